"""GPTQ: round one input at a time and let the inputs that are left make up for the error."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.compression import Compression, CompressionState, Pointwise
from compress_jax.core.types import Params, Scalar
from compress_jax.layerwise._error_feedback import (
    Block,
    by_blocks,
    by_rows,
    damped_factor,
    each_matrix,
    raise_damping,
)
from compress_jax.layerwise._problem import MatrixForm, Problem, listed
from compress_jax.layerwise._solve import Solved, layerwise
from compress_jax.trace import Calibration

QuantizeFn: TypeAlias = Callable[..., jax.Array]


def gptq(
    params: Params,
    calibration: Calibration,
    compression: Compression,
    state: CompressionState | None = None,
    *,
    damping: float = 0.01,
    block: int = 128,
    act_order: bool = False,
    held_out: Calibration | None = None,
) -> Solved:
    r"""Round weights so that the layers' outputs, not the weights, stay close, by second-order error compensation.

    With :math:`H = 2 X^\top X / m + \lambda I` and the upper Cholesky factor U of its inverse, each
    input i in turn is rounded to :math:`q_i`, and
    :math:`w_{j} \mathrel{-}= U_{ij} (w_i - q_i) / U_{ii}` for all j > i. This is computed as what
    it comes to with :math:`A = U^{-1}`, hence :math:`A A^\top = H`: input j is rounded at
    :math:`w_j + \sum_{i < j} A_{ij} (w_i - q_i) / A_{jj}`, w being the weights as they were; so
    nothing is ever inverted.

    The scales (and masks, in a chain) are those of the compression's state; any grid, floating
    format or granularity that sees weights entry by entry will do. All sites that `calibrate` saw:
    dense, einsum, attention projections, convolutions, experts, scanned layers, which are solved
    one after the other by one compiled program.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      compression: what the weights are to be seen through.
      state: its state; by default that of `init` once the compression is bound to the layouts the
        calibrated sites tell.
      damping: :math:`\lambda` as a share of the mean of H's diagonal. If H cannot be factored it is
        raised tenfold, up to five times; a note says so.
      block: inputs after which the error is carried to all that are left.
      act_order: take inputs in the order of falling H's diagonal.
      held_out: statistics of other batches: a layer that rounding to nearest serves better there is
        rounded to nearest; by default the calibration decides.

    Returns:
      ``Solved``: exact under the compression. Leaves without calibration are rounded to nearest and
      listed. So are, with a note, weights of inputs that were always zero, experts and branches
      that calibration did not reach, and layers that are not solved better.

    Raises:
      NonFiniteError: if calibration or weights are not finite.

    Example:
      >>> from compress_jax.quantize import output_error, uniform
      >>> from compress_jax.trace import calibrate, gram
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> x = jax.random.normal(keys[0], (256, 8)) @ jax.random.normal(keys[1], (8, 8))
      >>> params = {"kernel": jax.random.normal(keys[2], (8, 4))}
      >>> seen = calibrate(lambda p, x: x @ p["kernel"], gram(), params, [x])
      >>> solved = gptq(params, seen, uniform(bits=3, granularity="channel"))
      >>> nearest = uniform(bits=3, granularity="channel").view(params, solved.state)
      >>> error = lambda p: output_error(params["kernel"], p["kernel"], x.T @ x / 256)
      >>> bool(error(solved.params) < 0.7 * error(nearest))
      True

    References:
      Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ", 2023, arXiv:2210.17323, algorithm 1. Chen et
      al., "The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm", 2025,
      arXiv:2507.18553.
    """

    def solve(
        path: str, x: jax.Array, how: Pointwise, problem: Problem
    ) -> tuple[jax.Array, str | None]:
        return _leaf(problem.names(path), x, how, problem, damping, block, act_order)

    return layerwise(params, calibration, compression, state, solve, held_out)


def _leaf(
    names: list[str],
    x: jax.Array,
    how: Pointwise,
    problem: Problem,
    damping: float,
    block: int,
    act_order: bool,
) -> tuple[jax.Array, str | None]:
    """Solve one leaf; matrices that no damping lets be factored keep their weights, and a note says so."""
    form = problem.form

    def attempt(damping: float) -> tuple[jax.Array, jax.Array]:
        return _solve(x, how.operands, problem.gram, damping, form, how.see, block, act_order)

    unsolved = form.matrices(x.astype(jnp.float32))  # [batch, k, n]
    solved, failed, notes = raise_damping(attempt, unsolved, damping)
    if failed.any():
        which = listed([names[i] for i in np.flatnonzero(failed)])
        notes.append(f"no damping makes the Hessian positive definite of {which}")
    return form.stored(solved).astype(x.dtype), "; ".join(notes) or None


@partial(jax.jit, static_argnames=("form", "quantize_fn", "block", "act_order"))
def _solve(
    x: jax.Array,
    operands: Sequence[jax.Array],
    gram: jax.Array,
    damping: Scalar,
    form: MatrixForm,
    quantize_fn: QuantizeFn,
    block: int,
    act_order: bool,
) -> tuple[jax.Array, jax.Array]:
    """Solve all matrices of a leaf; return them, and which could be factored."""

    def solve(matrix: tuple[jax.Array, list[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _matrix(*matrix, damping, quantize_fn, block, act_order)

    w = form.matrices(x.astype(jnp.float32))  # [batch, k, n]
    return each_matrix(solve, (w, [form.matrices(each) for each in operands], gram))


def _matrix(
    w: jax.Array,
    operands: list[jax.Array],
    gram: jax.Array,
    damping: Scalar,
    quantize_fn: QuantizeFn,
    block: int,
    act_order: bool,
) -> tuple[jax.Array, jax.Array]:
    """Solve one matrix ``[k, n]``; tell whether its Hessian could be factored."""

    def quantize_row(row: jax.Array, operands: list[jax.Array]) -> jax.Array:
        return quantize_fn(row, *operands)

    def quantize_block(rows: Block) -> tuple[jax.Array, None]:
        return by_rows(rows, quantize_row), None

    k = len(w)
    size = min(block, k)
    if not act_order:
        factor, factored = damped_factor(gram, damping, k)
        return by_blocks(Block(w, factor, operands), quantize_block, size)[0], factored
    order = jnp.argsort(-jnp.diagonal(gram), stable=True)
    factor, factored = damped_factor(gram, damping, k, order)
    rows = Block(w[order], factor, [each[order] for each in operands])
    quantized, _ = by_blocks(rows, quantize_block, size)
    return jnp.zeros_like(quantized).at[order].set(quantized), factored
