"""Rounding learned by signed gradient descent, as AutoRound does, layer by layer."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression, CompressionState, Pointwise
from compress_jax.core.types import Params, Step
from compress_jax.layerwise._problem import MatrixForm, Problem
from compress_jax.layerwise._solve import HIGHEST, Solved, layerwise, neighbours
from compress_jax.trace import Calibration


def signround(
    params: Params,
    calibration: Calibration,
    compression: Compression,
    state: CompressionState | None = None,
    *,
    steps: int = 200,
    rate: float | None = None,
    held_out: Calibration | None = None,
) -> Solved:
    r"""Shift weights by less than half a step before they are rounded, by the sign of the output error's gradient.

    :math:`\hat w = Q(w + V g)`, g being the gap between the two levels around w and :math:`V \in [-1/2, 1/2]` starting at 0,
    :math:`V \leftarrow V - \eta_t \, sign(G (\hat w - w))` with the straight-through gradient of the error of a layer's
    outputs, :math:`tr((\hat w - w)^\top G (\hat w - w))`, G the mean of :math:`x x^\top` over all
    calibration data. The rate falls linearly to zero. For each column of weights the best of all
    steps is kept, rounding to nearest being the first, so none is worse than that.

    AutoRound descends on the outputs of whole blocks and learns ranges too; this is its descent on
    single layers with the ranges of ``state``.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      compression: what the weights are to be seen through.
      state: its state; by default that of `init` once the compression is bound to the layouts the
        calibrated sites tell.
      steps: of the descent.
      rate: the first :math:`\eta`; by default ``1 / steps``, with which V can just reach 1/2.
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
      >>> solved = signround(params, seen, uniform(bits=3, granularity="channel"))
      >>> nearest = uniform(bits=3, granularity="channel").view(params, solved.state)
      >>> error = lambda p: output_error(params["kernel"], p["kernel"], x.T @ x / 256)
      >>> bool(error(solved.params) < 0.7 * error(nearest))
      True

    References:
      Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent", 2024, arXiv:2309.05516,
      section 3.
    """

    def solve(path: str, x: jax.Array, how: Pointwise, problem: Problem) -> tuple[jax.Array, None]:
        return _solve(
            x, how.operands, problem.gram, problem.form, how.see, steps, rate or 1 / steps
        ), None

    return layerwise(params, calibration, compression, state, solve, held_out)


@partial(jax.jit, static_argnames=("form", "see", "steps", "rate"))
def _solve(
    x: jax.Array,
    operands: Sequence[jax.Array],
    gram: jax.Array,
    form: MatrixForm,
    see: Callable[..., Any],
    steps: int,
    rate: float,
) -> jax.Array:
    w, operands = form.matrices(x.astype(jnp.float32)), [form.matrices(each) for each in operands]
    low, high = neighbours(w, see, operands)
    gap = high - low

    def turn(step: Step, carry: Any) -> Any:
        v, best, lowest = carry
        rounded = see(w + v * gap, *operands)
        slope = jnp.einsum("bkl,bln->bkn", gram, rounded - w, precision=HIGHEST)
        error = (slope * (rounded - w)).sum(1)
        best = jnp.where((error < lowest)[:, None], rounded, best)
        v = jnp.clip(v - rate * (1 - step / steps) * jnp.sign(slope), -0.5, 0.5)
        return v, best, jnp.minimum(error, lowest)

    start = jnp.zeros_like(w), see(w, *operands), jnp.full((w.shape[0], w.shape[2]), jnp.inf)
    _, best, _ = jax.lax.fori_loop(0, steps + 1, turn, start)
    return form.stored(best).astype(x.dtype)
