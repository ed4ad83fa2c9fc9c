"""How values scale with the parameters: the powers of a factor along an axis that every value of a computation takes up.

If coordinate j of an axis of parameter p is multiplied by :math:`s_j^{e_p}`, a value is multiplied
by :math:`s_j^f` along the same axis, f being a linear form in the unknown exponents e: products add
forms, sums demand equal ones, and what is neither (tanh, the function's output) demands zero.
Solutions of all demands leave the function as it is, for every s > 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from compress_jax.trace._groups.analyze import Analysis
from compress_jax.trace._groups.axes import Axes, Dims, Leaf
from compress_jax.trace._jaxpr import primitives
from compress_jax.trace._jaxpr.interpret import Where


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
      fields: for each axis, the forms of the leaves along it; those that are left out are zero.
      zero: whether it is known to be zero, which stays zero however it is scaled.
      param: the parameter that it is, untouched so far.
      why: why it does not scale, where that is known.
    """

    dims: Dims
    fields: tuple[Field, ...]
    zero: bool = False
    param: str | None = None
    why: str = ""

    def along(self, leaf: Leaf) -> list[Form]:
        """Return the forms along a leaf, one for each axis on which one was noted."""
        return [own[leaf] for own in self.fields if leaf in own]


class Fixed(NamedTuple):
    """A demand that a form be zero, and what makes it."""

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


PARTS = (
    "slice",
    "split",
    "unstack",
)  # they leave out whole leaves; of those they cut, the axes say that they are frozen


@dataclass
class Demands:
    """What is demanded of the unknown exponents so far.

    Attributes:
      axes: what is known of axes.
      fixed: demands, in the order of the computation.
    """

    axes: Axes
    fixed: list[Fixed] = field(default_factory=list)

    def still(self, dims: Dims, why: str = "", zero: bool = False) -> Scaled:
        """Return a value that does not scale."""
        return Scaled(dims, tuple({} for _ in dims), zero, why=why)

    def fix(self, value: Scaled, why: str, axes: Sequence[int] | None = None) -> None:
        """Demand that a value does not scale, along some axes or all."""
        if not value.zero:
            for own in value.fields if axes is None else [value.fields[i] for i in axes]:
                self.fixed += [Fixed(form, why) for form in own.values() if form]

    def equal(self, forms: Sequence[Form], why: str) -> None:
        """Demand that forms be equal."""
        self.fixed += [Fixed(rest, why) for form in forms[1:] if (rest := plus(form, forms[0], -1))]

    def alike(self, values: Sequence[tuple[Field, ...]], why: str) -> None:
        """Demand that values scale alike along every axis."""
        for along in zip(*values, strict=True):
            for leaf in {leaf for own in along for leaf in own}:
                self.equal([own.get(leaf, {}) for own in along], why)

    def moved(self, value: Scaled, dims: Dims, why: str) -> Scaled:
        """Return a value in another shape: leaves keep their order; what cannot be followed must not scale."""
        leaves = self.axes.leaves
        fields: tuple[Field, ...] = tuple({} for _ in dims)
        places: dict[Leaf, list[int]] = {}
        for i, axis in enumerate(dims):
            for leaf in leaves(axis):
                places.setdefault(leaf, []).append(i)
        for leaf in {leaf for own in value.fields for leaf in own}:
            forms = value.along(leaf)
            if len(forms) == len(places.get(leaf, ())):
                for i, form in zip(places[leaf], forms, strict=True):
                    fields[i][leaf] = form
            elif why not in PARTS or leaf in places or self.axes.reason(leaf) is not None:
                self.equal([{}, *forms], f"{why} takes it apart")
        return Scaled(dims, fields, value.zero, why=value.why)


# What equations do to values that scale: one table of small functions; whatever it lacks must not
# scale.


Rule = Callable[[Demands, JaxprEqn, list[Scaled], Dims], Scaled | None]


def _widened(args: Sequence[Scaled]) -> list[tuple[Field, ...]]:
    """Return the fields of elementwise operands, of which some may be scalars."""
    rank = max(len(arg.fields) for arg in args)
    return [
        arg.fields if len(arg.fields) == rank else tuple({} for _ in range(rank)) for arg in args
    ]


def _why(args: Sequence[Scaled]) -> str:
    return next((arg.why for arg in args if arg.why and arg.why != "a constant"), "")


def _sum(times: tuple[int, ...]) -> Rule:
    """Products and quotients add or take off forms."""

    def rule(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
        del demands, eqn
        fields = []
        for a, b in zip(*_widened(args), strict=True):
            fields.append(
                {leaf: plus(a.get(leaf, {}), b.get(leaf, {}), times[1]) for leaf in {**a, **b}}
            )
        return Scaled(
            dims, tuple(fields), args[0].zero or (times[1] == 1 and args[1].zero), why=_why(args)
        )

    return rule


def _power(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    powers = {"sqrt": Fraction(1, 2), "rsqrt": Fraction(-1, 2), "square": Fraction(2)}
    power = (
        Fraction(eqn.params["y"])
        if eqn.primitive.name == "integer_pow"
        else powers[eqn.primitive.name]
    )
    fields = tuple(
        {leaf: plus({}, form, power) for leaf, form in own.items()} for own in args[0].fields
    )
    return Scaled(dims, fields, args[0].zero and power > 0, why=args[0].why)


def _equal(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    """Sums and choices: all scale alike, but for zeros."""
    if eqn.primitive.name == "select_n":
        demands.fix(args[0], "its entries decide a choice")
        args = args[1:]
    live = [arg for arg in args if not arg.zero]
    if not live:
        return demands.still(dims, zero=True)
    wide = _widened([*live, demands.still(dims)])[: len(live)]
    demands.alike(wide, "something is added that does not scale with it")
    return Scaled(dims, wide[0], why=_why(live))


def _compared(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    _equal(demands, eqn, args, dims)
    return demands.still(dims)


def _kept(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled | None:
    if eqn.primitive.name == "convert_element_type" and not jnp.issubdtype(
        eqn.params["new_dtype"], jnp.inexact
    ):
        return None
    return Scaled(dims, args[0].fields, args[0].zero, why=args[0].why)


def _sign(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    return demands.still(dims)


def _moved(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    return demands.moved(args[0], dims, eqn.primitive.name)


def _transposed(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    fields = tuple(args[0].fields[i] for i in eqn.params["permutation"])
    return Scaled(dims, fields, args[0].zero, why=args[0].why)


def _broadcast(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    to = dict(zip(eqn.params["broadcast_dimensions"], args[0].fields, strict=True))
    return Scaled(
        dims, tuple(to.get(i, {}) for i in range(len(dims))), args[0].zero, why=args[0].why
    )


def _reduced(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    axes = eqn.params["axes"]
    demands.fix(args[0], f"{eqn.primitive.name} takes its entries together", axes)
    fields = tuple(own for i, own in enumerate(args[0].fields) if i not in axes)
    return Scaled(dims, fields, args[0].zero, why=args[0].why)


def _ran_along(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    demands.fix(args[0], f"{eqn.primitive.name} runs along it", [eqn.params["axis"]])
    return _kept(demands, eqn, args, dims) or demands.still(dims)


def _padded(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    return _window(demands, eqn, args[:1], dims) if args[1].zero else _apart(demands, args[0], dims)


def _apart(demands: Demands, value: Scaled, dims: Dims) -> Scaled:
    demands.fix(value, "it is padded by what is not zero")
    return demands.still(dims, "it is padded by what is not zero")


def _window(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    wide = [
        i for i, (old, new) in enumerate(zip(args[0].dims, dims, strict=True)) if old is not new
    ]
    demands.fix(args[0], "a window runs along it", wide)
    fields = tuple({} if i in wide else own for i, own in enumerate(args[0].fields))
    return Scaled(dims, fields, args[0].zero, why=args[0].why)


def _concatenated(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    along, fields = eqn.params["dimension"], []
    live = [arg for arg in args if not arg.zero] or args
    for i in range(len(dims)):
        leaves = {leaf for arg in live for leaf in arg.fields[i]}
        for leaf in leaves:
            present = [
                arg.fields[i].get(leaf, {}) for arg in live if i != along or leaf in arg.fields[i]
            ]
            demands.equal(present, "it is put beside what does not scale with it")
        fields.append(
            {
                leaf: next(arg.fields[i][leaf] for arg in live if leaf in arg.fields[i])
                for leaf in leaves
            }
        )
    return Scaled(
        dims, tuple(fields), args == live and all(arg.zero for arg in args), why=_why(args)
    )


def _stacked(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    along = eqn.params["axis"]
    same = _equal(demands, eqn, args, (*dims[:along], *dims[along + 1 :]))
    return Scaled(dims, (*same.fields[:along], {}, *same.fields[along:]), same.zero, why=same.why)


def _contracted(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled | None:
    left, right = args[:2]
    if primitives.kind(eqn) == "ragged_dot":
        return None
    zero = left.zero or right.zero
    if primitives.kind(eqn) == "conv":
        return _convolved(demands, eqn, left, right, dims)
    (lhs, rhs), (lhs_batch, rhs_batch) = primitives.axes(eqn)
    for i, j in zip(lhs, rhs, strict=True):
        _against(demands, left, i, right, j)
    fields = []
    for i, j in zip(lhs_batch, rhs_batch, strict=True):
        a, b = left.fields[i], right.fields[j]
        fields.append({leaf: plus(a.get(leaf, {}), b.get(leaf, {})) for leaf in {**a, **b}})
    fields += [own for i, own in enumerate(left.fields) if i not in (*lhs, *lhs_batch)]
    fields += [own for j, own in enumerate(right.fields) if j not in (*rhs, *rhs_batch)]
    return Scaled(dims, tuple(fields), zero)


def _convolved(
    demands: Demands, eqn: JaxprEqn, image: Scaled, kernel: Scaled, dims: Dims
) -> Scaled | None:
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    (batch, channel, *space), (out, into, *window) = numbers.lhs_spec, numbers.rhs_spec
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
        return None
    # depthwise: each input channel makes outputs of its own, so that it scales them as the kernel
    # does
    demands.fix(kernel, "it has one entry", [into])
    a, b = image.fields[channel], kernel.fields[out]
    fields[numbers.out_spec[1]] = {
        leaf: plus(a.get(leaf, {}), b.get(leaf, {})) for leaf in {**a, **b}
    }
    return Scaled(dims, tuple(fields), image.zero or kernel.zero)


def _against(demands: Demands, left: Scaled, i: int, right: Scaled, j: int) -> None:
    """Summed over: what one operand is multiplied by, the other is divided by."""
    if left.zero or right.zero:
        return
    a, b = left.fields[i], right.fields[j]
    why = _why([left, right]) or "nothing that scales comes before it"
    for leaf in {**a, **b}:
        if form := plus(a.get(leaf, {}), b.get(leaf, {})):
            demands.fixed.append(Fixed(form, why))


RULES: dict[str, Rule] = {
    **dict.fromkeys(primitives.CASTS | primitives.SIGNS | {"abs", "rev"}, _kept),
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
    "mul": _sum((1, 1)),
    "div": _sum((1, -1)),
    "transpose": _transposed,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenated,
    "stack": _stacked,
}


# The walk over a function's jaxpr that finds out what scaling its parameters demands of their
# exponents.


@dataclass
class Walked:
    """The domain for the interpreter: a value is a `Scaled`.

    Attributes:
      analysis: the axes of every value.
      hold: parameters that are to stay as they are.
      demands: what they demand of exponents.
      carried: forms of what loops and branches carry or stack: factors of their own for each turn
        must not reach them.
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
        fields = tuple(
            {leaf: {Unknown(path, i, leaf): Fraction(1)} for leaf in leaves(axis)}
            for i, axis in enumerate(dims)
        )
        return Scaled(dims, fields, param=path)

    def constant(self, aval: Any, value: Any) -> Scaled:
        """Return a literal or a captured array."""
        return self.demands.still(
            tuple(Leaf(n, -1) for n in getattr(aval, "shape", ())),
            "a constant",
            _is_zero(aval, value),
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
        args = [
            Scaled(dims, arg.fields, arg.zero, arg.param, arg.why)
            for arg, dims in zip(args, operands, strict=True)
        ]
        name = eqn.primitive.name
        for arg in args:
            if arg.param is not None:
                self.used.add(arg.param)
                self.whole |= (
                    {arg.param} if len(arg.dims) == len(self.analysis.params[arg.param]) else set()
                )
        if name in ("split", "unstack"):
            return [self.demands.moved(args[0], dims, name) for dims in results]
        if name in RULES:
            out = RULES[name](self.demands, eqn, args, results[0])
            if out is not None:
                return [
                    out if len(results) == 1 else self.demands.moved(out, dims, name)
                    for dims in results
                ]
        for arg in args:
            self.demands.fix(arg, f"{name} acts on its entries")
        return [self.demands.still(dims, f"{name} acts on its entries") for dims in results]


def _is_zero(aval: Any, value: Any) -> bool:
    if not jnp.issubdtype(aval.dtype, jnp.number) or jnp.issubdtype(
        aval.dtype, jax.dtypes.extended
    ):
        return False
    return not np.any(np.asarray(value))
