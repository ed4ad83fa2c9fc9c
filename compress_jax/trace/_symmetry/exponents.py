"""How every value of a computation scales with the parameters.

If coordinate j of an axis of parameter p is multiplied by :math:`s_j^{e_p}`, a value is multiplied
by :math:`s_j^f` along the same axis, where f is a linear form in the unknown exponents e: products
add forms, sums demand equal ones, and anything else (tanh, the function's output) demands zero. For
solutions of all demands the function does not change, for every s > 0. `RULES` holds what
primitives do to forms; `ScalingWalk` is the domain for the interpreter.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from compress_jax.core.types import Aval
from compress_jax.trace._groups.analyze import Analysis
from compress_jax.trace._groups.axes import Axes, Dims, Leaf
from compress_jax.trace._jaxpr import primitives
from compress_jax.trace._jaxpr.interpret import ConstantValue, Where


class Unknown(NamedTuple):
    """The exponent of a parameter along one leaf of one of its axes."""

    path: str
    axis: int
    leaf: Leaf


Form = dict[Unknown, Fraction]
Field = dict[Leaf, Form]


@dataclass(frozen=True)
class Scaled:
    """How a value scales.

    Attributes:
      dims: its axes.
      fields: for each axis, the forms of the leaves along it; forms that are left out are zero.
      zero: whether it is known to be zero, which any scaling leaves zero.
      param: the parameter that it is, if it is one, or a loop's slice of one.
      why: the reason why it does not scale, if known.
    """

    dims: Dims
    fields: tuple[Field, ...]
    zero: bool = False
    param: str | None = None
    why: str = ""

    def along(self, leaf: Leaf) -> list[Form]:
        """Return the forms along a leaf, one for each axis that has one."""
        return [own[leaf] for own in self.fields if leaf in own]


class Fixed(NamedTuple):
    """The demand that a form be zero, and its reason."""

    form: Form
    why: str


def plus(a: Form, b: Form, times: int | Fraction = 1) -> Form:
    """Return ``a + times * b``, zeros left out.

    Example:
      >>> u = Unknown("w", 0, Leaf(2, 1))
      >>> plus({u: Fraction(1)}, {u: Fraction(1)}, -1)
      {}
    """
    total = {
        name: a.get(name, Fraction(0)) + times * b.get(name, Fraction(0)) for name in {**a, **b}
    }
    return {name: x for name, x in total.items() if x}


def _leaves(fields: Sequence[Field]) -> set[Leaf]:
    return set(itertools.chain.from_iterable(fields))


# These primitives drop whole leaves; leaves that they would split are frozen.
PARTS = ("slice", "split", "unstack")


@dataclass
class Demands:
    """What is demanded of the unknown exponents so far.

    Attributes:
      axes: what is known of axes.
      fixed: demands, in the order of the computation.
    """

    axes: Axes
    fixed: list[Fixed] = field(default_factory=list)

    def unscaled(self, dims: Dims, why: str = "", zero: bool = False) -> Scaled:
        """Return a value that does not scale."""
        return Scaled(dims, tuple({} for _ in dims), zero, why=why)

    def fix(self, value: Scaled, why: str, axes: Sequence[int] | None = None) -> None:
        """Demand that a value does not scale, along some axes or all."""
        # Zero stays zero under every factor.
        if value.zero:
            return
        for own in value.fields if axes is None else [value.fields[i] for i in axes]:
            self.fixed += [Fixed(form, why) for form in own.values() if form]

    def equal(self, forms: Sequence[Form], why: str) -> None:
        """Demand that forms be equal."""
        self.fixed += [Fixed(rest, why) for form in forms[1:] if (rest := plus(form, forms[0], -1))]

    def alike(self, values: Sequence[tuple[Field, ...]], why: str) -> None:
        """Demand that values scale alike along every axis."""
        for along in zip(*values, strict=True):
            for leaf in _leaves(along):
                self.equal([own.get(leaf, {}) for own in along], why)

    def moved(self, value: Scaled, dims: Dims, why: str) -> Scaled:
        """Return a value with its entries moved to other axes.

        Leaves keep their order; leaves that cannot be followed must not scale.
        """
        leaves = self.axes.leaves
        fields: tuple[Field, ...] = tuple({} for _ in dims)
        # The result's axes that each leaf lies in, in order.
        places: dict[Leaf, list[int]] = {}
        for i, axis in enumerate(dims):
            for leaf in leaves(axis):
                places.setdefault(leaf, []).append(i)
        for leaf in _leaves(value.fields):
            forms = value.along(leaf)
            # As often as before: the first occurrence goes to the first place, and so on. A slice
            # may drop a free leaf whole, of which nothing is then demanded.
            if len(forms) == len(places.get(leaf, ())):
                for i, form in zip(places[leaf], forms, strict=True):
                    fields[i][leaf] = form
            elif why not in PARTS or leaf in places or self.axes.reason(leaf) is not None:
                self.equal([{}, *forms], f"{why} takes it apart")
        return Scaled(dims, fields, value.zero, why=value.why)


# The rules of primitives; operands of any other primitive must not scale.

Rule = Callable[[Demands, JaxprEqn, list[Scaled], Dims], Scaled | None]


def _widened(args: Sequence[Scaled]) -> list[tuple[Field, ...]]:
    """Return the fields of elementwise operands, of which some may be scalars."""
    rank = max(len(arg.fields) for arg in args)
    scalar: tuple[Field, ...] = ({},) * rank
    return [arg.fields if len(arg.fields) == rank else scalar for arg in args]


def _combined(a: Field, b: Field, times: int = 1) -> Field:
    """Return the forms ``a + times * b`` of all leaves."""
    return {leaf: plus(a.get(leaf, {}), b.get(leaf, {}), times) for leaf in {**a, **b}}


def _why(args: Sequence[Scaled]) -> str:
    """Return the first operand's reason not to scale, constants excepted."""
    return next((arg.why for arg in args if arg.why and arg.why != "a constant"), "")


def _sum(times: int) -> Rule:
    """Return the rule of products (1) and quotients (-1), which add or subtract forms."""

    def rule(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
        del demands, eqn
        fields = tuple(_combined(a, b, times) for a, b in zip(*_widened(args), strict=True))
        # 0 * y and 0 / y are zero.
        zero = args[0].zero or (times == 1 and args[1].zero)  # y / 0 is not
        return Scaled(dims, fields, zero, why=_why(args))

    return rule


def _power(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    """A power multiplies forms by its exponent."""
    if eqn.primitive.name == "integer_pow":
        power = Fraction(eqn.params["y"])
    else:
        power = {"sqrt": Fraction(1, 2), "rsqrt": Fraction(-1, 2), "square": Fraction(2)}[
            eqn.primitive.name
        ]
    fields = tuple(_times(own, power) for own in args[0].fields)
    return Scaled(dims, fields, args[0].zero and power > 0, why=args[0].why)


def _times(own: Field, power: Fraction) -> Field:
    return {leaf: plus({}, form, power) for leaf, form in own.items()}


def _equal(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    """Operands of sums and choices must scale alike, except zeros."""
    if eqn.primitive.name == "select_n":
        demands.fix(args[0], "its entries decide a choice")
        args = args[1:]
    # relu is max(x, 0): a zero scales with whatever it is compared with or added to.
    live = [arg for arg in args if not arg.zero]
    if not live:
        return demands.unscaled(dims, zero=True)
    wide = _widened([*live, demands.unscaled(dims)])[: len(live)]  # of the result's rank
    demands.alike(wide, "something is added that does not scale with it")
    return Scaled(dims, wide[0], why=_why(live))


def _compared(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    """Operands of comparisons must scale alike; the result does not scale."""
    _equal(demands, eqn, args, dims)
    return demands.unscaled(dims)


def _passed(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled | None:
    """The result scales like its operand, except a cast to integers."""
    if eqn.primitive.name == "convert_element_type":
        if not jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact):
            return None  # rounded: the operand must not scale
    return Scaled(dims, args[0].fields, args[0].zero, why=args[0].why)


def _sign(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    return demands.unscaled(dims)


def _moved(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    return demands.moved(args[0], dims, eqn.primitive.name)


def _transposed(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    fields = tuple(args[0].fields[i] for i in eqn.params["permutation"])
    return Scaled(dims, fields, args[0].zero, why=args[0].why)


def _broadcast(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    to = dict(zip(eqn.params["broadcast_dimensions"], args[0].fields, strict=True))
    # Along a new axis all entries are equal, and scale alike.
    fields = tuple(to.get(i, {}) for i in range(len(dims)))
    return Scaled(dims, fields, args[0].zero, why=args[0].why)


def _reduced(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    axes = eqn.params["axes"]
    demands.fix(args[0], f"{eqn.primitive.name} combines its entries", axes)
    fields = tuple(own for i, own in enumerate(args[0].fields) if i not in axes)
    return Scaled(dims, fields, args[0].zero, why=args[0].why)


def _ran_along(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    demands.fix(args[0], f"{eqn.primitive.name} runs along it", [eqn.params["axis"]])
    return _passed(demands, eqn, args, dims) or demands.unscaled(dims)


def _padded(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    """Padding by zeros is like a window; a value padded by anything else must not scale."""
    if args[1].zero:
        return _window(demands, eqn, args[:1], dims)
    why = "it is padded by what is not zero"
    demands.fix(args[0], why)
    return demands.unscaled(dims, why)


def _window(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    """A value must not scale along axes that a window changes."""
    # Where nothing slides or pads, `analyze` has passed on the axis itself.
    pairs = zip(args[0].dims, dims, strict=True)
    wide = [i for i, (old, new) in enumerate(pairs) if old is not new]
    demands.fix(args[0], "a window runs along it", wide)
    fields = tuple({} if i in wide else own for i, own in enumerate(args[0].fields))
    return Scaled(dims, fields, args[0].zero, why=args[0].why)


def _concatenated(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    """Operands must scale alike along other axes, and along shared leaves of the joined axis."""
    along = eqn.params["dimension"]
    live = [arg for arg in args if not arg.zero] or args
    fields: list[Field] = []
    for i in range(len(dims)):
        own = [arg.fields[i] for arg in live]
        joined: Field = {}
        for leaf in _leaves(own):
            # Along the joined axis operands have leaves of their own; only shared ones must agree.
            present = [each for each in own if i != along or leaf in each]
            forms = [each.get(leaf, {}) for each in present]
            demands.equal(forms, "it is put beside what does not scale with it")
            joined[leaf] = next(each[leaf] for each in own if leaf in each)
        fields.append(joined)
    zero = args == live and all(arg.zero for arg in args)
    return Scaled(dims, tuple(fields), zero, why=_why(args))


def _stacked(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    along = eqn.params["axis"]
    # The new axis numbers the operands; nothing scales along it.
    same = _equal(demands, eqn, args, (*dims[:along], *dims[along + 1 :]))
    return Scaled(dims, (*same.fields[:along], {}, *same.fields[along:]), same.zero, why=same.why)


def _contracted(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled | None:
    """Contracted axes must cancel, batch axes add their forms, the others pass."""
    left, right = args[:2]
    if primitives.kind(eqn) == "ragged_dot":
        return None
    zero = left.zero or right.zero
    if primitives.kind(eqn) == "conv":
        return _convolved(demands, eqn, left, right, dims)
    (lhs, rhs), (lhs_batch, rhs_batch) = primitives.axes(eqn)
    for i, j in zip(lhs, rhs, strict=True):
        _against(demands, left, i, right, j)
    # [*batch, *others of left, *others of right]
    fields = []
    for i, j in zip(lhs_batch, rhs_batch, strict=True):
        fields.append(_combined(left.fields[i], right.fields[j]))
    fields += [own for i, own in enumerate(left.fields) if i not in (*lhs, *lhs_batch)]
    fields += [own for j, own in enumerate(right.fields) if j not in (*rhs, *rhs_batch)]
    return Scaled(dims, tuple(fields), zero)


def _convolved(
    demands: Demands, eqn: JaxprEqn, image: Scaled, kernel: Scaled, dims: Dims
) -> Scaled | None:
    p = eqn.params
    numbers = p["dimension_numbers"]
    batch, channel, *space = numbers.lhs_spec
    out, into, *window = numbers.rhs_spec
    if p["batch_group_count"] != 1:
        return None
    demands.fix(image, "a window runs along it", space)
    demands.fix(kernel, "a window runs along it", window)
    fields: list[Field] = [{} for _ in dims]
    fields[numbers.out_spec[0]] = image.fields[batch]
    if p["feature_group_count"] == 1:
        _against(demands, image, channel, kernel, into)
        fields[numbers.out_spec[1]] = kernel.fields[out]
        return Scaled(dims, tuple(fields), image.zero or kernel.zero)
    if p["feature_group_count"] != image.dims[channel].size:
        return None  # groups of several channels, which are summed over, are not followed
    # Depthwise: each input channel has outputs of its own, which it scales as the kernel does.
    demands.fix(kernel, "it has one entry", [into])
    fields[numbers.out_spec[1]] = _combined(image.fields[channel], kernel.fields[out])
    return Scaled(dims, tuple(fields), image.zero or kernel.zero)


def _against(demands: Demands, left: Scaled, i: int, right: Scaled, j: int) -> None:
    """Demand that the forms of two contracted axes cancel."""
    if left.zero or right.zero:
        return
    why = _why([left, right]) or "nothing that scales comes before it"
    for form in _combined(left.fields[i], right.fields[j]).values():
        if form:
            demands.fixed.append(Fixed(form, why))


RULES: dict[str, Rule] = {
    **dict.fromkeys(primitives.CASTS | primitives.SIGNS | {"abs", "rev"}, _passed),
    **dict.fromkeys(primitives.MOVES - {"broadcast_in_dim", "rev", "transpose"}, _moved),
    **dict.fromkeys(primitives.INDEXED, _moved),
    **dict.fromkeys(primitives.SUMS | {"max", "min", "select_n"}, _equal),
    **dict.fromkeys(primitives.COMPARISONS, _compared),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduced),
    **dict.fromkeys(("sqrt", "rsqrt", "square", "integer_pow"), _power),
    **dict.fromkeys(primitives.WINDOWS, _window),
    **dict.fromkeys(primitives.CONTRACTIONS, _contracted),
    "pad": _padded,
    "cumsum": _ran_along,
    "sign": _sign,
    "mul": _sum(1),
    "div": _sum(-1),
    "transpose": _transposed,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenated,
    "stack": _stacked,
}


@dataclass
class ScalingWalk:
    """The domain for the interpreter, in which a value is a `Scaled`.

    Attributes:
      analysis: the axes of every value.
      demands: on the exponents.
      hold: parameters that must not be scaled.
      carried: forms of values that loops and branches carry or stack; factors that differ between
        iterations must not appear in them.
      stacks: by parameter, the number of its leading axes that loops run along.
      live: every value that may scale: parameters, operands and results of equations.
      used: parameters that an equation takes.
      whole: parameters that an equation takes with all their axes, not a loop's slices of them.
    """

    analysis: Analysis
    demands: Demands
    hold: frozenset[str] = frozenset()
    carried: list[Form] = field(default_factory=list)
    stacks: dict[str, int] = field(default_factory=dict)
    live: list[Scaled] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)

    def start(self, path: str, dims: Dims) -> Scaled:
        """Return a parameter: every leaf of its axes has an unknown of its own."""
        leaves = self.analysis.walk.axes.leaves
        fields: list[Field] = []
        for i, axis in enumerate(dims):
            fields.append({leaf: {Unknown(path, i, leaf): Fraction(1)} for leaf in leaves(axis)})
        value = Scaled(dims, tuple(fields), param=path)
        self._live([value])
        return value

    def constant(self, aval: Aval, value: ConstantValue) -> Scaled:
        """Return a literal or a captured array."""
        dims = tuple(Leaf(n, -1) for n in getattr(aval, "shape", ()))
        return self.demands.unscaled(dims, "a constant", value.zero)

    def join(self, a: Scaled, b: Scaled) -> Scaled:
        """Demand that two values that one variable may hold scale alike."""
        live = [each for each in (a, b) if not each.zero]
        for each in live:
            self._carry(each)
        if len(live) == 2:
            self.demands.alike([each.fields for each in live], "a loop or a branch carries it")
        return Scaled(a.dims, (live or [a])[0].fields, not live, why=a.why)

    def same(self, a: Scaled, b: Scaled) -> bool:
        """Return whether a loop's body need not run again: what started as zero may change."""
        return a.zero == b.zero

    def unstack(self, a: Scaled, loop: int) -> Scaled:
        """Return an iteration's slice."""
        if a.param is not None:
            # How many leading axes of the stored parameter loops run along, this one included.
            depth = len(self.analysis.params[a.param]) - len(a.dims) + 1
            self.stacks[a.param] = max(self.stacks.get(a.param, 0), depth)
        else:
            self._carry(a)
        self.demands.fix(a, "a loop runs along it", [0])
        return Scaled(a.dims[1:], a.fields[1:], a.zero, a.param, a.why)

    def stack(self, a: Scaled, length: int) -> Scaled:
        """Return stacked slices; a loop may return those that it was given, as nnx.scan does."""
        param = a.param
        # Computed in the loop: factors that differ between iterations must not be in it.
        if param is None or len(a.dims) >= len(self.analysis.params[param]):
            param = None
            self._carry(a)
        return Scaled((Leaf(length, -1), *a.dims), ({}, *a.fields), a.zero, param, a.why)

    def reshard(self, a: Scaled, aval: Aval) -> Scaled:
        """Return a device's shard; along sharded axes a value must not scale."""
        shape = getattr(aval, "shape", ())
        cut = [i for i, (axis, n) in enumerate(zip(a.dims, shape, strict=True)) if axis.size != n]
        self.demands.fix(a, "it is cut over devices", cut)
        fields = tuple({} if i in cut else own for i, own in enumerate(a.fields))
        return Scaled(a.dims, fields, a.zero, why=a.why)

    def equation(self, eqn: JaxprEqn, args: list[Scaled], where: Where) -> Sequence[Scaled]:
        """Return how the results of an equation scale."""
        operands, results = self.analysis.walk.values[where.position]
        # Data, constants and stacks have axes of their own here; the analysis knows what they are.
        pairs = zip(args, operands, strict=True)
        args = [replace(arg, dims=dims) for arg, dims in pairs]
        self._use(args)
        made = self._results(eqn, args, results)
        self._live([*args, *made])
        return made

    def _results(self, eqn: JaxprEqn, args: list[Scaled], results: list[Dims]) -> list[Scaled]:
        name = eqn.primitive.name
        # The only moves with several results, each with axes of its own.
        if name in ("split", "unstack"):
            return [self.demands.moved(args[0], dims, name) for dims in results]
        out = RULES[name](self.demands, eqn, args, results[0]) if name in RULES else None
        if out is not None and len(results) == 1:
            return [out]
        if out is not None:
            return [self.demands.moved(out, dims, name) for dims in results]
        why = f"{name} acts on its entries"
        for arg in args:
            self.demands.fix(arg, why)
        return [self.demands.unscaled(dims, why) for dims in results]

    def _live(self, values: Sequence[Scaled]) -> None:
        """Note values that may scale; zeros are zero whatever they are multiplied by."""
        self.live += [each for each in values if not each.zero and any(each.fields)]

    def _carry(self, value: Scaled) -> None:
        """Note the forms of a value that a loop or a branch carries."""
        for own in value.fields:
            self.carried += [form for form in own.values() if form]

    def _use(self, args: Sequence[Scaled]) -> None:
        """Note which operands are parameters."""
        for arg in args:
            if arg.param is not None:
                self.used.add(arg.param)
                if len(arg.dims) == len(self.analysis.params[arg.param]):
                    self.whole.add(arg.param)
