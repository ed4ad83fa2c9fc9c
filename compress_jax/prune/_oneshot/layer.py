"""One-shot pruning of one leaf: problem by problem, and by magnitude where nothing is known."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.amount import amount_exact
from compress_jax.core.axes import Axes
from compress_jax.core.compression import Pointwise
from compress_jax.core.exact import Int64
from compress_jax.layerwise import _problem
from compress_jax.layerwise._problem import MatrixForm, Problem, column_errors
from compress_jax.prune._masks.select import largest_of_each, magnitude_bits, smallest, smallest_by
from compress_jax.prune._masks.structures import NofM
from compress_jax.trace._jaxpr.strided import Box

Within = Literal["output", "matrix"]


def _identity(x: jax.Array) -> jax.Array:
    return x


UNCHANGED = Pointwise(_identity, ())  # the rounding of a leaf without a quantizer


class Leaf(NamedTuple):
    """One leaf to be pruned, or a slice of it that is solved by itself.

    Attributes:
      x: its weights.
      problem: its matrices and the statistics of their inputs; inputs that were always zero count
        as average ones.
      share: the fraction of weights to prune; without effect if there are ``groups``.
      groups: n:m groups of its inputs, or None.
      rounding: the quantizer's function of single entries; `UNCHANGED` without a quantizer.
    """

    x: jax.Array
    problem: Problem
    share: float
    groups: NofM | None
    rounding: Pointwise

    def rows(self, block: int = 1) -> tuple[np.ndarray, str]:
        """Return the order of inputs in which groups are consecutive, and a note on it or ""."""
        # No group may cross a block, so a block holds at least one.
        least = self.groups.m if self.groups else 1
        return input_order(self.problem.form, self.groups, max(block, least))

    def masks(self, norms: jax.Array, rows: np.ndarray, within: Within) -> jax.Array:
        """Return the mask of largest ``|w|`` times the norms ``[batch, k]`` of their inputs."""
        form = self.problem.form
        size = form.k if within == "output" else self.x.size // (form.batch * form.groups)
        groups = self.groups and (self.groups.n, self.groups.m)
        count = jnp.uint32(amount_exact(self.share, size))
        return matrix_masks(self.x, norms, rows, count, form, groups, within)


class Solution(NamedTuple):
    """A solved leaf.

    Attributes:
      x: its new weights.
      mask: False where they are pruned.
      note: what was out of the ordinary, or empty.
      failed: which matrices could not be solved, bool ``[batch]``; None for none.
    """

    x: jax.Array
    mask: jax.Array
    note: str = ""
    failed: jax.Array | None = None


class Method(NamedTuple):
    """A solver with its options.

    Attributes:
      solve: ``Leaf -> Solution``.
      within: whether the fraction to prune is that of each ``"output"``'s inputs or of each
        ``"matrix"``.
      judged: whether a layer is pruned by magnitude if that is better by the calibration's own
        statistics.
    """

    solve: Callable[[Leaf], Solution]
    within: Within
    judged: bool


def pruned_leaf(
    path: str,
    leaf: Leaf,
    problems: Sequence[Problem],
    others: Sequence[Problem],
    method: Method,
    instead: str,
) -> tuple[jax.Array, jax.Array, str]:
    """Prune a leaf, problem by problem.

    A matrix (each layer of a stack by itself) for which magnitude is better is pruned by magnitude.

    Args:
      path: its name.
      leaf: all of it; the problem in it is not used.
      problems: its problems.
      others: those of held-out statistics; none if the calibration decides.
      method: the solver.
      instead: what is done where nothing is known, in words.

    Returns:
      ``(weights, mask, notes)``.
    """
    _problem.check_finite(path, (*problems, *others))
    x = leaf.x
    mask = jnp.ones(x.shape, bool)
    notes: list[str] = []
    judged = method.judged or bool(others)
    # Several problems only where a leaf is used in parts, each with inputs of its own.
    for problem in problems:
        # The solution does not depend on the scale of the inputs; powers of two keep sums in range.
        part = _part(leaf, replace(problem, gram=_problem.unit(problem.filled)))
        solution = method.solve(part)
        by_magnitude = part.masks(jnp.ones(problem.gram.shape[:2]), part.rows()[0], method.within)
        # Without inputs nothing is known of a matrix, and it is pruned by magnitude.
        unreached = problem.dead.all(1)  # [batch]
        failed = unreached if solution.failed is None else unreached | solution.failed
        judge = _problem.judge(problem, others, filled=True)
        operands = part.rounding.operands
        round_fn = part.rounding.fn
        form = problem.form
        new, part_mask, won, same = _better_matrices(
            part.x, operands, solution[:2], by_magnitude, judge, failed, form, round_fn, judged
        )
        x = problem.box.put(x, new)
        mask = problem.box.put(mask, part_mask)
        if solution.note:
            notes.append(solution.note)
        notes += _problem.notes(problem, path, instead)
        if lost := _problem.not_better(problem.names(path), won | unreached, same):
            notes.append(f"{lost}: {instead}")
    notes += _problem.asides(problems, instead)
    if _problem.unused(problems):
        mask = _mask_unused(leaf, mask, [problem.box for problem in problems])
        x = jnp.where(mask, x, jnp.zeros((), x.dtype))
    return x, mask, "; ".join(dict.fromkeys(notes))


def _part(leaf: Leaf, problem: Problem) -> Leaf:
    """Return the slice of a leaf that a problem is about, its groups along the same axes."""
    box = problem.box
    groups = leaf.groups
    if groups is not None and not box.whole:
        along = groups.axes(Axes.convention(box.shape))
        axes = [i for axis in along for i, own in enumerate(box.stored_axes) if own == axis]
        groups = replace(groups, axis=tuple(axes))
    operands = tuple(box.take(each) for each in leaf.rounding.operands)
    rounding = Pointwise(leaf.rounding.fn, operands)
    return Leaf(box.take(leaf.x), problem, leaf.share, groups, rounding)


@partial(jax.jit, static_argnames=("form", "round_fn", "judged"))
def _better_matrices(
    x: jax.Array,
    operands: Sequence[jax.Array],
    solved: tuple[jax.Array, jax.Array],
    by_magnitude: jax.Array,
    judge: jax.Array,
    failed: jax.Array,
    form: MatrixForm,
    round_fn: Callable[..., jax.Array],
    judged: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Compare each solved matrix with pruning by magnitude.

    Returns ``(better weights, their mask, which solutions won, which equal the other)``.
    """
    plain = jnp.where(by_magnitude, x, jnp.zeros((), x.dtype)).astype(jnp.float32)
    # Both candidates are rounded by the same quantizer: what is compared is what would ship.
    plain = round_fn(plain, *operands).astype(x.dtype)
    w, new, old, mask, old_mask = (
        form.matrices(each) for each in (x, solved[0], plain, solved[1], by_magnitude)
    )  # [batch, k, n] each
    error = column_errors((new - w).astype(jnp.float32), judge).sum(1)  # [batch]
    old_error = column_errors((old - w).astype(jnp.float32), judge).sum(1)
    same = (new == old).all((1, 2)) & (mask == old_mask).all((1, 2))
    won = ~failed & ((error < old_error) | (not judged))
    choose = won[:, None, None]  # whole matrices: a mask fits only its own weights
    weights = form.stored(jnp.where(choose, new, old))
    return weights, form.stored(jnp.where(choose, mask, old_mask)), won, same


def _mask_unused(leaf: Leaf, mask: jax.Array, boxes: Sequence[Box]) -> jax.Array:
    """Prune entries that no product uses by magnitude, so that the leaf has its sparsity."""
    used = jnp.zeros(leaf.x.shape, bool)
    for box in boxes:
        used = box.put(used, jnp.ones(box.sizes, bool))
    x = leaf.x.astype(jnp.float32)
    if leaf.groups is not None:  # used entries come first; unused ones fill the rest of each group
        of_used = jnp.where(mask, jnp.uint32(2**31), jnp.uint32(0))
        keys = jnp.where(used, of_used, magnitude_bits(x))
        axes = leaf.groups.axes(Axes.convention(x.shape))
        return jnp.where(used, mask, largest_of_each(keys, leaf.groups.n, leaf.groups.m, axes))
    # The leaf's count, less what its problems have pruned, is taken from the unused entries.
    free = int((~used).sum())
    pruned_before = int((~mask & used).sum())
    count = min(max(amount_exact(leaf.share, x.size) - pruned_before, 0), free)
    (pruned,) = smallest_by(_free, [(x, used)], Int64(jnp.uint32(0), jnp.uint32(count)))
    return jnp.where(used, mask, ~pruned)


def _free(x: jax.Array, used: jax.Array) -> jax.Array:
    """Return magnitudes in an order of integers, used entries as the largest."""
    return jnp.where(used, jnp.uint32(2**32 - 1), magnitude_bits(x))


def input_order(form: MatrixForm, structure: NofM | None, block: int) -> tuple[np.ndarray, str]:
    """Return an order of a matrix's rows in which n:m groups are consecutive.

    It is padded so that no group crosses a block. Groups run along the structure's axes if the site
    sums over them (the channels of a convolution, at each place of its window), else along
    everything it sums over, with a note: hardware needs groups that are summed over.

    Args:
      form: how the stored parameter becomes matrices ``[k, n]``.
      structure: from `n_m`, or None for the order there is.
      block: a multiple of the group's size.

    Returns:
      ``(rows, note)``: int32, a multiple of ``block`` long, with ``form.k`` for padding.

    Example:
      >>> from compress_jax.prune import n_m
      >>> attention = MatrixForm((5, 2, 3), order=(0, 1, 2), batch=1, k=5)
      >>> rows, note = input_order(attention, n_m(2, 4), 4)
      >>> rows.tolist()
      [0, 1, 2, 3, 4, 5, 5, 5]
      >>> note
      'groups run along axes (0,), which its site sums over, not along (1,)'
    """
    rows = np.arange(form.k)
    note = ""
    if structure is not None:
        summed = _summed_axes(form)
        sizes = [form.shape[axis] for axis in summed]
        axes = structure.axes(Axes.convention(form.shape))
        if not set(axes) <= set(summed):
            note = f"groups run along axes {summed}, which its site sums over, not along {axes}"
            axes = summed
        # [other summed axes..., axes of the groups...]; each line is cut into groups.
        places = [summed.index(axis) for axis in axes]
        grid = np.moveaxis(rows.reshape(sizes), places, range(-len(axes), 0))
        lines = grid.reshape(-1, math.prod(form.shape[axis] for axis in axes))
        missing = -lines.shape[1] % structure.m
        rows = np.pad(lines, ((0, 0), (0, missing)), constant_values=form.k).ravel()
    return np.pad(rows, (0, -len(rows) % block), constant_values=form.k).astype(np.int32), note


def _summed_axes(form: MatrixForm) -> tuple[int, ...]:
    """Return the axes that are summed over, with axes of size 1 between the batch and them."""
    sizes = [math.prod(form.shape[a] for a in form.order[:i]) for i in range(len(form.order) + 1)]
    start = sizes.index(form.batch)
    return form.order[start : sizes.index(form.batch * form.k, start)]


@partial(jax.jit, static_argnames=("form", "groups", "within"))
def matrix_masks(
    x: jax.Array,
    norms: jax.Array,
    rows: np.ndarray | None,
    count: jax.Array,
    form: MatrixForm,
    groups: tuple[int, int] | None,
    within: Within,
) -> jax.Array:
    r"""Return the mask of the weights of largest :math:`|w_{ij}| \, n_i`.

    This is Wanda's score, or magnitude if all norms are 1. Of equal scores the later input is kept.

    Args:
      x: array of the shape of ``form``.
      norms: :math:`n_i`, ``[batch, k]``.
      rows: the order of inputs in which groups are consecutive, see `input_order`; not used without
        groups.
      count: how many are pruned within each output, or each matrix; not used with groups.
      form: how ``x`` becomes matrices.
      groups: ``(n, m)``, or None.
      within: whether weights are compared within an output or a matrix.

    Returns:
      bool, the shape of ``x``.

    Example:
      >>> form, w = MatrixForm((2, 2), (0, 1), 1, 2), jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> ones, count = jnp.ones((1, 2)), jnp.uint32(1)
      >>> matrix_masks(w, ones, None, count, form, None, "output").tolist()
      [[False, False], [True, True]]
      >>> matrix_masks(w, ones, None, count, form, None, "matrix").tolist()
      [[False, True], [True, True]]
    """

    def pruned(score: jax.Array) -> jax.Array:
        return smallest([score], k=Int64(jnp.uint32(0), count))[0]

    def mask(matrix: tuple[jax.Array, jax.Array]) -> jax.Array:
        w, norm = matrix  # [k, n], [k]
        score = jnp.abs(w) * norm[:, None]
        if groups is None:
            if within == "matrix":
                return ~pruned(score)
            return ~jax.vmap(pruned, 1, 1)(score)
        assert rows is not None
        keys = magnitude_bits(score).at[rows].get(mode="fill", fill_value=2**32 - 1)
        keys = keys + 1  # padding wraps around to 0
        ordered = largest_of_each(keys, *groups, (0,))
        return jnp.zeros(w.shape, bool).at[rows].set(ordered, mode="drop")

    matrices = form.matrices(x.astype(jnp.float32))
    return form.stored(jax.lax.map(mask, (matrices, norms)))
