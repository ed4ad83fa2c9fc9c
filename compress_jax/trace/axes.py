"""What an axis of an array is made of, and what is known about it: leaves, products (reshape), sums (concatenate).

Everything that may be permuted or removed as one is a leaf. An axis is then a small tree: ``(heads, head_dim)`` reshaped
into one axis is a product, row-major; two axes put end to end are a sum. `Axes` remembers which leaves turned out to be the
same, which turned out to be made of parts, and which must stay as they are, and why.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


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
    return parts[0] if len(parts) == 1 else Product(math.prod(part.size for part in parts), parts) if parts else UNIT


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
                self.bound[axis.label] = self.bound[following.label]  # shortens the way for the next time
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
        return [factor for part in axis.parts for factor in self.factors(part)] if isinstance(axis, Product) else [axis]

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

        The coordinates alone say how permuting a leaf permutes the axis: the k-th index in which one coordinate occurs
        goes where the k-th of the other was. Each coordinate occurs equally often, and its k-th occurrence has the same
        surroundings as any other's: so it is in a leaf; a sum lists the occurrences of its terms one after the other; a
        product with the leaf in one factor lists them by that factor's occurrences and the other factors' indices, in an
        order that does not depend on the coordinate. A leaf in two factors (see `repeated`) has no such coordinates.

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
                    found.setdefault(leaf, np.full(axis.size, -1))[before : before + part.size] = own
                else:
                    found[leaf] = np.tile(np.repeat(own, axis.size // (before * part.size)), before)
            before = before + part.size if isinstance(axis, Sum) else before * part.size
        return found
