"""What the axes of a function's values are made of, found by one walk over its jaxpr.

`RULES` holds what every known primitive does to axes; a primitive without a rule freezes all it
touches. `Walk` is the domain for the interpreter, `analyze` runs it.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jax.extend.core import JaxprEqn

from compress_jax.core.paths import flatten
from compress_jax.core.types import Aval, Leaves, ModelFn, PyTree, Variables
from compress_jax.trace._groups import axes as moves
from compress_jax.trace._groups.axes import Axes, Axis, Dims, Results, alike, product, shape, unify
from compress_jax.trace._jaxpr import primitives
from compress_jax.trace._jaxpr.find_sites import Traced, trace
from compress_jax.trace._jaxpr.interpret import ConstantValue, Where, interpret
from compress_jax.trace._jaxpr.site import Position, Shape

Rule = Callable[[Axes, JaxprEqn, list[Dims]], Results]


def _elementwise(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Entry by entry: operands and results have the same axes."""
    dims = alike(axes, args)
    return [dims for _ in eqn.outvars]


def _each(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Each operand becomes a result of its own."""
    return args


def _free(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Random bits may come in any order: new axes, not frozen."""
    return [_new(axes, getattr(var.aval, "shape", ())) for var in eqn.outvars]


def _new(axes: Axes, shape: Shape) -> Dims:
    """Return new axes for a value of a shape."""
    return tuple(axes.leaf(size) for size in shape)


def _nothing(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """There is no result."""
    return []


def _iota(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """The result numbers one axis, whose indices are then no longer alike."""
    along = eqn.params["dimension"]
    return [
        tuple(
            axes.leaf(size, "numbered by iota" if i == along else None)
            for i, size in enumerate(eqn.params["shape"])
        )
    ]


def _reduce(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Sums, maxima and the like do not depend on the order along the reduced axes."""
    return [tuple(axis for i, axis in enumerate(args[0]) if i not in eqn.params["axes"])]


def _arg_reduce(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """The result is an index."""
    for i in eqn.params["axes"]:
        axes.freeze(args[0][i], eqn.primitive.name)
    return _reduce(axes, eqn, args)


def _along(name: str) -> Rule:
    """Return the rule of primitives that depend on the order along axes, which are frozen.

    Args:
      name: the equation's parameter that holds the axis, or the axes.
    """

    def rule(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
        dims = alike(axes, args)
        chosen = eqn.params[name]
        for i in (chosen,) if isinstance(chosen, int) else chosen:
            axes.freeze(dims[i], eqn.primitive.name)
        return [dims for _ in eqn.outvars]

    return rule


def _top_k(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """The results hold k entries of one axis in descending order: it is frozen."""
    i = eqn.params.get("axis", -1) % len(args[0])
    axes.freeze(args[0][i], "top_k")
    largest = axes.leaf(eqn.params["k"], "top_k")
    return [(*args[0][:i], largest, *args[0][i + 1 :]) for _ in eqn.outvars]


def _window(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Pooling freezes axes with a window longer than 1; the others pass through."""
    p = eqn.params
    windows = zip(
        args[0], p["window_dimensions"], p["window_strides"], p["padding"], shape(eqn), strict=True
    )
    return [tuple(_slide(axes, *window) for window in windows)]


def _slide(
    axes: Axes, axis: Axis, size: int, stride: int, padding: Sequence[int], length: int
) -> Axis:
    """Return the axis of the given length that a sliding window makes of another axis."""
    # A window of 1 in steps of 1 leaves every index where it is.
    if (size, stride, tuple(padding), length) == (1, 1, (0, 0), axis.size):
        return axis
    axes.freeze(axis, "spatial window")
    return axes.leaf(length, "spatial window")


def _dot_general(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """A contracted or a batch axis is the same axis in both operands."""
    (left, right), (left_batch, right_batch) = primitives.axes(eqn)
    for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        unify(axes, args[0][i], args[1][j])
    # The result has batch axes, then the free axes of the left operand, then of the right one.
    lhs = [axis for i, axis in enumerate(args[0]) if i not in (*left, *left_batch)]
    rhs = [axis for j, axis in enumerate(args[1]) if j not in (*right, *right_batch)]
    return [(*(args[0][i] for i in left_batch), *lhs, *rhs)]


def _ragged(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Groups of rows have a matrix each; their sizes are data, so neither can be permuted."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    rows = numbers.lhs_ragged_dimensions
    groups = numbers.rhs_group_dimensions
    (left, right), (left_batch, right_batch) = numbers.dot_dimension_numbers
    # Variants that sum over the ragged axis, or have it as a batch axis, have no rule.
    if len(rows) != 1 or rows[0] in (*left, *left_batch):
        return None
    # The rows of lhs, the matrices of rhs, and the group sizes, which are the third operand.
    for axis in (*(args[0][i] for i in rows), *(args[1][j] for j in groups), *args[2]):
        axes.freeze(axis, "ragged group")
    for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        unify(axes, args[0][i], args[1][j])
    # As in a plain product, but the axis of the matrices is gone: each row meets one of them.
    lhs = [axis for i, axis in enumerate(args[0]) if i not in (*left, *left_batch)]
    rhs = [axis for j, axis in enumerate(args[1]) if j not in (*right, *right_batch, *groups)]
    return [(*(args[0][i] for i in left_batch), *lhs, *rhs)]


def _convolution(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Input channels are groups x the kernel's, output channels are groups x the rest."""
    p = eqn.params
    numbers = p["dimension_numbers"]
    image, kernel = args
    if p["batch_group_count"] != 1:
        return None  # JAX makes these for the gradients of grouped convolutions
    batch, channel, *space = numbers.lhs_spec
    out, into, *window = numbers.rhs_spec
    if p["feature_group_count"] == 1:
        unify(axes, image[channel], kernel[into])
    else:
        # Channels are (group, channel of the group), the group varying slowest.
        groups = axes.leaf(p["feature_group_count"])
        unify(axes, image[channel], product([groups, kernel[into]]))
        unify(axes, kernel[out], product([groups, axes.leaf(kernel[out].size // groups.size)]))
    # out_spec lists the result's axes as (batch, channel, *space).
    results = dict(zip(numbers.out_spec, (image[batch], kernel[out]), strict=False))
    lengths = [shape(eqn)[i] for i in numbers.out_spec[2:]]
    for n, (i, j, target, length) in enumerate(
        zip(space, window, numbers.out_spec[2:], lengths, strict=True)
    ):
        axes.freeze(kernel[j], "spatial window")
        stride = p["window_strides"][n]
        results[target] = _slide(axes, image[i], kernel[j].size, stride, p["padding"][n], length)
    return [tuple(results[i] for i in range(len(results)))]


# A later row overrides its class: iota is a creation, dynamic_update_slice an update.
RULES: dict[str, Rule] = {
    **dict.fromkeys(primitives.ELEMENTWISE, _elementwise),
    **dict.fromkeys(primitives.COLLECTIVES, _each),
    **dict.fromkeys(primitives.REDUCTIONS, _reduce),
    **dict.fromkeys(primitives.CREATION | primitives.RANDOM, _free),
    **dict.fromkeys(primitives.INDEX_REDUCTIONS, _arg_reduce),
    **dict.fromkeys(primitives.CUMULATIVE, _along("axis")),
    **dict.fromkeys(primitives.WINDOWS, _window),
    **dict.fromkeys(primitives.UPDATES, moves.scatter),
    **dict.fromkeys(primitives.DEBUG, _nothing),
    "rev": _along("dimensions"),
    "sort": _along("dimension"),
    "top_k": _top_k,
    "iota": _iota,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _convolution,
    "reshape": moves.reshape,
    "broadcast_in_dim": moves.broadcast_in_dim,
    "transpose": moves.transpose,
    "squeeze": moves.squeeze,
    "expand_dims": moves.expand_dims,
    "tile": moves.tile,
    "stack": moves.stack,
    "concatenate": moves.concatenate,
    "split": moves.split,
    "unstack": moves.unstack,
    "slice": moves.slice_,
    "pad": moves.pad,
    "dynamic_slice": moves.dynamic_slice,
    "dynamic_update_slice": moves.dynamic_update_slice,
    "gather": moves.gather,
}


def summed(eqn: JaxprEqn) -> list[tuple[int, int]]:
    """Return the axes that an equation sums or reduces over, as ``(operand, axis)``."""
    # The rules unify the contracted axes of both operands, so those of the second are enough.
    if primitives.kind(eqn) is not None:
        return [(1, axis) for axis in primitives.axes(eqn)[0][1]]
    if eqn.primitive.name in primitives.REDUCTIONS:
        return [(0, axis) for axis in eqn.params["axes"]]
    return []


@dataclass
class Walk:
    """The domain for the interpreter, in which a value is the tuple of its axes.

    Attributes:
      axes: what is known about them.
      values: by position, the axes of an equation's operands and of its results.
      summed: by position, the axes that an equation sums or reduces over.
      unknown: by position, a primitive without a rule.
    """

    axes: Axes = field(default_factory=Axes)
    values: dict[Position, tuple[list[Dims], list[Dims]]] = field(default_factory=dict)
    summed: dict[Position, list[Axis]] = field(default_factory=dict)
    unknown: dict[Position, str] = field(default_factory=dict)

    def fresh(self, aval: Aval, reason: str | None = None) -> Dims:
        """Return new axes for a value."""
        return tuple(self.axes.leaf(size, reason) for size in getattr(aval, "shape", ()))

    def freeze(self, dims: Dims, reason: str) -> None:
        """Freeze all axes of a value."""
        for axis in dims:
            self.axes.freeze(axis, reason)

    def constant(self, aval: Aval, value: ConstantValue) -> Dims:
        """Return the axes of a literal or a captured array; frozen along which it may vary."""
        entries = value.entries
        if entries is None:
            return self.fresh(aval, "constant")
        dims: list[Axis] = []
        for axis, size in enumerate(entries.shape):
            slices = np.moveaxis(entries, axis, 0)
            # Where all slices along an axis are equal (a mask of ones), it may be permuted.
            varies = bool((slices != slices[:1]).any())
            dims.append(self.axes.leaf(size, "constant" if varies else None))
        return tuple(dims)

    def join(self, a: Dims, b: Dims) -> Dims:
        """Unify the axes of two values that one variable may hold."""
        for one, other in zip(a, b, strict=True):
            unify(self.axes, one, other)
        return a

    def same(self, a: Dims, b: Dims) -> bool:
        """Return True: `join` has already changed both, so a loop's body need not run again."""
        return True

    def unstack(self, a: Dims, loop: int) -> Dims:
        """Return the axes of a loop's slice; the axis along which the loop runs is frozen."""
        self.axes.freeze(a[0], "scan")
        return a[1:]

    def stack(self, a: Dims, length: int) -> Dims:
        """Return the axes of the slices that a loop stacks."""
        return (self.axes.leaf(length, "scan"), *a)

    def reshard(self, a: Dims, aval: Aval) -> Dims:
        """Return the axes of a device's shard, or of the whole array; sharded ones are frozen."""
        shape = getattr(aval, "shape", ())
        return tuple(self._recut(axis, size) for axis, size in zip(a, shape, strict=True))

    def _recut(self, axis: Axis, size: int) -> Axis:
        if axis.size == size:
            return axis
        self.axes.freeze(axis, "cut over devices")
        return self.axes.leaf(size, "cut over devices")

    def equation(self, eqn: JaxprEqn, args: list[Dims], where: Where) -> Sequence[Dims]:
        """Return the axes of an equation's results; without a rule, freeze all it touches."""
        name = eqn.primitive.name
        position = where.position
        # Sound by default: what has no rule, or is a variant that its rule does not know, freezes.
        results = RULES[name](self.axes, eqn, args) if name in RULES else None
        if results is None or not _fit(eqn, results):
            self.unknown[position] = name
            for dims in args:
                self.freeze(dims, f"unknown op {name}")
            results = [self.fresh(var.aval, f"unknown op {name}") for var in eqn.outvars]
        # The body of a loop is walked once, as `same` is True: each position has one entry.
        self.values[position] = args, list(results)
        self.summed[position] = [args[operand][axis] for operand, axis in summed(eqn)]
        return results


def _fit(eqn: JaxprEqn, results: Sequence[Dims]) -> bool:
    """Return whether a rule's results have the equation's shapes.

    They may not, where JAX has a variant of the primitive that the rule does not know.
    """
    shapes = [getattr(var.aval, "shape", ()) for var in eqn.outvars]
    return list(map(_sizes, results)) == shapes


def _sizes(dims: Dims) -> Shape:
    return tuple(axis.size for axis in dims)


@dataclass(frozen=True)
class Analysis:
    """What the axes of a function are made of.

    Attributes:
      traced: its trace.
      walk: the axes of every value in it, by position.
      params: the axes of every parameter, by path.
      state: which outputs are updated parameters, ``{path in the output: path of the parameter}``.
    """

    traced: Traced
    walk: Walk
    params: dict[str, Dims]
    state: dict[str, str]

    @property
    def unknown(self) -> dict[str, int]:
        """How often each primitive without a rule occurs."""
        return dict(Counter(self.walk.unknown.values()))


def analyze(fn: ModelFn, variables: Variables, *inputs: PyTree) -> Analysis:
    """Trace ``fn(variables, *inputs)`` and return what its axes are made of.

    Args:
      fn: a pure function.
      variables: tree of arrays or ``ShapeDtypeStruct``.
      inputs: trees of the same.

    Returns:
      The finished analysis.
    """
    traced = trace(fn, variables, *inputs)
    walk = Walk()
    params = {path: walk.fresh(leaf) for path, leaf in traced.params.items()}
    # Parameters begin free; the axes of inputs are the caller's, so no permutation may reach them.
    rest = traced.jaxpr.jaxpr.invars[len(params) :]
    data = [walk.fresh(var.aval, "input") for var in rest]
    results = interpret(walk, traced.jaxpr, [*params.values(), *data])
    # An updated parameter must be permuted like the parameter; any other output must not change.
    outputs = flatten(traced.out)[0]
    state = returned(outputs, traced.params)
    for path, dims in zip(outputs, results, strict=True):
        if path in state:
            walk.join(params[state[path]], dims)
        else:
            walk.freeze(dims, "output")
    # A leaf in two factors of one axis has no coordinates there (see `Axes.coordinates`).
    for axis in itertools.chain.from_iterable(params.values()):
        for leaf in walk.axes.repeated(axis):
            walk.axes.freeze(leaf, "twice in one axis")
    return Analysis(traced, walk, params, state)


def returned(outputs: Leaves, params: Leaves) -> dict[str, str]:
    """Return which outputs are updated parameters.

    Their paths end in the path of a parameter, whose shape and dtype they have.

    Args:
      outputs: what a function returns, by path.
      params: its parameters, by path.

    Returns:
      ``{path of the output: path of the parameter}``.

    Example:
      >>> params = {"stats/mean": np.ones(3), "w": np.ones((4, 3))}
      >>> returned({"0": np.ones((2, 3)), "1/stats/mean": np.ones(3)}, params)
      {'1/stats/mean': 'stats/mean'}
    """
    found = {}
    for path, leaf in outputs.items():
        # The longest end of the path that is the path of a parameter.
        keys = path.split("/")
        ends = ["/".join(keys[start:]) for start in range(len(keys))]
        param = next((end for end in ends if end and end in params), None)
        if param is None:
            continue
        if params[param].shape == leaf.shape and params[param].dtype == leaf.dtype:
            found[path] = param
    return found
