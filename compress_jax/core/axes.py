"""The role of each axis of a stored array: output, input, window or stacked layers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax

from compress_jax.core.errors import ShapeError, StateError
from compress_jax.core.types import Leaf

R = TypeVar("R")


class Axes(NamedTuple):
    """The axes of one leaf.

    Every axis that is neither an output nor a stack is contracted (summed over) by its product.

    Attributes:
      shape: the shape of the stored array.
      outputs: axes that index outputs: one scale each where scales go by channel.
      stack: axes along which the leaf holds several layers or experts, ascending; each is
        compressed by itself.
      window: of the contracted axes, those of a convolution's window.
      source: where this is known from: ``"trace"``, or ``"convention"`` for the guess that the last
        axis is the output.
      note: what a reader should know, such as two uses that disagree; else empty.

    Example:
      >>> axes = Axes((2, 3, 4), outputs=(2,), stack=(0,), source="trace")
      >>> axes.letters, axes.contracted, axes.layer.shape
      ('sio', (1,), (3, 4))
    """

    shape: tuple[int, ...]
    outputs: tuple[int, ...]
    stack: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    source: str = "convention"
    note: str = ""

    @classmethod
    def convention(cls, shape: tuple[int, ...]) -> "Axes":
        """Return the guess without a function: outputs last, as in Flax kernels; none at rank 1."""
        return cls(tuple(shape), (len(shape) - 1,) if len(shape) > 1 else ())

    @property
    def contracted(self) -> tuple[int, ...]:
        """The axes that are summed over."""
        return tuple(
            a for a in range(len(self.shape)) if a not in self.outputs and a not in self.stack
        )

    @property
    def letters(self) -> str:
        """One letter an axis: ``s`` stack, ``w`` window, ``i`` input, ``o`` output."""
        roles = (
            dict.fromkeys(self.outputs, "o")
            | dict.fromkeys(self.stack, "s")
            | dict.fromkeys(self.window, "w")
        )
        return "".join(roles.get(a, "i") for a in range(len(self.shape)))

    @property
    def layers(self) -> int:
        """How many layers the leaf holds."""
        return math.prod(self.shape[a] for a in self.stack)

    @property
    def layer(self) -> "Axes":
        """The axes of one layer, the stack taken away."""
        return self.without(len(self.stack))

    def without(self, count: int) -> "Axes":
        """Return the axes of a slice along the first axes of the stack.

        Args:
          count: how many axes of the stack are taken away.

        Returns:
          The axes that are left, numbered anew.

        Example:
          >>> Axes((2, 3, 4), outputs=(2,), stack=(0,)).without(1).outputs
          (1,)
        """
        left = [a for a in range(len(self.shape)) if a not in self.stack[:count]]
        place = {a: i for i, a in enumerate(left)}

        def moved(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(place[a] for a in axes)

        return self._replace(
            shape=tuple(self.shape[a] for a in left),
            outputs=moved(self.outputs),
            stack=moved(self.stack[count:]),
            window=moved(self.window),
        )

    def with_outputs(self, axis: int | Sequence[int]) -> "Axes":
        """Return these axes with other outputs.

        They are counted in the stored array, or in one layer if they would all be stacks.

        Args:
          axis: one axis or several, negative ones counted from the end.

        Returns:
          The axes. A layer of rank 1 keeps none: it is one channel.

        Raises:
          ShapeError: if the array has no such axis.
        """
        rank = len(self.shape)
        chosen = (axis,) if isinstance(axis, int) else tuple(axis)
        if any(not -rank <= a < rank for a in chosen if rank):
            raise ShapeError(
                f"channel axis {axis} does not exist in an array of shape {self.shape}"
            )
        # A layer of rank 1 is one channel: with a scale for each entry nothing would be shared.
        if rank - len(self.stack) < 2:
            return self._replace(outputs=())
        outputs = tuple(sorted({a % rank for a in chosen} - set(self.stack)))
        # axis=0 of a scanned kernel is its stack; it was meant for one layer.
        if not outputs and self.stack:
            left = [a for a in range(rank) if a not in self.stack]
            outputs = tuple(
                sorted({left[a % len(left)] for a in chosen if -len(left) <= a < len(left)})
            )
        note = self.note
        # The argument is followed even where a trace tells otherwise; `coverage` shows the note.
        if self.source == "trace" and outputs != tuple(sorted(self.outputs)):
            actual = _listed(self.outputs)
            note = f"axis={axis} was asked for, but its product's outputs are on {actual}"
        return self._replace(
            outputs=outputs, window=tuple(a for a in self.window if a not in outputs), note=note
        )


def known_axes(known: Mapping[str, Axes] | None, path: str, x: Leaf) -> Axes:
    """Return the axes of a leaf: those a trace told, or the convention where there is no trace.

    Args:
      known: ``{path: Axes}`` of a whole tree, or None.
      path: the name of the leaf.
      x: the leaf.

    Returns:
      The axes.

    Raises:
      StateError: if axes are known, but not this leaf's, or those of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> known_axes(None, "kernel", jnp.ones((3, 4))).outputs
      (1,)
    """
    shape = tuple(x.shape)
    if not known:
        return Axes.convention(shape)
    if path not in known:
        raise StateError(
            f"leaf {path!r} is not among those this compression was bound to: {', '.join(known)}; "
            "bind it to the tree it is "
            "used on, with a function of that tree"
        )
    axes = known[path]
    if axes.shape != shape:
        # Inside shard_map a leaf is one device's piece: another shape, the same axes.
        if not jax.sharding.get_abstract_mesh().manual_axes:
            raise StateError(
                f"leaf {path!r} has shape {shape}; this compression was bound to one of "
                f"{axes.shape}"
            )
        axes = axes._replace(shape=shape)
    return axes


def _listed(axes: tuple[int, ...]) -> str:
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {axes}" if axes else "no axis"


def over_layers(
    fn: Callable[..., R], axes: Axes, args: Sequence[str], out: str
) -> Callable[..., R]:
    """Return a function of one layer as a function of a whole stack: one program for all layers.

    Args:
      fn: takes positional arguments.
      axes: of the stacked leaf; without a stack ``fn`` is returned as it is.
      args: what each argument is: ``"leaf"`` (layers where the leaf has them), ``"state"`` (layers
        lead), or ``"shared"``.
      out: what the result is, likewise.

    Returns:
      The function.

    Example:
      >>> import jax.numpy as jnp
      >>> axes = Axes((2, 3), outputs=(), stack=(1,))
      >>> x = jnp.array([[1.0, 2.0, 3.0], [2.0, 2.0, 6.0]])
      >>> over_layers(lambda x: x / x.max(), axes, ["leaf"], "leaf")(x).tolist()
      [[0.5, 1.0, 0.5], [1.0, 1.0, 1.0]]
    """
    # From the innermost loop out: an axis moves down by one for each stack axis that outer loops
    # have taken away.
    for depth in reversed(range(len(axes.stack))):
        places = {"leaf": axes.stack[depth] - depth, "state": 0, "shared": None}
        fn = jax.vmap(fn, in_axes=tuple(places[each] for each in args), out_axes=places[out])
    return fn
