"""The walk over a function's jaxpr that finds out what its axes are made of; the domain of axes for the interpreter."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from compress_jax.core.paths import flatten
from compress_jax.trace._unify import unify
from compress_jax.trace.axes import Axes, Axis
from compress_jax.trace.axis_moves import Dims
from compress_jax.trace.axis_rules import RULES, summed
from compress_jax.trace.interpret import Where, interpret
from compress_jax.trace.site import Position
from compress_jax.trace.traced import Traced, trace


@dataclass
class Walk:
    """What a walk over a jaxpr saw: a value is the tuple of its axes.

    Attributes:
      axes: what is known about them.
      values: by position, the axes of an equation's operands and of its results.
      summed: by position, the axes that an equation takes together.
      unknown: by position, a primitive that has no rule.
    """

    axes: Axes = field(default_factory=Axes)
    values: dict[Position, tuple[list[Dims], list[Dims]]] = field(default_factory=dict)
    summed: dict[Position, list[Axis]] = field(default_factory=dict)
    unknown: dict[Position, str] = field(default_factory=dict)

    def fresh(self, aval: Any, reason: str | None = None) -> Dims:
        """Return new axes for a value."""
        return tuple(self.axes.leaf(size, reason) for size in getattr(aval, "shape", ()))

    def freeze(self, dims: Dims, reason: str) -> None:
        """Freeze all axes of a value."""
        for axis in dims:
            self.axes.freeze(axis, reason)

    def constant(self, aval: Any, value: Any) -> Dims:
        """Return the axes of a literal or a captured array: free where every index holds the same."""
        if not getattr(aval, "shape", ()):
            return ()
        if not isinstance(value, (np.ndarray, jax.Array)) or jnp.issubdtype(value.dtype, jax.dtypes.extended):
            return self.fresh(aval, "constant")
        value = np.asarray(value)
        varies = [bool((value != value.take([0], axis)).any()) for axis in range(value.ndim)]
        return tuple(self.axes.leaf(n, "constant" if vary else None) for n, vary in zip(value.shape, varies, strict=True))

    def join(self, a: Dims, b: Dims) -> Dims:
        """Unify what may be either."""
        for one, other in zip(a, b, strict=True):
            unify(self.axes, one, other)
        return a

    def same(self, a: Dims, b: Dims) -> bool:
        """Tell that two values need no further turn: to join them has already changed both."""
        return True

    def unstack(self, a: Dims, loop: int) -> Dims:
        """Return the axes of one slice; the order of the slices is that of the iterations."""
        self.axes.freeze(a[0], "scan")
        return a[1:]

    def stack(self, a: Dims, length: int) -> Dims:
        """Return the axes of the slices put together."""
        return (self.axes.leaf(length, "scan"), *a)

    def reshard(self, a: Dims, aval: Any) -> Dims:
        """Return the axes of a device's piece, or of the whole: those that are not cut go through."""
        return tuple(self._recut(axis, size) for axis, size in zip(a, getattr(aval, "shape", ()), strict=True))

    def _recut(self, axis: Axis, size: int) -> Axis:
        if axis.size == size:
            return axis
        self.axes.freeze(axis, "cut over devices")
        return self.axes.leaf(size, "cut over devices")

    def equation(self, eqn: JaxprEqn, args: list[Dims], where: Where) -> Sequence[Dims]:
        """Return the axes of an equation's results; without a rule, freeze what it touches."""
        name, position = eqn.primitive.name, where.position
        results = RULES[name](self.axes, eqn, args) if name in RULES else None
        if results is None or not _fit(eqn, results):
            self.unknown[position] = name
            for dims in args:
                self.freeze(dims, f"unknown op {name}")
            results = [self.fresh(var.aval, f"unknown op {name}") for var in eqn.outvars]
        self.values[position] = args, list(results)
        self.summed[position] = [args[operand][axis] for operand, axis in summed(eqn)]
        return results


def _fit(eqn: JaxprEqn, results: Sequence[Dims]) -> bool:
    """Tell whether a rule's results have the shapes of the equation's: not so for a form of it that is not known."""
    shapes = [getattr(var.aval, "shape", ()) for var in eqn.outvars]
    return [tuple(axis.size for axis in dims) for dims in results] == shapes


@dataclass(frozen=True)
class Analysis:
    """What the axes of a function are made of.

    Attributes:
      traced: its trace.
      walk: the axes of every value in it, by position.
      params: the axes of every parameter, by path.
      state: which outputs are parameters returned anew: path in the output to path of the parameter.
    """

    traced: Traced
    walk: Walk
    params: dict[str, Dims]
    state: dict[str, str]

    @property
    def unknown(self) -> dict[str, int]:
        """How often each primitive without a rule occurs."""
        return dict(Counter(self.walk.unknown.values()))


def analyse(fn: Callable[..., Any], variables: Any, *inputs: Any) -> Analysis:
    """Trace ``fn(variables, *inputs)`` and find out what its axes are made of.

    Args:
      fn: a pure function.
      variables: tree of arrays or ``ShapeDtypeStruct``.
      inputs: trees of the same.

    Returns:
      The analysis, to which nothing is added any more.
    """
    traced, walk = trace(fn, variables, *inputs), Walk()
    params = {path: walk.fresh(leaf) for path, leaf in traced.params.items()}
    rest = traced.jaxpr.jaxpr.invars[len(params) :]
    data = [walk.fresh(var.aval, "input") for var in rest]
    results = interpret(walk, traced.jaxpr, [*params.values(), *data])
    outputs = flatten(traced.out)[0]
    state = returned(outputs, traced.params)
    for path, dims in zip(outputs, results, strict=True):
        if path in state:
            walk.join(params[state[path]], dims)
        else:
            walk.freeze(dims, "output")
    for dims in params.values():
        for axis in dims:
            for leaf in walk.axes.repeated(axis):
                walk.axes.freeze(leaf, "twice in one axis")
    return Analysis(traced, walk, params, state)


def returned(outputs: dict[str, Any], params: dict[str, Any]) -> dict[str, str]:
    """Return which outputs are parameters returned anew: their paths end in a parameter's; shape and dtype are the same.

    Args:
      outputs: what a function returns, by path.
      params: its parameters, by path.

    Returns:
      ``{path of the output: path of the parameter}``.

    Example:
      >>> returned({"0": np.ones((2, 3)), "1/stats/mean": np.ones(3)}, {"stats/mean": np.ones(3), "w": np.ones((4, 3))})
      {'1/stats/mean': 'stats/mean'}
    """
    found = {}
    for path, leaf in outputs.items():
        parts = path.split("/")
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        match = next((end for end in ends if end and end in params), None)
        if match is not None and (params[match].shape, params[match].dtype) == (leaf.shape, leaf.dtype):
            found[path] = match
    return found
