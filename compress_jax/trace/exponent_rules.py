"""What equations do to values that scale: one table of small functions; whatever it lacks must not scale."""

from collections.abc import Callable, Sequence
from fractions import Fraction

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from compress_jax.trace import contraction, primitives
from compress_jax.trace.axis_moves import Dims
from compress_jax.trace.exponents import Demands, Field, Fixed, Scaled, plus

Rule = Callable[[Demands, JaxprEqn, list[Scaled], Dims], Scaled | None]


def _widened(args: Sequence[Scaled]) -> list[tuple[Field, ...]]:
    """Return the fields of elementwise operands, of which some may be scalars."""
    rank = max(len(arg.fields) for arg in args)
    return [arg.fields if len(arg.fields) == rank else tuple({} for _ in range(rank)) for arg in args]


def _why(args: Sequence[Scaled]) -> str:
    return next((arg.why for arg in args if arg.why and arg.why != "a constant"), "")


def _sum(times: tuple[int, ...]) -> Rule:
    """Products and quotients add or take off forms."""

    def rule(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
        del demands, eqn
        fields = []
        for a, b in zip(*_widened(args), strict=True):
            fields.append({leaf: plus(a.get(leaf, {}), b.get(leaf, {}), times[1]) for leaf in {**a, **b}})
        return Scaled(dims, tuple(fields), args[0].zero or (times[1] == 1 and args[1].zero), why=_why(args))

    return rule


def _power(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    powers = {"sqrt": Fraction(1, 2), "rsqrt": Fraction(-1, 2), "square": Fraction(2)}
    power = Fraction(eqn.params["y"]) if eqn.primitive.name == "integer_pow" else powers[eqn.primitive.name]
    fields = tuple({leaf: plus({}, form, power) for leaf, form in own.items()} for own in args[0].fields)
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
    if eqn.primitive.name == "convert_element_type" and not jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact):
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
    return Scaled(dims, tuple(to.get(i, {}) for i in range(len(dims))), args[0].zero, why=args[0].why)


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
    wide = [i for i, (old, new) in enumerate(zip(args[0].dims, dims, strict=True)) if old is not new]
    demands.fix(args[0], "a window runs along it", wide)
    fields = tuple({} if i in wide else own for i, own in enumerate(args[0].fields))
    return Scaled(dims, fields, args[0].zero, why=args[0].why)


def _concatenated(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    along, fields = eqn.params["dimension"], []
    live = [arg for arg in args if not arg.zero] or args
    for i in range(len(dims)):
        leaves = {leaf for arg in live for leaf in arg.fields[i]}
        for leaf in leaves:
            present = [arg.fields[i].get(leaf, {}) for arg in live if i != along or leaf in arg.fields[i]]
            demands.equal(present, "it is put beside what does not scale with it")
        fields.append({leaf: next(arg.fields[i][leaf] for arg in live if leaf in arg.fields[i]) for leaf in leaves})
    return Scaled(dims, tuple(fields), args == live and all(arg.zero for arg in args), why=_why(args))


def _stacked(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled:
    along = eqn.params["axis"]
    same = _equal(demands, eqn, args, (*dims[:along], *dims[along + 1 :]))
    return Scaled(dims, (*same.fields[:along], {}, *same.fields[along:]), same.zero, why=same.why)


def _contracted(demands: Demands, eqn: JaxprEqn, args: list[Scaled], dims: Dims) -> Scaled | None:
    left, right = args[:2]
    if contraction.kind(eqn) == "ragged_dot":
        return None
    zero = left.zero or right.zero
    if contraction.kind(eqn) == "conv":
        return _convolved(demands, eqn, left, right, dims)
    (lhs, rhs), (lhs_batch, rhs_batch) = contraction.axes(eqn)
    for i, j in zip(lhs, rhs, strict=True):
        _against(demands, left, i, right, j)
    fields = []
    for i, j in zip(lhs_batch, rhs_batch, strict=True):
        a, b = left.fields[i], right.fields[j]
        fields.append({leaf: plus(a.get(leaf, {}), b.get(leaf, {})) for leaf in {**a, **b}})
    fields += [own for i, own in enumerate(left.fields) if i not in (*lhs, *lhs_batch)]
    fields += [own for j, own in enumerate(right.fields) if j not in (*rhs, *rhs_batch)]
    return Scaled(dims, tuple(fields), zero)


def _convolved(demands: Demands, eqn: JaxprEqn, image: Scaled, kernel: Scaled, dims: Dims) -> Scaled | None:
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
    # depthwise: each input channel makes outputs of its own, so that it scales them as the kernel does
    demands.fix(kernel, "it has one entry", [into])
    a, b = image.fields[channel], kernel.fields[out]
    fields[numbers.out_spec[1]] = {leaf: plus(a.get(leaf, {}), b.get(leaf, {})) for leaf in {**a, **b}}
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
