"""A part of a stored parameter as it lies in a value: an offset and strides, as NumPy keeps them of a view.

Transposes, reshapes, slices at constant indices, concatenations and loops over stacked layers only
change offset and strides, so the entry of the parameter behind each entry of a value is known
exactly, and nothing is ever computed.
"""

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]
Digits = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Turn:
    """A loop that runs along an axis of a parameter: turn ``start + i`` sees index i of it.

    Attributes:
      loop: counted from the outermost.
      size: how many turns see one.
      stride: from one to the next, in entries of the stored parameter.
      start: the first turn that sees one.
    """

    loop: int
    size: int
    stride: int
    start: int = 0


@dataclass(frozen=True)
class Piece:
    """A box of a value whose entries are those of one parameter.

    Attributes:
      path: of the parameter.
      shape: of the parameter.
      offset: where the box's first entry is in the flattened parameter.
      axes: for each axis of the value, its ``(size, stride)`` in entries of the flattened
        parameter, outermost first: several where a reshape joined axes, none where only one index
        is left. The stride is 0 where entries are repeated.
      starts: for each axis of the value, where the box begins; not 0 beside other parameters or
        padding.
      turns: the loops that run along further axes.
      changed: the operations that changed entries on the way, such as ``"mul"``; each entry stayed
        where it was.
    """

    path: str
    shape: Shape
    offset: int
    axes: tuple[Digits, ...]
    starts: Shape
    turns: tuple[Turn, ...] = ()
    changed: tuple[str, ...] = ()

    @classmethod
    def whole(cls, path: str, shape: Shape) -> "Piece":
        """Return a parameter as it is stored."""
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        axes = tuple(
            ((n, stride),) if n != 1 else () for n, stride in zip(shape, strides, strict=True)
        )
        return cls(path, tuple(shape), 0, axes, (0,) * len(shape))

    @property
    def sizes(self) -> Shape:
        """The shape of the box."""
        return tuple(extent(digits) for digits in self.axes)

    def transposed(self, order: tuple[int, ...]) -> "Piece":
        """Return the piece in a transposed value."""
        return replace(
            self,
            axes=tuple(self.axes[i] for i in order),
            starts=tuple(self.starts[i] for i in order),
        )

    def squeezed(self, gone: tuple[int, ...]) -> "Piece":
        """Return the piece in a value that has lost axes of size 1."""
        return self.transposed(tuple(axis for axis in range(len(self.axes)) if axis not in gone))

    def broadcast(self, shape: Shape, before: Shape, places: tuple[int, ...]) -> "Piece":
        """Return the piece in a value whose axes went to ``places`` of a larger shape, repeated along the others."""
        axes: list[Digits] = [((n, 0),) if n != 1 else () for n in shape]
        starts = [0] * len(shape)
        for axis, place in enumerate(places):
            if before[axis] == shape[place]:
                axes[place], starts[place] = self.axes[axis], self.starts[axis]
        return replace(self, axes=tuple(axes), starts=tuple(starts))

    def moved(self, axis: int, by: int) -> "Piece":
        """Return the piece in a value that has ``by`` more entries before it along an axis."""
        return replace(
            self, starts=tuple(start + by * (i == axis) for i, start in enumerate(self.starts))
        )

    def cut(self, axis: int, low: int, high: int, step: int = 1) -> "Piece | str | None":
        """Return what a slice along one axis leaves of the piece: nothing, perhaps; or why it is no box any more."""
        begin, size = self.starts[axis], self.sizes[axis]
        if step > 1 and (low, high) != (0, 1) and (begin > low or begin + size < high):
            return "a slice in steps of a part of a joined value"
        first, last = max(low, begin), min(high, begin + size)
        if first >= last:
            return None
        answer = _cut(self.axes[axis], first - begin, -(-(last - first) // step), step)
        if answer is None:
            return "a slice across what a reshape has joined"
        added, digits = answer
        starts = tuple(first - low if i == axis else start for i, start in enumerate(self.starts))
        axes = tuple(digits if i == axis else old for i, old in enumerate(self.axes))
        return replace(self, offset=self.offset + added, axes=axes, starts=starts)

    def reversed(self, axes: tuple[int, ...], shape: Shape) -> "Piece":
        """Return the piece in a value whose axes run backwards."""
        offset, digits, starts = self.offset, list(self.axes), list(self.starts)
        for axis in axes:
            offset += sum((n - 1) * stride for n, stride in digits[axis])
            digits[axis] = tuple((n, -stride) for n, stride in digits[axis])
            starts[axis] = shape[axis] - starts[axis] - self.sizes[axis]
        return replace(self, offset=offset, axes=tuple(digits), starts=tuple(starts))

    def reshaped(self, before: Shape, after: Shape) -> "Piece | str":
        """Return the piece in a reshaped value, or why it is no box there."""
        axes: list[Digits] = [()] * len(after)
        starts = [0] * len(after)
        for run, target in runs(before, after):
            answer = _regrouped(self, before, run, [after[i] for i in target])
            if answer is None:
                return "a reshape mixes it with what it is joined with, or splits what a slice has left"
            for i, (digits, start) in zip(target, answer, strict=True):
                axes[i], starts[i] = digits, start
        return replace(self, axes=tuple(axes), starts=tuple(starts))

    def unstacked(self, loop: int) -> "Piece | str":
        """Return what a turn of a loop sees: one index of the first axis."""
        if len(self.axes[0]) > 1:
            return "a loop runs along axes that a reshape has joined"
        size, stride = self.axes[0][0] if self.axes[0] else (1, 0)
        turn = Turn(loop, size, stride, self.starts[0])
        return replace(self, axes=self.axes[1:], starts=self.starts[1:], turns=(*self.turns, turn))


def extent(digits: Digits) -> int:
    """Return the size of an axis.

    Example:
      >>> extent(((2, 12), (3, 1))), extent(())
      (6, 1)
    """
    return math.prod(n for n, _ in digits)


def runs(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Return the smallest runs of axes, those of size 1 left out, of equal products before and after a reshape.

    Example:
      >>> runs((2, 3, 1, 4), (6, 2, 2))
      [([0, 1], [0]), ([3], [1, 2])]
    """
    old, new = (
        [i for i, n in enumerate(before) if n != 1],
        [i for i, n in enumerate(after) if n != 1],
    )
    found: list[tuple[list[int], list[int]]] = []
    while old and new:
        run, target = [old.pop(0)], [new.pop(0)]
        while (left := math.prod(before[i] for i in run)) != (
            right := math.prod(after[i] for i in target)
        ):
            (run if left < right else target).append((old if left < right else new).pop(0))
        found.append((run, target))
    return found


def _cut(digits: Digits, start: int, size: int, step: int) -> tuple[int, Digits] | None:
    """Return what is added to the offset and the digits of a slice of an axis; None if it is not one of strides."""
    if (start, size) == (0, extent(digits)):
        return 0, digits
    if len(digits) == 1:
        stride = digits[0][1]
        return start * stride, ((size, stride * step),) if size > 1 else ()
    inner = extent(digits[1:])
    (_, stride), rest = digits[0], digits[1:]
    if step == 1 and start % inner == 0 and size % inner == 0:
        answer = _cut(digits[:1], start // inner, size // inner, 1)
        return answer and (answer[0], answer[1] + rest)
    if start // inner == (start + (size - 1) * step) // inner:
        answer = _cut(rest, start % inner, size, step)
        return answer and (answer[0] + start // inner * stride, answer[1])
    return None


def _regrouped(
    piece: Piece, before: Shape, run: list[int], after: list[int]
) -> list[tuple[Digits, int]] | None:
    """Return digits and start of each new axis of a run; of a box that is partial, only the run's first axis may be."""
    if any(piece.sizes[i] != before[i] for i in run[1:]):
        return None
    width, rest = math.prod(before[i] for i in run[1:]), math.prod(after[1:])
    start, size = piece.starts[run[0]] * width, piece.sizes[run[0]] * width
    if start % rest or size % rest:
        return None
    digits = _split(
        tuple(digit for i in run for digit in piece.axes[i]), [size // rest, *after[1:]]
    )
    return (
        None
        if digits is None
        else list(zip(digits, [start // rest, *[0] * (len(after) - 1)], strict=True))
    )


def _split(digits: Digits, sizes: list[int]) -> list[Digits] | None:
    """Deal digits out to axes of these sizes, cutting a digit in two where an axis ends inside it."""
    left, dealt = list(digits), []
    for n in sizes:
        own: list[tuple[int, int]] = []
        while extent(tuple(own)) < n:
            size, stride = left.pop(0)
            need = n // extent(tuple(own))
            if n % extent(tuple(own)) or (size % need if size > need else need % size):
                return None
            if size > need:
                left.insert(0, (size // need, stride))
                size, stride = need, stride * (size // need)
            own.append((size, stride))
        dealt.append(tuple(own))
    return dealt


# A box of a stored parameter: the part of it that a product uses, cut out and put back.


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
        return tuple(
            slice(start, start + size) for start, size in zip(self.starts, self.sizes, strict=True)
        )

    @property
    def whole(self) -> bool:
        """Whether it is the parameter as it is stored."""
        return self.shape == self.sizes and not self.flips

    def take(self, x: jax.Array) -> jax.Array:
        """Cut it out of an array of the parameter's shape."""
        return x if self.whole else jnp.flip(x.reshape(self.fine)[self.slices], self.flips)

    def put(self, x: jax.Array, new: jax.Array) -> jax.Array:
        """Return an array of the parameter's shape with what was cut out replaced."""
        return (
            new
            if self.whole
            else x.reshape(self.fine)
            .at[self.slices]
            .set(jnp.flip(new, self.flips))
            .reshape(self.shape)
        )

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
        while (
            words
            and words[-1] in (":", "0")
            and (words[-1] == ":" or self.shape[len(words) - 1] == 1)
        ):
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
        own = [
            (n, s // stride, role, rank)
            for n, s, role, rank in digits
            if stride <= abs(s) < stride * size
        ]
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
    ranked = {
        role: sorted((a.rank, i) for i, a in enumerate(axes) if a.role == role)
        for role in ("lead", "summed", "kept")
    }
    fixed = [i for i, a in enumerate(axes) if not a.role]
    front = [*fixed, *(i for _, i in ranked["lead"])]
    inner = [i for _, i in ranked["summed"]]
    counts = tuple(math.prod(axes[i].size for i in each) for each in (front, inner))
    return box, (*front, *inner, *(i for _, i in ranked["kept"])), (counts[0], counts[1])


def _axes(
    axis: int, size: int, start: int, digits: list[tuple[int, int, str, int]]
) -> list[_Axis] | None:
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
        if (
            last is not None
            and _whole(last)
            and _whole(axis)
            and last.role == axis.role
            and axis.rank == last.rank + 1
        ):
            done[-1] = replace(
                last, length=last.length * axis.length, size=last.size * axis.size, rank=axis.rank
            )
        else:
            done.append(axis)
    return done


def _whole(axis: _Axis) -> bool:
    return axis.role != "" and axis.size == axis.length and not axis.flip
