"""Rounding learned by signed gradient descent, as AutoRound does, layer by layer."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression, CompressionState, Pointwise
from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.types import Params, Step
from compress_jax.layerwise._problem import MatrixForm, Problem
from compress_jax.layerwise._result import Rewritten
from compress_jax.layerwise._solve import HIGHEST, QuantizeFn, neighboring_levels, solve_leaves
from compress_jax.trace._statistics.calibration import Calibration


@renamed_arguments(rate="learning_rate")
def signround(
    params: Params,
    calibration: Calibration,
    compression: Compression,
    state: CompressionState | None = None,
    *,
    steps: int = 200,
    learning_rate: float | None = None,
    held_out: Calibration | None = None,
) -> Rewritten:
    r"""Learn shifts of weights by less than half a step before they are rounded.

    Weights become :math:`\hat w = Q(w + V g)`, g being the gap between the two levels around w,
    and :math:`V \in [-1/2, 1/2]` starts at 0 and follows signs of gradients,

    .. math:: V \leftarrow V - \eta_t \, sign(G (\hat w - w)),

    the straight-through gradient of the error of a layer's outputs,
    :math:`tr((\hat w - w)^\top G (\hat w - w))`, G being the mean of :math:`x x^\top` over all
    calibration data. The learning rate falls linearly to zero. Each column of weights takes the
    best of all steps, the first of which is rounding to nearest, so none is worse than that.

    AutoRound minimizes the error of whole blocks and learns ranges too. This is its descent on
    single layers with the ranges of ``state``.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      compression: the grid or format to round to.
      state: its state; by default that of `init` once the compression is bound to the layouts of
        the calibrated sites.
      steps: number of steps.
      learning_rate: the first :math:`\eta`; by default ``1 / steps``, with which V can just reach
        1/2.
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
      >>> solved = cj.quantize.signround(params, seen, int3)
      >>> nearest = cj.quantize.uniform(bits=3, granularity="channel").view(params, solved.state)
      >>> error = lambda p: cj.quantize.output_error(params["kernel"], p["kernel"], x.T @ x / 256)
      >>> bool(error(solved.params) < 0.7 * error(nearest))
      True

    References:
      Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent", 2024, arXiv:2309.05516,
      section 3.
    """

    def solve(
        path: str, x: jax.Array, pointwise: Pointwise, problem: Problem
    ) -> tuple[jax.Array, None]:
        own = (pointwise.operands, problem.gram, problem.form, pointwise.fn)
        return _solve(x, *own, steps, learning_rate or 1 / steps), None

    return solve_leaves(params, calibration, compression, state, solve, held_out)


@partial(jax.jit, static_argnames=("form", "quantize_fn", "steps", "learning_rate"))
def _solve(
    x: jax.Array,
    operands: Sequence[jax.Array],
    gram: jax.Array,
    form: MatrixForm,
    quantize_fn: QuantizeFn,
    steps: int,
    learning_rate: float,
) -> jax.Array:
    """Solve all matrices of a leaf together; columns are independent of each other."""
    w = form.matrices(x.astype(jnp.float32))  # [batch, k, n]
    operands = [form.matrices(each) for each in operands]
    low, high = neighboring_levels(w, quantize_fn, operands)
    gap = high - low

    def descend(step: Step, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        v, best, lowest = carry
        # At v = 0, the first step, this is rounding to nearest.
        rounded = quantize_fn(w + v * gap, *operands)
        delta = rounded - w
        # Half the gradient of the error; it also gives the error itself.
        gradient = jnp.einsum("bkl,bln->bkn", gram, delta, precision=HIGHEST)
        error = (gradient * delta).sum(1)  # [batch, n]
        best = jnp.where((error < lowest)[:, None], rounded, best)
        v = jnp.clip(v - learning_rate * (1 - step / steps) * jnp.sign(gradient), -0.5, 0.5)
        return v, best, jnp.minimum(error, lowest)

    lowest = jnp.full((w.shape[0], w.shape[2]), jnp.inf)  # [batch, n]
    start = (jnp.zeros_like(w), quantize_fn(w, *operands), lowest)
    # One iteration more than steps, as an iteration judges what the one before has made.
    _, best, _ = jax.lax.fori_loop(0, steps + 1, descend, start)
    return form.stored(best).astype(x.dtype)
