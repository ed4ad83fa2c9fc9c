"""Which channel groups of a function may be rotated: a residual stream, the head dimension of values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from compress_jax.core.paths import flatten, matches
from compress_jax.core.types import Leaves, ModelFn, PyTree, Variables
from compress_jax.trace._groups.analyze import Analysis, analyze
from compress_jax.trace._groups.axes import Axis, Leaf
from compress_jax.trace._groups.groups import Group, groups
from compress_jax.trace._jaxpr import primitives
from compress_jax.trace._jaxpr.interpret import Where, interpret
from compress_jax.trace._jaxpr.primitives import CASTS, MOVES, RANDOM

# What equations do to values that turn: rotate one axis of a network everywhere, and what happens
# to each of its values?


ZERO, SAME, VECTOR, SQUARE, BROKEN = "zero", "same", "vector", "square", "broken"


@dataclass(frozen=True)
class Param:
    """A parameter that a value is, but for moves and factors that do not turn.

    Attributes:
      path: of the parameter.
      stack: the loops that run along its leading axes, one for each.
      whole: whether it is as it is stored, not moved so far.
    """

    path: str
    stack: tuple[int, ...] = ()
    whole: bool = True


@dataclass(frozen=True)
class Kind:
    """What is known of a value.

    Attributes:
      form: one of the five.
      param: the parameter that it is, if it is one.
      gain: a parameter that a vector was multiplied by, entry by entry, on its way.
    """

    form: str
    param: Param | None = None
    gain: Param | None = None


@dataclass(frozen=True)
class Use:
    """How a parameter enters the computation.

    Attributes:
      role: ``"gain"``, ``"read"`` (multiplied by a vector and summed over), ``"shift"`` (added to a
        vector that has a gain) or ``"other"``.
      param: the parameter.
      gain: the gain of the vector it meets.
      position: of the equation.
    """

    role: str
    param: Param
    gain: Param | None = None
    position: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What comes out of an equation: a kind, how parameters were used, and why it broke, if it did."""

    kind: Kind
    uses: tuple[Use, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Scene:
    """An equation with all that its rule looks at.

    Attributes:
      eqn: the equation.
      args: the kinds of its operands.
      along: for each operand, the axes that the rotated one is part of.
      ones: whether only rotations are asked for that leave the vector of ones as it is.
      uniform: tells of a parameter whether its entries are all equal along the rotated axis.
      position: where it stands.
    """

    eqn: JaxprEqn
    args: Sequence[Kind]
    along: Sequence[frozenset[int]]
    ones: bool
    uniform: Callable[[str], bool]
    position: tuple[int | str, ...]


Rule = Callable[[Scene], Answer]


def broken(reason: str) -> Answer:
    """Return that nothing can be said, and why.

    Example:
      >>> broken("tanh").kind.form
      'broken'
    """
    return Answer(Kind(BROKEN), reason=reason)


def together(a: Kind, b: Kind, ones: bool) -> Kind:
    """Return what two values are that are added, or of which either is taken.

    Example:
      >>> together(Kind(ZERO), Kind(VECTOR), ones=False).form, together(Kind(SAME), Kind(VECTOR), ones=False).form
      ('vector', 'broken')
    """
    if a == b or b.form == ZERO:
        return a
    if a.form == ZERO:
        return b
    if a.form == b.form and a.gain == b.gain:
        return Kind(a.form, gain=a.gain)
    if ones and {a.form, b.form} == {SAME, VECTOR} and a.gain is b.gain is None:
        return Kind(VECTOR)  # what is equal along the axis turns as well: it stays
    return Kind(BROKEN)


def dropped(kinds: Sequence[Kind], position: tuple[int | str, ...]) -> tuple[Use, ...]:
    """Return the uses of parameters that go into a value that is no longer one."""
    return tuple(
        Use("other", kind.param, kind.gain, position) for kind in kinds if kind.param is not None
    )


def _move(scene: Scene) -> Answer:
    kind = scene.args[0]
    return Answer(replace(kind, param=kind.param and replace(kind.param, whole=False)))


def _cast(scene: Scene) -> Answer:
    if (
        scene.eqn.primitive.name == "convert_element_type"
        and scene.eqn.params["new_dtype"].kind in "iub"
    ):
        return broken("a cast to whole numbers acts on its entries")
    return Answer(scene.args[0])


def _linear(scene: Scene) -> Answer:
    """The first operand goes through, of which the others pick or reorder."""
    kind = scene.args[0]
    return Answer(Kind(kind.form, gain=kind.gain), dropped([kind], scene.position))


def _mixture(kinds: Sequence[Kind], scene: Scene, what: str) -> Answer:
    """Sums and choices: all turn, or none."""
    if len(kinds) == 2 and (shifted := _shift(kinds, scene)) is not None:
        return shifted
    kind = kinds[0]
    for other in kinds[1:]:
        kind = together(kind, other, scene.ones)
    if kind.form == BROKEN:
        return broken(what)
    live = [each for each in kinds if each.form != ZERO]
    return Answer(kind, () if len(live) == 1 else dropped(live, scene.position))


def _shift(kinds: Sequence[Kind], scene: Scene) -> Answer | None:
    """A vector with a gain, plus a parameter: the bias of a layer norm."""
    for vector, bias in (kinds, kinds[::-1]):
        if (
            vector.gain
            and vector.param is None
            and bias.param
            and not bias.gain
            and scene.eqn.primitive.name != "sub"
        ):
            return Answer(vector, (Use("shift", bias.param, vector.gain, scene.position),))
    return None


def _sum(scene: Scene) -> Answer:
    return _mixture(scene.args, scene, "something is added that does not turn with it")


def _choice(scene: Scene) -> Answer:
    if scene.args[0].form not in (ZERO, SAME):
        return broken("its entries decide a choice")
    return _mixture(
        scene.args[1:], scene, "a choice is made between it and what does not turn with it"
    )


def _update(scene: Scene) -> Answer:
    return _mixture(
        scene.args[:2], scene, "it is written into something that does not turn with it"
    )


def _scatter(scene: Scene) -> Answer:
    return _mixture(
        [scene.args[0], scene.args[2]],
        scene,
        "it is written into something that does not turn with it",
    )


def _mul(scene: Scene) -> Answer:
    a, b = scene.args
    if ZERO in (a.form, b.form):
        return Answer(Kind(ZERO))
    if SAME in (a.form, b.form):
        return Answer(b if a.form == SAME else a)
    if a.form == b.form == VECTOR:
        return _product(a, b, scene)
    return broken("more than two values along it are multiplied entry by entry")


def _product(a: Kind, b: Kind, scene: Scene) -> Answer:
    """Entry by entry: a scale, or two vectors whose inner product is to come."""
    if a.gain or b.gain or max(map(len, scene.along)) > 1:
        return broken("it is multiplied entry by entry")
    if (a.param is None) == (b.param is None):
        return Answer(Kind(SQUARE), dropped([a, b], scene.position))
    scale = a.param or b.param
    assert scale is not None
    use = Use("gain", scale, None, scene.position)
    return Answer(Kind(VECTOR, gain=None if scene.uniform(scale.path) else scale), (use,))


def _square(scene: Scene) -> Answer:
    (kind,) = scene.args
    twice = scene.eqn.params.get("y", 2) == 2
    if not twice or kind.form != VECTOR or kind.gain or len(scene.along[0]) > 1:
        return broken(f"{scene.eqn.primitive.name} acts on its entries")
    return Answer(Kind(SQUARE), dropped([kind], scene.position))


def _div(scene: Scene) -> Answer:
    if scene.args[1].form != SAME:
        return broken("something is divided by its entries")
    return Answer(scene.args[0])


def _reduce_sum(scene: Scene) -> Answer:
    kind = scene.args[0]
    if (
        kind.form == VECTOR
        and scene.along[0] & set(scene.eqn.params["axes"])
        and (not scene.ones or kind.gain)
    ):
        return broken("its entries are summed up, as a mean does")
    return _linear(scene)


def _contraction(scene: Scene) -> Answer:
    left, right = scene.args[:2]
    (lhs, rhs), (lhs_batch, rhs_batch) = primitives.axes(scene.eqn)
    if (scene.along[0] & set(lhs_batch)) | (scene.along[1] & set(rhs_batch)):
        return broken("it is multiplied entry by entry")
    summed = bool(scene.along[0] & set(lhs))
    if summed != bool(scene.along[1] & set(rhs)):
        return broken("it is multiplied entry by entry")
    if ZERO in (left.form, right.form):
        return Answer(Kind(ZERO))
    return _inner(left, right, scene) if summed else _outer(left, right, scene)


def _inner(left: Kind, right: Kind, scene: Scene) -> Answer:
    """Summed over the axis: two vectors make a number that does not turn."""
    forms = {left.form, right.form}
    if forms == {SQUARE, SAME} or (
        forms == {VECTOR, SAME} and scene.ones and not (left.gain or right.gain)
    ):
        return Answer(Kind(VECTOR), dropped([left, right], scene.position))
    if forms != {VECTOR}:
        return broken("it is multiplied by what does not turn with it, and summed up")
    for data, kernel in ((left, right), (right, left)):
        if data.param is None and kernel.param is not None and kernel.gain is None:
            return Answer(Kind(VECTOR), (Use("read", kernel.param, data.gain, scene.position),))
    if left.gain or right.gain:
        return broken("what a scale was applied to is multiplied by activations")
    return Answer(Kind(VECTOR), dropped([left, right], scene.position))


def _outer(left: Kind, right: Kind, scene: Scene) -> Answer:
    forms = {left.form, right.form}
    if SQUARE in forms or (forms == {VECTOR} and (left.gain or right.gain)):
        return broken("products of its entries are multiplied further")
    return Answer(
        Kind(VECTOR, gain=left.gain or right.gain), dropped([left, right], scene.position)
    )


LINEAR = primitives.SIGNS | primitives.INDEXED | {"rev", "cumsum"}
RULES: dict[str, Rule] = {
    **dict.fromkeys(primitives.MOVES, _move),
    **dict.fromkeys(primitives.CASTS, _cast),
    **dict.fromkeys(LINEAR, _linear),
    **dict.fromkeys(primitives.SUMS | primitives.JOINS, _sum),
    **dict.fromkeys(("psum", "psum2", "psum_invariant", "ppermute"), _sum),
    **dict.fromkeys(("square", "integer_pow"), _square),
    **dict.fromkeys(("scatter", "scatter-add", "scatter-sub"), _scatter),
    **dict.fromkeys(primitives.CONTRACTIONS, _contraction),
    "select_n": _choice,
    "dynamic_update_slice": _update,
    "mul": _mul,
    "div": _div,
    "reduce_sum": _reduce_sum,
}
STILL_ZERO = CASTS | MOVES | {"neg"}


@dataclass(frozen=True)
class Turn:
    """A group along which the function's parameters may be rotated.

    Attributes:
      group: its members.
      keeps_ones: whether only by rotations that leave the vector of ones as it is, since means are
        taken along it.
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
    fn: ModelFn, variables: Variables, *inputs: PyTree, where: str | tuple[str, ...] | None = None
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
    analysis, leaves = analyze(fn, variables, *inputs), flatten(variables)[0]
    found, refused = {}, {}
    for group in groups(fn, variables, *inputs):
        if where is not None and not matches(where, group.name):
            refused[group.name] = "no pattern matches"
            continue
        free = _walk(analysis, leaves, group, ones=False)
        walk = free if free.reason is None else _walk(analysis, leaves, group, ones=True)
        if walk.reason is None:
            found[group.name] = walk.turn(group)
        else:
            refused[group.name] = walk.reason
    return found, refused


def _walk(analysis: Analysis, leaves: Leaves, group: Group, ones: bool) -> "_Walk":
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
        fits = {
            leaf
            for leaf, place in own.items()
            if np.array_equal(place, group.coordinates[path, axis])
        }
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
    leaves: Leaves
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
        if jnp.issubdtype(aval.dtype, jax.dtypes.extended) or not jnp.issubdtype(
            aval.dtype, jnp.number
        ):
            return Kind(SAME)
        return Kind(SAME if np.asarray(value).any() else ZERO)

    def join(self, a: Kind, b: Kind) -> Kind:
        kind = together(a, b, self.ones)
        if kind.form == BROKEN and BROKEN not in (a.form, b.form):
            self.reason = (
                self.reason or "a loop or a branch joins it with what does not turn with it"
            )
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
        if (
            a.param is not None and a.param.whole and a.param.stack
        ):  # a loop that hands its slices back, as nnx.scan does
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
        scene = Scene(
            eqn,
            args,
            [self._along(dims) for dims in operands],
            self.ones,
            self.uniform,
            where.position,
        )
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
        return Kind(
            ZERO if (name in STILL_ZERO and all(zeros)) or (name == "mul" and any(zeros)) else SAME
        )

    def _along(self, dims: Sequence[Axis]) -> frozenset[int]:
        axes = self.analysis.walk.axes
        return frozenset(
            i for i, axis in enumerate(dims) if axis.size > 1 and self.leaf in axes.leaves(axis)
        )

    def _note(self, uses: Sequence[Use]) -> None:
        self.uses |= dict.fromkeys(uses)
