"""How values scale with the parameters: the powers of a factor along an axis that every value of a computation takes up.

If coordinate j of an axis of parameter p is multiplied by :math:`s_j^{e_p}`, a value is multiplied by :math:`s_j^f` along
the same axis, f being a linear form in the unknown exponents e: products add forms, sums demand equal ones, and what is
neither (tanh, the function's output) demands zero. Solutions of all demands leave the function as it is, for every s > 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from compress_jax.trace import contraction
from compress_jax.trace._analyse import Analysis
from compress_jax.trace.axes import Leaf
from compress_jax.trace.axis_moves import Dims
from compress_jax.trace.interpret import Where


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
    total = {name: a.get(name, Fraction(0)) + times * b.get(name, Fraction(0)) for name in {**a, **b}}
    return {name: x for name, x in total.items() if x}


@dataclass
class Exponents:
    """The domain for the interpreter.

    Attributes:
      analysis: the axes of every value.
      hold: parameters that are to stay as they are.
      fixed: demands, in the order of the computation.
      carried: forms of what loops and branches carry or stack: factors of their own for each turn must not reach them.
      stacks: by parameter, how many of its leading axes loops run along.
      used: parameters that an equation takes.
      whole: those that an equation takes as they are stored, not a loop's slices of them.
    """

    analysis: Analysis
    hold: frozenset[str] = frozenset()
    fixed: list[Fixed] = field(default_factory=list)
    carried: list[Form] = field(default_factory=list)
    stacks: dict[str, int] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)

    def start(self, path: str, dims: Dims) -> Scaled:
        """Return a parameter: every leaf of its axes has an unknown of its own."""
        leaves = self.analysis.walk.axes.leaves
        fields = tuple({leaf: {Unknown(path, i, leaf): Fraction(1)} for leaf in leaves(axis)} for i, axis in enumerate(dims))
        return Scaled(dims, fields, param=path)

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

    def constant(self, aval: Any, value: Any) -> Scaled:
        """Return a literal or a captured array."""
        return self.still(tuple(Leaf(n, -1) for n in getattr(aval, "shape", ())), "a constant", _is_zero(aval, value))

    def join(self, a: Scaled, b: Scaled) -> Scaled:
        """Demand that one place holds values that scale alike."""
        live = [each for each in (a, b) if not each.zero]
        for each in live:
            self.carried += [form for own in each.fields for form in own.values() if form]
        if len(live) == 2:
            self.alike([each.fields for each in live], "a loop or a branch carries it")
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
        self.fix(a, "a loop runs along it", [0])
        return Scaled(a.dims[1:], a.fields[1:], a.zero, a.param, a.why)

    def stack(self, a: Scaled, length: int) -> Scaled:
        """Return slices put together."""
        self.carried += [form for own in a.fields for form in own.values() if form]
        return Scaled((Leaf(length, -1), *a.dims), ({}, *a.fields), a.zero, why=a.why)

    def reshard(self, a: Scaled, aval: Any) -> Scaled:
        """Return a device's piece: what is cut must not scale."""
        shape = getattr(aval, "shape", ())
        cut = [i for i, (axis, n) in enumerate(zip(a.dims, shape, strict=True)) if axis.size != n]
        self.fix(a, "it is cut over devices", cut)
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
        if name in RULES:
            out = RULES[name](self, eqn, args, results[0])
            if out is not None:
                return [out if len(results) == 1 else self.moved(out, dims, name) for dims in results]
        for arg in args:
            self.fix(arg, f"{name} acts on its entries")
        return [self.still(dims, f"{name} acts on its entries") for dims in results]

    def moved(self, value: Scaled, dims: Dims, why: str) -> Scaled:
        """Return a value in another shape: leaves keep their order; what cannot be followed must not scale."""
        leaves = self.analysis.walk.axes.leaves
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
            else:
                self.equal([{}, *forms], f"{why} takes it apart")
        return Scaled(dims, fields, value.zero, why=value.why)

    def alike(self, values: Sequence[tuple[Field, ...]], why: str) -> None:
        """Demand that values scale alike along every axis."""
        for along in zip(*values, strict=True):
            for leaf in {leaf for own in along for leaf in own}:
                self.equal([own.get(leaf, {}) for own in along], why)


def _is_zero(aval: Any, value: Any) -> bool:
    if not jnp.issubdtype(aval.dtype, jnp.number) or jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        return False
    return not np.any(np.asarray(value))


Rule = Callable[[Exponents, JaxprEqn, list[Scaled], Dims], Scaled | None]


def _widened(args: Sequence[Scaled]) -> list[tuple[Field, ...]]:
    """Return the fields of elementwise operands, of which some may be scalars."""
    rank = max(len(arg.fields) for arg in args)
    return [arg.fields if len(arg.fields) == rank else tuple({} for _ in range(rank)) for arg in args]


def _why(args: Sequence[Scaled]) -> str:
    return next((arg.why for arg in args if arg.why and arg.why != "a constant"), "")


def _sum(times: tuple[int, ...]) -> Rule:
    """Products and quotients add or take off forms."""

    def rule(domain: Exponents, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
        del domain, eqn
        fields = []
        for a, b in zip(*_widened(args), strict=True):
            fields.append({leaf: plus(a.get(leaf, {}), b.get(leaf, {}), times[1]) for leaf in {**a, **b}})
        return Scaled(dims, tuple(fields), args[0].zero or (times[1] == 1 and args[1].zero), why=_why(args))

    return rule


def _power(domain: Exponents, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    powers = {"sqrt": Fraction(1, 2), "rsqrt": Fraction(-1, 2), "square": Fraction(2)}
    power = Fraction(eqn.params["y"]) if eqn.primitive.name == "integer_pow" else powers[eqn.primitive.name]
    fields = tuple({leaf: plus({}, form, power) for leaf, form in own.items()} for own in args[0].fields)
    return Scaled(dims, fields, args[0].zero and power > 0, why=args[0].why)


def _equal(domain: Exponents, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    """Sums and choices: all scale alike, but for zeros."""
    if eqn.primitive.name == "select_n":
        domain.fix(args[0], "its entries decide a choice")
        args = args[1:]
    live = [arg for arg in args if not arg.zero]
    if not live:
        return domain.still(dims, zero=True)
    wide = _widened([*live, domain.still(dims)])[: len(live)]
    domain.alike(wide, "something is added that does not scale with it")
    return Scaled(dims, wide[0], why=_why(live))


def _compared(domain: Exponents, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    _equal(domain, eqn, args, dims)
    return domain.still(dims)


def _kept(domain: Exponents, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled | None:
    if eqn.primitive.name == "convert_element_type" and not jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact):
        return None
    return Scaled(dims, args[0].fields, args[0].zero, why=args[0].why)


def _sign(domain: Exponents, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    return domain.still(dims)


def _moved(domain: Exponents, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    return domain.moved(args[0], dims, eqn.primitive.name)


def _transposed(domain: Exponents, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    fields = tuple(args[0].fields[i] for i in eqn.params["permutation"])
    return Scaled(dims, fields, args[0].zero, why=args[0].why)


def _broadcast(domain: Exponents, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    to = dict(zip(eqn.params["broadcast_dimensions"], args[0].fields, strict=True))
    return Scaled(dims, tuple(to.get(i, {}) for i in range(len(dims))), args[0].zero, why=args[0].why)


def _reduced(domain: Exponents, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    axes = eqn.params["axes"]
    domain.fix(args[0], f"{eqn.primitive.name} takes its entries together", axes)
    fields = tuple(own for i, own in enumerate(args[0].fields) if i not in axes)
    return Scaled(dims, fields, args[0].zero, why=args[0].why)


def _ran_along(domain: Exponents, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    domain.fix(args[0], f"{eqn.primitive.name} runs along it", [eqn.params["axis"]])
    return _kept(domain, eqn, args, dims) or domain.still(dims)


def _padded(domain: Exponents, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    return _window(domain, eqn, args[:1], dims) if args[1].zero else _apart(domain, args[0], dims)


def _apart(domain: Exponents, value: Scaled, dims: Dims) -> Scaled:
    domain.fix(value, "it is padded by what is not zero")
    return domain.still(dims, "it is padded by what is not zero")


def _window(domain: Exponents, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    wide = [i for i, (old, new) in enumerate(zip(args[0].dims, dims, strict=True)) if old is not new]
    domain.fix(args[0], "a window runs along it", wide)
    fields = tuple({} if i in wide else own for i, own in enumerate(args[0].fields))
    return Scaled(dims, fields, args[0].zero, why=args[0].why)


def _concatenated(domain: Exponents, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    along, fields = eqn.params["dimension"], []
    live = [arg for arg in args if not arg.zero] or args
    for i in range(len(dims)):
        leaves = {leaf for arg in live for leaf in arg.fields[i]}
        for leaf in leaves:
            present = [arg.fields[i].get(leaf, {}) for arg in live if i != along or leaf in arg.fields[i]]
            domain.equal(present, "it is put beside what does not scale with it")
        fields.append({leaf: next(arg.fields[i][leaf] for arg in live if leaf in arg.fields[i]) for leaf in leaves})
    return Scaled(dims, tuple(fields), args == live and all(arg.zero for arg in args), why=_why(args))


def _contracted(domain: Exponents, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled | None:
    left, right = args[:2]
    if contraction.kind(eqn) == "ragged_dot":
        return None
    zero = left.zero or right.zero
    if contraction.kind(eqn) == "conv":
        return _convolved(domain, eqn, left, right, dims)
    (lhs, rhs), (lhs_batch, rhs_batch) = contraction.axes(eqn)
    for i, j in zip(lhs, rhs, strict=True):
        _against(domain, left, i, right, j)
    fields = []
    for i, j in zip(lhs_batch, rhs_batch, strict=True):
        a, b = left.fields[i], right.fields[j]
        fields.append({leaf: plus(a.get(leaf, {}), b.get(leaf, {})) for leaf in {**a, **b}})
    fields += [own for i, own in enumerate(left.fields) if i not in (*lhs, *lhs_batch)]
    fields += [own for j, own in enumerate(right.fields) if j not in (*rhs, *rhs_batch)]
    return Scaled(dims, tuple(fields), zero)


def _convolved(domain: Exponents, eqn: JaxprEqn, image: Scaled, kernel: Scaled, dims: Dims) -> Scaled | None:
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    (batch, channel, *space), (out, into, *window) = numbers.lhs_spec, numbers.rhs_spec
    if p["batch_group_count"] != 1:
        return None
    domain.fix(image, "a window runs along it", space)
    domain.fix(kernel, "a window runs along it", window)
    fields: list[Field] = [{} for _ in dims]
    fields[numbers.out_spec[0]] = image.fields[batch]
    if p["feature_group_count"] == 1:
        _against(domain, image, channel, kernel, into)
        fields[numbers.out_spec[1]] = kernel.fields[out]
        return Scaled(dims, tuple(fields), image.zero or kernel.zero)
    if p["feature_group_count"] != image.dims[channel].size:
        return None
    # depthwise: each input channel makes outputs of its own, so that it scales them as the kernel does
    domain.fix(kernel, "it has one entry", [into])
    a, b = image.fields[channel], kernel.fields[out]
    fields[numbers.out_spec[1]] = {leaf: plus(a.get(leaf, {}), b.get(leaf, {})) for leaf in {**a, **b}}
    return Scaled(dims, tuple(fields), image.zero or kernel.zero)


def _against(domain: Exponents, left: Scaled, i: int, right: Scaled, j: int) -> None:
    """Summed over: what one operand is multiplied by, the other is divided by."""
    if left.zero or right.zero:
        return
    a, b = left.fields[i], right.fields[j]
    why = _why([left, right]) or "nothing that scales comes before it"
    for leaf in {**a, **b}:
        if form := plus(a.get(leaf, {}), b.get(leaf, {})):
            domain.fixed.append(Fixed(form, why))


KEPT = """convert_element_type copy copy_p neg abs reduce_precision sharding_constraint stop_gradient name real
optimization_barrier device_put pvary pcast""".split()
MOVED = "reshape squeeze expand_dims slice split gather dynamic_slice tile".split()
SUMS = "add add_any sub max min select_n".split()
REDUCED = "reduce_sum reduce_max reduce_min".split()
RULES: dict[str, Rule] = {
    **dict.fromkeys(KEPT, _kept),
    **dict.fromkeys(MOVED, _moved),
    **dict.fromkeys(SUMS, _equal),
    **dict.fromkeys("eq ne lt le gt ge".split(), _compared),
    **dict.fromkeys(REDUCED, _reduced),
    **dict.fromkeys(("sqrt", "rsqrt", "square", "integer_pow"), _power),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), _window),
    **dict.fromkeys(contraction.KINDS, _contracted),
    "pad": _padded,
    "cumsum": _ran_along,
    "sign": _sign,
    "mul": _sum((1, 1)),
    "div": _sum((1, -1)),
    "transpose": _transposed,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenated,
}
