"""Which channel groups may be rotated: a residual stream, the head dimension of values.

If one axis of a network is rotated everywhere, every value is zero, invariant, a vector that
rotates along the axis, the square of such a vector entry by entry, or broken: nothing can be said.
`RULES` holds what every primitive does to these five kinds; `rotations` runs the walk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jax.extend.core import JaxprEqn

from compress_jax.core.paths import flatten, matches
from compress_jax.core.types import Aval, Leaves, ModelFn, PyTree, Variables
from compress_jax.trace._groups.analyze import Analysis, analyze
from compress_jax.trace._groups.axes import Axis, Leaf
from compress_jax.trace._groups.groups import Group, groups
from compress_jax.trace._jaxpr import primitives
from compress_jax.trace._jaxpr.interpret import ConstantValue, Where, interpret
from compress_jax.trace._jaxpr.primitives import CASTS, MOVES, RANDOM

ZERO = "zero"
INVARIANT = "invariant"
VECTOR = "vector"
SQUARE = "square"
BROKEN = "broken"


@dataclass(frozen=True)
class Param:
    """A parameter that a value is, up to moves and invariant factors.

    Attributes:
      path: of the parameter.
      stack: the loops that run along its leading axes, one for each.
      whole: whether it has its stored layout, not moved so far.
    """

    path: str
    stack: tuple[int, ...] = ()
    whole: bool = True


@dataclass(frozen=True)
class Kind:
    """What is known of a value.

    Attributes:
      form: `ZERO`, `INVARIANT`, `VECTOR`, `SQUARE` or `BROKEN`.
      param: the parameter that it is, if it is one.
      gain: a parameter that a vector was multiplied by, entry by entry.
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
      gain: the gain of the vector that it is combined with.
      position: of the equation.
    """

    role: str
    param: Param
    gain: Param | None = None
    position: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class RuleResult:
    """The result of an equation.

    Attributes:
      kind: of its results.
      uses: of parameters in it.
      reason: why the kind is broken, if it is.
    """

    kind: Kind
    uses: tuple[Use, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class RuleInputs:
    """An equation with all that its rule needs.

    Attributes:
      eqn: the equation.
      args: the kinds of its operands.
      along: for each operand, the axes that contain the rotated axis.
      ones: whether only rotations with ``Q 1 = 1`` are considered.
      uniform: returns whether a parameter's entries are all equal along the rotated axis.
      position: of the equation.
    """

    eqn: JaxprEqn
    args: Sequence[Kind]
    along: Sequence[frozenset[int]]
    ones: bool
    uniform: Callable[[str], bool]
    position: tuple[int | str, ...]


Rule = Callable[[RuleInputs], RuleResult]


def broken(reason: str) -> RuleResult:
    """Return a broken result with its reason.

    Example:
      >>> broken("tanh").kind.form
      'broken'
    """
    return RuleResult(Kind(BROKEN), reason=reason)


def joined(a: Kind, b: Kind, ones: bool) -> Kind:
    """Return the kind of the sum of two values, or of a choice between them.

    Example:
      >>> joined(Kind(ZERO), Kind(VECTOR), ones=False).form
      'vector'
      >>> joined(Kind(INVARIANT), Kind(VECTOR), ones=False).form
      'broken'
    """
    # Zero is any vector, and any number.
    if a == b or b.form == ZERO:
        return a
    if a.form == ZERO:
        return b
    if a.form == b.form and a.gain == b.gain:
        return Kind(a.form, gain=a.gain)
    if ones and {a.form, b.form} == {INVARIANT, VECTOR} and a.gain is b.gain is None:
        return Kind(VECTOR)  # as Q 1 = 1, what is equal along the axis is a rotated vector too
    return Kind(BROKEN)


def other_uses(kinds: Sequence[Kind], position: tuple[int | str, ...]) -> tuple[Use, ...]:
    """Return the uses of those values that are parameters, of which the result no longer is one."""
    return tuple(
        Use("other", kind.param, kind.gain, position) for kind in kinds if kind.param is not None
    )


def _move(given: RuleInputs) -> RuleResult:
    kind = given.args[0]
    return RuleResult(replace(kind, param=kind.param and replace(kind.param, whole=False)))


def _cast(given: RuleInputs) -> RuleResult:
    if (
        given.eqn.primitive.name == "convert_element_type"
        and given.eqn.params["new_dtype"].kind in "iub"
    ):
        return broken("a cast to whole numbers acts on its entries")
    return RuleResult(given.args[0])


def _linear(given: RuleInputs) -> RuleResult:
    """The first operand passes; other operands only select or reorder its entries."""
    kind = given.args[0]
    return RuleResult(Kind(kind.form, gain=kind.gain), other_uses([kind], given.position))


def _mixture(kinds: Sequence[Kind], given: RuleInputs, what: str) -> RuleResult:
    """Return a sum or a choice: all operands rotate, or none does."""
    if len(kinds) == 2 and (shifted := _shift(kinds, given)) is not None:
        return shifted
    kind = kinds[0]
    for other in kinds[1:]:
        kind = joined(kind, other, given.ones)
    if kind.form == BROKEN:
        return broken(what)
    # Beside zeros, as padding is added, a parameter still is that parameter.
    live = [each for each in kinds if each.form != ZERO]
    return RuleResult(kind, () if len(live) == 1 else other_uses(live, given.position))


def _shift(kinds: Sequence[Kind], given: RuleInputs) -> RuleResult | None:
    """Return a vector with a gain, plus a parameter (the bias of a layer norm), or None."""
    if given.eqn.primitive.name == "sub":
        return None
    for vector, bias in (kinds, kinds[::-1]):
        if vector.gain and vector.param is None and bias.param and not bias.gain:
            return RuleResult(vector, (Use("shift", bias.param, vector.gain, given.position),))
    return None


def _sum(given: RuleInputs) -> RuleResult:
    return _mixture(given.args, given, "something is added that does not rotate with it")


def _choice(given: RuleInputs) -> RuleResult:
    if given.args[0].form not in (ZERO, INVARIANT):
        return broken("its entries decide a choice")
    return _mixture(
        given.args[1:], given, "a choice is made between it and what does not rotate with it"
    )


def _update(given: RuleInputs) -> RuleResult:
    return _mixture(
        given.args[:2], given, "it is written into something that does not rotate with it"
    )


def _scatter(given: RuleInputs) -> RuleResult:
    return _mixture(
        [given.args[0], given.args[2]],
        given,
        "it is written into something that does not rotate with it",
    )


def _mul(given: RuleInputs) -> RuleResult:
    a, b = given.args
    if ZERO in (a.form, b.form):
        return RuleResult(Kind(ZERO))
    # A factor that is equal along the axis, such as a norm's 1 / rms: Q (x r) = (Q x) r.
    if INVARIANT in (a.form, b.form):
        return RuleResult(b if a.form == INVARIANT else a)
    if a.form == b.form == VECTOR:
        return _product(a, b, given)
    return broken("more than two values along it are multiplied entry by entry")


def _product(a: Kind, b: Kind, given: RuleInputs) -> RuleResult:
    """Return a vector times a scale, or the square of a vector, which a sum may follow."""
    # A second scale, or two rotated axes in one value, would need rules of their own.
    if a.gain or b.gain or max(map(len, given.along)) > 1:
        return broken("it is multiplied entry by entry")
    # x * x, which only its sum over the axis takes back: (Q x) . (Q x) = x . x.
    if (a.param is None) == (b.param is None):
        return RuleResult(Kind(SQUARE), other_uses([a, b], given.position))
    # A norm's scale times x: no gain if its entries are equal, as that commutes with Q.
    scale = a.param or b.param
    assert scale is not None
    use = Use("gain", scale, None, given.position)
    return RuleResult(Kind(VECTOR, gain=None if given.uniform(scale.path) else scale), (use,))


def _square(given: RuleInputs) -> RuleResult:
    (kind,) = given.args
    twice = given.eqn.params.get("y", 2) == 2
    if not twice or kind.form != VECTOR or kind.gain or len(given.along[0]) > 1:
        return broken(f"{given.eqn.primitive.name} acts on its entries")
    return RuleResult(Kind(SQUARE), other_uses([kind], given.position))


def _div(given: RuleInputs) -> RuleResult:
    if given.args[1].form != INVARIANT:
        return broken("something is divided by its entries")
    return RuleResult(given.args[0])


def _reduce_sum(given: RuleInputs) -> RuleResult:
    kind = given.args[0]
    # The sum of x is 1 . x, which stays only if Q 1 = 1; a sum of squares always stays.
    if (
        kind.form == VECTOR
        and given.along[0] & set(given.eqn.params["axes"])
        and (not given.ones or kind.gain)
    ):
        return broken("its entries are summed up, as a mean does")
    return _linear(given)


def _contraction(given: RuleInputs) -> RuleResult:
    left, right = given.args[:2]
    (lhs, rhs), (lhs_batch, rhs_batch) = primitives.axes(given.eqn)
    # A batch axis multiplies entry by entry, and so does an axis that one operand only sums over.
    if (given.along[0] & set(lhs_batch)) | (given.along[1] & set(rhs_batch)):
        return broken("it is multiplied entry by entry")
    summed = bool(given.along[0] & set(lhs))
    if summed != bool(given.along[1] & set(rhs)):
        return broken("it is multiplied entry by entry")
    if ZERO in (left.form, right.form):
        return RuleResult(Kind(ZERO))
    return _inner(left, right, given) if summed else _outer(left, right, given)


def _inner(left: Kind, right: Kind, given: RuleInputs) -> RuleResult:
    """Return a product that is summed over the rotated axis.

    Along other axes it may still rotate, so its form is a vector; `_Walk.equation` makes it
    invariant where the rotated axis is gone.
    """
    forms = {left.form, right.form}
    # (x * x) @ ones, and x @ ones where Q 1 = 1.
    norm = forms == {SQUARE, INVARIANT}
    mean = forms == {VECTOR, INVARIANT} and given.ones and not (left.gain or right.gain)
    if norm or mean:
        return RuleResult(Kind(VECTOR), other_uses([left, right], given.position))
    if forms != {VECTOR}:
        return broken("it is multiplied by what does not rotate with it, and summed up")
    # A kernel that reads x: (Q W)^T Q x = W^T x. It can take up the gain of x.
    for data, kernel in ((left, right), (right, left)):
        if data.param is None and kernel.param is not None and kernel.gain is None:
            return RuleResult(Kind(VECTOR), (Use("read", kernel.param, data.gain, given.position),))
    # Of two activations (attention scores) neither can take up a gain.
    if left.gain or right.gain:
        return broken("what a scale was applied to is multiplied by activations")
    return RuleResult(Kind(VECTOR), other_uses([left, right], given.position))


def _outer(left: Kind, right: Kind, given: RuleInputs) -> RuleResult:
    """Return a product that is not summed over the rotated axis."""
    forms = {left.form, right.form}
    if SQUARE in forms or (forms == {VECTOR} and (left.gain or right.gain)):
        return broken("products of its entries are multiplied further")
    return RuleResult(
        Kind(VECTOR, gain=left.gain or right.gain), other_uses([left, right], given.position)
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
ZERO_PRESERVING = CASTS | MOVES | {"neg"}


@dataclass(frozen=True)
class Rotation:
    """A group along which the function's parameters may be rotated.

    Attributes:
      group: the group.
      keeps_ones: whether the rotation must satisfy ``Q 1 = 1``, as means are taken along the axis.
      uses: how parameters enter the computation.
      unrotated: members that are not rotated: scales of norms whose entries are all equal.
      gains: scales of norms whose entries must be made equal first.
    """

    group: Group
    keeps_ones: bool
    uses: tuple[Use, ...]
    unrotated: tuple[str, ...]
    gains: tuple[Param, ...]


def rotations(
    fn: ModelFn, variables: Variables, *inputs: PyTree, where: str | tuple[str, ...] | None = None
) -> tuple[dict[str, Rotation], dict[str, str]]:
    """Find the groups that may be rotated, by following them through the function's jaxpr.

    Args:
      fn: a pure function of ``(variables, *inputs)``.
      variables: tree of arrays.
      inputs: trees of arrays.
      where: a glob, or several, over the names of groups.

    Returns:
      ``({name of the group: Rotation}, {name of the group: why it cannot be rotated})``.

    Example:
      >>> import jax.numpy as jnp
      >>> sizes = {"up": (3, 4), "down": (4, 2), "side": (2, 5), "out": (5, 1)}
      >>> params = {name: jnp.ones(shape) for name, shape in sizes.items()}
      >>> def fn(p, x):
      ...     return jnp.tanh(x @ p["up"] @ p["down"] @ p["side"]) @ p["out"]
      >>> rotations(fn, params, jnp.ones((1, 3)))[1]
      {'side:1': 'tanh acts on its entries'}
    """
    analysis = analyze(fn, variables, *inputs)
    leaves = flatten(variables)[0]
    found: dict[str, Rotation] = {}
    refused: dict[str, str] = {}
    for group in groups(fn, variables, *inputs):
        if where is not None and not matches(where, group.name):
            refused[group.name] = "no pattern matches"
            continue
        # Any rotation if it may be; else one with Q 1 = 1, under which means stay too.
        walk = _walk(analysis, leaves, group, ones=False)
        if walk.reason is not None:
            walk = _walk(analysis, leaves, group, ones=True)
        if walk.reason is None:
            found[group.name] = walk.rotation(group)
        else:
            refused[group.name] = walk.reason
    return found, refused


def _walk(analysis: Analysis, leaves: Leaves, group: Group, ones: bool) -> "_Walk":
    walk = _Walk(analysis, leaves, group, _leaf(analysis, group), ones)
    paths = {path for path, _ in group.members}
    # Members rotate; data and all other parameters do not.
    args = [
        Kind(VECTOR, Param(path)) if path in paths else Kind(INVARIANT) for path in analysis.params
    ]
    rest = len(analysis.traced.jaxpr.jaxpr.invars) - len(args)
    interpret(walk, analysis.traced.jaxpr, [*args, *[Kind(INVARIANT)] * rest])
    return walk


def _leaf(analysis: Analysis, group: Group) -> Leaf:
    """Return the leaf whose coordinates along every member's axis are the group's."""
    candidates: set[Leaf] | None = None
    for path, axis in group.members:
        along = analysis.walk.axes.coordinates(analysis.params[path][axis])
        expected = group.coordinates[path, axis]
        fits = {leaf for leaf, place in along.items() if np.array_equal(place, expected)}
        candidates = fits if candidates is None else candidates & fits
    assert candidates
    return candidates.pop()


@dataclass
class _Walk:
    """The domain for the interpreter, in which a value is a Kind.

    Attributes:
      analysis: the axes of every value.
      leaves: the parameters.
      group: what is rotated.
      leaf: the axis that is rotated.
      ones: see `RuleInputs`.
      uses: how parameters entered so far, in order.
      reason: why the group cannot be rotated, if that is known.
      equal: whether parameters are known to be uniform along the rotated axis, by path.
    """

    analysis: Analysis
    leaves: Leaves
    group: Group
    leaf: Leaf
    ones: bool
    uses: dict[Use, None] = field(default_factory=dict)
    reason: str | None = None
    equal: dict[str, bool] = field(default_factory=dict)

    def rotation(self, group: Group) -> Rotation:
        """Return the rotation that was found."""
        scales = dict.fromkeys(use.param for use in self.uses if use.role == "gain")
        unrotated = tuple(param.path for param in scales if self.uniform(param.path))
        gains = tuple(param for param in scales if param.path not in unrotated)
        return Rotation(group, self.ones, tuple(self.uses), unrotated, gains)

    def uniform(self, path: str) -> bool:
        if path not in self.equal:
            axes = tuple(axis for other, axis in self.group.members if other == path)
            x = ConstantValue(self.leaves[path]).entries  # None while a caller's jit traces
            # In each layer of a stack by itself.
            self.equal[path] = x is not None and bool((x.max(axes) == x.min(axes)).all())
        return self.equal[path]

    def constant(self, aval: Aval, value: ConstantValue) -> Kind:
        return Kind(ZERO if value.zero else INVARIANT)

    def join(self, a: Kind, b: Kind) -> Kind:
        kind = joined(a, b, self.ones)
        # Where one of the two was broken before, its own reason is better.
        if kind.form == BROKEN and BROKEN not in (a.form, b.form):
            reason = "a loop or a branch joins it with what does not rotate with it"
            self.reason = self.reason or reason
        if kind not in (a, b):
            self._note(other_uses([a, b], ()))
        return kind

    def same(self, a: Kind, b: Kind) -> bool:
        return a == b

    def unstack(self, a: Kind, loop: int) -> Kind:
        if a.param is None:
            return a
        # Of a moved stack it is not known which stored axis comes first.
        if not a.param.whole:
            self._note(other_uses([a], ()))
            return Kind(a.form, gain=a.gain)
        return Kind(a.form, Param(a.param.path, (*a.param.stack, loop)), a.gain)

    def stack(self, a: Kind, length: int) -> Kind:
        if a.param is not None and a.param.whole and a.param.stack:
            # A loop that returns the slices it was given, as nnx.scan does.
            return Kind(a.form, Param(a.param.path, a.param.stack[:-1]), a.gain)
        self._note(other_uses([a], ()))
        return Kind(a.form, gain=a.gain)

    def reshard(self, a: Kind, aval: Aval) -> Kind:
        self._note(other_uses([a], ()))
        return Kind(a.form, gain=a.gain)

    def equation(self, eqn: JaxprEqn, args: list[Kind], where: Where) -> Sequence[Kind]:
        forms = {kind.form for kind in args}
        name = eqn.primitive.name
        operands, results = self.analysis.walk.values[where.position]
        # The reason was noted where it broke.
        if BROKEN in forms:
            return [Kind(BROKEN)] * len(eqn.outvars)
        if not forms & {VECTOR, SQUARE}:
            return [self._invariant(name, args, dims) for dims in results]
        along = [self._along(dims) for dims in operands]
        given = RuleInputs(eqn, args, along, self.ones, self.uniform, where.position)
        result = RULES[name](given) if name in RULES else broken(f"{name} acts on its entries")
        if result.kind.form == BROKEN:
            self.reason = self.reason or result.reason
        self._note(result.uses)
        rotates = result.kind.form in (VECTOR, SQUARE)
        # A result without the rotated axis (a norm, logits) does not rotate.
        return [
            Kind(INVARIANT) if rotates and not self._along(dims) else result.kind
            for dims in results
        ]

    def _invariant(self, name: str, args: list[Kind], dims: Sequence[Axis]) -> Kind:
        """Return the result of invariant operands; only random numbers vary along the axis."""
        if name in RANDOM and self._along(dims):
            self.reason = self.reason or "random numbers run along it"
            return Kind(BROKEN)
        zeros = [kind.form == ZERO for kind in args]
        stays_zero = name in ZERO_PRESERVING and all(zeros)
        return Kind(ZERO if stays_zero or (name == "mul" and any(zeros)) else INVARIANT)

    def _along(self, dims: Sequence[Axis]) -> frozenset[int]:
        """Return the axes of a value that contain the rotated axis."""
        leaves = self.analysis.walk.axes.leaves
        return frozenset(i for i, axis in enumerate(dims) if self.leaf in leaves(axis))

    def _note(self, uses: Sequence[Use]) -> None:
        self.uses |= dict.fromkeys(uses)
