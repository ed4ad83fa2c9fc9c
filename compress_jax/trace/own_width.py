"""A function at another width: whether its code runs there as it stands, equation for equation, and with which numbers.

Code that reads its widths from its parameters says itself which of its numbers are counts: trace it for shorter ones.
Code that has them written down (a module's ``features``) fails there, or computes something else, which is noticed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from compress_jax.trace._analyse import Analysis, Walk
from compress_jax.trace.kept import Kept, cut
from compress_jax.trace.nested import bodies, nested
from compress_jax.trace.numbers import numbers, one_number
from compress_jax.trace.primitives import PASSED
from compress_jax.trace.resize_rules import resized
from compress_jax.trace.site import Position

PLAIN = (bool, int, float, str, tuple, np.dtype, type(None))


def own_width(
    fn: Callable[..., Any], analysis: Analysis, kept: Kept, variables: Any, inputs: Sequence[Any]
) -> ClosedJaxpr | None:
    """Return the jaxpr of a function for shorter variables, if it is that of the longer ones with shapes as they are kept.

    Args:
      fn: the function.
      analysis: of it, for the longer variables.
      kept: what is left of axes.
      variables: the shorter ones.
      inputs: as in the analysis.

    Returns:
      The jaxpr; None if the function fails, or if an equation is another, has other shapes or takes other arrays.
    """
    try:
        made = jax.make_jaxpr(getattr(fn, "whole", fn))(variables, *inputs)
    except Exception:  # whatever a model raises that has its widths written down
        return None
    return made if _Comparison(analysis.walk, kept).alike(analysis.traced.jaxpr, made) else None


def differences(old: ClosedJaxpr, new: ClosedJaxpr) -> dict[Position, dict[int, float]]:
    """Return the operands that are one number in both of two jaxprs that are alike, but not the same: the new numbers."""
    before, after = numbers(old), numbers(new)
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
        if any(len(a) != len(b) for a, b in (inputs, (old.eqns, new.eqns), (old.jaxpr.outvars, new.jaxpr.outvars))):
            return False
        self.pairs |= dict(zip(*inputs, strict=True))
        constants = dict(zip((*old.jaxpr.constvars, *new.jaxpr.constvars), (*old.consts, *new.consts), strict=True))
        equations = enumerate(zip(old.eqns, new.eqns, strict=True))
        return all(self._equations(a, b, (*position, i), constants) for i, (a, b) in equations) and all(
            self._atoms(a, b, constants) for a, b in zip(old.jaxpr.outvars, new.jaxpr.outvars, strict=True)
        )

    def _equations(self, old: JaxprEqn, new: JaxprEqn, position: Position, constants: Mapping[Any, Any]) -> bool:
        if old.primitive is not new.primitive or len(old.invars) != len(new.invars) or len(old.outvars) != len(new.outvars):
            return False
        if not all(self._atoms(a, b, constants) for a, b in zip(old.invars, new.invars, strict=True)):
            return False
        self.pairs |= dict(zip(old.outvars, new.outvars, strict=True))
        if old.primitive.name in PASSED:
            return True
        form, other = nested(old), nested(new)
        if form is None or other is None:
            return form is other is None and self._leaf(old, new, position)
        ours, others = bodies(form), bodies(other)
        same = ours.keys() == others.keys() and getattr(form, "length", 0) == getattr(other, "length", 0)
        return same and all(self.alike(body, others[step], (*position, step)) for step, body in ours.items())

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
        if one_number(a) is not None and one_number(b) is not None:
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
    return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())  # NaN is the same as NaN
