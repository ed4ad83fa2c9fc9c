"""One operand of a contraction: which of its axes are summed over, and where the others are found in the result."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.trace.site import Axes, Shape, Site


@dataclass(frozen=True)
class Side:
    """The axes of one operand.

    What belongs to its rows (a scale for each token or output channel) is kept as an array whose axes are ``kept``, any of
    them 1 long; what belongs to groups of summed entries too has the groups as last axis.

    Attributes:
      shape: of the operand.
      kept: axes that the result has as well: of a product the batch axes, then the others; of an image the examples, of a
        kernel its outputs.
      summed: the others, in the order in which the operands are paired.
      out: for each of ``kept``, its axis in the result; rising.
      rank: of the result.
    """

    shape: Shape
    kept: Axes
    summed: Axes
    out: Axes
    rank: int

    @property
    def products(self) -> int:
        """How many entries are summed over."""
        return math.prod(self.shape[axis] for axis in self.summed)

    def rows(self, x: jax.Array) -> jax.Array:
        """Return what is the same for all summed entries, by ``kept`` axes.

        Args:
          x: a scalar, or an array of the operand's rank with length 1 along the summed axes.

        Returns:
          Array of as many axes as ``kept``.
        """
        if jnp.ndim(x) == 0:
            return jnp.reshape(x, (1,) * len(self.kept))
        return jnp.transpose(x, (*self.kept, *self.summed)).reshape([x.shape[axis] for axis in self.kept])

    def facing(self, rows: jax.Array) -> jax.Array:
        """Return what belongs to rows in the shape that broadcasts against the result."""
        shape = np.ones(self.rank, int)
        shape[list(self.out)] = rows.shape
        return rows.reshape(shape)

    def matrix(self, x: jax.Array) -> jax.Array:
        """Return the operand as ``[*kept, products]``."""
        return jnp.transpose(x, (*self.kept, *self.summed)).reshape(*(self.shape[axis] for axis in self.kept), -1)

    def operand(self, x: jax.Array) -> jax.Array:
        """Undo `matrix`; ``kept`` axes may be 1 long, and so may be the last if all summed entries share a number."""
        order = (*self.kept, *self.summed)
        summed = [self.shape[axis] if x.shape[-1] > 1 else 1 for axis in self.summed]
        return jnp.transpose(x.reshape(*x.shape[:-1], *summed), np.argsort(order).tolist())


def side(site: Site, index: int) -> Side:
    """Return the axes of an operand.

    Args:
      site: the contraction.
      index: 0 for the first operand, 1 for the second.

    Returns:
      The side.

    Example:
      >>> site = Site("a", "dot", None, None, (2, 5, 3), (3, 4), (2, 5, 4), *["float32"] * 3, ((2,), (0,)))
      >>> side(site, 1).kept, side(site, 1).out, side(site, 1).products
      ((1,), (2,), 3)
    """
    shape, rank = (site.lhs_shape, site.rhs_shape)[index], len(site.out_shape)
    if site.kind == "conv":
        numbers = site.params["dimension_numbers"]
        spec = (numbers.lhs_spec, numbers.rhs_spec)[index]
        return Side(shape, spec[:1], tuple(sorted(spec[1:])), (numbers.out_spec[index],), rank)
    summed, batch = site.contracting[index], site.batch[index]
    free = tuple(axis for axis in range(len(shape)) if axis not in (*summed, *batch))
    start = rank - len(free) if index else len(batch)
    out = (*range(len(batch)), *range(start, start + len(free)))
    return Side(shape, (*batch, *free), summed, out, rank)
