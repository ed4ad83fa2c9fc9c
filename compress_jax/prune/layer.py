"""One layer pruned by what it is fed: slice by slice where its slices are fed apart, and by magnitude what was never fed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.axes import Axes
from compress_jax.core.compression import Pointwise
from compress_jax.prune.amount import amount_exact
from compress_jax.prune.groups_of_m import largest_of_each
from compress_jax.prune.input_groups import input_order
from compress_jax.prune.matrix_masks import matrix_masks
from compress_jax.prune.select import magnitude_bits, smallest_by
from compress_jax.prune.structures import NofM
from compress_jax.prune.wide import Wide
from compress_jax.trace import evidence
from compress_jax.trace.box import Box
from compress_jax.trace.matrix import MatrixForm, Problem, column_errors

Within = Literal["output", "matrix"]


def _as_it_is(x: jax.Array) -> jax.Array:
    return x


AS_IT_IS = Pointwise(_as_it_is, ())


class Leaf(NamedTuple):
    """One leaf to be pruned, or a slice of it that is solved by itself.

    Attributes:
      x: its weights.
      problem: the matrices it is, and what they are fed; inputs that were never seen count as average ones.
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
        return input_order(self.problem.form, self.groups, max(block, self.groups.m if self.groups else 1))

    def masks(self, norms: jax.Array, rows: Any, within: Within) -> jax.Array:
        """Return which weights are kept by their size times the norms ``[batch, k]`` of their inputs."""
        form = self.problem.form
        size = form.k if within == "output" else self.x.size // (form.batch * form.groups)
        groups = self.groups and (self.groups.n, self.groups.m)
        return matrix_masks(self.x, norms, rows, jnp.uint32(amount_exact(self.share, size)), form, groups, within)


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
      within: what the share to prune is a share of: each ``"output"``'s inputs or each ``"matrix"``.
      judged: whether a layer that magnitude serves better by the calibration's own statistics is pruned by magnitude.
    """

    solve: Callable[[Leaf], Solution]
    within: Within
    judged: bool


def pruned_leaf(
    path: str, leaf: Leaf, problems: Sequence[Problem], others: Sequence[Problem], method: Method, instead: str
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
    evidence.check_finite(path, (*problems, *others))
    for problem in problems:
        own = replace(problem, gram=evidence.unit(problem.filled))
        part = _part(leaf, own)
        solution, plain = method.solve(part), part.masks(jnp.ones(own.gram.shape[:2]), part.rows()[0], method.within)
        judge = evidence.judge(problem, others, filled=True)
        judged = method.judged or bool(others)
        failed = problem.dead.all(1) if solution.failed is None else problem.dead.all(1) | solution.failed
        new, kept, won, same = _chosen(
            part.x, part.seen.operands, solution[:2], plain, judge, failed, own.form, part.seen.see, judged
        )
        x, mask = problem.box.put(x, new), problem.box.put(mask, kept)
        said += [solution.note] if solution.note else []
        said += evidence.notes(problem, path, instead)
        lost = evidence.not_better(problem.names(path), won | problem.dead.all(1), same)
        said += [f"{lost}: {instead}"] if lost else []
    said += evidence.asides(problems, instead)
    if evidence.unused(problems):
        mask = _rest(leaf, mask, [problem.box for problem in problems])
        x = jnp.where(mask, x, jnp.zeros((), x.dtype))
    return x, mask, "; ".join(dict.fromkeys(said))


def _part(leaf: Leaf, problem: Problem) -> Leaf:
    """Return the slice of a leaf that a problem is about; groups run along the axes they did."""
    box, groups = problem.box, leaf.groups
    if groups is not None and not box.whole:
        along = [i for axis in groups.axes(Axes.convention(box.shape)) for i, own in enumerate(box.of) if own == axis]
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
    smallest = see(jnp.where(plain, x, jnp.zeros((), x.dtype)).astype(jnp.float32), *operands).astype(x.dtype)
    w, new, old, mask, kept = (form.matrices(each) for each in (x, solved[0], smallest, solved[1], plain))
    errors = [column_errors((each - w).astype(jnp.float32), judge).sum(1) for each in (new, old)]
    same = (new == old).all((1, 2)) & (mask == kept).all((1, 2))
    won = ~failed & ((errors[0] < errors[1]) | (not judged))
    choose = won[:, None, None]
    return form.stored(jnp.where(choose, new, old)), form.stored(jnp.where(choose, mask, kept)), won, same


def _rest(leaf: Leaf, mask: jax.Array, boxes: Sequence[Box]) -> jax.Array:
    """Prune entries that no product uses by magnitude, so that the whole leaf is as sparse as was asked."""
    covered = jnp.zeros(leaf.x.shape, bool)
    for box in boxes:
        covered = box.put(covered, jnp.ones(box.sizes, bool))
    x = leaf.x.astype(jnp.float32)
    if leaf.groups is not None:  # what is used comes first, and what is not fills what is left of each group
        keys = jnp.where(covered, jnp.where(mask, jnp.uint32(2**31), jnp.uint32(0)), magnitude_bits(x))
        kept = largest_of_each(keys, leaf.groups.n, leaf.groups.m, leaf.groups.axes(Axes.convention(x.shape)))
        return jnp.where(covered, mask, kept)
    free = int((~covered).sum())
    count = min(max(amount_exact(leaf.share, x.size) - int((~mask & covered).sum()), 0), free)
    (pruned,) = smallest_by(_free, [(x, covered)], Wide(jnp.uint32(0), jnp.uint32(count)))
    return jnp.where(covered, mask, ~pruned)


def _free(x: jax.Array, covered: jax.Array) -> jax.Array:
    return jnp.where(covered, jnp.uint32(2**32 - 1), magnitude_bits(x))
