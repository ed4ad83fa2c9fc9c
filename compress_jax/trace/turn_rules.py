"""What equations do to values that turn: rotate one axis of a network everywhere, and what happens to each of its values?

A value that lies along the rotated axis either turns with it (a *vector*), does not change and is equal along it (*same*),
is zero, is the product of two vectors that still has to be summed up (a *square*), or nothing can be said of it (*broken*).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jax.extend.core import JaxprEqn

from compress_jax.trace import contraction, primitives

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
      role: ``"gain"``, ``"read"`` (multiplied by a vector and summed over), ``"shift"`` (added to a vector that has a gain)
        or ``"other"``.
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
    return tuple(Use("other", kind.param, kind.gain, position) for kind in kinds if kind.param is not None)


def _move(scene: Scene) -> Answer:
    kind = scene.args[0]
    return Answer(replace(kind, param=kind.param and replace(kind.param, whole=False)))


def _cast(scene: Scene) -> Answer:
    if scene.eqn.primitive.name == "convert_element_type" and scene.eqn.params["new_dtype"].kind in "iub":
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
        if vector.gain and vector.param is None and bias.param and not bias.gain and scene.eqn.primitive.name != "sub":
            return Answer(vector, (Use("shift", bias.param, vector.gain, scene.position),))
    return None


def _sum(scene: Scene) -> Answer:
    return _mixture(scene.args, scene, "something is added that does not turn with it")


def _choice(scene: Scene) -> Answer:
    if scene.args[0].form not in (ZERO, SAME):
        return broken("its entries decide a choice")
    return _mixture(scene.args[1:], scene, "a choice is made between it and what does not turn with it")


def _update(scene: Scene) -> Answer:
    return _mixture(scene.args[:2], scene, "it is written into something that does not turn with it")


def _scatter(scene: Scene) -> Answer:
    return _mixture([scene.args[0], scene.args[2]], scene, "it is written into something that does not turn with it")


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
    if kind.form == VECTOR and scene.along[0] & set(scene.eqn.params["axes"]) and (not scene.ones or kind.gain):
        return broken("its entries are summed up, as a mean does")
    return _linear(scene)


def _contraction(scene: Scene) -> Answer:
    left, right = scene.args[:2]
    (lhs, rhs), (lhs_batch, rhs_batch) = contraction.axes(scene.eqn)
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
    if forms == {SQUARE, SAME} or (forms == {VECTOR, SAME} and scene.ones and not (left.gain or right.gain)):
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
    return Answer(Kind(VECTOR, gain=left.gain or right.gain), dropped([left, right], scene.position))


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
