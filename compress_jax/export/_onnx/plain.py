"""Rewrite a function's jaxpr in the layouts that the converter has rules for.

The converter has rules for whole layers, which it recognizes by the names of functions, and these
rules know some of the ways to call them. JAX's own trace has one primitive for each operation; only
its layouts are left to change.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from compress_jax.trace._jaxpr import evaluate
from compress_jax.trace._jaxpr.primitives import Branches, Call, Scan, While, nested


def plain(jaxpr: ClosedJaxpr, data: Sequence[bool]) -> Callable[..., list[Any]]:
    """Return a jaxpr as a function with inlined calls, in the converter's layouts.

    Args:
      jaxpr: of the function.
      data: whether each of its arguments is an input, not a parameter: a product has its parameter
        on the right.

    Returns:
      ``(*arrays) -> results``.

    Example:
      >>> import jax
      >>> arrays = jnp.ones((5, 3)), jnp.ones((3, 2))
      >>> made = jax.make_jaxpr(lambda w, x: w @ x)(*arrays)
      >>> rewritten = jax.make_jaxpr(plain(made, [False, True]))(*arrays)
      >>> print(rewritten.jaxpr.eqns[2].primitive)
      dot_general
    """
    return lambda *arrays: _run(jaxpr, list(arrays), list(data))[0]


def live(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """Return a jaxpr without unused equations and captured arrays.

    Random keys of an initial state are an example.

    Args:
      jaxpr: any.

    Returns:
      The same function of the same arguments.

    Example:
      >>> import jax
      >>> made = jax.make_jaxpr(lambda x: (jnp.sin(x), x + 1)[1])(1.0)
      >>> len(made.jaxpr.eqns), len(live(made).jaxpr.eqns)
      (2, 1)
    """
    inner = jaxpr.jaxpr
    needed = {atom for atom in inner.outvars if not isinstance(atom, Literal)}
    eqns = []
    for eqn in reversed(inner.eqns):
        if eqn.effects or needed.intersection(eqn.outvars):
            eqns.append(eqn)
            needed.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
    consts = {v: x for v, x in zip(inner.constvars, jaxpr.consts, strict=True) if v in needed}
    inner = inner.replace(eqns=eqns[::-1], constvars=list(consts))
    return ClosedJaxpr(inner, list(consts.values()))


def _run(jaxpr: ClosedJaxpr, arrays: list[Any], data: list[bool]) -> tuple[list[Any], list[bool]]:
    env: dict[Any, tuple[Any, bool]] = {}

    def read(atom: Any) -> tuple[Any, bool]:
        return (atom.val, False) if isinstance(atom, Literal) else env[atom]

    env |= {var: (x, False) for var, x in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)}
    env |= dict(zip(jaxpr.jaxpr.invars, zip(arrays, data, strict=True), strict=True))
    for eqn in jaxpr.jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        with eqn.ctx.manager:
            results, flags = _equation(eqn, [x for x, _ in values], [flag for _, flag in values])
        env |= dict(zip(eqn.outvars, zip(results, flags, strict=True), strict=True))
    read_out = [read(atom) for atom in jaxpr.jaxpr.outvars]
    return [x for x, _ in read_out], [flag for _, flag in read_out]


def _equation(eqn: JaxprEqn, arrays: list[Any], data: list[bool]) -> tuple[list[Any], list[bool]]:
    inside = nested(eqn)
    flag = any(data)
    if isinstance(inside, Call) and inside.shards is None:
        return _run(inside.body, arrays, data)
    results = _bodies(eqn, inside, arrays, data)
    if results is None:
        rule = RULES.get(eqn.primitive.name)
        made = rule(eqn, arrays, data) if rule else None
        results = evaluate.bind(eqn, arrays) if made is None else [made]
    return results, [flag] * len(results)


def _bodies(eqn: JaxprEqn, inside: Any, arrays: list[Any], data: list[bool]) -> list[Any] | None:
    """Rebuild a loop or a choice around plain bodies; None for anything else."""
    match inside:
        case Scan() as scan:
            start = scan.consts
            end = start + scan.carry

            def iteration(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
                flags = [*data[:start], *[True] * scan.carry, *data[end:]]
                results = _run(scan.body, [*arrays[:start], *carry, *xs], flags)[0]
                return results[: scan.carry], results[scan.carry :]

            options = {key: eqn.params[key] for key in ("reverse", "unroll")}
            carried, ys = lax.scan(
                iteration, arrays[start:end], arrays[end:], length=scan.length, **options
            )
            return [*carried, *ys]
        case While() as loop:
            start = loop.condition_consts
            end = start + loop.body_consts
            head = arrays[:start]
            consts = arrays[start:end]
            carried_data = [True] * (len(arrays) - end)

            def condition(carry: list[Any]) -> Any:
                flags = [*data[:start], *carried_data]
                results, _ = _run(loop.condition, [*head, *carry], flags)
                return results[0]

            def body(carry: list[Any]) -> list[Any]:
                flags = [*data[start:end], *carried_data]
                return _run(loop.body, [*consts, *carry], flags)[0]

            return list(lax.while_loop(condition, body, arrays[end:]))
        case Branches(bodies):
            made = [
                lambda *operands, body=body: _run(body, list(operands), data[1:])[0]
                for body in bodies
            ]
            return list(lax.switch(arrays[0], made, *arrays[1:]))
    return None


def _dot(eqn: JaxprEqn, arrays: list[Any], data: list[bool]) -> Any:
    """Write a product without batch axes as ``[..., k] @ [k, n]``, its parameter on the right."""
    contracting, batch = eqn.params["dimension_numbers"]
    if batch[0]:
        return None
    swapped = data[1] and not data[0]
    (x, w), (xs, ws) = (arrays[::-1], contracting[::-1]) if swapped else (arrays, contracting)
    rows = [axis for axis in range(x.ndim) if axis not in xs]
    columns = [axis for axis in range(w.ndim) if axis not in ws]
    lead = [x.shape[axis] for axis in rows]
    tail = [w.shape[axis] for axis in columns]
    size = math.prod(w.shape[axis] for axis in ws)
    left = jnp.transpose(x, (*rows, *xs)).reshape(*(lead or [1]), size)  # [..., k]
    right = jnp.transpose(w, (*ws, *columns)).reshape(size, -1)  # [k, n]
    numbers = (((left.ndim - 1,), (0,)), ((), ()))
    options = {name: eqn.params[name] for name in ("precision", "preferred_element_type")}
    y = lax.dot_general(left, right, numbers, **options).reshape(*lead, *tail)
    if not swapped:
        return y
    return jnp.transpose(y, (*range(len(lead), y.ndim), *range(len(lead))))


def _conv(eqn: JaxprEqn, arrays: list[Any], data: list[bool]) -> Any:
    """Write a convolution with channels last, unless the converter supports its layout."""
    numbers = eqn.params["dimension_numbers"]
    rank = arrays[0].ndim
    window = tuple(range(2, rank))
    first = (0, 1, *window)  # channels first
    last = (0, rank - 1, *range(1, rank - 1))  # channels last
    kernels = ((0, 1, *window), (rank - 1, rank - 2, *range(rank - 2)))
    if numbers[0] in (first, last) and numbers[1] in kernels and numbers[2] in (first, last):
        return None
    image = jnp.transpose(arrays[0], (numbers[0][0], *numbers[0][2:], numbers[0][1]))
    kernel = jnp.transpose(arrays[1], (*numbers[1][2:], numbers[1][1], numbers[1][0]))
    skipped = ("dimension_numbers", "lhs_shape", "rhs_shape")
    options = {name: value for name, value in eqn.params.items() if name not in skipped}
    new = lax.ConvDimensionNumbers(last, kernels[1], last)
    y = lax.conv_general_dilated(image, kernel, dimension_numbers=new, **options)
    places = (numbers[2][0], *numbers[2][2:], numbers[2][1])  # where each axis of y belongs
    return jnp.transpose(y, [places.index(axis) for axis in range(rank)])


def _window_min(eqn: JaxprEqn, arrays: list[Any], data: list[bool]) -> Any:
    """Write the minimum of windows as a maximum."""
    return -_window_max(-arrays[0], eqn.params)


def _window(eqn: JaxprEqn, arrays: list[Any], data: list[bool]) -> Any:
    """Write a window reduction with any initial value as one that starts from the identity."""
    kind = _reducer(eqn)
    if len(arrays) != 2 or kind not in ("max", "min"):
        return None
    x, start = arrays
    if kind == "max":
        return jnp.maximum(_window_max(x, eqn.params), start)
    return jnp.minimum(-_window_max(-x, eqn.params), start)


def _reducer(eqn: JaxprEqn) -> str:
    body = eqn.params["jaxpr"]
    eqns = getattr(body, "jaxpr", body).eqns
    return eqns[0].primitive.name if len(eqns) == 1 else ""


def _window_max(x: Any, params: dict[str, Any]) -> Any:
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    low = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    # With this constant JAX uses reduce_window_max, a primitive that the converter knows.
    start = np.asarray(low, x.dtype)
    return lax.reduce_window(x, start, lax.max, **{name: params[name] for name in names})


RULES: dict[str, Callable[[JaxprEqn, list[Any], list[bool]], Any]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "reduce_window_min": _window_min,
    "reduce_window": _window,
}
