"""The axis algebra: an axis is a leaf, a product (of a reshape) or a sum (of a concatenation).

Everything that may be permuted or removed as one is a leaf. An axis is then a small tree:
``(heads, head_dim)`` reshaped into one axis is a product, row-major; two axes put end to end are a
sum. `Axes` remembers which leaves are the same, which are made of other axes, and which are frozen
and why. `unify` refines two axes until their leaves are the same. The functions after it are the
rules of the primitives that move entries.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jax.extend.core import JaxprEqn

from compress_jax.core.types import Aval
from compress_jax.trace._jaxpr.site import Shape

Member = tuple[str, int]  # the path of a parameter and one of its axes


@dataclass(frozen=True, slots=True)
class Leaf:
    """An axis that is not split.

    Attributes:
      size: its length.
      label: a number of its own; smaller is older.
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
    if not parts:
        return UNIT
    if len(parts) == 1:
        return parts[0]
    return Product(math.prod(part.size for part in parts), parts)


def concatenation(parts: Sequence[Axis]) -> Axis:
    """Return the axis that a concatenation makes of several axes.

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
    """What is known so far about all axes of a computation; facts are only added.

    Attributes:
      bound: by label, the axis that a leaf stands for (the parent of a union-find forest).
      reasons: by label, why a leaf is frozen.
    """

    def __init__(self) -> None:
        """Start without facts."""
        self.bound: dict[int, Axis] = {}
        self.reasons: dict[int, str] = {}
        self._made = 0

    def leaf(self, size: int, reason: str | None = None) -> Leaf:
        """Return a new leaf, frozen if a reason is given; of size 1 there is only one."""
        if size == 1:
            return UNIT
        self._made += 1
        leaf = Leaf(size, self._made)
        if reason is not None:
            self.freeze(leaf, reason)
        return leaf

    def find(self, axis: Axis) -> Axis:
        """Return the axis that a bound leaf stands for; any other axis is returned as it is."""
        while isinstance(axis, Leaf) and axis.label in self.bound:
            parent = self.bound[axis.label]
            if isinstance(parent, Leaf) and parent.label in self.bound:
                self.bound[axis.label] = self.bound[parent.label]  # path compression
            axis = parent
        return axis

    def bind(self, leaf: Leaf, axis: Axis) -> None:
        """Record that a leaf, not bound so far, stands for another axis."""
        # What the leaf stands for from now on cannot be permuted either.
        if leaf.label in self.reasons:
            self.freeze(axis, self.reasons[leaf.label])
        self.bound[leaf.label] = axis

    def freeze(self, axis: Axis, reason: str) -> None:
        """Record that an axis cannot be permuted; of several reasons the first one counts."""
        for leaf in self.leaves(axis):
            self.reasons.setdefault(leaf.label, reason)

    def reason(self, leaf: Leaf) -> str | None:
        """Return why a leaf is frozen, or None."""
        return self.reasons.get(leaf.label)

    def leaves(self, axis: Axis) -> Iterator[Leaf]:
        """Yield the leaves of an axis in order, repeated where they occur twice, without `UNIT`."""
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
        if not isinstance(axis, Product):
            return [axis]
        return list(itertools.chain.from_iterable(map(self.factors, axis.parts)))

    def terms(self, axis: Axis) -> list[Axis]:
        """Return the terms of an axis, none of them a sum or a product that begins with a sum.

        Products are expanded by ``(a + b) c = a c + b c``.
        """
        axis = self.find(axis)
        if isinstance(axis, Sum):
            return list(itertools.chain.from_iterable(map(self.terms, axis.parts)))
        # Only the first factor is expanded: in a x b a range of a is a range of the axis, one of b
        # is not.
        first, *rest = self.factors(axis)
        if not rest or len(rows := self.terms(first)) == 1:
            return [product([first, *rest])]
        expanded = (self.terms(product([row, *rest])) for row in rows)
        return list(itertools.chain.from_iterable(expanded))

    def repeated(self, axis: Axis) -> set[Leaf]:
        """Return the leaves that occur in two factors of one product.

        A permutation would have to permute both factors at once, which no `coordinates` describe.
        """
        axis = self.find(axis)
        if isinstance(axis, Leaf):
            return set()
        found = set().union(*map(self.repeated, axis.parts))
        if isinstance(axis, Product):
            earlier: set[Leaf] = set()
            for part in axis.parts:
                leaves = set(self.leaves(part))
                found |= earlier & leaves
                earlier |= leaves
        return found

    def coordinates(self, axis: Axis) -> dict[Leaf, np.ndarray]:
        """Return for every index of an axis its coordinate in each leaf, -1 where it has none.

        The coordinates determine how permuting a leaf permutes the axis: the k-th index of one
        coordinate goes to the k-th index of the other. By induction, every coordinate occurs
        equally often and its k-th occurrence has the same indices in all other leaves: this is
        trivial for a leaf; a sum lists the occurrences in its terms one after the other; a product
        with the leaf in one factor lists them by that factor's occurrences and the other factors'
        indices, in an order that does not depend on the coordinate. A leaf in two factors (see
        `repeated`) has no such coordinates.

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
        return self._of_terms(axis) if isinstance(axis, Sum) else self._of_factors(axis)

    def _of_terms(self, axis: Sum) -> dict[Leaf, np.ndarray]:
        found: dict[Leaf, np.ndarray] = {}
        start = 0
        for part in axis.parts:
            for leaf, own in self.coordinates(part).items():
                # [axis.size], -1 outside the terms that hold the leaf.
                place = found.setdefault(leaf, np.full(axis.size, -1))
                place[start : start + part.size] = own
            start += part.size
        return found

    def _of_factors(self, axis: Product) -> dict[Leaf, np.ndarray]:
        found: dict[Leaf, np.ndarray] = {}
        slower = 1  # size of the factors before this one
        for part in axis.parts:
            faster = axis.size // (slower * part.size)
            for leaf, own in self.coordinates(part).items():
                found[leaf] = np.tile(np.repeat(own, faster), slower)  # [part.size] to [axis.size]
            slower *= part.size
        return found


# Unification: two axes are permuted alike, so they are refined until their leaves are the same.

MISALIGNED = "reshaped or sliced across its parts"


def unify(axes: Axes, a: Axis, b: Axis) -> None:
    """Record that two axes are permuted alike: each index of one is the same index of the other.

    A leaf is bound to the other axis. Products are split into common factors, sums at common
    boundaries, and a product against a sum into rows of its first factor. Where that is impossible
    (4 x 6 against 6 x 4), both are frozen.

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
    a = axes.find(a)
    b = axes.find(b)
    if a == b:
        return
    if a.size == b.size and isinstance(a, Leaf) and isinstance(b, Leaf):
        older, newer = sorted((a, b), key=lambda leaf: leaf.label)
        axes.bind(newer, older)  # so that the leaves of parameters, the oldest, stay
    elif a.size == b.size and isinstance(a, Leaf):
        axes.bind(a, b)
    elif a.size == b.size and isinstance(b, Leaf):
        axes.bind(b, a)
    elif a.size != b.size or not _align(axes, a, b):
        axes.freeze(a, MISALIGNED)
        axes.freeze(b, MISALIGNED)


def pieces(axes: Axes, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Split an axis into consecutive pieces.

    Args:
      axes: what is known; it is changed.
      axis: the axis.
      sizes: of the pieces; their sum is the axis' size.

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
    """Unify term by term or factor by factor; return False where these do not fit."""
    left = axes.terms(a)
    right = axes.terms(b)
    # Neither is a sum: both are products.
    if len(left) == len(right) == 1:
        return _align_factors(axes, axes.factors(a), axes.factors(b))
    return _align_terms(axes, left, right)


def _align_terms(axes: Axes, left: Sequence[Axis], right: Sequence[Axis]) -> bool:
    """Unify sums of equal size.

    Of the two first terms the longer is split where a run of the other sum's terms ends.
    """
    short = deque(left)
    long = deque(right)
    while short and long:
        shorter = _first(axes, short)
        longer = _first(axes, long)
        # Each list goes with its own first term: a rest that is split off returns to that list.
        if shorter.size > longer.size:
            shorter, longer = longer, shorter
            short, long = long, short
        if not _align_first(axes, [shorter], short, longer, long):
            return False
    return True


def _first(axes: Axes, terms: deque[Axis]) -> Axis:
    """Pop the first term, which may have been split since the list was made."""
    first, *rest = axes.terms(terms.popleft())
    terms.extendleft(reversed(rest))
    return first


def _align_first(
    axes: Axes, run: list[Axis], short: deque[Axis], whole: Axis, long: deque[Axis]
) -> bool:
    """Unify a term with a run of the other sum's terms.

    The run has the term's size, or the term is split at the end of the shortest run where it can be
    split, and its rest goes back to its list.
    """
    while (size := sum(term.size for term in run)) < whole.size:
        # A term of 5 against 2 + ...: it is 2 + 3, and the 3 goes on to the next term.
        if (cut := _cut(axes, whole, size)) is not None:
            unify(axes, concatenation(run), cut[0])
            long.appendleft(cut[1])
            return True
        run.append(_first(axes, short))
    if size == whole.size and len(run) == 1:
        unify(axes, whole, run[0])
        return True
    # The term could be split at none of the boundaries in the run.
    return False


def _cut(axes: Axes, term: Axis, at: int) -> tuple[Axis, Axis] | None:
    """Split a term in two, a leaf anywhere, a product between rows; None where it is impossible."""
    # At a boundary between rows, where the first factor itself can be split.
    if isinstance(term, Product):
        first, *rest = axes.factors(term)
        if at * first.size % term.size:
            return None
        cut = _cut(axes, first, at * first.size // term.size)
        return cut and (product([cut[0], *rest]), product([cut[1], *rest]))
    if not isinstance(term, Leaf):
        return None
    left = axes.leaf(at)
    right = axes.leaf(term.size - at)
    axes.bind(term, concatenation([left, right]))
    return left, right


def _align_factors(axes: Axes, left: Sequence[Axis], right: Sequence[Axis]) -> bool:
    """Unify products of equal size.

    Of the two first factors the larger is unified with a run of the other product's factors that
    has its size, or split if it is a leaf.
    """
    small = deque(left)
    large = deque(right)
    while small and large:
        # The first factors may have been split since the lists were made.
        for factors in (small, large):
            factors.extendleft(reversed(axes.factors(factors.popleft())))
        if small[0].size > large[0].size:
            small, large = large, small
        whole = large.popleft()
        if run := _run(small, whole.size):
            # 6 against 2 x 3: the run of factors is the whole.
            unify(axes, whole, product([small.popleft() for _ in range(run)]))
        elif isinstance(whole, Leaf) and whole.size % small[0].size == 0:
            # A leaf of 12 against 4 x 6: it is 4 x 3, and the 3 goes on to the next factor.
            parts = (axes.leaf(small[0].size), axes.leaf(whole.size // small[0].size))
            axes.bind(whole, product(parts))
            large.extendleft(reversed(parts))
        else:
            return False
    return True


def _run(factors: Sequence[Axis], size: int) -> int:
    """Return how many leading factors have a size as their product, 0 if none have."""
    total = 1
    for count, factor in enumerate(factors, 1):
        total *= factor.size
        if total == size:
            return count
    return 0


# The rules of primitives that move entries.

Dims = tuple[Axis, ...]  # the axes of one value
Results = Sequence[Dims] | None  # of an equation; None where a rule does not know this variant


def alike(axes: Axes, values: Iterable[Dims]) -> Dims:
    """Unify values axis by axis and return the axes of an elementwise result.

    Scalars and axes of size 1 are broadcast.
    """
    results: list[Axis] = []
    # Scalars have no axes to unify; all other operands of an equation have the same rank.
    for aligned in zip(*(dims for dims in values if dims), strict=True):
        first, *others = [axis for axis in aligned if axis.size != 1] or [UNIT]
        for other in others:
            unify(axes, first, other)
        results.append(first)
    return tuple(results)


def shape(eqn: JaxprEqn) -> Shape:
    """Return the shape of an equation's first result."""
    aval: Aval = eqn.outvars[0].aval
    return aval.shape


def part(axes: Axes, axis: Axis, size: int, reason: str) -> Axis:
    """Return an axis that is taken whole; else freeze it and return an axis of that size."""
    if axis.size == size:
        return axis
    axes.freeze(axis, reason)
    return axes.leaf(size, reason)


def reshape(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Match the shortest runs of axes whose sizes multiply to the same."""
    old = [axis.size for axis in args[0]]
    new = eqn.params["new_sizes"]
    if eqn.params.get("dimensions") is not None or 0 in old:
        return None
    results: list[Axis] = [UNIT] * len(new)
    for old_run, new_run in _runs(old, new):
        # (2, 3, 4) to (6, 4): the runs are [2, 3] to [6], and [4] to [4].
        whole = product([args[0][i] for i in old_run])
        made = [whole] if len(new_run) == 1 else [axes.leaf(new[i]) for i in new_run]
        unify(axes, whole, product(made))
        for i, axis in zip(new_run, made, strict=True):
            results[i] = axis
    return [tuple(results)]


def _runs(old: Sequence[int], new: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """Yield runs of old and of new axes of equal size, without axes of size 1."""
    # Extend the run with the smaller product until both products are equal.
    left = deque(i for i, size in enumerate(old) if size != 1)
    right = deque(i for i, size in enumerate(new) if size != 1)
    while left:
        old_run = [left.popleft()]
        new_run = [right.popleft()]
        old_size = old[old_run[0]]
        new_size = new[new_run[0]]
        while old_size != new_size:
            if old_size < new_size:
                old_run.append(left.popleft())
                old_size *= old[old_run[-1]]
            else:
                new_run.append(right.popleft())
                new_size *= new[new_run[-1]]
        yield old_run, new_run


def broadcast_in_dim(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """A new axis is not frozen, as the value is the same at every index of it."""
    results: list[Axis] = [axes.leaf(size) for size in eqn.params["shape"]]
    for axis, i in zip(args[0], eqn.params["broadcast_dimensions"], strict=True):
        results[i] = axis if axis.size == results[i].size else results[i]
    return [tuple(results)]


def transpose(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Reorder the axes."""
    return [tuple(args[0][i] for i in eqn.params["permutation"])]


def squeeze(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Remove axes of size 1."""
    return [tuple(axis for i, axis in enumerate(args[0]) if i not in eqn.params["dimensions"])]


def expand_dims(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Add axes of size 1."""
    results = list(args[0])
    for i in sorted(eqn.params["dimensions"]):
        results.insert(i, UNIT)
    return [tuple(results)]


def tile(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Repeat: a result axis is (number of the copy) x (old axis)."""
    repeats = zip(args[0], eqn.params["reps"], strict=True)
    return [tuple(product([axes.leaf(times), axis]) for axis, times in repeats)]


def stack(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Stack values along a new axis, whose indices are different values and cannot be permuted."""
    results = list(alike(axes, args))
    results.insert(eqn.params["axis"], concatenation([UNIT] * len(args)))
    return [tuple(results)]


def concatenate(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Concatenate along one axis; the other axes are the same in all operands."""
    i = eqn.params["dimension"]
    rest = alike(axes, [(*dims[:i], UNIT, *dims[i + 1 :]) for dims in args])
    return [(*rest[:i], concatenation([dims[i] for dims in args]), *rest[i + 1 :])]


def split(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Split an axis into consecutive pieces."""
    i = eqn.params["axis"]
    cut = pieces(axes, args[0][i], eqn.params["sizes"])  # one axis for each result
    return [(*args[0][:i], piece, *args[0][i + 1 :]) for piece in cut]


def unstack(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Return the slices along an axis, each a result of its own."""
    # Each index becomes a value of its own: split into units, the axis has no permutation left.
    i = eqn.params["axis"]
    pieces(axes, args[0][i], [1] * args[0][i].size)
    return [(*args[0][:i], *args[0][i + 1 :]) for _ in eqn.outvars]


def slice_(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Take a range of each axis, or every n-th index of a range."""
    p = eqn.params
    strides = p["strides"] or [1] * len(args[0])
    limits = zip(args[0], p["start_indices"], p["limit_indices"], strides, strict=True)
    return [tuple(_piece(axes, axis, *limit) for axis, *limit in limits)]


def _piece(axes: Axes, axis: Axis, start: int, limit: int, stride: int) -> Axis:
    """Return a range of an axis, perhaps strided.

    Every n-th index of whole rows of n is a column of them, as of interleaved channels.
    """
    if stride == 1:
        return pieces(axes, axis, [start, limit - start, axis.size - limit])[1]
    first, count = interleaved(start, limit, stride)
    last = first + count * stride
    if count > 1 and last <= axis.size:
        # [count, stride] interleaved: the slice is one column of it.
        rows = pieces(axes, axis, [first, count * stride, axis.size - last])[1]
        column = axes.leaf(count)
        unify(axes, rows, product([column, concatenation([UNIT] * stride)]))
        return column
    axes.freeze(axis, "strided slice")
    return axes.leaf(-(-(limit - start) // stride), "strided slice")


def interleaved(start: int, limit: int, stride: int) -> tuple[int, int]:
    """Return the start and the number of the rows from which a strided slice takes one index each.

    Example:
      >>> interleaved(1, 8, 2), interleaved(5, 8, 2)
      ((0, 4), (4, 2))
    """
    return start - start % stride, -(-(limit - start) // stride)


def pad(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Put an axis between two axes of padding, whose indices all hold the same value."""
    results = []
    for axis, (low, high, interior) in zip(args[0], eqn.params["padding_config"], strict=True):
        # Elsewhere the axis is no longer one whole range of the result.
        if interior or low < 0 or high < 0:
            axes.freeze(axis, "dilated or cropped")
            size = axis.size + max(axis.size - 1, 0) * interior + low + high
            results.append(axes.leaf(size, "dilated or cropped"))
        else:
            results.append(concatenation([axes.leaf(low), axis, axes.leaf(high)]))
    return [tuple(results)]


def dynamic_slice(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Take a range whose start is data: an axis passes only whole."""
    ranges = zip(args[0], eqn.params["slice_sizes"], strict=True)
    return [tuple(part(axes, axis, size, "dynamic slice") for axis, size in ranges)]


def dynamic_update_slice(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Replace a range whose start is data: an axis passes only whole."""
    # args: the value, its replacement, then one start for each axis.
    for axis, new in zip(args[0], args[1], strict=True):
        if axis.size == new.size:
            unify(axes, axis, new)
        else:
            axes.freeze(axis, "dynamic update")
            axes.freeze(new, "dynamic update")
    return [args[0]]


def gather(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Look up by index: indexed axes are frozen, those taken whole pass through."""
    numbers = eqn.params["dimension_numbers"]
    sizes = eqn.params["slice_sizes"]
    table, indices = args[:2]  # the last axis of the indices holds one number for each indexed axis
    for i in numbers.collapsed_slice_dims:
        axes.freeze(table[i], "looked up by index")
    batching = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    for i, j in batching:
        unify(axes, table[i], indices[j])
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    # The result interleaves the table's window axes and the batch axes of the indices.
    windows = [i for i in range(len(table)) if i not in gone]
    whole = iter([part(axes, table[i], sizes[i], "looked up by index") for i in windows])
    rest = iter(indices[:-1])
    from_table = [i in numbers.offset_dims for i in range(len(shape(eqn)))]
    return [tuple(next(whole if taken else rest) for taken in from_table)]


def scatter(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Write or add at indices: the same as `gather`, with updates in place of results."""
    numbers = eqn.params["dimension_numbers"]
    table, indices, updates = args
    for i in numbers.inserted_window_dims:
        axes.freeze(table[i], "written by index")
    batching = zip(
        numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
    )
    for i, j in batching:
        unify(axes, table[i], indices[j])
    # The updates interleave the table's window axes and the batch axes of the indices.
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    whole = iter([table[i] for i in range(len(table)) if i not in gone])
    rest = iter(indices[:-1])
    for i, axis in enumerate(updates):
        other = next(whole if i in numbers.update_window_dims else rest)
        unify(axes, axis, other)
    return [table]
