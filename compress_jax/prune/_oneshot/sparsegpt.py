"""SparseGPT: prune block by block and let the inputs that are left make up for what was lost."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.amount import amount_exact
from compress_jax.core.compression import Compression
from compress_jax.core.exact import Int64
from compress_jax.core.paths import Patterns
from compress_jax.core.types import Params
from compress_jax.layerwise._problem import MatrixForm, damped_hessian, upper_factor
from compress_jax.prune._masks.select import largest_of_each, magnitude_bits, smallest_by
from compress_jax.prune._masks.structures import NofM
from compress_jax.prune._masks.target import Sparsity
from compress_jax.prune._oneshot.layer import Leaf, Method, Solution
from compress_jax.prune._oneshot.post_training import Pruned, prune
from compress_jax.trace import Calibration

HIGHEST = jax.lax.Precision.HIGHEST
TRIES, LEAST = 6, 1e-4


def sparsegpt(
    params: Params,
    calibration: Calibration,
    sparsity: Sparsity | None,
    structure: NofM | None = None,
    *,
    where: Patterns = "**",
    quantizer: Compression | None = None,
    damping: float = 0.01,
    block: int = 128,
    held_out: Calibration | None = None,
) -> Pruned:
    r"""Prune a trained model in one shot so that the layers' outputs, not the weights, stay close.

    With :math:`H = 2 X^\top X / m + \lambda I` and the upper Cholesky factor U of its inverse,
    inputs are taken in blocks. When a block's turn comes, its weights of smallest
    :math:`w_{ij}^2 / U_{ii}^2` over all outputs are pruned; then each input i in turn becomes
    :math:`q_i` (zero, or the weight, or with a quantizer the weight rounded), and
    :math:`w_j \mathrel{-}= U_{ij} (w_i - q_i) / U_{ii}` for all j > i, which moves the weights that
    are kept. Of n:m groups, each is chosen when its own turn comes. Computed from
    :math:`A = U^{-1}`, hence :math:`A A^\top = H`: nothing is inverted.

    All sites that `calibrate` saw: dense, einsum, attention projections, convolutions, experts,
    scanned layers. Calibrated once, every layer answers for the inputs it had before the others
    were pruned; to go layer by layer, as the paper does, calibrate and solve with one ``where``
    after the other.

    An input that was always zero counts as an average one, so that its weights are pruned by
    magnitude, as are those of experts and branches that calibration did not reach: nothing is known
    of either, which is not to say that they do not matter. A layer whose outputs come out no better
    than by pruning its smallest weights is pruned by magnitude. Notes say where.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      sparsity: share of each matrix to prune, met exactly (blocks share the rounding); or
        ``{glob: share}``: leaves that no glob matches are left alone; a schedule counts at step 0.
        None with `n_m`.
      structure: `n_m`, or None for single weights. Groups run along what a site sums over.
      where: globs of the leaves to prune. Give ``"**/kernel"`` to leave embeddings alone that are
        also the last layer.
      quantizer: a grid, floating format or granularity that sees weights entry by entry; kept
        weights are rounded in the same pass. Leaves that only it covers are rounded as by GPTQ if
        calibrated, else to nearest.
      damping: :math:`\lambda` as a share of the mean of H's diagonal. If H cannot be factored it is
        raised tenfold, up to five times; a note says so.
      block: inputs whose masks are chosen together; of n:m groups, a matter of speed only.
      held_out: statistics of other batches, by which layers are compared with pruning by magnitude;
        by default the calibration's.

    Returns:
      ``Pruned``: exact under its own compression, masks and all.

    Raises:
      ConfigError: for a structure other than n:m, or a quantizer that cannot be used.
      NonFiniteError: if calibration or weights are not finite.

    Example:
      >>> from compress_jax.prune import magnitude
      >>> from compress_jax.trace import calibrate, gram
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> x = jax.random.normal(keys[0], (256, 64)) @ jax.random.normal(keys[1], (64, 64))
      >>> params = {"kernel": jax.random.normal(keys[2], (64, 32))}
      >>> fn = lambda p, x: x @ p["kernel"]
      >>> solved = sparsegpt(params, calibrate(fn, gram(), params, [x]), 0.5)
      >>> smallest = magnitude(0.5).view(params, magnitude(0.5).init(params))
      >>> error = lambda p: jnp.square(fn(p, x) - fn(params, x)).mean()
      >>> int((solved.params["kernel"] == 0).sum()), bool(error(solved.params) < error(smallest))
      (1024, True)

    References:
      Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
      One-Shot", 2023, arXiv:2301.00774, algorithm 1; section 3.5 for joint quantization.
    """

    def solve(leaf: Leaf) -> Solution:
        return _leaf(leaf, damping, block)

    return prune(
        params,
        calibration,
        sparsity,
        structure,
        where,
        quantizer,
        Method(solve, "matrix", True),
        held_out,
    )


def _leaf(leaf: Leaf, damping: float, block: int) -> Solution:
    """Solve one leaf, raising the damping of the matrices that cannot be factored; what remains is not solved."""
    form, m = leaf.problem.form, leaf.groups.m if leaf.groups else 1
    block = max(min(block, form.k + -form.k % m) // m, 1) * m
    rows, note = leaf.rows(block)
    plan = Plan(form, block, leaf.groups and (leaf.groups.n, m), leaf.seen.see)
    counts = _counts(leaf, block, len(rows))
    solved = form.matrices(leaf.x.astype(jnp.float32))
    masks, left, said = (
        jnp.ones(solved.shape, bool),
        jnp.ones(len(solved), bool),
        [note] if note else [],
    )
    for attempt in range(TRIES):
        used = damping if attempt == 0 else max(damping, LEAST) * 10**attempt
        new, mask, factored = _solve(
            leaf.x, leaf.seen.operands, leaf.problem.gram, used, rows, counts, plan
        )
        done = (left & factored)[:, None, None]
        solved, masks, left = (
            jnp.where(done, new, solved),
            jnp.where(done, mask, masks),
            left & ~factored,
        )
        if not left.any():
            break
    if attempt:
        said.append(f"damping was raised from {damping:g} to {used:g} to factor the Hessian")
    return Solution(
        form.stored(solved).astype(leaf.x.dtype), form.stored(masks), "; ".join(said), left
    )


def _counts(leaf: Leaf, block: int, rows: int) -> np.ndarray:
    """Return how many weights each block prunes; the sums up to each block are rounded, so that the total is exact."""
    form = leaf.problem.form
    outputs = leaf.x.size // (form.batch * form.groups * form.k)
    ends = [min(start, form.k) * outputs for start in range(0, rows + 1, block)]
    return np.diff([amount_exact(leaf.share, end) for end in ends]).astype(np.uint32)


class Plan(NamedTuple):
    """What is compiled for.

    Attributes:
      form: how the leaf becomes matrices.
      block: inputs a block.
      groups: ``(n, m)``, or None.
      see: rounds entries, their operands given.
    """

    form: MatrixForm
    block: int
    groups: tuple[int, int] | None
    see: Callable[..., Any]


@partial(jax.jit, static_argnames="plan")
def _solve(
    x: jax.Array,
    operands: Sequence[jax.Array],
    gram: jax.Array,
    damping: Any,
    rows: Any,
    counts: Any,
    plan: Plan,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Solve all matrices of a leaf in turn; return them, their masks, and which could be factored."""
    form = plan.form
    every = form.matrices(x.astype(jnp.float32)), [form.matrices(each) for each in operands], gram

    def one(each: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        return _matrix(each[0], each[1], each[2], damping, rows, counts, plan)

    return jax.lax.map(one, every)


def _matrix(
    w: jax.Array,
    operands: Any,
    gram: jax.Array,
    damping: Any,
    rows: jax.Array,
    counts: jax.Array,
    plan: Plan,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Solve one matrix ``[k, n]``; a Hessian that is not positive definite, or NaN, has no finite factor."""
    k = len(w)
    hessian, _ = damped_hessian(_taken(_taken(gram, rows).T, rows), damping, k)
    factor = upper_factor(hessian)
    solved, mask = _blocks(
        _taken(w, rows), [_taken(each, rows) for each in operands], factor, rows < k, counts, plan
    )
    back = partial(jnp.zeros((k, w.shape[1])).at[rows].set, mode="drop", unique_indices=False)
    stored = jnp.zeros((k, w.shape[1]), bool).at[rows].set(mask, mode="drop")
    return back(solved), stored, jnp.isfinite(jnp.diagonal(factor)).all()


def _taken(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Return rows of a matrix, zeros for padding."""
    return x.at[rows].get(mode="fill", fill_value=0)


def _blocks(
    w: jax.Array,
    operands: list[jax.Array],
    factor: jax.Array,
    real: jax.Array,
    counts: jax.Array,
    plan: Plan,
) -> tuple[jax.Array, jax.Array]:
    """Prune block by block; before each, add up what the inputs before it owe it."""
    starts = jnp.arange(0, len(w), plan.block)

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(-1, plan.block, *x.shape[1:])

    def turn(missed: jax.Array, block: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        start, count, w, real, operands = block
        columns = jax.lax.dynamic_slice_in_dim(factor, start, plan.block, axis=1)
        owed = jnp.matmul(
            columns.T, missed, precision=HIGHEST
        )  # what is yet to be pruned has missed nothing
        corner = jax.lax.dynamic_slice_in_dim(columns, start, plan.block)
        step = (
            partial(_unit, plan=plan, count=count)
            if plan.groups is None
            else partial(_grouped, plan=plan)
        )
        pruned, kept, missed_here = step(w, operands, owed, corner, real)
        return jax.lax.dynamic_update_slice_in_dim(missed, missed_here, start, 0), (pruned, kept)

    blocks = (starts, counts, cut(w), cut(real), [cut(each) for each in operands])
    _, (pruned, kept) = jax.lax.scan(turn, jnp.zeros_like(w), blocks)
    return pruned.reshape(w.shape), kept.reshape(w.shape)


def _grouped(
    w: jax.Array,
    operands: list[jax.Array],
    owed: jax.Array,
    factor: jax.Array,
    real: jax.Array,
    plan: Plan,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prune the n:m groups of a block in turn."""
    assert plan.groups is not None
    m = plan.groups[1]

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(-1, m, *x.shape[1:])

    def turn(missed: jax.Array, group: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        start, w, operands, owed, coefficients, real = group
        owed = owed + jnp.matmul(coefficients, missed, precision=HIGHEST)
        corner = jax.lax.dynamic_slice_in_dim(coefficients, start, m, axis=1).T
        pruned, kept, missed_here = _unit(w, operands, owed, corner, real, plan)
        return jax.lax.dynamic_update_slice_in_dim(missed, missed_here, start, 0), (pruned, kept)

    groups = (
        jnp.arange(0, len(w), m),
        cut(w),
        [cut(each) for each in operands],
        cut(owed),
        cut(factor.T),
        cut(real),
    )
    missed, (pruned, kept) = jax.lax.scan(turn, jnp.zeros_like(w), groups)
    return pruned.reshape(w.shape), kept.reshape(w.shape), missed


def _unit(
    w: jax.Array,
    operands: list[jax.Array],
    owed: jax.Array,
    factor: jax.Array,
    real: jax.Array,
    plan: Plan,
    count: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choose the mask of rows that are pruned together, by what their weights are by now; then prune them."""
    moved = jax.lax.linalg.triangular_solve(factor.T, owed, left_side=True, lower=True)
    score = jnp.abs((w + moved) * jnp.diagonal(factor)[:, None])
    if plan.groups is None:
        kept = ~smallest_by(
            _key,
            [(score, jnp.broadcast_to(real[:, None], score.shape))],
            Int64(jnp.uint32(0), count),
        )[0]
    else:
        kept = largest_of_each(
            jnp.where(real[:, None], magnitude_bits(score) + 1, 0), *plan.groups, (0,)
        )
    pruned, missed = _rows(w, operands, owed, factor, kept, plan.see)
    return pruned, kept, missed


def _key(score: jax.Array, real: jax.Array) -> jax.Array:
    return jnp.where(real, magnitude_bits(score), jnp.uint32(2**32 - 1))


def _rows(
    w: jax.Array,
    operands: list[jax.Array],
    owed: jax.Array,
    factor: jax.Array,
    kept: jax.Array,
    see: Callable[..., Any],
) -> tuple[jax.Array, jax.Array]:
    """Prune and round rows in turn, each once it has gathered what the rows before it owe it; and what they missed."""

    def turn(missed: jax.Array, row: Any) -> tuple[jax.Array, jax.Array]:
        i, w, owed, coefficients, inverse, kept, operands = row
        owed = owed + jnp.matmul(coefficients, missed, precision=HIGHEST)
        new = see(jnp.where(kept, w + owed * inverse, 0.0), *operands)
        return jax.lax.dynamic_update_index_in_dim(missed, w - new, i, 0), new

    steps = (jnp.arange(len(w)), w, owed, factor.T, 1 / jnp.diagonal(factor), kept, operands)
    missed, pruned = jax.lax.scan(turn, jnp.zeros_like(w), steps)
    return pruned, missed
