"""AdaRound: learn for every weight whether it is rounded up or down."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax

from compress_jax.core.compression import Compression, CompressionState, Pointwise
from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.types import Params
from compress_jax.layerwise._problem import MatrixForm, Problem, column_errors
from compress_jax.layerwise._result import Rewritten
from compress_jax.layerwise._solve import (
    QuantizeFn,
    better_columns,
    neighboring_levels,
    solve_leaves,
)
from compress_jax.trace._statistics.calibration import Calibration

# The sigmoid is stretched to this range and clipped, so that it reaches 0 and 1.
LOW = -0.1
HIGH = 1.1


@renamed_arguments(rate="learning_rate", weight="regularization")
def adaround(
    params: Params,
    calibration: Calibration,
    compression: Compression,
    state: CompressionState | None = None,
    *,
    steps: int = 10_000,
    learning_rate: float = 0.01,
    regularization: float = 1.0,
    warmup: float = 0.2,
    beta: tuple[float, float] = (20.0, 2.0),
    held_out: Calibration | None = None,
) -> Rewritten:
    r"""Round every weight up or down, whichever keeps the layers' outputs close.

    With the levels :math:`w^- \le w \le w^+` and :math:`h(V) = clip(1.2\,\sigma(V) - 0.1, 0, 1)`,
    Adam minimizes

    .. math:: \frac{tr(\Delta^\top G \Delta)}{e}
        + \lambda \sum_i \bigl(1 - |2 h(V_i) - 1|^\beta\bigr), \quad
        \Delta = w^- + h(V) (w^+ - w^-) - w.

    G is the mean of :math:`x x^\top`, so that the first term is the exact error of a layer's
    outputs over all calibration data; e is the error per weight of rounding to nearest, so that
    :math:`\lambda` means the same for every layer. During the warmup the second term is left out;
    then :math:`\beta` falls and drives every h to 0 or 1. A column of weights for which rounding
    to nearest turned out better is rounded to nearest.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      compression: the grid or format to round to.
      state: its state; by default that of `init` once the compression is bound to the layouts of
        the calibrated sites.
      steps: number of steps.
      learning_rate: Adam's.
      regularization: :math:`\lambda`.
      warmup: the fraction of steps without the second term.
      beta: the first and the last :math:`\beta`.
      held_out: statistics of other batches. A layer for which rounding to nearest is better there
        is rounded to nearest; by default the calibration decides.

    Returns:
      ``Rewritten``, exact under the compression. Leaves without calibration are rounded to nearest
      and listed. So are, with a note, weights of inputs that were always zero, and experts and
      branches that calibration did not reach.

    Raises:
      NonFiniteError: if calibration or weights are not finite.

    Example:
      >>> import compress_jax as cj
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> x = jax.random.normal(keys[0], (256, 8)) @ jax.random.normal(keys[1], (8, 8))
      >>> params = {"kernel": jax.random.normal(keys[2], (8, 4))}
      >>> seen = cj.trace.calibrate(lambda p, x: x @ p["kernel"], cj.trace.gram(), params, [x])
      >>> int3 = cj.quantize.uniform(bits=3, granularity="channel")
      >>> solved = cj.quantize.adaround(params, seen, int3, steps=500)
      >>> nearest = cj.quantize.uniform(bits=3, granularity="channel").view(params, solved.state)
      >>> error = lambda p: cj.quantize.output_error(params["kernel"], p["kernel"], x.T @ x / 256)
      >>> bool(error(solved.params) < 0.7 * error(nearest))
      True

    References:
      Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
      arXiv:2004.10568, equations 21 to 25.
    """
    solve_matrices = partial(
        _solve,
        steps=steps,
        learning_rate=learning_rate,
        regularization=regularization,
        warmup=warmup,
        beta=beta,
    )

    def solve(
        path: str, x: jax.Array, pointwise: Pointwise, problem: Problem
    ) -> tuple[jax.Array, None]:
        own = (pointwise.operands, problem.gram, problem.form, pointwise.fn)
        # optax mixes int32 counts and floats, which strict dtype promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            return solve_matrices(x, *own), None

    return solve_leaves(params, calibration, compression, state, solve, held_out)


@partial(
    jax.jit,
    static_argnames=(
        "form",
        "quantize_fn",
        "steps",
        "learning_rate",
        "regularization",
        "warmup",
        "beta",
    ),
)
def _solve(
    x: jax.Array,
    operands: Sequence[jax.Array],
    gram: jax.Array,
    form: MatrixForm,
    quantize_fn: QuantizeFn,
    steps: int,
    learning_rate: float,
    regularization: float,
    warmup: float,
    beta: tuple[float, float],
) -> jax.Array:
    """Solve all matrices of a leaf together; each has its own error unit, as if it were alone."""
    w = form.matrices(x.astype(jnp.float32))  # [batch, k, n]
    operands = [form.matrices(each) for each in operands]
    nearest = quantize_fn(w, *operands)
    low, high = neighboring_levels(w, quantize_fn, operands)
    gap = high - low  # 0 where w is a level or lies beyond the last: nothing to decide
    # The inner `where` keeps 0 / 0 out.
    fraction = jnp.where(gap > 0, (w - low) / jnp.where(gap > 0, gap, 1), 0.0)
    unit = column_errors(nearest - w, gram).mean(1) / form.k  # e, [batch]
    unit = jnp.where(unit > 0, unit, 1.0)

    def loss(v: jax.Array, power: jax.Array, active: jax.Array) -> jax.Array:
        h = soft(v)
        distance = jnp.abs(2 * h - 1)
        # A power below 1 has an infinite derivative at 0.
        undecided = 1 - jnp.where(distance > 0, distance, 1e-6) ** power
        error = (column_errors(low + h * gap - w, gram).sum(1) / unit).sum()
        return error + regularization * active * jnp.where(gap > 0, undecided, 0.0).sum()

    optimizer = optax.adam(learning_rate)
    start = steps * warmup

    def descend(
        step: jax.Array, carry: tuple[jax.Array, optax.OptState]
    ) -> tuple[jax.Array, optax.OptState]:
        v, optimizer_state = carry
        # After the warmup the second term is on, and its exponent falls linearly.
        remaining = 1 - jnp.maximum(step - start, 0) / max(steps - start, 1)
        power = beta[1] + (beta[0] - beta[1]) * remaining
        active = (step >= start).astype(jnp.float32)
        gradient = jax.grad(loss)(v, power, active)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return jnp.asarray(optax.apply_updates(v, updates)), optimizer_state

    v = inverse_soft(fraction)  # h(V) starts where w is between its levels: without error
    v, _ = jax.lax.fori_loop(0, steps, descend, (v, optimizer.init(v)))
    learned = jnp.where(soft(v) >= 0.5, high, low)
    return form.stored(better_columns(w, gram, nearest, learned)).astype(x.dtype)


def soft(v: jax.Array) -> jax.Array:
    """Return the rectified sigmoid, ``clip(1.2 * sigmoid(v) - 0.1, 0, 1)``.

    Example:
      >>> soft(jnp.array([-9.0, 0.0, 9.0])).tolist()
      [0.0, 0.5, 1.0]
    """
    return jnp.clip(jax.nn.sigmoid(v) * (HIGH - LOW) + LOW, 0, 1)


def inverse_soft(h: jax.Array) -> jax.Array:
    """Return the argument at which the rectified sigmoid is ``h``.

    Example:
      >>> soft(inverse_soft(jnp.array([0.0, 0.25, 1.0]))).round(4).tolist()
      [0.0, 0.25, 1.0]
    """
    return jax.scipy.special.logit((h - LOW) / (HIGH - LOW))
