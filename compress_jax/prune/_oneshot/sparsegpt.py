"""SparseGPT: prune block by block and compensate the error in the remaining inputs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.amount import amount_exact
from compress_jax.core.compression import Compression
from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.exact import Int64
from compress_jax.core.paths import Patterns
from compress_jax.core.types import Params, PyTree, Scalar
from compress_jax.layerwise._error_feedback import (
    Block,
    by_blocks,
    by_rows,
    damped_factor,
    each_matrix,
    raise_damping,
)
from compress_jax.layerwise._problem import MatrixForm
from compress_jax.layerwise._result import Rewritten
from compress_jax.prune._masks.select import largest_of_each, magnitude_bits, smallest_by
from compress_jax.prune._masks.structures import NofM
from compress_jax.prune._masks.target import Sparsity
from compress_jax.prune._oneshot.layer import Leaf, Method, Solution
from compress_jax.prune._oneshot.post_training import prune
from compress_jax.trace._statistics.calibration import Calibration


@renamed_arguments(where="pattern")
def sparsegpt(
    params: Params,
    calibration: Calibration,
    sparsity: Sparsity | None,
    structure: NofM | None = None,
    *,
    pattern: Patterns = "**",
    quantizer: Compression | None = None,
    damping: float = 0.01,
    block: int = 128,
    held_out: Calibration | None = None,
) -> Rewritten:
    r"""Prune a trained model in one shot so that the layers' outputs stay close.

    With :math:`H = 2 X^\top X / m + \lambda I` and the upper Cholesky factor U of its inverse,
    inputs are taken in blocks. Of each block, the weights of smallest
    :math:`w_{ij}^2 / U_{ii}^2` over all outputs are pruned. Then each input i in turn becomes
    :math:`q_i` (zero, or the weight, or with a quantizer the rounded weight), and
    :math:`w_j \mathrel{-}= U_{ij} (w_i - q_i) / U_{ii}` for all j > i, which changes the remaining
    weights. The mask of an n:m group is chosen when the group is reached. Computed from
    :math:`A = U^{-1}`, hence :math:`A A^\top = H`: nothing is inverted.

    Pruned are the kernels of all calibrated sites: dense, einsum, attention projections,
    convolutions, experts, scanned layers. After one calibration, every layer is solved for the
    inputs that it had before the others were pruned. To go layer by layer, as the paper does,
    calibrate and solve with one ``pattern`` after the other.

    An input that was always zero counts as an average one, so that its weights are pruned by
    magnitude, as are those of experts and branches that calibration did not reach: calibration does
    not show whether they matter. A layer whose outputs are no better than after pruning its
    smallest weights is pruned by magnitude. Notes say where.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      sparsity: the fraction of each matrix to prune, met exactly (blocks share the rounding); or
        ``{glob: fraction}``, where leaves that no glob matches are left alone; of a schedule, its
        value at step 0. None with `n_m`.
      structure: `n_m`, or None for single weights. Groups run along the axes that a site sums over.
      pattern: globs of the leaves to prune. With ``"**/kernel"`` embeddings that are also the last
        layer are left alone.
      quantizer: a grid, floating format or granularity that rounds weights entry by entry; the
        remaining weights are rounded in the same pass. Leaves that only it covers are rounded as by
        GPTQ if calibrated, else to nearest.
      damping: :math:`\lambda` as a share of the mean of H's diagonal. If H cannot be factored it is
        raised tenfold, up to five times; a note says so.
      block: inputs whose masks are chosen together; with n:m groups it only affects speed.
      held_out: statistics of other batches, by which layers are compared with pruning by magnitude;
        by default the calibration's.

    Returns:
      ``Rewritten``: its ``compression`` holds the masks.

    Raises:
      ConfigError: for a structure other than n:m, or a quantizer that cannot be used.
      NonFiniteError: if calibration or weights are not finite.

    Example:
      >>> import compress_jax as cj
      >>> rng = np.random.default_rng(0)
      >>> x = jnp.asarray(rng.normal(size=(256, 64)) @ rng.normal(size=(64, 64)), jnp.float32)
      >>> params = {"kernel": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)}
      >>> fn = lambda p, x: x @ p["kernel"]
      >>> seen = cj.trace.calibrate(fn, cj.trace.gram(), params, [x])
      >>> solved = cj.prune.sparsegpt(params, seen, 0.5)
      >>> smallest = cj.prune.magnitude(0.5).view(params, cj.prune.magnitude(0.5).init(params))
      >>> error = lambda p: jnp.square(fn(p, x) - fn(params, x)).mean()
      >>> int((solved.params["kernel"] == 0).sum()), bool(error(solved.params) < error(smallest))
      (1024, True)

    References:
      Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
      One-Shot", 2023, arXiv:2301.00774, algorithm 1; section 3.5 for joint quantization.
    """
    method = Method(lambda leaf: _solve_leaf(leaf, damping, block), "matrix", True)
    return prune(params, calibration, sparsity, structure, pattern, quantizer, method, held_out)


def _solve_leaf(leaf: Leaf, damping: float, block: int) -> Solution:
    """Solve one leaf, except matrices whose Hessian no damping mends."""
    form = leaf.problem.form
    m = leaf.groups.m if leaf.groups else 1
    block = max(min(block, form.k + -form.k % m) // m, 1) * m  # whole groups
    rows, note = leaf.rows(block)
    plan = Plan(form, block, leaf.groups and (leaf.groups.n, m), leaf.rounding.fn)
    counts = _counts(leaf, block, len(rows))

    def attempt(damping: float) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        gram = leaf.problem.gram
        return _solve(leaf.x, leaf.rounding.operands, gram, damping, rows, counts, plan)

    # A matrix that cannot be solved keeps its weights; the caller prunes it by magnitude.
    w = form.matrices(leaf.x.astype(jnp.float32))  # [batch, k, n]
    unsolved = (w, jnp.ones(w.shape, bool))
    (solved, masks), failed, raised = raise_damping(attempt, unsolved, damping)
    notes = [note, *raised] if note else raised
    x = form.stored(solved).astype(leaf.x.dtype)
    return Solution(x, form.stored(masks), "; ".join(notes), failed)


def _counts(leaf: Leaf, block: int, rows: int) -> np.ndarray:
    """Return how many weights each block prunes.

    The sums up to each block are rounded, so that the total is exact.
    """
    form = leaf.problem.form
    outputs = leaf.x.size // (form.batch * form.groups * form.k)
    ends = [min(start, form.k) * outputs for start in range(0, rows + 1, block)]
    return np.diff([amount_exact(leaf.share, end) for end in ends]).astype(np.uint32)


class Plan(NamedTuple):
    """The static options that one program is compiled for.

    Attributes:
      form: how the leaf becomes matrices.
      block: inputs in a block.
      groups: ``(n, m)``, or None.
      quantize_fn: rounds weights, given their operands.
    """

    form: MatrixForm
    block: int
    groups: tuple[int, int] | None
    quantize_fn: Callable[..., jax.Array]


@partial(jax.jit, static_argnames="plan")
def _solve(
    x: jax.Array,
    operands: Sequence[jax.Array],
    gram: jax.Array,
    damping: Scalar,
    rows: jax.Array,
    counts: jax.Array,
    plan: Plan,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Solve all matrices of a leaf; return ``((weights, masks), factored)``."""

    def solve(matrix: tuple[jax.Array, list[jax.Array], jax.Array]) -> PyTree:
        return _matrix(*matrix, damping, rows, counts, plan)

    w = plan.form.matrices(x.astype(jnp.float32))  # [batch, k, n]
    return each_matrix(solve, (w, [plan.form.matrices(each) for each in operands], gram))


def _matrix(
    w: jax.Array,
    operands: list[jax.Array],
    gram: jax.Array,
    damping: Scalar,
    rows: jax.Array,
    counts: jax.Array,
    plan: Plan,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Solve one matrix ``[k, n]``, its inputs taken in the order of ``rows``."""

    def take(x: jax.Array) -> jax.Array:
        return x.at[rows].get(mode="fill", fill_value=0)  # zeros for padding

    def put(x: jax.Array) -> jax.Array:
        return jnp.zeros(w.shape, x.dtype).at[rows].set(x, mode="drop")

    factor, factored = damped_factor(take(take(gram).T), damping, len(w))
    ordered = Block(take(w), factor, (rows < len(w), [take(each) for each in operands]))
    prune = _prune_unit if plan.groups is None else _prune_groups
    new, mask = by_blocks(ordered, partial(prune, counts=counts, plan=plan), plan.block)
    return (put(new), put(mask)), factored


def _prune_groups(block: Block, counts: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Prune the n:m groups of a block, each when it is reached."""
    assert plan.groups is not None
    return by_blocks(block, partial(_prune_unit, counts=counts, plan=plan), plan.groups[1])


def _prune_unit(unit: Block, counts: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Choose the mask of rows by their compensated weights, then prune and quantize them."""
    assert unit.pending is not None
    real, operands = unit.operands
    # The rows before any of them is pruned are w + A^-T p, p being what earlier rows left pending.
    moved = jax.lax.linalg.triangular_solve(unit.factor.T, unit.pending, left_side=True, lower=True)
    score = jnp.abs((unit.w + moved) * jnp.diagonal(unit.factor)[:, None])  # |w_ij| / U_ii
    # The mask is that of the compensated weights of this block, over all outputs together.
    if plan.groups is None:
        number = Int64(jnp.uint32(0), counts[unit.start // plan.block])
        keys = [(score, jnp.broadcast_to(real[:, None], score.shape))]
        mask = ~smallest_by(_key, keys, number)[0]
    else:
        # Padding has key 0, below every weight, so it is never kept in place of one.
        bits = jnp.where(real[:, None], magnitude_bits(score) + 1, 0)
        mask = largest_of_each(bits, *plan.groups, (0,))

    def prune_row(row: jax.Array, own: tuple[jax.Array, list[jax.Array]]) -> jax.Array:
        keep, operands = own
        return plan.quantize_fn(jnp.where(keep, row, 0.0), *operands)

    return by_rows(unit._replace(operands=(mask, operands)), prune_row), mask


def _key(score: jax.Array, real: jax.Array) -> jax.Array:
    """Return magnitudes in an order of integers, padding as the largest."""
    return jnp.where(real, magnitude_bits(score), jnp.uint32(2**32 - 1))
