"""Structures: which entries are kept or pruned together, for any pruning method.

A structure knows which leaves it fits (`why_not`), and which entries of a leaf belong together: the
window of a unit, or groups in which n of m entries are kept. `unit_scores` and `spread_to_entries`
convert between entries and units.
"""

import math
from dataclasses import dataclass
from itertools import chain
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

Axes = tuple[int, ...]
Shape = tuple[int, ...]
Window = tuple[int, ...]
"""The shape of a unit."""

REDUCTIONS = ("sum", "mean", "l2", "max")


@dataclass(frozen=True)
class NofM:
    """The structure that `n_m` returns: at most ``n`` of every ``m`` entries are kept."""

    n: int
    m: int
    axis: Axes | None

    @property
    def sparsity(self) -> float:
        """The share of a full group that is pruned."""
        return 1 - self.n / self.m

    def along(self, layout: Layout) -> Axes:
        """Return the axes that groups run along.

        They are those given, else the inputs found by a trace, else the last axis but one.
        """
        if self.axis is not None:
            return self.axis
        # Without a trace: the inputs of Flax kernels [in, out] and [height, width, in, out].
        if layout.source == "convention":
            return (-2,)
        # The window stays apart: hardware sums over input channels at one place of it.
        return tuple(a for a in layout.contracted if a not in layout.window) or layout.contracted

    def why_not(self, layout: Layout) -> str | None:
        """Return why nothing of a leaf can be pruned in such groups, or None."""
        axes = self.along(layout)
        if missing := _missing(axes, layout):
            return missing
        length = math.prod(layout.shape[axis] for axis in axes)
        if length <= self.n < self.m:
            return (
                f"it has {length} along axis {axes}, so {self.n} of every {self.m} prunes nothing; "
                "give n_m another axis"
            )
        return None

    def axes(self, layout: Layout) -> Axes:
        """Return the axes that groups run along, nonnegative."""
        return tuple(axis % len(layout.shape) for axis in self.along(layout))


@dataclass(frozen=True)
class Block:
    """The structure that `block` returns: blocks of ``shape`` along the last axes."""

    shape: Shape
    reduce: str

    def why_not(self, layout: Layout) -> str | None:
        """Return why a leaf has no such blocks, or None."""
        rank = len(layout.shape) - len(layout.stack)
        if rank < len(self.shape):
            return f"blocks of shape {self.shape} need rank {len(self.shape)}, it has {rank}"
        return None

    def window(self, layout: Layout) -> Window:
        """Return the shape of a block in the rank of the array, 1 along stacked layers.

        It is clipped to the shape of the array.
        """
        # Blocks run along the last axes of a layer; a unit has size 1 along those before them.
        missing = len(layout.layer.shape) - len(self.shape)
        sizes = iter((1,) * missing + self.shape)
        return tuple(
            1 if axis in layout.stack else min(next(sizes), n)
            for axis, n in enumerate(layout.shape)
        )


@dataclass(frozen=True)
class Channel:
    """The structure that `channel` and `head` return.

    A unit is everything at one index of ``axis``, or in one of ``parts`` equal runs of it.
    """

    axis: Axes | None
    reduce: str
    parts: int | None = None

    def along(self, layout: Layout) -> Axes:
        """Return the axes that index channels.

        They are those given, else the outputs. A layer of rank 1 has only one axis.
        """
        if self.axis is not None:
            return self.axis
        unstacked = tuple(axis for axis in range(len(layout.shape)) if axis not in layout.stack)
        return layout.outputs or unstacked[-1:] or (-1,)

    def why_not(self, layout: Layout) -> str | None:
        """Return why a leaf has no such channels, or None."""
        axes = self.along(layout)
        shape = layout.shape
        if missing := _missing(axes, layout):
            return missing
        if self.parts and shape[axes[0]] % self.parts:
            return (
                f"{self.parts} heads do not divide the {shape[axes[0]]} entries of axis {axes[0]}"
            )
        return None

    def window(self, layout: Layout) -> Window:
        """Return the shape of a channel; 1 along stacked layers."""
        shape = layout.shape
        axes = self.along(layout)
        window = list(shape)  # a unit spans all other axes
        for axis in axes:
            window[axis] = shape[axis] // self.parts if self.parts else 1
        # No unit spans layers.
        for axis in layout.stack:
            window[axis] = 1
        return tuple(window)


Structure: TypeAlias = NofM | Block | Channel


def n_m(n: int, m: int, axis: int | Axes | None = None) -> NofM:
    """Return the structure that keeps ``n`` of every ``m`` consecutive entries along an axis.

    It sets the sparsity to ``1 - n / m``, so pass None as the sparsity of the method, or that
    number. Hardware needs groups along the axis that the product sums over. `cj.bind` finds it by a
    trace; without one it is -2, as in Flax kernels ``[in, out]`` and ``[height, width, in, out]``.
    A last group that is not full keeps ``min(n, its size)``.

    Args:
      n: how many entries of each group are kept.
      m: the size of a group.
      axis: the axis that groups run along; several are joined in C order. Default: the inputs.

    Returns:
      The structure.

    Raises:
      ArgumentError: unless ``0 < n <= m`` and the axes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> c = cj.prune.magnitude(None, cj.prune.n_m(2, 4))
      >>> params = {"kernel": jnp.array([[1.0], [-4.0], [3.0], [2.0]])}
      >>> c.view(params, c.init(params))["kernel"].ravel().tolist()
      [0.0, -4.0, 3.0, 0.0]

    References:
      Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, section 3.
      Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", 2021.
    """
    n = whole("n", n)
    m = whole("m", m)
    if not 0 < n <= m:
        raise ArgumentError(f"n_m keeps n of every m entries, 0 < n <= m, got n={n}, m={m}")
    return NofM(n, m, None if axis is None else _axes(axis))


def block(shape: Shape, reduce: str = "mean") -> Block:
    """Return the structure of blocks that are kept or pruned as a whole.

    Blocks tile the last axes of an array. Smaller ones at its ends count as one block each. The
    sparsity is the share of blocks.

    Args:
      shape: the shape of a block, such as ``(4, 4)``; each size at least 1.
      reduce: how the scores of entries are combined into the score of a block: ``"mean"``,
        ``"sum"``, ``"l2"`` or ``"max"``.

    Returns:
      The structure.

    Raises:
      ArgumentError: if the shape is empty or a size below 1, or there is no such reduction.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> c = cj.prune.magnitude(0.5, cj.prune.block((1, 2)))
      >>> params = {"kernel": jnp.array([[1.0, 9.0, 3.0, 4.0]])}
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
      axis: the axis that indexes channels; with several, each tuple of indices is a unit. Default:
        the outputs, which `cj.bind` finds by a trace; the last axis of Flax kernels.
      reduce: how the scores of entries are combined into the score of a channel: ``"mean"``,
        ``"sum"``, ``"l2"`` or ``"max"``.

    Returns:
      The structure.

    Raises:
      ArgumentError: if there is no such reduction, or an axis is named twice.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> c = cj.prune.magnitude(0.5, cj.prune.channel(-1, "l2"))
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 2.0]])}
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
      heads: the number of heads, if the axis has ``heads * head_dim`` entries, as in
        ``[in, heads * head_dim]``.
      reduce: how the scores of entries are combined into the score of a head: ``"mean"``,
        ``"sum"``, ``"l2"`` or ``"max"``.

    Returns:
      The structure. Leaves whose axis ``heads`` does not divide are skipped and reported.

    Raises:
      ArgumentError: if ``heads`` is below 1 or there is no such reduction.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> c = cj.prune.magnitude(0.5, cj.prune.head(-1, heads=2))
      >>> params = {"query": jnp.array([[1.0, 2.0, 3.0, -1.0]])}
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
    """Return an axis or several as a tuple, and raise ArgumentError unless they differ."""
    found = () if isinstance(axis, tuple) and not axis else checked_axes("axis", axis)
    axes = (found,) if isinstance(found, int) else found
    if not axes or len(set(axes)) < len(axes):
        raise ArgumentError(f"give one axis or several different ones, got {axis!r}")
    return axes


def _missing(axes: Axes, layout: Layout) -> str | None:
    """Return why a leaf has no such axes, or None."""
    shape = layout.shape
    absent = [axis for axis in axes if not -len(shape) <= axis < len(shape)]
    if absent:
        if not shape:
            return f"it is a scalar and has no axis {absent[0]}"
        return f"it has no axis {absent[0]}, only {len(shape)}"
    if len({axis % len(shape) for axis in axes}) < len(axes):
        return f"two of the axes {axes} are the same one of its {len(shape)}"
    stacked = [axis for axis in axes if axis % len(shape) in layout.stack]
    return f"axis {stacked[0]} holds its stacked layers" if stacked else None


def check_reduction(reduce: str) -> str:
    """Return the name of a reduction, or raise an ArgumentError that lists them.

    Example:
      >>> check_reduction("mean")
      'mean'
    """
    if not isinstance(reduce, str) or reduce not in REDUCTIONS:
        raise ArgumentError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    return reduce


def unit_counts(shape: tuple[int, ...], window: Window) -> tuple[int, ...]:
    """Return the number of units along each axis, including one at the end that is not full.

    Example:
      >>> unit_counts((5, 8), (2, 4))
      (3, 2)
    """
    return tuple(-(-n // w) for n, w in zip(shape, window, strict=True))


def unit_scores(scores: jax.Array, window: Window, reduce: str) -> jax.Array:
    r"""Return the score of each unit, from the scores s of its entries.

    ``"sum"``: :math:`\sum s`; ``"mean"``: their mean; ``"l2"``: :math:`\sqrt{\sum s^2}`;
    ``"max"``: the largest. A unit at an end may have fewer entries. Sums are in fixed point
    (`exact_sum`), so that the result has the same bits under every sharding.

    Args:
      scores: floating point, any shape.
      window: static, the shape of a unit, in the rank of ``scores``.
      reduce: one of `REDUCTIONS`.

    Returns:
      float32, shape ``unit_counts(scores.shape, window)``.

    Example:
      >>> scores = jnp.array([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
      >>> unit_scores(scores, (2, 2), "mean").tolist()
      [[2.0, 3.5]]
    """
    x = scores.astype(jnp.float32)
    within = tuple(range(1, 2 * x.ndim, 2))  # the window axes of `_tiled`
    if reduce == "max":
        return _tiled(x, window, -jnp.inf).max(within)  # padding never wins
    if reduce == "l2":
        # sqrt(sum((x / 2**e)**2)) * 2**e: the power of two changes no bit of the mantissa.
        exponent = scale_exponent(x)
        scaled = x * power_of_two(-exponent)  # its squares neither overflow nor vanish
        squares = exact_sum(_tiled(scaled * scaled, window), within)
        return jnp.sqrt(squares) * power_of_two(exponent)
    # [units along 0, units along 1, ...]
    total = exact_sum(_tiled(x, window), within)
    if reduce == "sum":
        return total
    return total * _reciprocals(scores.shape, window)


def spread_to_entries(flags: jax.Array, window: Window, shape: tuple[int, ...]) -> jax.Array:
    """Return for each entry the flag of its unit.

    Args:
      flags: bool, one for each unit.
      window: static, the shape of a unit.
      shape: static, the shape of the array.

    Returns:
      bool, in that shape.

    Example:
      >>> spread_to_entries(jnp.array([[True, False]]), (2, 2), (2, 3)).tolist()
      [[True, True, False], [True, True, False]]
    """
    split: list[int] = []
    tiled: list[int] = []
    joined: list[int] = []
    for n, w in zip(flags.shape, window, strict=True):
        split += [n, 1]
        tiled += [n, w]
        joined.append(n * w)
    # [n, m] -> [n, 1, m, 1] -> [n, w, m, v] -> [n * w, m * v], then the ends are cut.
    full = jnp.broadcast_to(flags.reshape(split), tiled).reshape(joined)
    return full[tuple(slice(n) for n in shape)]


def _tiled(x: jax.Array, window: Window, fill: float = 0.0) -> jax.Array:
    """Return ``[units along 0, window 0, units along 1, window 1, ...]``, padded at the ends."""
    counts = unit_counts(x.shape, window)
    ends = [(0, k * w - n) for k, w, n in zip(counts, window, x.shape, strict=True)]
    if any(end for _, end in ends):
        x = jnp.pad(x, ends, constant_values=fill)
    return x.reshape(list(chain.from_iterable(zip(counts, window, strict=True))))


def _reciprocals(shape: tuple[int, ...], window: Window) -> np.ndarray:
    """Return one over the number of entries of each unit, float32."""
    counts = np.ones((), np.float64)
    for n, w in zip(shape, window, strict=True):
        lengths = np.minimum(w, n - w * np.arange(-(-n // w)))  # the last may be shorter
        counts = counts[..., None] * lengths  # one axis more
    return (1 / counts).astype(np.float32)
