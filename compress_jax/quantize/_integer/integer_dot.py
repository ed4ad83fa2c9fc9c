"""Contractions of integer codes, exact in int32, with any zero points, and scaled in float32."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.quantize._activations.quantizer import ActivationQuantizer, OperandState
from compress_jax.trace._jaxpr.site import AxisIndices, Shape, Site


@dataclass(frozen=True)
class OperandAxes:
    """The axes of one operand of a contraction.

    Values for its rows (a scale for each token or output channel) are stored as an array whose
    axes are ``kept``, each of full length or 1. Values for groups of summed entries have the groups
    as an additional last axis.

    Attributes:
      shape: the operand's shape.
      kept: axes that the result has as well: of a product the batch axes, then the others; of an
        image the examples, of a kernel its outputs.
      summed: the others, in the order in which the operands are paired.
      out: for each of ``kept``, its axis in the result; increasing.
      rank: the result's.
    """

    shape: Shape
    kept: AxisIndices
    summed: AxisIndices
    out: AxisIndices
    rank: int

    @property
    def products(self) -> int:
        """How many entries are summed over."""
        return math.prod(self.shape[axis] for axis in self.summed)

    def rows(self, x: jax.Array) -> jax.Array:
        """Return values that are the same for all summed entries, by ``kept`` axes.

        Args:
          x: a scalar, or an array of the operand's rank with length 1 along the summed axes.

        Returns:
          Array of as many axes as ``kept``.
        """
        if jnp.ndim(x) == 0:
            return jnp.reshape(x, (1,) * len(self.kept))
        return jnp.transpose(x, (*self.kept, *self.summed)).reshape(
            [x.shape[axis] for axis in self.kept]
        )

    def facing(self, rows: jax.Array) -> jax.Array:
        """Return values of rows in the shape that broadcasts against the result."""
        # `out` increases, so the reshape only inserts axes of length 1.
        shape = np.ones(self.rank, int)
        shape[list(self.out)] = rows.shape
        return rows.reshape(shape)

    def matrix(self, x: jax.Array) -> jax.Array:
        """Return the operand as ``[*kept, products]``."""
        return jnp.transpose(x, (*self.kept, *self.summed)).reshape(
            *(self.shape[axis] for axis in self.kept), -1
        )

    def operand(self, x: jax.Array) -> jax.Array:
        """Undo `matrix`; ``kept`` axes may have length 1, and so may the last."""
        order = (*self.kept, *self.summed)
        summed = [self.shape[axis] if x.shape[-1] > 1 else 1 for axis in self.summed]
        return jnp.transpose(x.reshape(*x.shape[:-1], *summed), np.argsort(order).tolist())


def operand_axes(site: Site, index: int) -> OperandAxes:
    """Return the axes of an operand.

    Args:
      site: the contraction.
      index: 0 for the first operand, 1 for the second.

    Returns:
      The axes.

    Example:
      >>> shapes, dtypes = ((2, 5, 3), (3, 4), (2, 5, 4)), ["float32"] * 3
      >>> site = Site("a", "dot", None, None, *shapes, *dtypes, ((2,), (0,)))
      >>> operand_axes(site, 1).kept, operand_axes(site, 1).out, operand_axes(site, 1).products
      ((1,), (2,), 3)
    """
    shape = (site.lhs_shape, site.rhs_shape)[index]
    rank = len(site.out_shape)
    # Of an image only the examples count as rows, as every pixel is in several windows.
    if site.kind == "conv":
        numbers = site.params["dimension_numbers"]
        spec = (numbers.lhs_spec, numbers.rhs_spec)[index]
        summed = tuple(sorted(spec[1:]))
        # lhs_spec starts with the examples, rhs_spec with the outputs, and out_spec with both.
        return OperandAxes(shape, spec[:1], summed, (numbers.out_spec[index],), rank)
    # A dot's result has the batch axes first, then the free axes of lhs, then those of rhs.
    summed = site.contracting[index]
    batch = site.batch[index]
    free = tuple(axis for axis in range(len(shape)) if axis not in (*summed, *batch))
    start = rank - len(free) if index else len(batch)
    out = (*range(len(batch)), *range(start, start + len(free)))
    return OperandAxes(shape, (*batch, *free), summed, out, rank)


LARGEST_INT32 = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Coded:
    """One operand of a contraction in integers: ``value = (codes - zero) * scale``.

    Attributes:
      codes: int8, of the operand's shape.
      scale: float32 ``[*kept axes, groups]``, each 1 long or whole (see `OperandAxes`).
      zero: int32, likewise; None for 0.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None


def encode(
    quantizer: ActivationQuantizer, site: Site, index: int, x: jax.Array, own: OperandState
) -> Coded:
    """Return activations in integers.

    Args:
      quantizer: places the grid.
      site: the contraction.
      index: which operand.
      x: the operand.
      own: its calibrated range, empty if the quantizer is dynamic.

    Returns:
      The codes of the grid, counted from the middle one. A row that holds NaN has the scale NaN, so
      that its results are NaN.

    Example:
      >>> from compress_jax.quantize._activations.dynamic import dynamic
      >>> shapes, dtypes = ((1, 2), (2, 4), (1, 4)), ["float32"] * 3
      >>> site = Site("a", "dot", None, None, *shapes, *dtypes, ((1,), (0,)))
      >>> coded = encode(dynamic(bits=8, symmetric=False), site, 0, jnp.array([[0.0, 2.55]]), {})
      >>> coded.codes.tolist(), coded.zero.tolist(), coded.scale.round(4).tolist()
      ([[-128, 127]], [[-128]], [[0.009999999776482582]])
    """
    grid = quantizer.grid
    axes = operand_axes(site, index)
    scale, zero_point = quantizer.scale_fn(site, index, x, own)
    middle = 2 ** (grid.bits - 1)
    # Codes of the grid start at 0, signed ones at -middle: codes and zero points shift alike.
    codes = (grid.encode(x, scale, zero_point) - middle).astype(jnp.int8)
    # An int8 code cannot hold NaN, so the row's scale does.
    unknown = axes.rows(jnp.isnan(x).any(axes.summed, keepdims=True))
    scale = jnp.where(unknown, jnp.nan, axes.rows(scale))[..., None]  # [*kept, 1 group]
    if grid.symmetric:
        return Coded(codes, scale)
    return Coded(codes, scale, axes.rows(zero_point.astype(jnp.int32) - middle)[..., None])


def product(site: Site, lhs: Coded, rhs: Coded) -> jax.Array:
    r"""Return the contraction of two operands in integers.

    It is :math:`s_l s_r \sum (q_l - z_l) (q_r - z_r)`. The sum is exact. Where an operand has a
    scale for each of several groups, the sums of the groups are scaled and added one after the
    other in float32.

    Args:
      site: the contraction.
      lhs: its first operand.
      rhs: its second operand; at most one of them has groups.

    Returns:
      float32, of the result's shape.

    Example:
      >>> shapes, dtypes = ((1, 2), (2, 1), (1, 1)), ["float32"] * 3
      >>> numbers = {"dimension_numbers": (((1,), (0,)), ((), ()))}
      >>> site = Site("a", "dot", None, None, *shapes, *dtypes, ((1,), (0,)), params=numbers)
      >>> half, one = jnp.full((1, 1), 0.5), jnp.ones((1, 1))
      >>> lhs = Coded(jnp.array([[100, -128]], jnp.int8), half, jnp.full((1, 1), -28))
      >>> rhs = Coded(jnp.array([[3], [1]], jnp.int8), one)
      >>> float(product(site, lhs, rhs)[0, 0])  # (128 * 3 - 100) / 2
      142.0
    """
    axes = (operand_axes(site, 0), operand_axes(site, 1))
    if max(lhs.scale.shape[-1], rhs.scale.shape[-1]) > 1:
        return _by_groups(site, axes, (lhs, rhs))
    scale = axes[0].facing(lhs.scale[..., 0]) * axes[1].facing(rhs.scale[..., 0])
    return accumulate(site, lhs, rhs).astype(jnp.float32) * scale


def accumulate(site: Site, lhs: Coded, rhs: Coded) -> jax.Array:
    r"""Return :math:`\sum (q_l - z_l) (q_r - z_r)` of operands without groups, int32 and exact.

    It is :math:`\sum q_l q_r - z_l \sum q_r - z_r \sum q_l + z_l z_r \sum 1`, where the other sums
    are the same contraction with ones: at the border of a padded image they leave out what the
    padding leaves out. Sums wrap around, so only the result must be within int32 (see `fits`).

    Args:
      site: the contraction.
      lhs: its first operand.
      rhs: its second operand.

    Returns:
      int32, of the result's shape.
    """
    # The precision was chosen for floats; sums in int32 are exact without one.
    site = replace(site, params={**site.params, "precision": None})
    left = operand_axes(site, 0)
    right = operand_axes(site, 1)
    total = site.contract(lhs.codes, rhs.codes, preferred_element_type=jnp.int32)
    if lhs.zero is not None:
        total = total - left.facing(lhs.zero[..., 0]) * _of_ones(site, left, rhs.codes, 0)
    if rhs.zero is not None:
        total = total - right.facing(rhs.zero[..., 0]) * _of_ones(site, right, lhs.codes, 1)
    if lhs.zero is not None and rhs.zero is not None:
        both = left.facing(lhs.zero[..., 0]) * right.facing(rhs.zero[..., 0])
        # Ones with ones count the products of each result: fewer at a padded border.
        total = total + both * _of_ones(site, right, _ones(site, left, 0), 1)
    return total


def _ones(site: Site, axes: OperandAxes, index: int) -> jax.Array:
    """Return ones for an operand: one row, one image, or one output for each feature group."""
    shape = list(axes.shape)
    for axis in axes.kept[len(site.batch[index]) :]:
        shape[axis] = site.groups if index else 1
    return jnp.ones(shape, jnp.int8)


def _of_ones(site: Site, axes: OperandAxes, other: jax.Array, index: int) -> jax.Array:
    """Contract an operand with ones in the place of the other."""
    ones = _ones(site, axes, index)
    operands = (other, ones) if index else (ones, other)
    # The ones are one row long: their sums are the same for all rows, and broadcast against them.
    sums = site.contract(*operands, preferred_element_type=jnp.int32)
    if index and site.groups > 1:  # the ones have one output for each feature group
        return jnp.repeat(sums, axes.shape[axes.kept[0]] // site.groups, axis=axes.out[0])
    return sums


def _by_groups(
    site: Site, axes: tuple[OperandAxes, OperandAxes], operands: tuple[Coded, Coded]
) -> jax.Array:
    """Contract group after group, in a fixed order of the float32 additions."""
    groups = max(each.scale.shape[-1] for each in operands)
    batch = len(site.batch[0])
    left_parts = _cut(axes[0], operands[0], groups, batch)
    right_parts = _cut(axes[1], operands[1], groups, batch)

    def add_group(
        total: jax.Array, group: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]
    ) -> tuple[jax.Array, None]:
        (left, left_scale, left_zero), (right, right_scale, right_zero) = group
        # As `accumulate`, but the sums with ones are sums along k: [batch, m] and [batch, n].
        sums = jnp.einsum("bmk,bnk->bmn", left, right, preferred_element_type=jnp.int32)
        sums -= left_zero[:, :, None] * right.sum(-1, dtype=jnp.int32)[:, None, :]
        sums -= right_zero[:, None, :] * left.sum(-1, dtype=jnp.int32)[:, :, None]
        sums += left_zero[:, :, None] * right_zero[:, None, :] * left.shape[-1]
        scale = left_scale[:, :, None] * right_scale[:, None, :]
        return total + sums.astype(jnp.float32) * scale, None

    _, lead, rows, _ = left_parts[0].shape
    start = jnp.zeros((lead, rows, right_parts[0].shape[2]), jnp.float32)  # [batch, m, n]
    total, _ = jax.lax.scan(add_group, start, (left_parts, right_parts))
    return total.reshape(site.out_shape)


def _cut(
    axes: OperandAxes, operand: Coded, groups: int, batch: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return codes ``[groups, batch, rows, size]``, scales and zeros ``[groups, batch, rows]``."""
    sizes = [axes.shape[axis] for axis in axes.kept]
    lead = math.prod(sizes[:batch]), math.prod(sizes[batch:])

    def spread(x: jax.Array) -> jax.Array:
        # [*kept or 1, groups or 1] -> [groups, batch, rows]
        return jnp.moveaxis(jnp.broadcast_to(x, (*sizes, groups)).reshape(*lead, groups), -1, 0)

    # A group is a run of summed entries: [*kept, products] -> [batch, rows, groups, size], then
    # the groups first, where `scan` takes them.
    codes = jnp.moveaxis(axes.matrix(operand.codes).reshape(*lead, groups, -1), 2, 0)
    zero = operand.zero
    if zero is None:
        zero = jnp.zeros((1,) * (len(sizes) + 1), jnp.int32)
    return codes, spread(operand.scale), spread(zero)


def fits(products: int, largest: tuple[int, int]) -> bool:
    """Tell whether a sum of so many products of levels is within int32, whatever they are.

    Args:
      products: how many are added.
      largest: the largest magnitude of either operand's levels.

    Returns:
      Whether ``products * largest[0] * largest[1] < 2**31``.

    Example:
      >>> fits(131071, (128, 128)), fits(131072, (128, 128))
      (True, False)
    """
    return products * largest[0] * largest[1] <= LARGEST_INT32
