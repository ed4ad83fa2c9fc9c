"""Which channel groups of a function may be rotated: a residual stream, the head dimension of values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from compress_jax.core.paths import flatten, matches
from compress_jax.trace._analyse import Analysis, analyse
from compress_jax.trace._groups import groups
from compress_jax.trace.axes import Axis, Leaf
from compress_jax.trace.group import Group
from compress_jax.trace.interpret import Where, interpret
from compress_jax.trace.primitives import CASTS, MOVES, RANDOM
from compress_jax.trace.turn_rules import (
    BROKEN,
    RULES,
    SAME,
    SQUARE,
    VECTOR,
    ZERO,
    Kind,
    Param,
    Scene,
    Use,
    broken,
    dropped,
    together,
)

STILL_ZERO = CASTS | MOVES | {"neg"}


@dataclass(frozen=True)
class Turn:
    """A group along which the function's parameters may be rotated.

    Attributes:
      group: its members.
      keeps_ones: whether only by rotations that leave the vector of ones as it is, since means are taken along it.
      uses: how its parameters enter the computation.
      still: parameters that lie along it and do not turn: scales of norms, all equal by now.
      gains: scales of norms that must be made equal first.
    """

    group: Group
    keeps_ones: bool
    uses: tuple[Use, ...]
    still: tuple[str, ...]
    gains: tuple[Param, ...]


def turns(
    fn: Callable[..., Any], variables: Any, *inputs: Any, where: str | tuple[str, ...] | None = None
) -> tuple[dict[str, Turn], dict[str, str]]:
    """Find the groups that may be rotated, by following what rotates with them through the function's jaxpr.

    Args:
      fn: a pure function of ``(variables, *inputs)``.
      variables: tree of arrays.
      inputs: trees of arrays.
      where: a glob, or several, over the names of groups.

    Returns:
      ``({name of the group: Turn}, {name of the group: why it cannot be rotated})``.

    Example:
      >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2)), "side": jnp.ones((2, 5)), "out": jnp.ones((5, 1))}
      >>> def fn(p, x):
      ...     return jnp.tanh(x @ p["up"] @ p["down"] @ p["side"]) @ p["out"]
      >>> turns(fn, params, jnp.ones((1, 3)))[1]
      {'side:1': 'tanh acts on its entries'}
    """
    analysis, leaves = analyse(fn, variables, *inputs), flatten(variables)[0]
    found, refused = {}, {}
    for group in groups(fn, variables, *inputs):
        if where is not None and not matches(where, group.name):
            refused[group.name] = "no pattern matches it"
            continue
        free = _walk(analysis, leaves, group, ones=False)
        walk = free if free.reason is None else _walk(analysis, leaves, group, ones=True)
        if walk.reason is None:
            found[group.name] = walk.turn(group)
        else:
            refused[group.name] = walk.reason
    return found, refused


def _walk(analysis: Analysis, leaves: dict[str, Any], group: Group, ones: bool) -> "_Walk":
    walk = _Walk(analysis, leaves, group, _leaf(analysis, group), ones)
    paths = {path for path, _ in group.members}
    args = [Kind(VECTOR, Param(path)) if path in paths else Kind(SAME) for path in analysis.params]
    rest = len(analysis.traced.jaxpr.jaxpr.invars) - len(args)
    interpret(walk, analysis.traced.jaxpr, [*args, *[Kind(SAME)] * rest])
    return walk


def _leaf(analysis: Analysis, group: Group) -> Leaf:
    """Return the axis that a group is."""
    candidates = None
    for path, axis in group.members:
        own = analysis.walk.axes.coordinates(analysis.params[path][axis])
        fits = {leaf for leaf, place in own.items() if np.array_equal(place, group.coordinates[path, axis])}
        candidates = fits if candidates is None else candidates & fits
    assert candidates
    return candidates.pop()


@dataclass
class _Walk:
    """The domain for the interpreter: a value is a Kind.

    Attributes:
      analysis: the axes of every value.
      leaves: the parameters.
      group: what is rotated.
      leaf: the axis that is rotated.
      ones: see `Scene`.
      uses: how parameters entered, so far.
      reason: why the group cannot be rotated, as far as known.
    """

    analysis: Analysis
    leaves: dict[str, Any]
    group: Group
    leaf: Leaf
    ones: bool
    uses: dict[Use, None] = field(default_factory=dict)
    reason: str | None = None
    equal: dict[str, bool] = field(default_factory=dict)

    def turn(self, group: Group) -> Turn:
        scales = dict.fromkeys(use.param for use in self.uses if use.role == "gain")
        still = tuple(param.path for param in scales if self.uniform(param.path))
        gains = tuple(param for param in scales if param.path not in still)
        return Turn(group, self.ones, tuple(self.uses), still, gains)

    def uniform(self, path: str) -> bool:
        if path not in self.equal:
            axes = tuple(axis for other, axis in self.group.members if other == path)
            x = self.leaves[path]
            self.equal[path] = bool((x.max(axes) == x.min(axes)).all())
        return self.equal[path]

    def constant(self, aval: Any, value: Any) -> Kind:
        if jnp.issubdtype(aval.dtype, jax.dtypes.extended) or not jnp.issubdtype(aval.dtype, jnp.number):
            return Kind(SAME)
        return Kind(SAME if np.asarray(value).any() else ZERO)

    def join(self, a: Kind, b: Kind) -> Kind:
        kind = together(a, b, self.ones)
        if kind.form == BROKEN and BROKEN not in (a.form, b.form):
            self.reason = self.reason or "a loop or a branch joins it with what does not turn with it"
        if kind not in (a, b):
            self._note(dropped([a, b], ()))
        return kind

    def same(self, a: Kind, b: Kind) -> bool:
        return a == b

    def unstack(self, a: Kind, loop: int) -> Kind:
        if a.param is None:
            return a
        if not a.param.whole:
            self._note(dropped([a], ()))
            return Kind(a.form, gain=a.gain)
        return Kind(a.form, Param(a.param.path, (*a.param.stack, loop)), a.gain)

    def stack(self, a: Kind, length: int) -> Kind:
        if a.param is not None and a.param.whole and a.param.stack:  # a loop that hands its slices back, as nnx.scan does
            return Kind(a.form, Param(a.param.path, a.param.stack[:-1]), a.gain)
        self._note(dropped([a], ()))
        return Kind(a.form, gain=a.gain)

    def reshard(self, a: Kind, aval: Any) -> Kind:
        self._note(dropped([a], ()))
        return Kind(a.form, gain=a.gain)

    def equation(self, eqn: JaxprEqn, args: list[Kind], where: Where) -> Sequence[Kind]:
        forms = {kind.form for kind in args}
        name, (operands, results) = eqn.primitive.name, self.analysis.walk.values[where.position]
        if BROKEN in forms:
            return [Kind(BROKEN)] * len(eqn.outvars)
        if not forms & {VECTOR, SQUARE}:
            return [self._still(name, args, dims) for dims in results]
        scene = Scene(eqn, args, [self._along(dims) for dims in operands], self.ones, self.uniform, where.position)
        answer = RULES[name](scene) if name in RULES else broken(f"{name} acts on its entries")
        if answer.kind.form == BROKEN:
            self.reason = self.reason or answer.reason
        self._note(answer.uses)
        turned = answer.kind.form in (VECTOR, SQUARE)
        return [Kind(SAME) if turned and not self._along(dims) else answer.kind for dims in results]

    def _still(self, name: str, args: list[Kind], dims: Sequence[Axis]) -> Kind:
        """Of values that do not turn, only random numbers differ along the axis."""
        if name in RANDOM and self._along(dims):
            self.reason = self.reason or "random numbers run along it"
            return Kind(BROKEN)
        zeros = [kind.form == ZERO for kind in args]
        return Kind(ZERO if (name in STILL_ZERO and all(zeros)) or (name == "mul" and any(zeros)) else SAME)

    def _along(self, dims: Sequence[Axis]) -> frozenset[int]:
        axes = self.analysis.walk.axes
        return frozenset(i for i, axis in enumerate(dims) if axis.size > 1 and self.leaf in axes.leaves(axis))

    def _note(self, uses: Sequence[Use]) -> None:
        self.uses |= dict.fromkeys(uses)
