"""A box of a stored parameter: the part of it that a product uses, cut out and put back."""

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from compress_jax.trace.strided import Piece, Shape

Digit = tuple[int, int]
Order = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A range of indices along each axis of a parameter, of which one axis may be kept as several.

    Attributes:
      shape: of the parameter.
      fine: its shape with the axes that are several (``heads * head_dim``) written out.
      of: for each fine axis, the axis of the parameter that it is or lies in.
      starts: the first index along each fine axis.
      sizes: how many: the shape of what is cut out.
      flips: the fine axes that run backwards.
    """

    shape: Shape
    fine: Shape
    of: Order
    starts: Shape
    sizes: Shape
    flips: Order = ()

    @property
    def slices(self) -> tuple[slice, ...]:
        """The ranges, of the fine axes."""
        return tuple(slice(start, start + size) for start, size in zip(self.starts, self.sizes, strict=True))

    @property
    def whole(self) -> bool:
        """Whether it is the parameter as it is stored."""
        return self.shape == self.sizes and not self.flips

    def take(self, x: jax.Array) -> jax.Array:
        """Cut it out of an array of the parameter's shape."""
        return x if self.whole else jnp.flip(x.reshape(self.fine)[self.slices], self.flips)

    def put(self, x: jax.Array, new: jax.Array) -> jax.Array:
        """Return an array of the parameter's shape with what was cut out replaced."""
        return new if self.whole else x.reshape(self.fine).at[self.slices].set(jnp.flip(new, self.flips)).reshape(self.shape)

    def index(self, places: dict[int, int]) -> str:
        """Return the index of one matrix, ``"[3]"``, given its place along some of the fine axes; empty for everything."""
        words: list[str] = []
        for axis, size in enumerate(self.shape):
            inside = [i for i, own in enumerate(self.of) if own == axis]
            low = high = 0
            for i in inside:
                unit = math.prod(self.fine[j] for j in inside if j > i)
                first = self.starts[i] + places.get(i, 0)
                last = first if i in places else self.starts[i] + self.sizes[i] - 1
                low, high = low + first * unit, high + last * unit
            part = str(low) if low == high else f"{low}:{high + 1}"
            words.append(":" if (low, high) == (0, size - 1) and size > 1 else part)
        while words and words[-1] in (":", "0") and (words[-1] == ":" or self.shape[len(words) - 1] == 1):
            words.pop()
        return f"[{', '.join(words)}]" if words else ""


@dataclass
class _Axis:
    """A fine axis in the making; ``role`` is the list it is in, ``rank`` its place there, None for a fixed index."""

    of: int
    length: int
    start: int
    size: int
    flip: bool = False
    role: str = ""
    rank: int = field(default=-1)


def placed(
    piece: Piece, lead: list[Digit], summed: list[Digit], kept: list[Digit]
) -> tuple[Box, Order, tuple[int, int]] | str:
    """Return the box that a piece is of its parameter, and the order of its axes that makes it matrices.

    Args:
      piece: the piece.
      lead: ``(size, stride)`` of what matrices are stacked along.
      summed: of what is summed over.
      kept: of the outputs.

    Returns:
      ``(box, order of its axes, (matrices, entries summed over))``; or why it is no box.

    Example:
      >>> piece = Piece("w", (2, 6), 7, (((2, 3), (1, 1)),), (0,))
      >>> placed(piece, [], [(2, 3)], [(2, 1)])
      (Box(shape=(2, 6), fine=(2, 2, 3), of=(0, 1, 1), starts=(1, 0, 1), sizes=(1, 2, 2), flips=()), (0, 1, 2), (1, 2))
    """
    roles = {"lead": lead, "summed": summed, "kept": kept}
    digits = [(n, s, role, rank) for role, own in roles.items() for rank, (n, s) in enumerate(own)]
    first = piece.offset + sum((n - 1) * s for n, s, *_ in digits if s < 0)
    axes: list[_Axis] = []
    for axis, size in enumerate(piece.shape):
        stride = math.prod(piece.shape[axis + 1 :])
        own = [(n, s // stride, role, rank) for n, s, role, rank in digits if stride <= abs(s) < stride * size]
        found = _axes(axis, size, first // stride % max(size, 1), own)
        if found is None:
            return "a slice of it in steps that do not divide its axis is used"
        axes += _merged(found)
    box = Box(
        piece.shape,
        fine=tuple(a.length for a in axes),
        of=tuple(a.of for a in axes),
        starts=tuple(a.start for a in axes),
        sizes=tuple(a.size for a in axes),
        flips=tuple(i for i, a in enumerate(axes) if a.flip),
    )
    ranked = {role: sorted((a.rank, i) for i, a in enumerate(axes) if a.role == role) for role in ("lead", "summed", "kept")}
    fixed = [i for i, a in enumerate(axes) if not a.role]
    front = [*fixed, *(i for _, i in ranked["lead"])]
    inner = [i for _, i in ranked["summed"]]
    counts = tuple(math.prod(axes[i].size for i in each) for each in (front, inner))
    return box, (*front, *inner, *(i for _, i in ranked["kept"])), (counts[0], counts[1])


def _axes(axis: int, size: int, start: int, digits: list[tuple[int, int, str, int]]) -> list[_Axis] | None:
    """Write one stored axis out: a fine axis for each digit, and one of a fixed index for what no digit runs along."""
    found: list[_Axis] = []
    outer = size
    for n, stride, role, rank in sorted(digits, key=lambda digit: -abs(digit[1])):
        step = abs(stride)
        if outer % step or start // step + n > outer // step:
            return None
        found.append(_Axis(axis, outer // step, start // step, n, stride < 0, role, rank))
        outer, start = step, start % step
    if outer > 1 or not digits:
        found.append(_Axis(axis, outer, start, 1))
    return found


def _merged(axes: list[_Axis]) -> list[_Axis]:
    """Join neighbours that a reshape had parted, where both are whole and follow each other in the same role."""
    done: list[_Axis] = []
    for axis in axes:
        last = done[-1] if done else None
        if last is not None and _whole(last) and _whole(axis) and last.role == axis.role and axis.rank == last.rank + 1:
            done[-1] = replace(last, length=last.length * axis.length, size=last.size * axis.size, rank=axis.rank)
        else:
            done.append(axis)
    return done


def _whole(axis: _Axis) -> bool:
    return axis.role != "" and axis.size == axis.length and not axis.flip
