"""What is left of axes if only some coordinates of some leaves are kept: their indices and their lengths."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from compress_jax.core.types import ModelFn, Variables
from compress_jax.trace._groups.analyze import Analysis, Walk
from compress_jax.trace._groups.axes import Axes, Axis, Dims, Leaf, Sum, interleaved
from compress_jax.trace._groups.groups import Group
from compress_jax.trace._jaxpr.interpret import uniform_operands, uniform_value
from compress_jax.trace._jaxpr.primitives import PASS_THROUGH, bodies, nested
from compress_jax.trace._jaxpr.site import Position, Shape


@dataclass(frozen=True)
class Kept:
    """Coordinates that are kept of leaves; leaves that are not listed stay whole.

    Attributes:
      axes: what is known about axes.
      indices: by leaf, none of them bound, the coordinates to keep, ascending.
    """

    axes: Axes
    indices: Mapping[Leaf, np.ndarray]

    def of(self, axis: Axis) -> np.ndarray:
        """Return the indices of an axis that are left, ascending.

        Example:
          >>> axes = Axes()
          >>> rows, columns = axes.leaf(2), axes.leaf(3)
          >>> from compress_jax.trace._groups.axes import product
          >>> Kept(axes, {columns: np.array([0, 2])}).of(product([rows, columns])).tolist()
          [0, 2, 3, 5]
        """
        axis = self.axes.find(axis)
        if isinstance(axis, Leaf):
            return self.indices.get(axis, np.arange(axis.size))
        if isinstance(axis, Sum):
            starts = np.cumsum([0, *(part.size for part in axis.parts)])
            return np.concatenate(
                [start + self.of(part) for start, part in zip(starts, axis.parts, strict=False)]
            )
        found = np.zeros(1, int)
        for part in axis.parts:
            found = (found[:, None] * part.size + self.of(part)[None, :]).reshape(-1)
        return found

    def size(self, axis: Axis) -> int:
        """Return how many indices of an axis are left."""
        axis = self.axes.find(axis)
        if isinstance(axis, Leaf):
            return len(self.indices[axis]) if axis in self.indices else axis.size
        sizes = [self.size(part) for part in axis.parts]
        return sum(sizes) if isinstance(axis, Sum) else math.prod(sizes)

    def shape(self, dims: Dims) -> Shape:
        """Return the shape of what is left of a value."""
        return tuple(map(self.size, dims))


def leaves_of(analysis: Analysis, group: Group) -> tuple[Leaf, ...]:
    """Return the leaves that a group is in an analysis, perhaps of the same function for inputs of other shapes.

    They are those whose coordinates along every member's axis are the group's: one, or several
    where shorter inputs no longer tie all members together.

    Args:
      analysis: of the function.
      group: one that `groups` found, for the same parameters.

    Returns:
      The leaves; none if in this analysis the members' axes are made of other parts.
    """
    found: list[Leaf] = []
    for path, axis in group.members:
        along = analysis.walk.axes.coordinates(analysis.params[path][axis])
        same = [
            leaf
            for leaf, place in along.items()
            if np.array_equal(place, group.coordinates[path, axis])
        ]
        if not same:
            return ()
        found += same
    return tuple(dict.fromkeys(found))


def cut(x: Any, shape: Shape) -> Any:
    """Return the first entries along every axis: a constant's, which are all the same along whatever may be shortened."""
    return x if np.shape(x) == shape else x[tuple(map(slice, shape))]


# What an equation's own parameters become when axes get shorter: shapes, limits, sizes of slices,
# counts of groups.


Changes = dict[str, Any]
Rule = Callable[
    [Kept, JaxprEqn, list[Dims], list[Dims]], Changes
]  # (kept, equation, axes of operands, of results)


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
      >>> from compress_jax.trace._groups.axes import Axes
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
    pieces = zip(
        operands[0], results[0], p["start_indices"], p["limit_indices"], strides, strict=True
    )
    limits = [_limits(kept, *piece) for piece in pieces]
    return {
        "start_indices": tuple(start for start, _ in limits),
        "limit_indices": tuple(limit for _, limit in limits),
    }


def _limits(
    kept: Kept, axis: Axis, piece: Axis, start: int, limit: int, stride: int
) -> tuple[int, int]:
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
    return {
        "slice_sizes": tuple(kept.size(axis) if axis.size == size else size for axis, size in pairs)
    }


def _pad(kept: Kept, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]) -> Changes:
    """Padding that a removed channel falls into gets shorter."""
    config = []
    for axis, (low, high, interior), out in zip(
        operands[0], eqn.params["padding_config"], results[0], strict=True
    ):
        if low > 0 or high > 0:
            left = kept.of(out)
            low, high = (
                (int((left < low).sum()), int((left >= low + axis.size).sum()))
                if not interior
                else (low, high)
            )
        config.append((low, high, interior))
    return {"padding_config": tuple(config)}


def _tile(kept: Kept, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]) -> Changes:
    return {
        "reps": tuple(
            kept.size(out) // kept.size(axis)
            for axis, out in zip(operands[0], results[0], strict=True)
        )
    }


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


# A function at another width: whether its code runs there as it stands, equation for equation, and
# with which numbers.


PLAIN = (bool, int, float, str, tuple, np.dtype, type(None))


def own_width(
    fn: ModelFn, analysis: Analysis, kept: Kept, variables: Variables, inputs: Sequence[Any]
) -> ClosedJaxpr | None:
    """Return the jaxpr of a function for shorter variables, if it is that of the longer ones with shapes as they are kept.

    Args:
      fn: the function.
      analysis: of it, for the longer variables.
      kept: what is left of axes.
      variables: the shorter ones.
      inputs: as in the analysis.

    Returns:
      The jaxpr; None if the function fails, or if an equation is another, has other shapes or takes
      other arrays.
    """
    try:
        made = jax.make_jaxpr(getattr(fn, "whole", fn))(variables, *inputs)
    except Exception:  # whatever a model raises that has its widths written down
        return None
    return made if _Comparison(analysis.walk, kept).alike(analysis.traced.jaxpr, made) else None


def differences(old: ClosedJaxpr, new: ClosedJaxpr) -> dict[Position, dict[int, float]]:
    """Return the operands that are one number in both of two jaxprs that are alike, but not the same: the new numbers."""
    before, after = uniform_operands(old), uniform_operands(new)
    found: dict[Position, dict[int, float]] = {}
    for position, ours in before.items():
        for which, (a, b) in enumerate(zip(ours, after.get(position, ()), strict=False)):
            if a is not None and b is not None and a != b:
                found.setdefault(position, {})[which] = b
    return found


@dataclass
class _Comparison:
    """Goes through two jaxprs side by side.

    Attributes:
      walk: the axes of every value in the first.
      kept: what should be left of them in the second.
      pairs: variables of the first and what they are in the second.
    """

    walk: Walk
    kept: Kept
    pairs: dict[Any, Any] = field(default_factory=dict)

    def alike(self, old: ClosedJaxpr, new: ClosedJaxpr, position: Position = ()) -> bool:
        """Tell whether the second is the first at another width."""
        inputs = (old.jaxpr.invars, new.jaxpr.invars)
        if any(
            len(a) != len(b)
            for a, b in (inputs, (old.eqns, new.eqns), (old.jaxpr.outvars, new.jaxpr.outvars))
        ):
            return False
        self.pairs |= dict(zip(*inputs, strict=True))
        constants = dict(
            zip(
                (*old.jaxpr.constvars, *new.jaxpr.constvars),
                (*old.consts, *new.consts),
                strict=True,
            )
        )
        equations = enumerate(zip(old.eqns, new.eqns, strict=True))
        return all(
            self._equations(a, b, (*position, i), constants) for i, (a, b) in equations
        ) and all(
            self._atoms(a, b, constants)
            for a, b in zip(old.jaxpr.outvars, new.jaxpr.outvars, strict=True)
        )

    def _equations(
        self, old: JaxprEqn, new: JaxprEqn, position: Position, constants: Mapping[Any, Any]
    ) -> bool:
        if (
            old.primitive is not new.primitive
            or len(old.invars) != len(new.invars)
            or len(old.outvars) != len(new.outvars)
        ):
            return False
        if not all(
            self._atoms(a, b, constants) for a, b in zip(old.invars, new.invars, strict=True)
        ):
            return False
        self.pairs |= dict(zip(old.outvars, new.outvars, strict=True))
        if old.primitive.name in PASS_THROUGH:
            return True
        form, other = nested(old), nested(new)
        if form is None or other is None:
            return form is other is None and self._leaf(old, new, position)
        ours, others = bodies(form), bodies(other)
        same = ours.keys() == others.keys() and getattr(form, "length", 0) == getattr(
            other, "length", 0
        )
        return same and all(
            self.alike(body, others[step], (*position, step)) for step, body in ours.items()
        )

    def _leaf(self, old: JaxprEqn, new: JaxprEqn, position: Position) -> bool:
        operands, results = self.walk.values[position]
        shapes = [tuple(getattr(var.aval, "shape", ())) for var in new.outvars]
        if shapes != [self.kept.shape(dims) for dims in results]:
            return False
        expected = {**old.params, **resized(self.kept, old, operands, results)}
        return all(
            new.params.get(key) == value
            for key, value in expected.items()
            if isinstance(value, PLAIN) and isinstance(new.params.get(key), PLAIN)
        )

    def _atoms(self, old: Any, new: Any, constants: Mapping[Any, Any]) -> bool:
        """Tell whether two operands are the same value, or constants that are numbers or the same array."""
        a, b = (_constant(atom, constants) for atom in (old, new))
        if a is None or b is None:
            return a is b is None and self.pairs.get(old) is new
        if uniform_value(a) is not None and uniform_value(b) is not None:
            return True
        shapes = np.shape(a), np.shape(b)
        if len(shapes[0]) != len(shapes[1]) or any(x < y for x, y in zip(*shapes, strict=True)):
            return False
        return _equal(cut(a, shapes[1]), b)


def _constant(atom: Any, constants: Mapping[Any, Any]) -> Any:
    return atom.val if isinstance(atom, Literal) else constants.get(atom)


def _equal(a: Any, b: Any) -> bool:
    if jax.numpy.issubdtype(getattr(a, "dtype", np.float32), jax.dtypes.extended):
        return bool((jax.random.key_data(a) == jax.random.key_data(b)).all())
    x, y = np.asarray(a), np.asarray(b)
    return x.shape == y.shape and bool(
        ((x == y) | ((x != x) & (y != y))).all()
    )  # NaN is the same as NaN
