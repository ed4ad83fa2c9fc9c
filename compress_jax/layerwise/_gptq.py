"""GPTQ: round one input at a time and compensate the error in the remaining inputs."""

from collections.abc import Sequence
from functools import partial

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
from compress_jax.layerwise._result import Rewritten
from compress_jax.layerwise._solve import QuantizeFn, solve_leaves
from compress_jax.trace._statistics.calibration import Calibration


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
) -> Rewritten:
    r"""Round weights so that the layers' outputs stay close, by second-order error compensation.

    With :math:`H = 2 X^\top X / m + \lambda I` and the upper Cholesky factor U of its inverse, each
    input i in turn is rounded to :math:`q_i`, and
    :math:`w_{j} \mathrel{-}= U_{ij} (w_i - q_i) / U_{ii}` for all j > i. The same is computed with
    :math:`A = U^{-1}`, hence :math:`A A^\top = H`, and without an inverse: input j is rounded at
    :math:`w_j + \sum_{i < j} A_{ij} (w_i - q_i) / A_{jj}`, w being the original weights.

    The scales (and masks, in a chain) are those of the compression's state. Any grid, floating
    format or granularity that rounds weights entry by entry will do. Solved are the kernels of all
    calibrated sites: dense, einsum, attention projections, convolutions, experts, and scanned
    layers, one after the other by one compiled program.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      compression: the grid or format to round to.
      state: its state; by default that of `init` once the compression is bound to the layouts of
        the calibrated sites.
      damping: :math:`\lambda` as a share of the mean of H's diagonal. If H cannot be factored it is
        raised tenfold, up to five times; a note says so.
      block: inputs after which the error is passed on to all that remain.
      act_order: take inputs in the order of H's diagonal, the largest first.
      held_out: statistics of other batches. A layer for which rounding to nearest is better there
        is rounded to nearest; by default the calibration decides.

    Returns:
      ``Rewritten``, exact under the compression. Leaves without calibration are rounded to nearest
      and listed. So are, with a note, weights of inputs that were always zero, experts and branches
      that calibration did not reach, and layers for which the solution is no better.

    Raises:
      NonFiniteError: if calibration or weights are not finite.

    Example:
      >>> import compress_jax as cj
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> x = jax.random.normal(keys[0], (256, 8)) @ jax.random.normal(keys[1], (8, 8))
      >>> params = {"kernel": jax.random.normal(keys[2], (8, 4))}
      >>> seen = cj.trace.calibrate(lambda p, x: x @ p["kernel"], cj.trace.gram(), params, [x])
      >>> int3 = cj.quantize.uniform(bits=3, granularity="channel")
      >>> solved = cj.quantize.gptq(params, seen, int3)
      >>> nearest = cj.quantize.uniform(bits=3, granularity="channel").view(params, solved.state)
      >>> error = lambda p: cj.quantize.output_error(params["kernel"], p["kernel"], x.T @ x / 256)
      >>> bool(error(solved.params) < 0.7 * error(nearest))
      True

    References:
      Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ", 2023, arXiv:2210.17323, algorithm 1. Chen et
      al., "The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm", 2025,
      arXiv:2507.18553.
    """

    def solve(
        path: str, x: jax.Array, pointwise: Pointwise, problem: Problem
    ) -> tuple[jax.Array, str | None]:
        return _solve_leaf(path, x, pointwise, problem, damping, block, act_order)

    return solve_leaves(params, calibration, compression, state, solve, held_out)


def _solve_leaf(
    path: str,
    x: jax.Array,
    pointwise: Pointwise,
    problem: Problem,
    damping: float,
    block: int,
    act_order: bool,
) -> tuple[jax.Array, str | None]:
    """Solve one leaf. A matrix whose Hessian no damping mends keeps its weights, with a note."""
    form = problem.form

    def attempt(damping: float) -> tuple[jax.Array, jax.Array]:
        return _solve(
            x, pointwise.operands, problem.gram, damping, form, pointwise.fn, block, act_order
        )

    unsolved = form.matrices(x.astype(jnp.float32))  # [batch, k, n]
    solved, failed, notes = raise_damping(attempt, unsolved, damping)
    if failed.any():
        names = problem.names(path)
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
    size = min(block, k)  # a block of more rows than there are would only be padding
    if not act_order:
        factor, factored = damped_factor(gram, damping, k)
        return by_blocks(Block(w, factor, operands), quantize_block, size)[0], factored
    # Inputs of large second moment first: their errors have the most others left to absorb them.
    order = jnp.argsort(-jnp.diagonal(gram), stable=True)  # [k]
    factor, factored = damped_factor(gram, damping, k, order)
    rows = Block(w[order], factor, [each[order] for each in operands])
    quantized, _ = by_blocks(rows, quantize_block, size)
    return jnp.zeros_like(quantized).at[order].set(quantized), factored  # back in w's order
