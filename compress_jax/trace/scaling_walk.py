"""The walk over a function's jaxpr that finds out what scaling its parameters demands of their exponents."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from compress_jax.trace._analyse import Analysis
from compress_jax.trace.axes import Leaf
from compress_jax.trace.axis_moves import Dims
from compress_jax.trace.exponent_rules import RULES
from compress_jax.trace.exponents import Demands, Form, Scaled, Unknown
from compress_jax.trace.interpret import Where


@dataclass
class Walked:
    """The domain for the interpreter: a value is a `Scaled`.

    Attributes:
      analysis: the axes of every value.
      hold: parameters that are to stay as they are.
      demands: what they demand of exponents.
      carried: forms of what loops and branches carry or stack: factors of their own for each turn must not reach them.
      stacks: by parameter, how many of its leading axes loops run along.
      used: parameters that an equation takes.
      whole: those that an equation takes as they are stored, not a loop's slices of them.
    """

    analysis: Analysis
    demands: Demands
    hold: frozenset[str] = frozenset()
    carried: list[Form] = field(default_factory=list)
    stacks: dict[str, int] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)

    def start(self, path: str, dims: Dims) -> Scaled:
        """Return a parameter: every leaf of its axes has an unknown of its own."""
        leaves = self.analysis.walk.axes.leaves
        fields = tuple({leaf: {Unknown(path, i, leaf): Fraction(1)} for leaf in leaves(axis)} for i, axis in enumerate(dims))
        return Scaled(dims, fields, param=path)

    def constant(self, aval: Any, value: Any) -> Scaled:
        """Return a literal or a captured array."""
        return self.demands.still(
            tuple(Leaf(n, -1) for n in getattr(aval, "shape", ())), "a constant", _is_zero(aval, value)
        )

    def join(self, a: Scaled, b: Scaled) -> Scaled:
        """Demand that one place holds values that scale alike."""
        live = [each for each in (a, b) if not each.zero]
        for each in live:
            self.carried += [form for own in each.fields for form in own.values() if form]
        if len(live) == 2:
            self.demands.alike([each.fields for each in live], "a loop or a branch carries it")
        return Scaled(a.dims, (live or [a])[0].fields, not live, why=a.why)

    def same(self, a: Scaled, b: Scaled) -> bool:
        """Tell whether a loop's body need not run again: what started as zero may not stay so."""
        return a.zero == b.zero

    def unstack(self, a: Scaled, loop: int) -> Scaled:
        """Return a turn's slice."""
        if a.param is not None:
            depth = len(self.analysis.params[a.param]) - len(a.dims) + 1
            self.stacks[a.param] = max(self.stacks.get(a.param, 0), depth)
        else:
            self.carried += [form for own in a.fields for form in own.values() if form]
        self.demands.fix(a, "a loop runs along it", [0])
        return Scaled(a.dims[1:], a.fields[1:], a.zero, a.param, a.why)

    def stack(self, a: Scaled, length: int) -> Scaled:
        """Return slices put together; a loop may hand back those that it was given, as nnx.scan does."""
        if a.param is not None and len(a.dims) < len(self.analysis.params[a.param]):
            return Scaled((Leaf(length, -1), *a.dims), ({}, *a.fields), a.zero, a.param, a.why)
        self.carried += [form for own in a.fields for form in own.values() if form]
        return Scaled((Leaf(length, -1), *a.dims), ({}, *a.fields), a.zero, why=a.why)

    def reshard(self, a: Scaled, aval: Any) -> Scaled:
        """Return a device's piece: what is cut must not scale."""
        shape = getattr(aval, "shape", ())
        cut = [i for i, (axis, n) in enumerate(zip(a.dims, shape, strict=True)) if axis.size != n]
        self.demands.fix(a, "it is cut over devices", cut)
        fields = tuple({} if i in cut else own for i, own in enumerate(a.fields))
        return Scaled(a.dims, fields, a.zero, why=a.why)

    def equation(self, eqn: JaxprEqn, args: list[Scaled], where: Where) -> Sequence[Scaled]:
        """Return how the results of an equation scale."""
        operands, results = self.analysis.walk.values[where.position]
        args = [Scaled(dims, arg.fields, arg.zero, arg.param, arg.why) for arg, dims in zip(args, operands, strict=True)]
        name = eqn.primitive.name
        for arg in args:
            if arg.param is not None:
                self.used.add(arg.param)
                self.whole |= {arg.param} if len(arg.dims) == len(self.analysis.params[arg.param]) else set()
        if name in ("split", "unstack"):
            return [self.demands.moved(args[0], dims, name) for dims in results]
        if name in RULES:
            out = RULES[name](self.demands, eqn, args, results[0])
            if out is not None:
                return [out if len(results) == 1 else self.demands.moved(out, dims, name) for dims in results]
        for arg in args:
            self.demands.fix(arg, f"{name} acts on its entries")
        return [self.demands.still(dims, f"{name} acts on its entries") for dims in results]


def _is_zero(aval: Any, value: Any) -> bool:
    if not jnp.issubdtype(aval.dtype, jnp.number) or jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return False
    return not np.any(np.asarray(value))
