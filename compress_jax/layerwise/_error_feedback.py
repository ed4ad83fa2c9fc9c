r"""Error feedback: the loop that GPTQ and SparseGPT share.

A layer's weights ``[k, n]`` are changed row by row (a row belongs to one input), and the remaining
rows compensate the error of those before. With the Hessian :math:`H = A A^\top` of the squared
output error, A upper triangular, and :math:`q_i` the new value of row :math:`w_i`, row j is
rounded or pruned at

.. math:: w_j + \frac{1}{A_{jj}} \sum_{i < j} A_{ij} (w_i - q_i). \qquad (1)

This equals the published updates :math:`w_j \mathrel{-}= U_{ij} (w_i - q_i) / U_{ii}` with
:math:`U = A^{-1}`, and nothing is inverted. The sum over earlier blocks is one matrix product a
block, that within a block one product a row.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from compress_jax.core.types import PyTree, Scalar

HIGHEST = jax.lax.Precision.HIGHEST
TILE = 1024  # at most so many earlier rows enter one product; later tiles are skipped
TRIES = 6
LEAST_DAMPING = 1e-4  # what a smaller damping counts as when it is raised

T = TypeVar("T")


class Block(NamedTuple):
    """Consecutive rows of a matrix, as they are when they are reached.

    Attributes:
      w: float32 ``[size, n]``, the weights before any compensation.
      factor: float32 ``[size, size]``, their block on the diagonal of A.
      operands: a tree of arrays ``[size, ...]`` that go along with the rows: scales, masks.
      pending: float32 ``[size, n]``, the sum in (1) over the rows before the block; None if it is
        the first.
      start: the index of the first row.
    """

    w: jax.Array
    factor: jax.Array
    operands: PyTree
    pending: jax.Array | None = None
    start: jax.Array | int = 0


def by_blocks(
    whole: Block, treat: Callable[[Block], tuple[jax.Array, PyTree]], size: int
) -> tuple[jax.Array, PyTree]:
    """Treat the rows of a matrix (or of a block of it) block by block.

    Args:
      whole: all rows.
      treat: ``Block -> (new rows [size, n], a tree of arrays [size, ...] to be collected)``.
      size: rows in a block. The last block is padded with copies of the last row.

    Returns:
      ``(new rows [k, n], collected [k, ...])``.

    Example:
      >>> block = Block(jnp.array([[0.4], [0.4], [0.4]]), jnp.triu(jnp.ones((3, 3))), None)
      >>> round_block = lambda each: (by_rows(each, lambda w, _: jnp.round(w)), None)
      >>> new, _ = by_blocks(block, round_block, size=2)
      >>> new.ravel().tolist()  # each row is rounded once the errors before it are added
      [0.0, 1.0, 0.0]
    """
    k = len(whole.w)
    tile = _tile(k, size)
    w, factor, operands, pending, _ = _padded(whole, -k % tile)

    def step(
        residuals: jax.Array, rows: tuple[jax.Array, jax.Array, PyTree, jax.Array | None]
    ) -> tuple[jax.Array, tuple[jax.Array, PyTree]]:
        start, w, operands, pending = rows
        columns = jax.lax.dynamic_slice_in_dim(factor, start, size, axis=1)  # [k, size]
        pending = _add_earlier(pending, columns, residuals, start, tile)  # [size, n]
        corner = jax.lax.dynamic_slice_in_dim(columns, start, size)  # [size, size]
        new, collected = treat(Block(w, corner, operands, pending, start))
        residuals = jax.lax.dynamic_update_slice_in_dim(residuals, w - new, start, 0)
        return residuals, (new, collected)

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(-1, size, *x.shape[1:])  # [blocks, size, ...]

    starts = jnp.arange(0, len(w), size)
    w_blocks, operand_blocks, pending_blocks = jax.tree.map(cut, (w, operands, pending))
    blocks = (starts, w_blocks, operand_blocks, pending_blocks)
    _, results = jax.lax.scan(step, jnp.zeros_like(w), blocks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:k], results)  # [k, ...]


def by_rows(block: Block, treat: Callable[[jax.Array, PyTree], jax.Array]) -> jax.Array:
    """Treat the rows of a block one after the other.

    Each row gathers the errors of the rows before it, which reads them. Passing each row's error on
    at once, as published, would rewrite the whole block every time.

    Args:
      block: the rows.
      treat: ``(compensated row [n], its operands) -> new row [n]``.

    Returns:
      The new rows ``[size, n]``.

    Example:
      >>> block = Block(jnp.array([[0.4], [0.4]]), jnp.array([[1.0, 1.0], [0.0, 1.0]]), None)
      >>> by_rows(block, lambda w, _: jnp.round(w)).tolist()
      [[0.0], [1.0]]
    """
    pending = jnp.zeros_like(block.w) if block.pending is None else block.pending

    def step(
        residuals: jax.Array,
        row: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, PyTree],
    ) -> tuple[jax.Array, jax.Array]:
        i, w, pending, column, inverse, operands = row
        # Row i absorbs the errors of the rows treated before it (eq. 1), then is treated itself.
        correction = pending + jnp.matmul(column, residuals, precision=HIGHEST)  # [n]
        new = treat(w + correction * inverse, operands)  # [n]
        residuals = jax.lax.dynamic_update_index_in_dim(residuals, w - new, i, 0)
        return residuals, new

    inverses = 1 / jnp.diagonal(block.factor)
    rows = (jnp.arange(len(block.w)), block.w, pending, block.factor.T, inverses, block.operands)
    _, new = jax.lax.scan(step, jnp.zeros_like(block.w), rows)
    return new


def _tile(k: int, size: int) -> int:
    """Return how many rows enter one product: a multiple of ``size``, all tiles equally long."""
    tiles = -(-k // max(size, TILE))
    return -(-k // (tiles * size)) * size


def _padded(whole: Block, rows: int) -> Block:
    """Append independent rows: copies of the last one, with 1 on the factor's diagonal."""
    if rows == 0:
        return whole

    def extend(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, rows),) + ((0, 0),) * (x.ndim - 1), mode="edge")

    w, operands, pending = jax.tree.map(extend, (whole.w, whole.operands, whole.pending))
    factor = jax.scipy.linalg.block_diag(whole.factor, jnp.eye(rows, dtype=whole.factor.dtype))
    return Block(w, factor, operands, pending, whole.start)


def _add_earlier(
    pending: jax.Array | None, columns: jax.Array, residuals: jax.Array, start: jax.Array, tile: int
) -> jax.Array:
    """Add the sum in (1) over all rows before ``start``; those behind it have residual 0."""
    first = jnp.zeros((columns.shape[1], residuals.shape[1])) if pending is None else pending

    def add(i: jax.Array | int, total: jax.Array) -> jax.Array:
        factor = jax.lax.dynamic_slice_in_dim(columns, i * tile, tile)  # [tile, size]
        earlier = jax.lax.dynamic_slice_in_dim(residuals, i * tile, tile)  # [tile, n]
        return total + jnp.matmul(factor.T, earlier, precision=HIGHEST)

    # One tile needs no loop; of several, those behind ``start`` are skipped.
    if len(residuals) == tile:
        return add(0, first)
    return jax.lax.fori_loop(0, -(-start // tile), add, first)


def each_matrix(solve: Callable[[T], PyTree], matrices: T) -> PyTree:
    """Solve the matrices of a stack, one after the other by one compiled program.

    Args:
      solve: takes a tree of arrays of one matrix and returns another.
      matrices: the tree, its arrays with a leading axis ``[batch, ...]``.

    Returns:
      Its results, with the same leading axis.
    """
    if len(jax.tree.leaves(matrices)[0]) > 1:
        return jax.lax.map(solve, matrices)
    return jax.tree.map(lambda y: y[None], solve(jax.tree.map(lambda x: x[0], matrices)))


def raise_damping(
    solve: Callable[[float], tuple[T, jax.Array]], unsolved: T, damping: float
) -> tuple[T, jax.Array, list[str]]:
    """Solve a stack of matrices, again with more damping where the Hessian cannot be factored.

    Args:
      solve: ``damping -> (tree of arrays [batch, k, n], factored)``, the latter bool ``[batch]``.
      unsolved: what stands for matrices that no damping serves.
      damping: the first; it is raised tenfold, up to five times.

    Returns:
      ``(solutions, failed, notes)``: failed is bool ``[batch]``, notes say how far damping was
      raised.

    Example:
      >>> attempts = lambda damping: (jnp.full((1, 1, 1), damping), jnp.array([damping > 0.05]))
      >>> solution, failed, notes = raise_damping(attempts, jnp.zeros((1, 1, 1)), 0.01)
      >>> failed.tolist(), notes
      ([False], ['damping was raised from 0.01 to 0.1 to factor the Hessian'])
    """
    solutions = unsolved
    failed = jnp.ones(len(jax.tree.leaves(unsolved)[0]), bool)
    used = damping
    for attempt in range(TRIES):
        if attempt:
            used = max(damping, LEAST_DAMPING) * 10**attempt
        new, factored = solve(used)
        # Only matrices that have failed so far take the new solution: others keep less damping.
        solved = (failed & factored)[:, None, None]
        solutions = jax.tree.map(
            lambda a, b, solved=solved: jnp.where(solved, a, b), new, solutions
        )
        failed = failed & ~factored
        if not failed.any():
            break
    raised = f"damping was raised from {damping:g} to {used:g} to factor the Hessian"
    return solutions, failed, [raised] if used != damping else []


def damped_factor(
    gram: jax.Array, damping: Scalar, inputs: int, order: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Factor the damped Hessian of one matrix.

    Args:
      gram: ``[k, k]``, the mean of x x^T over calibration rows.
      damping: see `damped_hessian`.
      inputs: how many of the k there are; others are padding, which is always zero.
      order: a permutation ``[k]`` in which the inputs are taken.

    Returns:
      ``(A [k, k], succeeded)``; A is NaN if the Hessian is not positive definite.
    """
    hessian = damped_hessian(gram, damping, inputs)
    if order is not None:
        hessian = hessian[order][:, order]
    factor = upper_factor(hessian)
    return factor, jnp.isfinite(jnp.diagonal(factor)).all()


def damped_hessian(gram: jax.Array, damping: Scalar, inputs: int) -> jax.Array:
    r"""Return :math:`H = 2 G + \lambda I`.

    Inputs that were always zero are independent of the others, with 1 on the diagonal.

    Args:
      gram: ``[k, k]``, the mean of x x^T over calibration rows.
      damping: :math:`\lambda` as a share of the mean of the diagonal of ``2 G``.
      inputs: how many of the k there are; others are padding, which is always zero.

    Returns:
      ``[k, k]``.

    Example:
      >>> damped_hessian(jnp.diag(jnp.array([1.0, 0.0])), jnp.float32(0.5), 2).tolist()
      [[2.5, 0.0], [0.0, 1.0]]
    """
    diagonal = 2 * jnp.diagonal(gram)  # [k]
    added = jnp.where(diagonal == 0, 1.0, damping * diagonal.sum() / inputs)  # [k]
    return jnp.where(jnp.eye(len(gram), dtype=bool), 2 * gram + added[None], 2 * gram)


def upper_factor(h: jax.Array) -> jax.Array:
    r"""Return the upper triangular A with :math:`A A^\top = H`.

    It is the Cholesky factor of H read backwards. Its inverse is the upper Cholesky factor of
    :math:`H^{-1}`.

    Args:
      h: symmetric positive definite ``[k, k]``.

    Returns:
      ``[k, k]``; NaN if ``h`` is not positive definite.

    Example:
      >>> a = upper_factor(jnp.array([[5.0, 2.0], [2.0, 1.0]]))
      >>> a.tolist(), (a @ a.T).tolist()
      ([[1.0, 2.0], [0.0, 1.0]], [[5.0, 2.0], [2.0, 1.0]])
    """
    return jax.lax.linalg.cholesky(h[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]
