"""What an axis of an array is made of, and what is known about it: leaves, products (reshape), sums (concatenate).

Everything that may be permuted or removed as one is a leaf. An axis is then a small tree:
``(heads, head_dim)`` reshaped into one axis is a product, row-major; two axes put end to end are a
sum. `Axes` remembers which leaves turned out to be the same, which turned out to be made of parts,
and which must stay as they are, and why.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from compress_jax.trace._jaxpr.site import Shape

Member = tuple[str, int]  # the path of a parameter and one of its axes


@dataclass(frozen=True, slots=True)
class Leaf:
    """An axis that nothing has taken apart.

    Attributes:
      size: its length.
      label: what tells it from other leaves; smaller is older.
    """

    size: int
    label: int


@dataclass(frozen=True, slots=True)
class Product:
    """Several axes reshaped into one, the last varying fastest; build it with `product`.

    Attributes:
      size: its length.
      parts: the factors, none of size 1.
    """

    size: int
    parts: tuple["Axis", ...]


@dataclass(frozen=True, slots=True)
class Sum:
    """Several axes put end to end; build it with `concatenation`.

    Attributes:
      size: its length.
      parts: the terms, none of size 0.
    """

    size: int
    parts: tuple["Axis", ...]


Axis = Leaf | Product | Sum
UNIT = Leaf(1, 0)  # every axis of size 1: it has no permutation but the identity


def product(parts: Sequence[Axis]) -> Axis:
    """Return the axis that a reshape makes of several axes.

    Args:
      parts: the axes, in their order.

    Returns:
      The axis; just the one axis if the others have size 1.

    Example:
      >>> product([Leaf(2, 1), UNIT, Leaf(3, 2)]).size
      6
    """
    parts = tuple(part for part in parts if part.size != 1)
    return (
        parts[0]
        if len(parts) == 1
        else Product(math.prod(part.size for part in parts), parts)
        if parts
        else UNIT
    )


def concatenation(parts: Sequence[Axis]) -> Axis:
    """Return the axis that holds several axes end to end.

    Args:
      parts: the axes, in their order.

    Returns:
      The axis; just the one axis if the others are empty.

    Example:
      >>> concatenation([Leaf(2, 1), Leaf(0, 2), UNIT]).parts
      (Leaf(size=2, label=1), Leaf(size=1, label=0))
    """
    parts = tuple(part for part in parts if part.size != 0)
    return parts[0] if len(parts) == 1 else Sum(sum(part.size for part in parts), parts)


class Axes:
    """What is known about all axes of a computation so far; it only ever grows.

    Attributes:
      bound: by label, the axis that a leaf turned out to be.
      reasons: by label, why a leaf must stay as it is.
    """

    def __init__(self) -> None:
        """Start knowing nothing."""
        self.bound: dict[int, Axis] = {}
        self.reasons: dict[int, str] = {}
        self._made = 0

    def leaf(self, size: int, reason: str | None = None) -> Leaf:
        """Return a new leaf, frozen if there is a reason to; all of size 1 are one."""
        if size == 1:
            return UNIT
        self._made += 1
        leaf = Leaf(size, self._made)
        if reason is not None:
            self.freeze(leaf, reason)
        return leaf

    def find(self, axis: Axis) -> Axis:
        """Return what an axis is as far as its outermost form is known."""
        while isinstance(axis, Leaf) and axis.label in self.bound:
            following = self.bound[axis.label]
            if isinstance(following, Leaf) and following.label in self.bound:
                self.bound[axis.label] = self.bound[
                    following.label
                ]  # shortens the way for the next time
            axis = following
        return axis

    def bind(self, leaf: Leaf, axis: Axis) -> None:
        """Record that a leaf, not bound so far, is this other axis."""
        if leaf.label in self.reasons:
            self.freeze(axis, self.reasons[leaf.label])
        self.bound[leaf.label] = axis

    def freeze(self, axis: Axis, reason: str) -> None:
        """Record that an axis must stay as it is; of several reasons the first one counts."""
        for leaf in self.leaves(axis):
            self.reasons.setdefault(leaf.label, reason)

    def reason(self, leaf: Leaf) -> str | None:
        """Return why a leaf must stay as it is, or None if nothing known so far says so."""
        return self.reasons.get(leaf.label)

    def leaves(self, axis: Axis) -> Iterator[Leaf]:
        """Yield the leaves of an axis in order, those of size 1 left out; one that occurs twice is yielded twice."""
        axis = self.find(axis)
        if isinstance(axis, Leaf):
            if axis.size > 1:
                yield axis
        else:
            for part in axis.parts:
                yield from self.leaves(part)

    def factors(self, axis: Axis) -> list[Axis]:
        """Return the factors of an axis, none of them a product."""
        axis = self.find(axis)
        return (
            [factor for part in axis.parts for factor in self.factors(part)]
            if isinstance(axis, Product)
            else [axis]
        )

    def terms(self, axis: Axis) -> list[Axis]:
        """Return the terms of an axis, none of them a sum, nor a product with a sum in front: ``(a + b) c = a c + b c``."""
        axis = self.find(axis)
        if isinstance(axis, Sum):
            return [term for part in axis.parts for term in self.terms(part)]
        first, *rest = self.factors(axis)
        if not rest or len(terms := self.terms(first)) == 1:
            return [product([first, *rest])]
        return [term for row in terms for term in self.terms(product([row, *rest]))]

    def repeated(self, axis: Axis) -> set[Leaf]:
        """Return the leaves that occur in two factors of one product: a permutation moves them in two ways at once."""
        axis = self.find(axis)
        if isinstance(axis, Leaf):
            return set()
        found = set().union(*map(self.repeated, axis.parts))
        seen: set[Leaf] = set()
        for part in axis.parts if isinstance(axis, Product) else ():
            leaves = set(self.leaves(part))
            found, seen = found | (seen & leaves), seen | leaves
        return found

    def coordinates(self, axis: Axis) -> dict[Leaf, np.ndarray]:
        r"""Return for every index of an axis its coordinate in each leaf, -1 where it is in none.

        The coordinates alone say how permuting a leaf permutes the axis: the k-th index in which
        one coordinate occurs goes where the k-th of the other was. Each coordinate occurs equally
        often, and its k-th occurrence has the same surroundings as any other's: so it is in a leaf;
        a sum lists the occurrences of its terms one after the other; a product with the leaf in one
        factor lists them by that factor's occurrences and the other factors' indices, in an order
        that does not depend on the coordinate. A leaf in two factors (see `repeated`) has no such
        coordinates.

        Args:
          axis: any axis.

        Returns:
          ``{leaf: int array [size]}``, in the order of the leaves; none of size 1.

        Example:
          >>> axes = Axes()
          >>> heads, dim = axes.leaf(2), axes.leaf(3)
          >>> axes.coordinates(product([heads, dim]))[dim].tolist()
          [0, 1, 2, 0, 1, 2]
          >>> axes.coordinates(concatenation([heads, dim]))[dim].tolist()
          [-1, -1, 0, 1, 2]
        """
        axis = self.find(axis)
        if isinstance(axis, Leaf):
            return {axis: np.arange(axis.size)} if axis.size > 1 else {}
        found: dict[Leaf, np.ndarray] = {}
        before = 0 if isinstance(axis, Sum) else 1
        for part in axis.parts:
            for leaf, own in self.coordinates(part).items():
                if isinstance(axis, Sum):
                    found.setdefault(leaf, np.full(axis.size, -1))[before : before + part.size] = (
                        own
                    )
                else:
                    found[leaf] = np.tile(np.repeat(own, axis.size // (before * part.size)), before)
            before = before + part.size if isinstance(axis, Sum) else before * part.size
        return found


# Two axes turn out to be one: refine both until their leaves are the same.


MISALIGNED = "reshaped or sliced across its parts"


def unify(axes: Axes, a: Axis, b: Axis) -> None:
    """Record that two axes are permuted alike: each index of one is the same index of the other.

    A leaf becomes whatever the other axis is. Products are cut into common factors, sums at common
    places, a product that meets a sum into rows of its first factor. Where that cannot be done (4 x
    6 meets 6 x 4), both are frozen.

    Args:
      axes: what is known; it is changed.
      a: an axis.
      b: an axis of the same size.

    Example:
      >>> axes = Axes()
      >>> heads, dim, flat = axes.leaf(2), axes.leaf(3), axes.leaf(6)
      >>> unify(axes, flat, product([heads, dim]))
      >>> [leaf.size for leaf in axes.leaves(flat)]
      [2, 3]
    """
    a, b = axes.find(a), axes.find(b)
    if a == b:
        return
    if a.size == b.size and isinstance(a, Leaf) and isinstance(b, Leaf):
        axes.bind(
            *((a, b) if a.label > b.label else (b, a))
        )  # the older one stays: parameters are the oldest
    elif a.size == b.size and isinstance(a, Leaf):
        axes.bind(a, b)
    elif a.size == b.size and isinstance(b, Leaf):
        axes.bind(b, a)
    elif a.size != b.size or not _align(axes, a, b):
        axes.freeze(a, MISALIGNED)
        axes.freeze(b, MISALIGNED)


def pieces(axes: Axes, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Cut an axis into consecutive pieces.

    Args:
      axes: what is known; it is changed.
      axis: the axis.
      sizes: of the pieces, whose sum is the axis' size.

    Returns:
      The pieces; the axis itself where the others are empty.

    Example:
      >>> axes = Axes()
      >>> first, second = pieces(axes, concatenation([axes.leaf(2), axes.leaf(3)]), [2, 3])
      >>> axes.find(first), axes.find(second)
      (Leaf(size=2, label=1), Leaf(size=3, label=2))
    """
    found: list[Axis] = [axis if size == axis.size else axes.leaf(size) for size in sizes]
    if axis not in found:
        unify(axes, axis, concatenation(found))
    return found


def _align(axes: Axes, a: Axis, b: Axis) -> bool:
    """Unify part by part; return False where the parts do not fit."""
    left, right = axes.terms(a), axes.terms(b)
    if len(left) == len(right) == 1:
        return _align_factors(axes, axes.factors(a), axes.factors(b))
    return _align_terms(axes, left, right)


def _align_terms(axes: Axes, left: Sequence[Axis], right: Sequence[Axis]) -> bool:
    """Unify sums of equal size: cut the longer of the two first terms where a run of the other's terms ends."""
    short, long = deque(left), deque(right)
    while short and long:
        ours, theirs = _first(axes, short), _first(axes, long)
        if ours.size > theirs.size:
            short, long, ours, theirs = long, short, theirs, ours
        if not _align_first(axes, [ours], short, theirs, long):
            return False
    return True


def _first(axes: Axes, terms: deque[Axis]) -> Axis:
    """Take the first term, which may have come apart since the list was made."""
    first, *rest = axes.terms(terms.popleft())
    terms.extendleft(reversed(rest))
    return first


def _align_first(
    axes: Axes, run: list[Axis], short: deque[Axis], whole: Axis, long: deque[Axis]
) -> bool:
    """Unify a term with a run of the other's terms of its size, or cut it at the end of the shortest run that lets it."""
    while (size := sum(term.size for term in run)) < whole.size:
        if (cut := _cut(axes, whole, size)) is not None:
            unify(axes, concatenation(run), cut[0])
            long.appendleft(cut[1])
            return True
        run.append(_first(axes, short))
    if size == whole.size and len(run) == 1:
        unify(axes, whole, run[0])
        return True
    return False


def _cut(axes: Axes, term: Axis, at: int) -> tuple[Axis, Axis] | None:
    """Cut a term in two: a leaf anywhere, a product between rows of its first factor, or None."""
    if isinstance(term, Product):
        first, *rest = axes.factors(term)
        cut = (
            _cut(axes, first, at * first.size // term.size)
            if at * first.size % term.size == 0
            else None
        )
        return cut and (product([cut[0], *rest]), product([cut[1], *rest]))
    if not isinstance(term, Leaf):
        return None
    left, right = axes.leaf(at), axes.leaf(term.size - at)
    axes.bind(term, concatenation([left, right]))
    return left, right


def _align_factors(axes: Axes, left: Sequence[Axis], right: Sequence[Axis]) -> bool:
    """Unify products of equal size: a factor with the run of the other's that has its size, or split it."""
    small, large = deque(left), deque(right)
    while small and large:
        for factors in (small, large):
            factors.extendleft(reversed(axes.factors(factors.popleft())))
        if small[0].size > large[0].size:
            small, large = large, small
        whole = large.popleft()
        if run := _run(small, whole.size):
            unify(axes, whole, product([small.popleft() for _ in range(run)]))
        elif isinstance(whole, Leaf) and whole.size % small[0].size == 0:
            parts = axes.leaf(small[0].size), axes.leaf(whole.size // small[0].size)
            axes.bind(whole, product(parts))
            large.extendleft(reversed(parts))
        else:
            return False
    return True


def _run(factors: Sequence[Axis], size: int) -> int:
    """Return how many of the first factors multiply to a size, 0 if none do."""
    total = 1
    for count, factor in enumerate(factors, 1):
        total *= factor.size
        if total == size:
            return count
    return 0


# What equations that move entries about do to axes: reshape, transpose, broadcast, slice,
# concatenate, index.


Dims = tuple[Axis, ...]  # the axes of one value
Results = Sequence[Dims] | None  # of an equation; None where a rule does not know this form of it


def alike(axes: Axes, values: Iterable[Dims]) -> Dims:
    """Unify values axis by axis and return the axes of what they make; scalars and axes of size 1 are broadcast."""
    results: list[Axis] = []
    for along in zip(*(dims for dims in values if dims), strict=True):
        first, *others = [axis for axis in along if axis.size != 1] or [UNIT]
        for other in others:
            unify(axes, first, other)
        results.append(first)
    return tuple(results)


def shape(eqn: JaxprEqn) -> Shape:
    """Return the shape of an equation's first result."""
    aval: Any = eqn.outvars[0].aval
    return aval.shape


def part(axes: Axes, axis: Axis, size: int, reason: str) -> Axis:
    """Return an axis that stays whole, else freeze it and return some of its indices."""
    if axis.size == size:
        return axis
    axes.freeze(axis, reason)
    return axes.leaf(size, reason)


def reshape(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Match the shortest runs of axes whose sizes multiply to the same."""
    old, new = [axis.size for axis in args[0]], eqn.params["new_sizes"]
    if eqn.params.get("dimensions") is not None or 0 in old:
        return None
    results: list[Axis] = [UNIT] * len(new)
    for old_run, new_run in _runs(old, new):
        whole = product([args[0][i] for i in old_run])
        made = [whole] if len(new_run) == 1 else [axes.leaf(new[i]) for i in new_run]
        unify(axes, whole, product(made))
        for i, axis in zip(new_run, made, strict=True):
            results[i] = axis
    return [tuple(results)]


def _runs(old: Sequence[int], new: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """Yield which axes become which, those of size 1 left out."""
    left, right = ([i for i, size in enumerate(sizes) if size != 1] for sizes in (old, new))
    while left:
        runs, sizes = ([left.pop(0)], [right.pop(0)]), [0, 0]
        sizes = [old[runs[0][0]], new[runs[1][0]]]
        while sizes[0] != sizes[1]:
            behind = int(sizes[1] < sizes[0])
            runs[behind].append((left, right)[behind].pop(0))
            sizes[behind] *= (old, new)[behind][runs[behind][-1]]
        yield runs


def broadcast_in_dim(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """What is broadcast is the same at every index: a new axis is free."""
    results: list[Axis] = [axes.leaf(size) for size in eqn.params["shape"]]
    for axis, i in zip(args[0], eqn.params["broadcast_dimensions"], strict=True):
        results[i] = axis if axis.size == results[i].size else results[i]
    return [tuple(results)]


def transpose(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Reorder."""
    return [tuple(args[0][i] for i in eqn.params["permutation"])]


def squeeze(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Drop axes of size 1."""
    return [tuple(axis for i, axis in enumerate(args[0]) if i not in eqn.params["dimensions"])]


def expand_dims(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Add axes of size 1."""
    rest = iter(args[0])
    return [
        tuple(UNIT if i in eqn.params["dimensions"] else next(rest) for i in range(len(shape(eqn))))
    ]


def tile(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Repeat: the number of the copy is a free axis in front of the old one."""
    return [
        tuple(
            product([axes.leaf(times), axis])
            for axis, times in zip(args[0], eqn.params["reps"], strict=True)
        )
    ]


def stack(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Put values side by side along a new axis, every index of which is another value."""
    results = list(alike(axes, args))
    results.insert(eqn.params["axis"], concatenation([UNIT] * len(args)))
    return [tuple(results)]


def concatenate(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Put axes end to end."""
    i = eqn.params["dimension"]
    rest = alike(axes, [(*dims[:i], UNIT, *dims[i + 1 :]) for dims in args])
    return [(*rest[:i], concatenation([dims[i] for dims in args]), *rest[i + 1 :])]


def split(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Cut an axis into consecutive pieces."""
    i = eqn.params["axis"]
    cut = pieces(axes, args[0][i], eqn.params["sizes"])
    return [(*args[0][:i], piece, *args[0][i + 1 :]) for piece in cut]


def unstack(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Hand out the indices of an axis, each by itself."""
    i = eqn.params["axis"]
    pieces(axes, args[0][i], [1] * args[0][i].size)
    return [(*args[0][:i], *args[0][i + 1 :]) for _ in eqn.outvars]


def slice_(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Take a piece of each axis, or every n-th index of one."""
    p = eqn.params
    strides = p["strides"] or [1] * len(args[0])
    limits = zip(args[0], p["start_indices"], p["limit_indices"], strides, strict=True)
    return [tuple(_piece(axes, axis, *limit) for axis, *limit in limits)]


def _piece(axes: Axes, axis: Axis, start: int, limit: int, stride: int) -> Axis:
    """Return a piece of an axis. Every n-th index of whole rows of n is a column of them: interleaved channels."""
    if stride == 1:
        return pieces(axes, axis, [start, limit - start, axis.size - limit])[1]
    first, count = interleaved(start, limit, stride)
    if count > 1 and first + count * stride <= axis.size:
        rows = pieces(axes, axis, [first, count * stride, axis.size - first - count * stride])[1]
        column = axes.leaf(count)
        unify(axes, rows, product([column, concatenation([UNIT] * stride)]))
        return column
    axes.freeze(axis, "strided slice")
    return axes.leaf(-(-(limit - start) // stride), "strided slice")


def interleaved(start: int, limit: int, stride: int) -> tuple[int, int]:
    """Return where the rows begin of which a strided slice takes one index each, and how many they are.

    Example:
      >>> interleaved(1, 8, 2), interleaved(5, 8, 2)
      ((0, 4), (4, 2))
    """
    return start - start % stride, -(-(limit - start) // stride)


def pad(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Put an axis between two constant ones, within which every index is the same."""
    results = []
    for axis, (low, high, interior) in zip(args[0], eqn.params["padding_config"], strict=True):
        if interior or low < 0 or high < 0:
            axes.freeze(axis, "dilated or cropped")
            size = axis.size + max(axis.size - 1, 0) * interior + low + high
            results.append(axes.leaf(size, "dilated or cropped"))
        else:
            results.append(concatenation([axes.leaf(low), axis, axes.leaf(high)]))
    return [tuple(results)]


def dynamic_slice(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Take a piece of which the start is not known."""
    sizes = eqn.params["slice_sizes"]
    return [
        tuple(
            part(axes, axis, size, "dynamic slice")
            for axis, size in zip(args[0], sizes, strict=True)
        )
    ]


def dynamic_update_slice(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Replace a piece of which the start is not known."""
    for axis, new in zip(args[0], args[1], strict=True):
        if axis.size == new.size:
            unify(axes, axis, new)
        else:
            axes.freeze(axis, "dynamic update")
            axes.freeze(new, "dynamic update")
    return [args[0]]


def gather(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Look up: axes that indices point into are frozen; those taken whole go through."""
    numbers, sizes, (table, indices) = (
        eqn.params["dimension_numbers"],
        eqn.params["slice_sizes"],
        args[:2],
    )
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    for i in numbers.collapsed_slice_dims:
        axes.freeze(table[i], "looked up by index")
    for i, j in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ):
        unify(axes, table[i], indices[j])
    whole = iter(
        [
            part(axes, table[i], sizes[i], "looked up by index")
            for i in range(len(table))
            if i not in gone
        ]
    )
    rest = iter(indices[:-1])
    return [
        tuple(next(whole if i in numbers.offset_dims else rest) for i in range(len(shape(eqn))))
    ]


def scatter(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Write or add at indices: as `gather`, the other way round."""
    numbers, (table, indices, updates) = eqn.params["dimension_numbers"], args
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    for i in numbers.inserted_window_dims:
        axes.freeze(table[i], "written by index")
    for i, j in zip(
        numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
    ):
        unify(axes, table[i], indices[j])
    whole, rest = iter([table[i] for i in range(len(table)) if i not in gone]), iter(indices[:-1])
    for i, axis in enumerate(updates):
        other = next(whole if i in numbers.update_window_dims else rest)
        unify(axes, axis, other)
    return [table]
