"""What an equation's own parameters become when axes get shorter: shapes, limits, sizes of slices, counts of groups."""

from collections.abc import Callable
from typing import Any

from jax.extend.core import JaxprEqn

from compress_jax.trace.axes import Axis
from compress_jax.trace.axis_moves import Dims, interleaved
from compress_jax.trace.kept import Kept

Changes = dict[str, Any]
Rule = Callable[[Kept, JaxprEqn, list[Dims], list[Dims]], Changes]  # (kept, equation, axes of operands, of results)


def resized(kept: Kept, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]) -> Changes:
    """Return those of an equation's parameters that change when axes get shorter.

    Args:
      kept: what is left of the axes.
      eqn: an equation that runs nothing inside.
      operands: the axes of its operands.
      results: the axes of its results.

    Returns:
      ``{parameter: new value}``; most primitives have none.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from compress_jax.trace.axes import Axes
      >>> axes = Axes()
      >>> channels = axes.leaf(4)
      >>> eqn = jax.make_jaxpr(lambda x: jnp.broadcast_to(x, (2, 4)))(jnp.ones(4)).jaxpr.eqns[0]
      >>> resized(Kept(axes, {channels: np.array([0, 3])}), eqn, [(channels,)], [(axes.leaf(2), channels)])
      {'shape': (2, 2)}
    """
    rule = RULES.get(eqn.primitive.name)
    return rule(kept, eqn, operands, results) if rule else {}


def _shape(kept: Kept, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]) -> Changes:
    return {"shape": kept.shape(results[0])}


def _last_axes(kept: Kept, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]) -> Changes:
    """Random numbers for each key of an array of keys."""
    count = len(eqn.params["shape"])
    return {"shape": kept.shape(results[0])[len(results[0]) - count :]} if count else {}


def _reshape(kept: Kept, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]) -> Changes:
    return {"new_sizes": kept.shape(results[0])}


def _slice(kept: Kept, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]) -> Changes:
    """Count what is left before a limit."""
    p = eqn.params
    strides = p["strides"] or [1] * len(operands[0])
    pieces = zip(operands[0], results[0], p["start_indices"], p["limit_indices"], strides, strict=True)
    limits = [_limits(kept, *piece) for piece in pieces]
    return {"start_indices": tuple(start for start, _ in limits), "limit_indices": tuple(limit for _, limit in limits)}


def _limits(kept: Kept, axis: Axis, piece: Axis, start: int, limit: int, stride: int) -> tuple[int, int]:
    """Return the new start and limit; of a strided slice, rows stay whole or go."""

    def before(index: int) -> int:
        return index and int((kept.of(axis) < index).sum())

    if stride == 1:
        return before(start), before(limit)
    first, _ = interleaved(start, limit, stride)
    new = before(first) + start - first
    return new, new + (kept.size(piece) - 1) * stride + 1


def _split(kept: Kept, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]) -> Changes:
    return {"sizes": tuple(kept.size(dims[eqn.params["axis"]]) for dims in results)}


def _whole(kept: Kept, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]) -> Changes:
    """Slices that take an axis whole still do; others are of axes that stay."""
    pairs = zip(operands[0], eqn.params["slice_sizes"], strict=True)
    return {"slice_sizes": tuple(kept.size(axis) if axis.size == size else size for axis, size in pairs)}


def _pad(kept: Kept, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]) -> Changes:
    """Padding that a removed channel falls into gets shorter."""
    config = []
    for axis, (low, high, interior), out in zip(operands[0], eqn.params["padding_config"], results[0], strict=True):
        if low > 0 or high > 0:
            left = kept.of(out)
            low, high = (int((left < low).sum()), int((left >= low + axis.size).sum())) if not interior else (low, high)
        config.append((low, high, interior))
    return {"padding_config": tuple(config)}


def _tile(kept: Kept, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]) -> Changes:
    return {"reps": tuple(kept.size(out) // kept.size(axis) for axis, out in zip(operands[0], results[0], strict=True))}


def _convolution(kept: Kept, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]) -> Changes:
    """As many groups as the image's channels hold those of one kernel."""
    numbers = eqn.params["dimension_numbers"]
    image, kernel = operands[0][numbers.lhs_spec[1]], operands[1][numbers.rhs_spec[1]]
    return {"feature_group_count": kept.size(image) // kept.size(kernel)}


RULES: dict[str, Rule] = {
    "broadcast_in_dim": _shape,
    "iota": _shape,
    "rng_bit_generator": lambda kept, eqn, operands, results: {"shape": kept.shape(results[1])},
    "rng_uniform": _shape,
    "random_bits": _last_axes,
    "random_split": _last_axes,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _whole,
    "gather": _whole,
    "pad": _pad,
    "tile": _tile,
    "conv_general_dilated": _convolution,
}
