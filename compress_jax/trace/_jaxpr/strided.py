"""A part of a stored parameter as it lies in a value: an offset and strides, like a NumPy view.

Transposes, reshapes, slices at constant indices, concatenations and loops over stacked layers only
change offset and strides, so the entry of the parameter behind each entry of a value is known
exactly, and nothing is ever computed.

`Piece` describes the part by strides, `Box` by ranges of indices; `placed` makes the one from the
other.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]
Order = tuple[int, ...]
Digit = tuple[int, int]
"""``(size, stride)``: one factor of an axis, the stride in entries of the flattened parameter."""
Digits = tuple[Digit, ...]


@dataclass(frozen=True)
class Iteration:
    """A loop that runs along an axis of a parameter: iteration ``start + i`` uses index i of it.

    Attributes:
      loop: which loop, counted from the outermost.
      size: how many iterations use an index.
      stride: from one index to the next, in entries of the stored parameter.
      start: the first iteration that uses one.
    """

    loop: int
    size: int
    stride: int
    start: int = 0


@dataclass(frozen=True)
class Piece:
    """A box of a value whose entries are those of one parameter.

    Attributes:
      path: path of the parameter.
      shape: shape of the parameter.
      offset: where the box's first entry is in the flattened parameter.
      axes: for each axis of the value, its ``(size, stride)`` in entries of the flattened
        parameter, outermost first: several where a reshape joined axes, none where only one index
        is left. The stride is 0 where entries are repeated.
      starts: for each axis of the value, where the box begins; not 0 beside other parameters or
        padding.
      iterations: the loops that run along further axes.
      changed: the operations that changed entries on the way, such as ``"mul"``; each entry stayed
        where it was.
    """

    path: str
    shape: Shape
    offset: int
    axes: tuple[Digits, ...]
    starts: Shape
    iterations: tuple[Iteration, ...] = ()
    changed: tuple[str, ...] = ()

    @classmethod
    def whole(cls, path: str, shape: Shape) -> "Piece":
        """Return a parameter as it is stored."""
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]  # row-major
        sized = zip(shape, strides, strict=True)
        axes = tuple(((n, stride),) if n != 1 else () for n, stride in sized)
        return cls(path, tuple(shape), 0, axes, (0,) * len(shape))

    @property
    def sizes(self) -> Shape:
        """The shape of the box."""
        return tuple(extent(digits) for digits in self.axes)

    def transposed(self, order: Order) -> "Piece":
        """Return the piece in a transposed value."""
        axes = tuple(self.axes[i] for i in order)
        starts = tuple(self.starts[i] for i in order)
        return replace(self, axes=axes, starts=starts)

    def squeezed(self, removed: Order) -> "Piece":
        """Return the piece in a value that has lost axes of size 1."""
        left = (axis for axis in range(len(self.axes)) if axis not in removed)
        return self.transposed(tuple(left))

    def broadcast(self, shape: Shape, before: Shape, places: Order) -> "Piece":
        """Return the piece in a larger value, repeated along the axes that are new.

        Args:
          shape: shape of the larger value.
          before: shape of the value so far.
          places: for each axis of the value so far, its axis in the larger one.

        Returns:
          The piece.
        """
        # Repeated along every axis, except where the value has the axis at its full size already.
        axes: list[Digits] = [((n, 0),) if n != 1 else () for n in shape]
        starts = [0] * len(shape)
        for axis, place in enumerate(places):
            if before[axis] == shape[place]:
                axes[place] = self.axes[axis]
                starts[place] = self.starts[axis]
        return replace(self, axes=tuple(axes), starts=tuple(starts))

    def shifted(self, axis: int, by: int) -> "Piece":
        """Return the piece in a value that has ``by`` more entries before it along an axis."""
        starts = list(self.starts)
        starts[axis] += by
        return replace(self, starts=tuple(starts))

    def cut(self, axis: int, low: int, high: int, step: int = 1) -> "Piece | str | None":
        """Return what a slice along one axis leaves of the piece.

        Args:
          axis: the axis of the value.
          low: first index of the slice.
          high: where it ends.
          step: its step.

        Returns:
          The piece; None if the slice holds nothing of it; or why what is left is no box.
        """
        begin = self.starts[axis]
        size = self.sizes[axis]
        # Beside other parameters the first step inside the box may fall on any of its entries.
        if step > 1 and (low, high) != (0, 1) and (begin > low or begin + size < high):
            return "a slice in steps of a part of a joined value"
        first = max(low, begin)
        last = min(high, begin + size)
        if first >= last:
            return None
        # Relative to the box; the number of steps is rounded up.
        answer = _slice_digits(self.axes[axis], first - begin, -(-(last - first) // step), step)
        if answer is None:
            return "a slice across what a reshape has joined"
        added, digits = answer
        # Entry `low` of the value is the first of the slice.
        starts = list(self.starts)
        starts[axis] = first - low
        axes = list(self.axes)
        axes[axis] = digits
        return replace(self, offset=self.offset + added, axes=tuple(axes), starts=tuple(starts))

    def reversed(self, axes: Order, shape: Shape) -> "Piece":
        """Return the piece in a value whose axes run backwards."""
        offset = self.offset
        digits = list(self.axes)
        starts = list(self.starts)
        for axis in axes:
            # The first entry becomes the last of each digit, and every stride changes its sign.
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
                return (
                    "a reshape mixes it with what it is joined with, or splits what a slice has "
                    "left"
                )
            for i, (digits, start) in zip(target, answer, strict=True):
                axes[i] = digits
                starts[i] = start
        return replace(self, axes=tuple(axes), starts=tuple(starts))

    def unstacked(self, loop: int) -> "Piece | str":
        """Return the piece in one iteration of a loop, which uses one index of the first axis."""
        if len(self.axes[0]) > 1:
            return "a loop runs along axes that a reshape has joined"
        # Each iteration has one index of the first axis. Without a digit the box has just one.
        size, stride = self.axes[0][0] if self.axes[0] else (1, 0)
        iteration = Iteration(loop, size, stride, self.starts[0])
        return replace(
            self,
            axes=self.axes[1:],
            starts=self.starts[1:],
            iterations=(*self.iterations, iteration),
        )


def extent(digits: Digits) -> int:
    """Return the size of an axis.

    Example:
      >>> extent(((2, 12), (3, 1))), extent(())
      (6, 1)
    """
    return math.prod(n for n, _ in digits)


def runs(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Return the smallest runs of axes whose products are equal before and after a reshape.

    Args:
      before: shape of the operand.
      after: shape of the result.

    Returns:
      ``[(axes before, axes after)]``, axes of size 1 left out.

    Example:
      >>> runs((2, 3, 1, 4), (6, 2, 2))
      [([0, 1], [0]), ([3], [1, 2])]
    """
    old = [i for i, n in enumerate(before) if n != 1]
    new = [i for i, n in enumerate(after) if n != 1]
    found: list[tuple[list[int], list[int]]] = []
    # Take axes from whichever side has the smaller product, until both products are equal.
    while old and new:
        run = [old.pop(0)]
        target = [new.pop(0)]
        left = before[run[0]]
        right = after[target[0]]
        while left != right:
            if left < right:
                run.append(old.pop(0))
                left *= before[run[-1]]
            else:
                target.append(new.pop(0))
                right *= after[target[-1]]
        found.append((run, target))
    return found


def _slice_digits(digits: Digits, start: int, size: int, step: int) -> tuple[int, Digits] | None:
    """Return what a slice of an axis adds to the offset, and the digits that are left.

    None if it takes from several indices of an outer digit, and not all entries of each.
    """
    if (start, size) == (0, extent(digits)):
        return 0, digits
    if len(digits) == 1:
        stride = digits[0][1]
        return start * stride, ((size, stride * step),) if size > 1 else ()
    # Of several digits the outer one changes every `inner` indices.
    rest = digits[1:]
    inner = extent(rest)
    if step == 1 and start % inner == 0 and size % inner == 0:  # whole indices of the outer digit
        answer = _slice_digits(digits[:1], start // inner, size // inner, 1)
        return answer and (answer[0], answer[1] + rest)
    if start // inner == (start + (size - 1) * step) // inner:  # one index of the outer digit
        answer = _slice_digits(rest, start % inner, size, step)
        return answer and (answer[0] + start // inner * digits[0][1], answer[1])
    return None


def _regrouped(
    piece: Piece, before: Shape, run: list[int], after: list[int]
) -> list[tuple[Digits, int]] | None:
    """Return digits and start of each new axis of a run; None if the piece is no box there.

    A box that does not fill the value can be regrouped only if it is partial along the first axis
    of the run.
    """
    # It must fill the other axes of the run to be an interval of the merged axis.
    if any(piece.sizes[i] != before[i] for i in run[1:]):
        return None
    # The new first axis must not cut into that interval.
    width = math.prod(before[i] for i in run[1:])
    rest = math.prod(after[1:])
    start = piece.starts[run[0]] * width
    size = piece.sizes[run[0]] * width
    if start % rest or size % rest:
        return None
    digits = tuple(itertools.chain.from_iterable(piece.axes[i] for i in run))
    dealt = _split(digits, [size // rest, *after[1:]])
    if dealt is None:
        return None
    starts = [start // rest, *[0] * (len(after) - 1)]
    return list(zip(dealt, starts, strict=True))


def _split(digits: Digits, sizes: list[int]) -> list[Digits] | None:
    """Deal digits out to axes of these sizes, cutting a digit in two where an axis ends inside."""
    left = list(digits)
    dealt = []
    for n in sizes:
        own: list[Digit] = []
        while (filled := extent(tuple(own))) < n:
            size, stride = left.pop(0)
            need = n // filled  # what the axis still lacks
            # The digit must divide what is lacking, or be a multiple of it.
            if n % filled or (size % need if size > need else need % size):
                return None
            if size > need:
                # The outer part belongs to this axis, the inner part to the next: (6, 1) dealt to
                # axes of 2 and 3 becomes (2, 3) and (3, 1).
                inner = size // need
                left.insert(0, (inner, stride))
                size = need
                stride *= inner
            own.append((size, stride))
        dealt.append(tuple(own))
    return dealt


@dataclass(frozen=True)
class Box:
    """A range of indices along each axis of a parameter: the part of it that a product uses.

    Attributes:
      shape: shape of the parameter.
      fine: its shape with the axes that hold several (``heads * head_dim``) written out.
      stored_axes: for each fine axis, the axis of the parameter that it is or lies in.
      starts: the first index along each fine axis.
      sizes: how many indices: the shape of what is cut out.
      flips: the fine axes that run backwards.
    """

    shape: Shape
    fine: Shape
    stored_axes: Order
    starts: Shape
    sizes: Shape
    flips: Order = ()

    @property
    def slices(self) -> tuple[slice, ...]:
        """The ranges, of the fine axes."""
        spans = zip(self.starts, self.sizes, strict=True)
        return tuple(slice(start, start + size) for start, size in spans)

    @property
    def whole(self) -> bool:
        """Whether it is the parameter as it is stored."""
        return self.shape == self.sizes and not self.flips

    def take(self, x: jax.Array) -> jax.Array:
        """Cut the box out of an array of the parameter's shape."""
        if self.whole:
            return x
        return jnp.flip(x.reshape(self.fine)[self.slices], self.flips)  # [*sizes]

    def put(self, x: jax.Array, new: jax.Array) -> jax.Array:
        """Return an array of the parameter's shape with the entries of the box replaced."""
        if self.whole:
            return new
        fine = x.reshape(self.fine)  # [*fine]
        return fine.at[self.slices].set(jnp.flip(new, self.flips)).reshape(self.shape)

    def index(self, places: dict[int, int]) -> str:
        """Return the index of one matrix as text.

        Args:
          places: the place of the matrix along some of the fine axes.

        Returns:
          ``"[3]"`` or ``"[:, 2:4]"``; empty for the whole parameter.
        """
        words: list[str] = []
        for axis, size in enumerate(self.shape):
            low, high = self._span(axis, places)
            if (low, high) == (0, size - 1) and size > 1:
                words.append(":")
            else:
                words.append(str(low) if low == high else f"{low}:{high + 1}")
        # NumPy's short form: w[3] for w[3, :, :].
        while words and self._implied(len(words) - 1, words[-1]):
            words.pop()
        return f"[{', '.join(words)}]" if words else ""

    def _span(self, axis: int, places: dict[int, int]) -> tuple[int, int]:
        """Return the first and the last index of the box along a stored axis."""
        inside = [i for i, own in enumerate(self.stored_axes) if own == axis]
        low = high = 0
        # Mixed radix: a step along a fine axis is as many indices as the finer ones after it hold.
        for i in inside:
            unit = math.prod(self.fine[j] for j in inside if j > i)
            first = self.starts[i] + places.get(i, 0)
            last = first if i in places else self.starts[i] + self.sizes[i] - 1
            low += first * unit
            high += last * unit
        return low, high

    def _implied(self, axis: int, word: str) -> bool:
        """Tell whether an index at the end of the text may be left out."""
        return word == ":" or (word == "0" and self.shape[axis] == 1)


@dataclass
class _FineAxis:
    """One fine axis of a `Box`, with what becomes of it in the matrices.

    Attributes:
      stored_axis: the axis of the parameter.
      length: its length.
      start: first index of the box.
      size: how many indices.
      flip: whether it runs backwards.
      role: ``"lead"``, ``"summed"`` or ``"kept"``; empty for a fixed index.
      rank: its place in the list of its role.
    """

    stored_axis: int
    length: int
    start: int
    size: int
    flip: bool = False
    role: str = ""
    rank: int = -1

    @property
    def full(self) -> bool:
        """Whether all of it is used, in its own order."""
        return self.role != "" and self.size == self.length and not self.flip


class _RoleDigit(NamedTuple):
    """A digit of a piece, with the place of its axis in the matrices.

    Attributes:
      size: number of entries.
      stride: from one to the next, in entries of the flattened parameter.
      role: as in `_FineAxis`.
      rank: likewise.
    """

    size: int
    stride: int
    role: str
    rank: int


def placed(
    piece: Piece, lead: list[Digit], summed: list[Digit], kept: list[Digit]
) -> tuple[Box, Order, tuple[int, int]] | str:
    """Return the box that a piece is of its parameter, and the order of axes for matrices.

    Args:
      piece: the piece.
      lead: ``(size, stride)`` of the axes that matrices are stacked along.
      summed: likewise of the axes summed over.
      kept: likewise of the outputs.

    Returns:
      ``(box, order of its axes, (matrices, entries summed over))``; or why it is no box.

    Example:
      >>> piece = Piece("w", (2, 6), 7, (((2, 3), (1, 1)),), (0,))
      >>> box, order, counts = placed(piece, [], [(2, 3)], [(2, 1)])
      >>> box.fine, box.stored_axes, box.starts, box.sizes
      ((2, 2, 3), (0, 1, 1), (1, 0, 1), (1, 2, 2))
      >>> order, counts
      ((0, 1, 2), (1, 2))
    """
    roles = {"lead": lead, "summed": summed, "kept": kept}
    axes = _fine_axes(piece, roles)
    if axes is None:
        return "a slice of it in steps that do not divide its axis is used"
    box = Box(
        piece.shape,
        fine=tuple(a.length for a in axes),
        stored_axes=tuple(a.stored_axis for a in axes),
        starts=tuple(a.start for a in axes),
        sizes=tuple(a.size for a in axes),
        flips=tuple(i for i, a in enumerate(axes) if a.flip),
    )
    ordered = {role: _ranked(axes, role) for role in roles}
    fixed = [i for i, a in enumerate(axes) if not a.role]
    front = [*fixed, *ordered["lead"]]
    inner = ordered["summed"]
    # Transposed to (*front, *inner, *outputs), the box reshapes to [matrices, contracted, outputs].
    matrices = math.prod(axes[i].size for i in front)
    contracted = math.prod(axes[i].size for i in inner)
    return box, (*front, *inner, *ordered["kept"]), (matrices, contracted)


def _ranked(axes: list[_FineAxis], role: str) -> list[int]:
    """Return the indices of the fine axes of a role, in the order of their ranks."""
    found = [i for i, axis in enumerate(axes) if axis.role == role]
    return sorted(found, key=lambda i: axes[i].rank)


def _fine_axes(piece: Piece, roles: dict[str, list[Digit]]) -> list[_FineAxis] | None:
    """Write the stored axes of a piece's parameter out, by the digits of each role."""
    digits: list[_RoleDigit] = []
    for role, listed in roles.items():
        digits += [_RoleDigit(n, stride, role, rank) for rank, (n, stride) in enumerate(listed)]
    # A digit that runs backwards begins at its end: move to the smallest entry of the box.
    first = piece.offset + sum((d.size - 1) * d.stride for d in digits if d.stride < 0)
    axes: list[_FineAxis] = []
    for axis, size in enumerate(piece.shape):
        # The digits that run along this stored axis, with strides in indices of it.
        unit = math.prod(piece.shape[axis + 1 :])
        inside = [d for d in digits if unit <= abs(d.stride) < unit * size]
        own = [d._replace(stride=d.stride // unit) for d in inside]
        # The index of the box's first entry along this axis is first // unit % size.
        found = _written_out(axis, size, first // unit % max(size, 1), own)
        if found is None:
            return None
        axes += _merged(found)
    return axes


def _written_out(
    axis: int, size: int, start: int, digits: list[_RoleDigit]
) -> list[_FineAxis] | None:
    """Write one stored axis out: a fine axis for each digit, and one where no digit runs along."""
    found: list[_FineAxis] = []
    outer = size  # what is left to cut
    # The digit with the longest steps is the outermost factor of the stored axis.
    for n, stride, role, rank in sorted(digits, key=lambda digit: -abs(digit.stride)):
        # Cut `outer` into [outer / step, step]: the digit runs along the first.
        step = abs(stride)
        if outer % step or start // step + n > outer // step:
            return None
        found.append(_FineAxis(axis, outer // step, start // step, n, stride < 0, role, rank))
        outer = step
        start %= step
    # No digit runs along the rest: one index of it is used.
    if outer > 1 or not digits:
        found.append(_FineAxis(axis, outer, start, 1))
    return found


def _merged(axes: list[_FineAxis]) -> list[_FineAxis]:
    """Join neighbours that a reshape had parted: both full, one after the other in one role."""
    done: list[_FineAxis] = []
    for axis in axes:
        last = done[-1] if done else None
        if last is None or not _joinable(last, axis):
            done.append(axis)
            continue
        length = last.length * axis.length
        done[-1] = replace(last, length=length, size=last.size * axis.size, rank=axis.rank)
    return done


def _joinable(last: _FineAxis, axis: _FineAxis) -> bool:
    follows = last.role == axis.role and axis.rank == last.rank + 1
    return last.full and axis.full and follows
