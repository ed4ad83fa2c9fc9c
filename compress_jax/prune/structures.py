"""Structures: which entries are kept or pruned together. Small values, given to any pruning method.

A structure says of a leaf's shape whether it fits (`why_not`), and what goes together: the window of a unit, or groups of
which n of m entries are kept.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

from compress_jax.prune.pooling import Window, check_reduction

Axes = tuple[int, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class NofM:
    """At most ``n`` of every ``m`` entries along ``axis`` are kept; made by `n_m`."""

    n: int
    m: int
    axis: Axes

    @property
    def sparsity(self) -> float:
        """The share that is pruned of full groups."""
        return 1 - self.n / self.m

    def why_not(self, shape: Shape) -> str | None:
        """Say why an array of this shape has no such groups, or return None."""
        if missing := _missing(self.axis, shape):
            return missing
        long = math.prod(shape[axis] for axis in self.axis)
        few = f"it has {long} along axis {self.axis}, so {self.n} of every {self.m} prunes nothing; give n_m another axis"
        return few if long <= self.n < self.m else None

    def axes(self, shape: Shape) -> Axes:
        """Return the axes of groups, nonnegative."""
        return tuple(axis % len(shape) for axis in self.axis)


@dataclass(frozen=True)
class Block:
    """Blocks of ``shape`` along the last axes; made by `block`."""

    shape: Shape
    reduce: str

    def why_not(self, shape: Shape) -> str | None:
        """Say why an array of this shape has no such blocks, or return None."""
        few = len(shape) < len(self.shape)
        return f"blocks of shape {self.shape} need rank {len(self.shape)}, it has {len(shape)}" if few else None

    def window(self, shape: Shape) -> Window:
        """Return the shape of a block in the rank of the array, no longer than the array."""
        full = (1,) * (len(shape) - len(self.shape)) + self.shape
        return tuple(min(w, n) for w, n in zip(full, shape, strict=True))


@dataclass(frozen=True)
class Channel:
    """Everything at one index of ``axis``, or at one of ``parts`` equal runs of it; made by `channel` and `head`."""

    axis: Axes
    reduce: str
    parts: int | None = None

    def why_not(self, shape: Shape) -> str | None:
        """Say why an array of this shape has no such channels, or return None."""
        if missing := _missing(self.axis, shape):
            return missing
        if self.parts and shape[self.axis[0]] % self.parts:
            return f"{self.parts} heads do not divide the {shape[self.axis[0]]} entries of axis {self.axis[0]}"
        return None

    def window(self, shape: Shape) -> Window:
        """Return the shape of a channel."""
        chosen = {axis % len(shape) for axis in self.axis}
        run = shape[self.axis[0]] // self.parts if self.parts else 1
        return tuple(run if axis in chosen else n for axis, n in enumerate(shape))


Structure: TypeAlias = NofM | Block | Channel


def n_m(n: int, m: int, axis: int | Axes = -2) -> NofM:
    """Return the structure that keeps ``n`` of every ``m`` consecutive entries along an axis.

    It sets the sparsity, ``1 - n / m``: give None as the method's, or that number. For hardware, ``axis`` is what the
    product sums over: of Flax kernels ``[in, out]`` and ``[height, width, in, out]`` it is -2, of an attention output
    projection ``[heads, head_dim, out]`` (0, 1). A last group that is not full keeps ``min(n, its size)``.

    Args:
      n: how many are kept.
      m: out of how many.
      axis: along which groups run; several axes are joined in C order.

    Returns:
      The structure.

    Raises:
      ValueError: unless ``0 < n <= m`` and the axes differ.

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
    if not (isinstance(n, int) and isinstance(m, int) and 0 < n <= m):
        raise ValueError(f"n_m keeps n of every m entries, 0 < n <= m, got n={n}, m={m}")
    return NofM(n, m, _axes(axis))


def block(shape: Shape, reduce: str = "mean") -> Block:
    """Return the structure of blocks that are kept or pruned as a whole.

    Blocks tile the last axes of an array; those at its ends may be smaller, and count as one block each. The sparsity is the
    share of blocks.

    Args:
      shape: of a block, such as ``(4, 4)``; each size at least 1.
      reduce: how scores of entries make the score of a block: ``"mean"``, ``"sum"``, ``"l2"`` or ``"max"``.

    Returns:
      The structure.

    Raises:
      ValueError: if the shape is empty or a size below 1, or there is no such reduction.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.prune import magnitude
      >>> c, params = magnitude(0.5, block((1, 2))), {"kernel": jnp.array([[1.0, 9.0, 3.0, 4.0]])}
      >>> c.view(params, c.init(params))["kernel"].tolist()
      [[1.0, 9.0, 0.0, 0.0]]

    References:
      Gray, Radford and Kingma, "GPU Kernels for Block-Sparse Weights", 2017.
    """
    if not shape or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"the shape of a block is a tuple of sizes of at least 1, got {shape!r}")
    return Block(tuple(shape), check_reduction(reduce))


def channel(axis: int | Axes = -1, reduce: str = "mean") -> Channel:
    """Return the structure of whole channels: everything at one index of an axis.

    The sparsity is the share of channels. Pruned channels are zeros in an array of the same shape; `shrink` removes them.

    Args:
      axis: which axis indexes channels (Flax kernels keep their outputs last); several for one unit an index pair.
      reduce: how scores of entries make the score of a channel: ``"mean"``, ``"sum"``, ``"l2"`` or ``"max"``.

    Returns:
      The structure.

    Raises:
      ValueError: if there is no such reduction, or an axis is named twice.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.prune import magnitude
      >>> c, params = magnitude(0.5, channel(-1, "l2")), {"kernel": jnp.array([[1.0, 2.0], [3.0, 2.0]])}
      >>> c.view(params, c.init(params))["kernel"].tolist()
      [[1.0, 0.0], [3.0, 0.0]]

    References:
      Li et al., "Pruning Filters for Efficient ConvNets", 2017, section 3.1.
    """
    return Channel(_axes(axis), check_reduction(reduce))


def head(axis: int = -2, heads: int | None = None, reduce: str = "mean") -> Channel:
    """Return the structure of whole attention heads.

    Args:
      axis: the axis of heads: -2 in Flax's query, key and value kernels ``[in, heads, head_dim]``, 0 in its output kernel
        ``[heads, head_dim, out]``.
      heads: if the axis holds ``heads * head_dim`` entries, as in ``[in, heads * head_dim]``: how many heads.
      reduce: how scores of entries make the score of a head: ``"mean"``, ``"sum"``, ``"l2"`` or ``"max"``.

    Returns:
      The structure; leaves whose axis ``heads`` does not divide are left alone, and reported.

    Raises:
      ValueError: if ``heads`` is below 1 or there is no such reduction.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.prune import magnitude
      >>> c, params = magnitude(0.5, head(-1, heads=2)), {"query": jnp.array([[1.0, 2.0, 3.0, -1.0]])}
      >>> c.view(params, c.init(params))["query"].tolist()
      [[0.0, 0.0, 3.0, -1.0]]

    References:
      Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", 2019.
    """
    if heads is not None and heads < 1:
        raise ValueError(f"there is at least one head, got heads={heads}")
    return Channel((axis,), check_reduction(reduce), heads)


def _axes(axis: int | Axes) -> Axes:
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(f"give one axis or several different ones, got {axis!r}")
    return axes


def _missing(axes: Axes, shape: Shape) -> str | None:
    absent = [axis for axis in axes if not -len(shape) <= axis < len(shape)]
    if absent:
        return f"it has no axis {absent[0]}, only {len(shape)}" if shape else f"it is a scalar and has no axis {absent[0]}"
    same = len({axis % len(shape) for axis in axes}) < len(axes)
    return f"two of the axes {axes} are the same one of its {len(shape)}" if same else None
