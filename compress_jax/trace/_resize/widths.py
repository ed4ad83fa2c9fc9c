"""Axes with some coordinates removed: their indices and sizes, and what changes in equations.

`KeptCoordinates` computes indices and sizes, `resized` the parameters of an equation at the new
sizes. `own_width` traces a function at the new width and compares it, equation for equation, with
the old one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from compress_jax.core.types import ModelFn, PyTree, Variables
from compress_jax.trace._groups.analyze import Analysis, Walk
from compress_jax.trace._groups.axes import Axes, Axis, Dims, Leaf, Sum, interleaved
from compress_jax.trace._groups.groups import Group
from compress_jax.trace._jaxpr.interpret import ConstantValue, uniform_operands, uniform_value
from compress_jax.trace._jaxpr.primitives import PASS_THROUGH, bodies, nested
from compress_jax.trace._jaxpr.site import Position, Shape


@dataclass(frozen=True)
class KeptCoordinates:
    """The coordinates that remain of leaves; leaves that are not listed stay whole.

    Attributes:
      axes: what is known about axes.
      indices: by leaf, none of them bound, the coordinates that remain, ascending.
    """

    axes: Axes
    indices: Mapping[Leaf, np.ndarray]

    def of(self, axis: Axis) -> np.ndarray:
        """Return the indices of an axis that remain, ascending.

        Example:
          >>> from compress_jax.trace._groups.axes import product
          >>> axes = Axes()
          >>> rows, columns = axes.leaf(2), axes.leaf(3)
          >>> kept = KeptCoordinates(axes, {columns: np.array([0, 2])})
          >>> kept.of(product([rows, columns])).tolist()
          [0, 2, 3, 5]
        """
        axis = self.axes.find(axis)
        if isinstance(axis, Leaf):
            return self.indices.get(axis, np.arange(axis.size))
        # Terms end to end: each begins where those before it ended, at their old sizes.
        if isinstance(axis, Sum):
            starts = np.cumsum([0, *(part.size for part in axis.parts[:-1])])
            terms = zip(starts, axis.parts, strict=True)
            return np.concatenate([start + self.of(part) for start, part in terms])
        # Row-major: index = (index of the slower factors) * size + (index of this factor).
        found = np.zeros(1, int)
        for part in axis.parts:
            found = found[:, None] * part.size + self.of(part)[None, :]  # [slower, this factor]
            found = found.reshape(-1)
        return found

    def size(self, axis: Axis) -> int:
        """Return how many indices of an axis remain."""
        axis = self.axes.find(axis)
        if isinstance(axis, Leaf):
            return len(self.indices[axis]) if axis in self.indices else axis.size
        sizes = [self.size(part) for part in axis.parts]
        return sum(sizes) if isinstance(axis, Sum) else math.prod(sizes)

    def all_of(self, axis: Axis) -> bool:
        """Return whether all indices of an axis remain, as of any that is frozen."""
        return self.size(axis) == axis.size

    def shape(self, dims: Dims) -> Shape:
        """Return the shape of a value at the new sizes of its axes."""
        return tuple(map(self.size, dims))


def leaves_of(analysis: Analysis, group: Group) -> tuple[Leaf, ...]:
    """Return the leaves of a group in an analysis, perhaps for inputs of other shapes.

    They are the leaves whose coordinates along every member's axis are the group's: one leaf, or
    several where inputs of these shapes no longer tie all members together.

    Args:
      analysis: of the function.
      group: one that `groups` found, for the same parameters.

    Returns:
      The leaves; none if in this analysis the members' axes are made of other axes.
    """
    found: list[Leaf] = []
    for path, axis in group.members:
        along = analysis.walk.axes.coordinates(analysis.params[path][axis])
        expected = group.coordinates[path, axis]
        same = [leaf for leaf, place in along.items() if np.array_equal(place, expected)]
        # One member that cannot be shortened would no longer fit the others.
        if not same:
            return ()
        found += same
    return tuple(dict.fromkeys(found))


def sliced(x: jax.Array, shape: Shape) -> jax.Array:
    """Return the first entries along every axis.

    Of a constant any entries would do: they are equal along every axis that can be shortened.
    """
    return x if np.shape(x) == shape else x[tuple(map(slice, shape))]


# The parameters of equations (shapes, limits, sizes of slices, group counts) at the new sizes. What
# a rule says of an axis must be what is there already if the axis is not shortened: most variants
# of primitives (negative padding, say) freeze the axis, and rules know only the others.

Changes = dict[str, object]
# (kept, equation, axes of operands, axes of results) -> changed parameters
Rule = Callable[[KeptCoordinates, JaxprEqn, list[Dims], list[Dims]], Changes]


def resized(
    kept: KeptCoordinates, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]
) -> Changes:
    """Return those parameters of an equation that change with the sizes of axes.

    Args:
      kept: the coordinates that remain.
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
      >>> kept = KeptCoordinates(axes, {channels: np.array([0, 3])})
      >>> resized(kept, eqn, [(channels,)], [(axes.leaf(2), channels)])
      {'shape': (2, 2)}
    """
    rule = RULES.get(eqn.primitive.name)
    return rule(kept, eqn, operands, results) if rule else {}


def _shape(
    kept: KeptCoordinates, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]
) -> Changes:
    return {"shape": kept.shape(results[0])}


def _last_axes(
    kept: KeptCoordinates, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]
) -> Changes:
    """Random numbers for each key of an array of keys."""
    # [*keys, *shape]: only the last axes are a parameter of the equation.
    count = len(eqn.params["shape"])
    return {"shape": kept.shape(results[0])[len(results[0]) - count :]} if count else {}


def _reshape(
    kept: KeptCoordinates, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]
) -> Changes:
    return {"new_sizes": kept.shape(results[0])}


def _slice(
    kept: KeptCoordinates, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]
) -> Changes:
    """A limit becomes the number of indices that remain before it."""
    p = eqn.params
    strides = p["strides"] or [1] * len(operands[0])
    pieces = zip(
        operands[0], results[0], p["start_indices"], p["limit_indices"], strides, strict=True
    )
    limits = [_limits(kept, *piece) for piece in pieces]
    starts, ends = zip(*limits, strict=True) if limits else ((), ())
    return {"start_indices": starts, "limit_indices": ends}


def _limits(
    kept: KeptCoordinates, axis: Axis, piece: Axis, start: int, limit: int, stride: int
) -> tuple[int, int]:
    """Return the new start and limit; a strided slice's rows remain or go as a whole."""

    def before(index: int) -> int:
        # How many of the first `index` indices remain; of none, none.
        return index and int((kept.of(axis) < index).sum())

    if kept.all_of(axis):
        return start, limit
    if stride == 1:
        return before(start), before(limit)
    # The slice takes index `start - first` of each row; rows keep their length, the stride.
    first, count = interleaved(start, limit, stride)
    new = before(first) + start - first
    # The limit stays as far behind the last index taken as it was, within the axis.
    behind = limit - (start + (count - 1) * stride)
    return new, min(new + (kept.size(piece) - 1) * stride + behind, kept.size(axis))


def _split(
    kept: KeptCoordinates, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]
) -> Changes:
    return {"sizes": tuple(kept.size(dims[eqn.params["axis"]]) for dims in results)}


def _whole(
    kept: KeptCoordinates, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]
) -> Changes:
    """An axis that was taken whole still is; other axes do not change."""
    sizes = []
    for axis, size in zip(operands[0], eqn.params["slice_sizes"], strict=True):
        sizes.append(kept.size(axis) if axis.size == size else size)
    return {"slice_sizes": tuple(sizes)}


def _pad(
    kept: KeptCoordinates, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]
) -> Changes:
    """Padding may be removed like any other coordinates of the result."""
    config = []
    for axis, padding, out in zip(
        operands[0], eqn.params["padding_config"], results[0], strict=True
    ):
        low, high, interior = padding
        # Shortened, the result is [low, axis, high]: what is cropped or dilated is frozen.
        if not kept.all_of(out):
            left = kept.of(out)
            high = int((left >= low + axis.size).sum())
            low = int((left < low).sum())
        config.append((low, high, interior))
    return {"padding_config": tuple(config)}


def _tile(
    kept: KeptCoordinates, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]
) -> Changes:
    reps = []
    for axis, out, times in zip(operands[0], results[0], eqn.params["reps"], strict=True):
        reps.append(times if kept.all_of(out) else kept.size(out) // kept.size(axis))
    return {"reps": tuple(reps)}


def _convolution(
    kept: KeptCoordinates, eqn: JaxprEqn, operands: list[Dims], results: list[Dims]
) -> Changes:
    """The number of groups is the image's channels over the kernel's."""
    numbers = eqn.params["dimension_numbers"]
    image = operands[0][numbers.lhs_spec[1]]  # input channels
    kernel = operands[1][numbers.rhs_spec[1]]  # input channels of one group
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


# The function's own code at the new width, compared with the old one.

# Parameters of other types, such as functions, are made anew by every trace: they are not compared.
PLAIN = (bool, int, float, str, tuple, np.dtype, type(None))


def own_width(
    fn: ModelFn,
    analysis: Analysis,
    kept: KeptCoordinates,
    variables: Variables,
    inputs: Sequence[PyTree],
) -> ClosedJaxpr | None:
    """Return the jaxpr of a function's own code for the shorter variables, if it does the same.

    It does if its equations are those for the longer variables, with resized shapes.

    Args:
      fn: the function.
      analysis: of it, for the longer variables.
      kept: the coordinates that remain.
      variables: the shorter ones.
      inputs: as in the analysis.

    Returns:
      The jaxpr; None if the function fails, or if an equation is another, has other shapes or takes
      other arrays.
    """
    # What an earlier `resize` returned runs a plan; the user's own code is its attribute `whole`.
    try:
        made = jax.make_jaxpr(getattr(fn, "whole", fn))(variables, *inputs)
    except Exception:  # whatever a model with its widths written down raises
        return None
    alike = _Comparison(analysis.walk, kept).alike(analysis.traced.jaxpr, made)
    return made if alike else None


def differences(old: ClosedJaxpr, new: ClosedJaxpr) -> dict[Position, dict[int, float]]:
    """Return the numbers that differ between two jaxprs that are otherwise alike.

    Returns:
      By position, ``{which operand: its number in the new jaxpr}``.
    """
    before = uniform_operands(old)
    after = uniform_operands(new)
    found: dict[Position, dict[int, float]] = {}
    for position, ours in before.items():
        for which, (a, b) in enumerate(zip(ours, after.get(position, ()), strict=False)):
            if a is not None and b is not None and a != b:
                found.setdefault(position, {})[which] = b
    return found


Constants = Mapping[Var, jax.Array]  # captured arrays by the variable that holds them


@dataclass
class _Comparison:
    """Compares two jaxprs equation by equation.

    Attributes:
      walk: the axes of every value in the first.
      kept: the coordinates of them that the second should have.
      pairs: variables of the first, and their counterparts in the second.
    """

    walk: Walk
    kept: KeptCoordinates
    pairs: dict[Var, Var] = field(default_factory=dict)

    def alike(self, old: ClosedJaxpr, new: ClosedJaxpr, position: Position = ()) -> bool:
        """Return whether the second jaxpr is the first one at another width."""
        inputs = (old.jaxpr.invars, new.jaxpr.invars)
        outputs = (old.jaxpr.outvars, new.jaxpr.outvars)
        if any(len(a) != len(b) for a, b in (inputs, outputs, (old.eqns, new.eqns))):
            return False
        # Variables correspond by their places; every equation adds its results.
        self.pairs |= dict(zip(*inputs, strict=True))
        variables = (*old.jaxpr.constvars, *new.jaxpr.constvars)
        constants = dict(zip(variables, (*old.consts, *new.consts), strict=True))
        for i, (a, b) in enumerate(zip(old.eqns, new.eqns, strict=True)):
            if not self._equations(a, b, (*position, i), constants):
                return False
        return self._all_atoms(*outputs, constants)

    def _equations(
        self, old: JaxprEqn, new: JaxprEqn, position: Position, constants: Constants
    ) -> bool:
        if old.primitive is not new.primitive or len(old.outvars) != len(new.outvars):
            return False
        if not self._all_atoms(old.invars, new.invars, constants):
            return False
        self.pairs |= dict(zip(old.outvars, new.outvars, strict=True))
        if old.primitive.name in PASS_THROUGH:
            return True
        form = nested(old)
        other = nested(new)
        if form is None or other is None:
            return form is other is None and self._leaf(old, new, position)
        ours = bodies(form)
        others = bodies(other)
        if ours.keys() != others.keys():
            return False
        # An axis that a loop runs along is frozen, so that the same loop runs as often.
        if getattr(form, "length", 0) != getattr(other, "length", 0):
            return False
        return all(self.alike(body, others[step], (*position, step)) for step, body in ours.items())

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

    def _all_atoms(
        self,
        old: Sequence[Var | Literal],
        new: Sequence[Var | Literal],
        constants: Constants,
    ) -> bool:
        if len(old) != len(new):
            return False
        return all(self._atoms(a, b, constants) for a, b in zip(old, new, strict=True))

    def _atoms(self, old: Var | Literal, new: Var | Literal, constants: Constants) -> bool:
        """Return whether two operands are the same value, two numbers, or the same array."""
        a = _constant(old, constants)
        b = _constant(new, constants)
        if a is None or b is None:
            # A value that is computed: the same if it corresponds to the other.
            return a is b is None and isinstance(old, Var) and self.pairs.get(old) is new
        # Two numbers may differ: `differences` lists them, and `resize` decides.
        if uniform_value(a) is not None and uniform_value(b) is not None:
            return True
        # A captured array may be made in the new width: it must be the first entries of the old.
        before = np.shape(a)
        after = np.shape(b)
        if len(before) != len(after) or any(x < y for x, y in zip(before, after, strict=True)):
            return False
        return _equal(sliced(a, after), b)


def _constant(atom: Var | Literal, constants: Constants) -> jax.Array | None:
    return atom.val if isinstance(atom, Literal) else constants.get(atom)


def _equal(a: jax.Array, b: jax.Array) -> bool:
    """Return whether two captured arrays are known to be equal."""
    if a is b:
        return True
    x = _entries(a)
    y = _entries(b)
    if x is None or y is None or x.shape != y.shape:
        return False
    both_nan = (x != x) & (y != y)
    return bool(((x == y) | both_nan).all())


def _entries(x: jax.Array) -> np.ndarray | None:
    value = ConstantValue(x)
    # NumPy cannot compare typed keys of random numbers.
    if value.known and jax.numpy.issubdtype(jax.numpy.result_type(x), jax.dtypes.extended):
        return np.asarray(jax.random.key_data(x))
    return value.entries
