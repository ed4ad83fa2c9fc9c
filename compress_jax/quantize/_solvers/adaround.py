"""AdaRound: learn for every weight whether it is rounded up or down."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from compress_jax.core.compression import Compression, CompressionState, Pointwise
from compress_jax.core.types import Params
from compress_jax.layerwise._problem import MatrixForm, Problem
from compress_jax.layerwise._solve import Solved, better, column_errors, layerwise, neighbours
from compress_jax.trace import Calibration

LOW, HIGH = (
    -0.1,
    1.1,
)  # the sigmoid is stretched to this range and clipped, so that it reaches 0 and 1


def adaround(
    params: Params,
    calibration: Calibration,
    compression: Compression,
    state: CompressionState | None = None,
    *,
    steps: int = 10_000,
    rate: float = 0.01,
    weight: float = 1.0,
    warmup: float = 0.2,
    beta: tuple[float, float] = (20.0, 2.0),
    held_out: Calibration | None = None,
) -> Solved:
    r"""Round every weight up or down, whichever keeps the layers' outputs close, by a continuous relaxation.

    With the levels :math:`w^- \le w \le w^+` and :math:`h(V) = clip(1.2\,\sigma(V) - 0.1, 0, 1)`,
    it descends by Adam

    .. math:: \frac{tr(\Delta^\top G \Delta)}{e} + \lambda \sum_i \bigl(1 - |2 h(V_i) - 1|^\beta\bigr), \quad
        \Delta = w^- + h(V) (w^+ - w^-) - w,

    G being the mean of :math:`x x^\top`, so that the first term is the exact error of a layer's
    outputs over all calibration data, and e the error per weight of rounding to nearest, so that
    :math:`\lambda` means the same for every layer. The second term is left out at first; then
    :math:`\beta` falls and drives every h to 0 or 1. A column of weights for which rounding to
    nearest turned out better is rounded to nearest.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      compression: what the weights are to be seen through.
      state: its state; by default that of `init` once the compression is bound to the layouts the
        calibrated sites tell.
      steps: of Adam.
      rate: of Adam.
      weight: :math:`\lambda`.
      warmup: the share of steps without the second term.
      beta: the first and the last :math:`\beta`.
      held_out: statistics of other batches: a layer that rounding to nearest serves better there is
        rounded to nearest; by default the calibration decides.

    Returns:
      ``Solved``: exact under the compression. Leaves without calibration are rounded to nearest and
      listed. So are, with a note, weights of inputs that were always zero, and experts and branches
      that calibration did not reach.

    Raises:
      NonFiniteError: if calibration or weights are not finite.

    Example:
      >>> from compress_jax.quantize import output_error, uniform
      >>> from compress_jax.trace import calibrate, gram
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> x = jax.random.normal(keys[0], (256, 8)) @ jax.random.normal(keys[1], (8, 8))
      >>> params = {"kernel": jax.random.normal(keys[2], (8, 4))}
      >>> seen = calibrate(lambda p, x: x @ p["kernel"], gram(), params, [x])
      >>> solved = adaround(params, seen, uniform(bits=3, granularity="channel"), steps=500)
      >>> nearest = uniform(bits=3, granularity="channel").view(params, solved.state)
      >>> error = lambda p: output_error(params["kernel"], p["kernel"], x.T @ x / 256)
      >>> bool(error(solved.params) < 0.7 * error(nearest))
      True

    References:
      Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
      arXiv:2004.10568, equations 21 to 25.
    """
    options = partial(_solve, steps=steps, rate=rate, weight=weight, warmup=warmup, beta=beta)

    def solve(path: str, x: jax.Array, how: Pointwise, problem: Problem) -> tuple[jax.Array, None]:
        with jax.numpy_dtype_promotion(
            "standard"
        ):  # optax mixes int32 counts and floats; strict callers may not
            return options(x, how.operands, problem.gram, problem.form, how.see), None

    return layerwise(params, calibration, compression, state, solve, held_out)


@partial(jax.jit, static_argnames=("form", "see", "steps", "rate", "weight", "warmup", "beta"))
def _solve(
    x: jax.Array,
    operands: Sequence[jax.Array],
    gram: jax.Array,
    form: MatrixForm,
    see: Callable[..., Any],
    steps: int,
    rate: float,
    weight: float,
    warmup: float,
    beta: tuple[float, float],
) -> jax.Array:
    w, operands = form.matrices(x.astype(jnp.float32)), [form.matrices(each) for each in operands]
    nearest = see(w, *operands)
    low, high = neighbours(w, see, operands)
    gap = high - low
    share = jnp.where(gap > 0, (w - low) / jnp.where(gap > 0, gap, 1), 0.0)
    unit = (
        column_errors(nearest - w, gram).mean(1) / form.k
    )  # of each matrix, so that a stack is solved as its layers
    unit = jnp.where(unit > 0, unit, 1.0)

    def loss(v: jax.Array, power: jax.Array, on: jax.Array) -> jax.Array:
        h = soft(v)
        even = jnp.abs(2 * h - 1)
        undecided = 1 - jnp.where(even > 0, even, 1e-6) ** power
        error = (column_errors(low + h * gap - w, gram).sum(1) / unit).sum()
        return error + weight * on * jnp.where(gap > 0, undecided, 0.0).sum()

    optimizer = optax.adam(rate)
    start = steps * warmup

    def turn(step: jax.Array, carry: Any) -> Any:
        v, memory = carry
        left = 1 - jnp.maximum(step - start, 0) / max(steps - start, 1)
        power = beta[1] + (beta[0] - beta[1]) * left
        updates, memory = optimizer.update(
            jax.grad(loss)(v, power, (step >= start).astype(jnp.float32)), memory
        )
        return optax.apply_updates(v, updates), memory

    v = inverse_soft(share)
    v, _ = jax.lax.fori_loop(0, steps, turn, (v, optimizer.init(v)))
    learned = jnp.where(soft(v) >= 0.5, high, low)  # pyright: ignore[reportArgumentType]
    return form.stored(better(w, gram, nearest, learned)).astype(x.dtype)


def soft(v: jax.Array) -> jax.Array:
    """Return the rectified sigmoid, ``clip(1.2 * sigmoid(v) - 0.1, 0, 1)``.

    Example:
      >>> soft(jnp.array([-9.0, 0.0, 9.0])).tolist()
      [0.0, 0.5, 1.0]
    """
    return jnp.clip(jax.nn.sigmoid(v) * (HIGH - LOW) + LOW, 0, 1)


def inverse_soft(h: jax.Array) -> jax.Array:
    """Return where the rectified sigmoid is ``h``.

    Example:
      >>> soft(inverse_soft(jnp.array([0.0, 0.25, 1.0]))).round(4).tolist()
      [0.0, 0.25, 1.0]
    """
    return jax.scipy.special.logit((h - LOW) / (HIGH - LOW))
