"""Two axes turn out to be one: refine both until their leaves are the same."""

from collections import deque
from collections.abc import Sequence

from compress_jax.trace.axes import Axes, Axis, Leaf, Product, concatenation, product

MISALIGNED = "reshaped or sliced across its parts"


def unify(axes: Axes, a: Axis, b: Axis) -> None:
    """Record that two axes are permuted alike: each index of one is the same index of the other.

    A leaf becomes whatever the other axis is. Products are cut into common factors, sums at common places, a product that
    meets a sum into rows of its first factor. Where that cannot be done (4 x 6 meets 6 x 4), both are frozen.

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
        axes.bind(*((a, b) if a.label > b.label else (b, a)))  # the older one stays: parameters are the oldest
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


def _align_first(axes: Axes, run: list[Axis], short: deque[Axis], whole: Axis, long: deque[Axis]) -> bool:
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
        cut = _cut(axes, first, at * first.size // term.size) if at * first.size % term.size == 0 else None
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
