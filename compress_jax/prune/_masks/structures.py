"""Structures: which entries are kept or pruned together. Small values, given to any pruning method.

A structure says of a leaf's axes whether it fits (`why_not`), and what goes together: the window of
a unit, or groups of which n of m entries are kept.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.arguments import axes as checked_axes
from compress_jax.core.arguments import is_whole, whole
from compress_jax.core.axes import Axes as Layout
from compress_jax.core.errors import ArgumentError
from compress_jax.core.exact import exact_sum, scale_exponent
from compress_jax.core.levels import power_of_two

# From scores of entries to scores of units (blocks of entries that go together), and from masks of
# units back.


Window = tuple[int, ...]
REDUCTIONS = ("sum", "mean", "l2", "max")


def check_reduction(reduce: str) -> str:
    """Return the name of a reduction, or raise a ValueError that lists them.

    Example:
      >>> check_reduction("mean")
      'mean'
    """
    if not isinstance(reduce, str) or reduce not in REDUCTIONS:
        raise ArgumentError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    return reduce


def units(shape: tuple[int, ...], window: Window) -> tuple[int, ...]:
    """Return how many units there are along each axis, one that is not full at an end included.

    Example:
      >>> units((5, 8), (2, 4))
      (3, 2)
    """
    return tuple(-(-n // w) for n, w in zip(shape, window, strict=True))


def pooled(scores: jax.Array, window: Window, reduce: str) -> jax.Array:
    r"""Return the score of every unit.

    Of the scores s in a unit (a last one that is not full has fewer): ``"sum"`` :math:`\sum s`,
    ``"mean"`` their mean, ``"l2"`` :math:`\sqrt{\sum s^2}`, ``"max"`` the largest. Sums are taken
    in fixed point (`exact_sum`), so that the result has the same bits under every sharding.

    Args:
      scores: floating point, any shape.
      window: static, the shape of a unit, of the rank of ``scores``.
      reduce: one of `REDUCTIONS`.

    Returns:
      float32, shape ``units(scores.shape, window)``.

    Example:
      >>> pooled(jnp.arange(6.0).reshape(2, 3), (2, 2), "mean").tolist()
      [[2.0, 3.5]]
    """
    x = scores.astype(jnp.float32)
    within = tuple(range(1, 2 * x.ndim, 2))
    if reduce == "max":
        return _tiled(x, window, -jnp.inf).max(within)
    if reduce == "l2":
        exponent = scale_exponent(x)
        normal = x * power_of_two(-exponent)  # squares neither overflow nor vanish
        return jnp.sqrt(exact_sum(_tiled(normal * normal, window), within)) * power_of_two(exponent)
    total = exact_sum(_tiled(x, window), within)
    return total if reduce == "sum" else total * _reciprocals(scores.shape, window)


def spread(flags: jax.Array, window: Window, shape: tuple[int, ...]) -> jax.Array:
    """Return the flag of every entry's unit.

    Args:
      flags: bool, one a unit.
      window: static, the shape of a unit.
      shape: static, of the array.

    Returns:
      bool, of that shape.

    Example:
      >>> spread(jnp.array([[True, False]]), (2, 2), (2, 3)).tolist()
      [[True, True, False], [True, True, False]]
    """
    grid = flags.reshape([k for n in flags.shape for k in (n, 1)])
    full = jnp.broadcast_to(
        grid, [k for n, w in zip(flags.shape, window, strict=True) for k in (n, w)]
    )
    whole = full.reshape([n * w for n, w in zip(flags.shape, window, strict=True)])
    return whole[tuple(slice(n) for n in shape)]


def _tiled(x: jax.Array, window: Window, fill: float = 0.0) -> jax.Array:
    """Return ``[units along 0, window 0, units along 1, window 1, ...]``, padded at the ends."""
    counts = units(x.shape, window)
    ends = [(0, k * w - n) for k, w, n in zip(counts, window, x.shape, strict=True)]
    padded = jnp.pad(x, ends, constant_values=fill) if any(end for _, end in ends) else x
    return padded.reshape([k for pair in zip(counts, window, strict=True) for k in pair])


def _reciprocals(shape: tuple[int, ...], window: Window) -> np.ndarray:
    """Return one over the number of entries of every unit, float32."""
    counts = np.ones((), np.float64)
    for n, w in zip(shape, window, strict=True):
        along = np.minimum(w, n - w * np.arange(-(-n // w)))
        counts = counts[..., None] * along
    return (1 / counts).astype(np.float32)


Axes = tuple[int, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class NofM:
    """At most ``n`` of every ``m`` entries along ``axis`` are kept; made by `n_m`."""

    n: int
    m: int
    axis: Axes | None

    @property
    def sparsity(self) -> float:
        """The share that is pruned of full groups."""
        return 1 - self.n / self.m

    def along(self, layout: Layout) -> Axes:
        """Return the axes groups run along: those given, else the inputs a trace tells, else the last but one."""
        if self.axis is not None:
            return self.axis
        if layout.source == "convention":
            return (-2,)
        return tuple(a for a in layout.contracted if a not in layout.window) or layout.contracted

    def why_not(self, layout: Layout) -> str | None:
        """Say why a leaf has no such groups, or none of which anything is pruned; or return None."""
        axes = self.along(layout)
        if missing := _missing(axes, layout):
            return missing
        long = math.prod(layout.shape[axis] for axis in axes)
        few = f"it has {long} along axis {axes}, so {self.n} of every {self.m} prunes nothing; give n_m another axis"
        return few if long <= self.n < self.m else None

    def axes(self, layout: Layout) -> Axes:
        """Return the axes of groups, nonnegative."""
        return tuple(axis % len(layout.shape) for axis in self.along(layout))


@dataclass(frozen=True)
class Block:
    """Blocks of ``shape`` along the last axes; made by `block`."""

    shape: Shape
    reduce: str

    def why_not(self, layout: Layout) -> str | None:
        """Say why a leaf has no such blocks, or return None."""
        rank = len(layout.shape) - len(layout.stack)
        few = rank < len(self.shape)
        return (
            f"blocks of shape {self.shape} need rank {len(self.shape)}, it has {rank}"
            if few
            else None
        )

    def window(self, layout: Layout) -> Window:
        """Return the shape of a block in the rank of the array, no longer than the array; 1 along stacked layers."""
        own = layout.layer.shape
        full = iter((1,) * (len(own) - len(self.shape)) + self.shape)
        return tuple(
            1 if a in layout.stack else min(next(full), n) for a, n in enumerate(layout.shape)
        )


@dataclass(frozen=True)
class Channel:
    """Everything at one index of ``axis``, or at one of ``parts`` equal runs of it; made by `channel` and `head`."""

    axis: Axes | None
    reduce: str
    parts: int | None = None

    def along(self, layout: Layout) -> Axes:
        """Return the axes that index channels: those given, else the outputs; of a layer of rank 1 its only axis."""
        if self.axis is not None:
            return self.axis
        left = tuple(a for a in range(len(layout.shape)) if a not in layout.stack)
        return layout.outputs or left[-1:] or (-1,)

    def why_not(self, layout: Layout) -> str | None:
        """Say why a leaf has no such channels, or return None."""
        axes, shape = self.along(layout), layout.shape
        if missing := _missing(axes, layout):
            return missing
        if self.parts and shape[axes[0]] % self.parts:
            return (
                f"{self.parts} heads do not divide the {shape[axes[0]]} entries of axis {axes[0]}"
            )
        return None

    def window(self, layout: Layout) -> Window:
        """Return the shape of a channel; 1 along stacked layers."""
        shape, axes = layout.shape, self.along(layout)
        chosen = {axis % len(shape) for axis in axes}
        run = shape[axes[0]] // self.parts if self.parts else 1
        return tuple(
            1 if a in layout.stack else run if a in chosen else n for a, n in enumerate(shape)
        )


Structure: TypeAlias = NofM | Block | Channel


def n_m(n: int, m: int, axis: int | Axes | None = None) -> NofM:
    """Return the structure that keeps ``n`` of every ``m`` consecutive entries along an axis.

    It sets the sparsity, ``1 - n / m``: give None as the method's, or that number. For hardware,
    ``axis`` is what the product sums over. A trace tells it (`cj.bind`); without one it is -2, as
    Flax kernels ``[in, out]`` and ``[height, width, in, out]`` have it. A last group that is not
    full keeps ``min(n, its size)``.

    Args:
      n: how many are kept.
      m: out of how many.
      axis: along which groups run; several axes are joined in C order. Default: the inputs.

    Returns:
      The structure.

    Raises:
      ArgumentError: unless ``0 < n <= m`` and the axes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.prune import magnitude
      >>> c, params = magnitude(None, n_m(2, 4)), {"kernel": jnp.array([[1.0], [-4.0], [3.0], [2.0]])}
      >>> c.view(params, c.init(params))["kernel"].ravel().tolist()
      [0.0, -4.0, 3.0, 0.0]

    References:
      Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, section 3.
      Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", 2021.
    """
    n, m = whole("n", n), whole("m", m)
    if not 0 < n <= m:
        raise ArgumentError(f"n_m keeps n of every m entries, 0 < n <= m, got n={n}, m={m}")
    return NofM(n, m, None if axis is None else _axes(axis))


def block(shape: Shape, reduce: str = "mean") -> Block:
    """Return the structure of blocks that are kept or pruned as a whole.

    Blocks tile the last axes of an array; those at its ends may be smaller, and count as one block
    each. The sparsity is the share of blocks.

    Args:
      shape: of a block, such as ``(4, 4)``; each size at least 1.
      reduce: how scores of entries make the score of a block: ``"mean"``, ``"sum"``, ``"l2"`` or
        ``"max"``.

    Returns:
      The structure.

    Raises:
      ArgumentError: if the shape is empty or a size below 1, or there is no such reduction.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.prune import magnitude
      >>> c, params = magnitude(0.5, block((1, 2))), {"kernel": jnp.array([[1.0, 9.0, 3.0, 4.0]])}
      >>> c.view(params, c.init(params))["kernel"].tolist()
      [[1.0, 9.0, 0.0, 0.0]]

    References:
      Gray, Radford and Kingma, "GPU Kernels for Block-Sparse Weights", 2017.
    """
    sizes = shape if isinstance(shape, (tuple, list)) else ()
    if not sizes or any(not is_whole(size) or size < 1 for size in sizes):
        raise ArgumentError(
            f"the shape of a block is a tuple of sizes of at least 1, got {shape!r}"
        )
    return Block(tuple(map(int, shape)), check_reduction(reduce))


def channel(axis: int | Axes | None = None, reduce: str = "mean") -> Channel:
    """Return the structure of whole channels: everything at one index of an axis.

    The sparsity is the share of channels. Pruned channels are zeros in an array of the same shape;
    `shrink` removes them.

    Args:
      axis: which axis indexes channels; several for one unit an index pair. Default: the outputs,
        which a trace tells (`cj.bind`) and Flax kernels keep last.
      reduce: how scores of entries make the score of a channel: ``"mean"``, ``"sum"``, ``"l2"`` or
        ``"max"``.

    Returns:
      The structure.

    Raises:
      ArgumentError: if there is no such reduction, or an axis is named twice.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.prune import magnitude
      >>> c, params = magnitude(0.5, channel(-1, "l2")), {"kernel": jnp.array([[1.0, 2.0], [3.0, 2.0]])}
      >>> c.view(params, c.init(params))["kernel"].tolist()
      [[1.0, 0.0], [3.0, 0.0]]

    References:
      Li et al., "Pruning Filters for Efficient ConvNets", 2017, section 3.1.
    """
    return Channel(None if axis is None else _axes(axis), check_reduction(reduce))


def head(axis: int = -2, heads: int | None = None, reduce: str = "mean") -> Channel:
    """Return the structure of whole attention heads.

    Args:
      axis: the axis of heads: -2 in Flax's query, key and value kernels ``[in, heads, head_dim]``,
        0 in its output kernel ``[heads, head_dim, out]``.
      heads: if the axis holds ``heads * head_dim`` entries, as in ``[in, heads * head_dim]``: how
        many heads.
      reduce: how scores of entries make the score of a head: ``"mean"``, ``"sum"``, ``"l2"`` or
        ``"max"``.

    Returns:
      The structure; leaves whose axis ``heads`` does not divide are left alone, and reported.

    Raises:
      ArgumentError: if ``heads`` is below 1 or there is no such reduction.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.prune import magnitude
      >>> c, params = magnitude(0.5, head(-1, heads=2)), {"query": jnp.array([[1.0, 2.0, 3.0, -1.0]])}
      >>> c.view(params, c.init(params))["query"].tolist()
      [[0.0, 0.0, 3.0, -1.0]]

    References:
      Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", 2019.
    """
    heads = None if heads is None else whole("heads", heads)
    if heads is not None and heads < 1:
        raise ArgumentError(f"there is at least one head, got heads={heads}")
    return Channel(_axes(axis), check_reduction(reduce), heads)


def _axes(axis: int | Axes) -> Axes:
    found = () if isinstance(axis, tuple) and not axis else checked_axes("axis", axis)
    axes = (found,) if isinstance(found, int) else found
    if not axes or len(set(axes)) < len(axes):
        raise ArgumentError(f"give one axis or several different ones, got {axis!r}")
    return axes


def _missing(axes: Axes, layout: Layout) -> str | None:
    shape = layout.shape
    absent = [axis for axis in axes if not -len(shape) <= axis < len(shape)]
    if absent:
        return (
            f"it has no axis {absent[0]}, only {len(shape)}"
            if shape
            else f"it is a scalar and has no axis {absent[0]}"
        )
    if len({axis % len(shape) for axis in axes}) < len(axes):
        return f"two of the axes {axes} are the same one of its {len(shape)}"
    stacked = [axis for axis in axes if axis % len(shape) in layout.stack]
    return f"axis {stacked[0]} holds its stacked layers" if stacked else None
