"""What is left of axes if only some coordinates of some leaves are kept: their indices and their lengths."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress_jax.trace._analyse import Analysis
from compress_jax.trace.axes import Axes, Axis, Leaf, Sum
from compress_jax.trace.axis_moves import Dims
from compress_jax.trace.group import Group
from compress_jax.trace.site import Shape


@dataclass(frozen=True)
class Kept:
    """Coordinates that are kept of leaves; leaves that are not listed stay whole.

    Attributes:
      axes: what is known about axes.
      indices: by leaf, none of them bound, the coordinates to keep, ascending.
    """

    axes: Axes
    indices: Mapping[Leaf, np.ndarray]

    def of(self, axis: Axis) -> np.ndarray:
        """Return the indices of an axis that are left, ascending.

        Example:
          >>> axes = Axes()
          >>> rows, columns = axes.leaf(2), axes.leaf(3)
          >>> from compress_jax.trace.axes import product
          >>> Kept(axes, {columns: np.array([0, 2])}).of(product([rows, columns])).tolist()
          [0, 2, 3, 5]
        """
        axis = self.axes.find(axis)
        if isinstance(axis, Leaf):
            return self.indices.get(axis, np.arange(axis.size))
        if isinstance(axis, Sum):
            starts = np.cumsum([0, *(part.size for part in axis.parts)])
            return np.concatenate([start + self.of(part) for start, part in zip(starts, axis.parts, strict=False)])
        found = np.zeros(1, int)
        for part in axis.parts:
            found = (found[:, None] * part.size + self.of(part)[None, :]).reshape(-1)
        return found

    def size(self, axis: Axis) -> int:
        """Return how many indices of an axis are left."""
        axis = self.axes.find(axis)
        if isinstance(axis, Leaf):
            return len(self.indices[axis]) if axis in self.indices else axis.size
        sizes = [self.size(part) for part in axis.parts]
        return sum(sizes) if isinstance(axis, Sum) else math.prod(sizes)

    def shape(self, dims: Dims) -> Shape:
        """Return the shape of what is left of a value."""
        return tuple(map(self.size, dims))


def leaves_of(analysis: Analysis, group: Group) -> tuple[Leaf, ...]:
    """Return the leaves that a group is in an analysis, perhaps of the same function for inputs of other shapes.

    They are those whose coordinates along every member's axis are the group's: one, or several where shorter inputs no
    longer tie all members together.

    Args:
      analysis: of the function.
      group: one that `groups` found, for the same parameters.

    Returns:
      The leaves; none if in this analysis the members' axes are made of other parts.
    """
    found: list[Leaf] = []
    for path, axis in group.members:
        along = analysis.walk.axes.coordinates(analysis.params[path][axis])
        same = [leaf for leaf, place in along.items() if np.array_equal(place, group.coordinates[path, axis])]
        if not same:
            return ()
        found += same
    return tuple(dict.fromkeys(found))


def cut(x: Any, shape: Shape) -> Any:
    """Return the first entries along every axis: a constant's, which are all the same along whatever may be shortened."""
    return x if np.shape(x) == shape else x[tuple(map(slice, shape))]
