"""One layer pruned by what it is fed: slice by slice where its slices are fed apart, and by magnitude what was never fed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

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

# Which inputs of a layer's matrix form an n:m group, whatever the order its site sums them in.


def input_order(form: MatrixForm, structure: NofM | None, block: int) -> tuple[np.ndarray, str]:
    """Return an order of a matrix's rows in which groups are consecutive, padded so that none crosses a block.

    Groups run along the structure's axes if the site sums over them (the channels of a convolution,
    at each place of its window), else along everything it sums over, which the note says: other
    groups are of no use to hardware.

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
      >>> rows.tolist(), note
      ([0, 1, 2, 3, 4, 5, 5, 5], 'groups run along axes (0,), which its site sums over, not along (1,)')
    """
    rows, note = np.arange(form.k), ""
    if structure is not None:
        summed = _summed(form)
        sizes, axes = (
            [form.shape[axis] for axis in summed],
            structure.axes(Axes.convention(form.shape)),
        )
        if not set(axes) <= set(summed):
            note = f"groups run along axes {summed}, which its site sums over, not along {axes}"
            axes = summed
        grid = np.moveaxis(
            rows.reshape(sizes), [summed.index(axis) for axis in axes], range(-len(axes), 0)
        )
        lines = grid.reshape(-1, math.prod(form.shape[axis] for axis in axes))
        rows = np.pad(
            lines, ((0, 0), (0, -lines.shape[1] % structure.m)), constant_values=form.k
        ).ravel()
    return np.pad(rows, (0, -len(rows) % block), constant_values=form.k).astype(np.int32), note


def _summed(form: MatrixForm) -> tuple[int, ...]:
    """Return the axes that are summed over: behind those of the batch, as many as make k."""
    start = next(
        i
        for i in range(len(form.order) + 1)
        if math.prod(form.shape[a] for a in form.order[:i]) == form.batch
    )
    ends = range(start, len(form.order) + 1)
    end = next(i for i in ends if math.prod(form.shape[a] for a in form.order[start:i]) == form.k)
    return form.order[start:end]


# Which weights of a layer's matrices to keep, by their size times a norm of each input: Wanda's
# score, or magnitude.


@partial(jax.jit, static_argnames=("form", "groups", "within"))
def matrix_masks(
    x: jax.Array,
    norms: jax.Array,
    rows: Any,
    count: jax.Array,
    form: MatrixForm,
    groups: tuple[int, int] | None,
    within: Literal["output", "matrix"],
) -> jax.Array:
    r"""Return which weights are kept: those of largest :math:`|w_{ij}| \, n_i`; of equal ones the later input.

    Args:
      x: what ``form`` makes matrices of.
      norms: of the inputs, ``[batch, k]``.
      rows: the order of inputs in which groups are consecutive, see `input_order`; of no meaning
        without groups.
      count: how many are pruned within each output, or each matrix; of no meaning with groups.
      form: how ``x`` becomes matrices.
      groups: ``(n, m)``, or None.
      within: what weights are compared in.

    Returns:
      bool, the shape of ``x``.

    Example:
      >>> form, w = MatrixForm((2, 2), (0, 1), 1, 2), jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> keep = lambda count, within: matrix_masks(w, jnp.ones((1, 2)), None, jnp.uint32(count), form, None, within)
      >>> keep(1, "output").tolist(), keep(2, "matrix").tolist()
      ([[False, False], [True, True]], [[False, False], [True, True]])
    """

    def one(each: tuple[jax.Array, jax.Array]) -> jax.Array:
        w, norm = each
        score = jnp.abs(w) * norm[:, None]
        if groups is None:
            pruned = partial(smallest, k=Int64(jnp.uint32(0), count))
            return ~(
                jax.vmap(lambda s: pruned([s])[0], 1, 1)(score)
                if within == "output"
                else pruned([score])[0]
            )
        keys = (
            magnitude_bits(score).at[rows].get(mode="fill", fill_value=2**32 - 1) + 1
        )  # padding wraps around to 0
        kept = largest_of_each(keys, *groups, (0,))
        return jnp.zeros(w.shape, bool).at[rows].set(kept, mode="drop")

    return form.stored(jax.lax.map(one, (form.matrices(x.astype(jnp.float32)), norms)))


Within = Literal["output", "matrix"]


def _as_it_is(x: jax.Array) -> jax.Array:
    return x


AS_IT_IS = Pointwise(_as_it_is, ())


class Leaf(NamedTuple):
    """One leaf to be pruned, or a slice of it that is solved by itself.

    Attributes:
      x: its weights.
      problem: the matrices it is, and what they are fed; inputs that were never seen count as
        average ones.
      share: of the weights to prune; of no meaning with ``groups``.
      groups: n:m groups of its inputs, or None.
      seen: how a quantizer sees it; as it is, without one.
    """

    x: jax.Array
    problem: Problem
    share: float
    groups: NofM | None
    seen: Pointwise

    def rows(self, block: int = 1) -> tuple[Any, str]:
        """Return the order of inputs in which groups are consecutive, and what is out of the ordinary about it."""
        return input_order(
            self.problem.form, self.groups, max(block, self.groups.m if self.groups else 1)
        )

    def masks(self, norms: jax.Array, rows: Any, within: Within) -> jax.Array:
        """Return which weights are kept by their size times the norms ``[batch, k]`` of their inputs."""
        form = self.problem.form
        size = form.k if within == "output" else self.x.size // (form.batch * form.groups)
        groups = self.groups and (self.groups.n, self.groups.m)
        return matrix_masks(
            self.x, norms, rows, jnp.uint32(amount_exact(self.share, size)), form, groups, within
        )


class Solution(NamedTuple):
    """What a solver makes of a leaf.

    Attributes:
      x: its new weights.
      mask: which are kept.
      note: what was out of the ordinary, or empty.
      failed: which matrices could not be solved, bool ``[batch]``; None for none.
    """

    x: jax.Array
    mask: jax.Array
    note: str = ""
    failed: jax.Array | None = None


class Method(NamedTuple):
    """A way to prune.

    Attributes:
      solve: ``Leaf -> Solution``.
      within: what the share to prune is a share of: each ``"output"``'s inputs or each
        ``"matrix"``.
      judged: whether a layer that magnitude serves better by the calibration's own statistics is
        pruned by magnitude.
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
    """Prune all of a leaf; a matrix (each layer of a stack by itself) that magnitude serves better is pruned by that.

    Args:
      path: its name.
      leaf: the whole of it; the first of its problems in it is of no meaning.
      problems: its problems.
      others: those of held-out statistics; none if the calibration is to judge.
      method: how.
      instead: what is done where nothing is known, in words.

    Returns:
      ``(weights, mask, notes)``.
    """
    x, mask, said = leaf.x, jnp.ones(leaf.x.shape, bool), []
    _problem.check_finite(path, (*problems, *others))
    for problem in problems:
        own = replace(problem, gram=_problem.unit(problem.filled))
        part = _part(leaf, own)
        solution, plain = (
            method.solve(part),
            part.masks(jnp.ones(own.gram.shape[:2]), part.rows()[0], method.within),
        )
        judge = _problem.judge(problem, others, filled=True)
        judged = method.judged or bool(others)
        failed = (
            problem.dead.all(1)
            if solution.failed is None
            else problem.dead.all(1) | solution.failed
        )
        new, kept, won, same = _chosen(
            part.x,
            part.seen.operands,
            solution[:2],
            plain,
            judge,
            failed,
            own.form,
            part.seen.see,
            judged,
        )
        x, mask = problem.box.put(x, new), problem.box.put(mask, kept)
        said += [solution.note] if solution.note else []
        said += _problem.notes(problem, path, instead)
        lost = _problem.not_better(problem.names(path), won | problem.dead.all(1), same)
        said += [f"{lost}: {instead}"] if lost else []
    said += _problem.asides(problems, instead)
    if _problem.unused(problems):
        mask = _rest(leaf, mask, [problem.box for problem in problems])
        x = jnp.where(mask, x, jnp.zeros((), x.dtype))
    return x, mask, "; ".join(dict.fromkeys(said))


def _part(leaf: Leaf, problem: Problem) -> Leaf:
    """Return the slice of a leaf that a problem is about; groups run along the axes they did."""
    box, groups = problem.box, leaf.groups
    if groups is not None and not box.whole:
        along = [
            i
            for axis in groups.axes(Axes.convention(box.shape))
            for i, own in enumerate(box.of)
            if own == axis
        ]
        groups = replace(groups, axis=tuple(along))
    seen = Pointwise(leaf.seen.see, tuple(box.take(each) for each in leaf.seen.operands))
    return Leaf(box.take(leaf.x), problem, leaf.share, groups, seen)


@partial(jax.jit, static_argnames=("form", "see", "judged"))
def _chosen(
    x: jax.Array,
    operands: Sequence[jax.Array],
    solved: tuple[jax.Array, jax.Array],
    plain: jax.Array,
    judge: jax.Array,
    failed: jax.Array,
    form: MatrixForm,
    see: Callable[..., Any],
    judged: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return weights and mask, which matrices are solved better than by magnitude, and which come out the same."""
    smallest = see(
        jnp.where(plain, x, jnp.zeros((), x.dtype)).astype(jnp.float32), *operands
    ).astype(x.dtype)
    w, new, old, mask, kept = (
        form.matrices(each) for each in (x, solved[0], smallest, solved[1], plain)
    )
    errors = [column_errors((each - w).astype(jnp.float32), judge).sum(1) for each in (new, old)]
    same = (new == old).all((1, 2)) & (mask == kept).all((1, 2))
    won = ~failed & ((errors[0] < errors[1]) | (not judged))
    choose = won[:, None, None]
    return (
        form.stored(jnp.where(choose, new, old)),
        form.stored(jnp.where(choose, mask, kept)),
        won,
        same,
    )


def _rest(leaf: Leaf, mask: jax.Array, boxes: Sequence[Box]) -> jax.Array:
    """Prune entries that no product uses by magnitude, so that the whole leaf is as sparse as was asked."""
    covered = jnp.zeros(leaf.x.shape, bool)
    for box in boxes:
        covered = box.put(covered, jnp.ones(box.sizes, bool))
    x = leaf.x.astype(jnp.float32)
    if (
        leaf.groups is not None
    ):  # what is used comes first, and what is not fills what is left of each group
        keys = jnp.where(
            covered, jnp.where(mask, jnp.uint32(2**31), jnp.uint32(0)), magnitude_bits(x)
        )
        kept = largest_of_each(
            keys, leaf.groups.n, leaf.groups.m, leaf.groups.axes(Axes.convention(x.shape))
        )
        return jnp.where(covered, mask, kept)
    free = int((~covered).sum())
    count = min(max(amount_exact(leaf.share, x.size) - int((~mask & covered).sum()), 0), free)
    (pruned,) = smallest_by(_free, [(x, covered)], Int64(jnp.uint32(0), jnp.uint32(count)))
    return jnp.where(covered, mask, ~pruned)


def _free(x: jax.Array, covered: jax.Array) -> jax.Array:
    return jnp.where(covered, jnp.uint32(2**32 - 1), magnitude_bits(x))
