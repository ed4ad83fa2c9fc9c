"""A function in the few forms that the converter knows, however its operations were spelled.

The converter has rules for whole layers, which it recognizes by the names of functions, and these
rules know some of the ways to call them. JAX's own trace has one form for each operation; what is
left to do is to write its operations in the layouts that the converter has rules for.
"""

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
      >>> made = jax.make_jaxpr(lambda w, x: w @ x)(jnp.ones((5, 3)), jnp.ones((3, 2)))
      >>> print(jax.make_jaxpr(plain(made, [False, True]))(jnp.ones((5, 3)), jnp.ones((3, 2))).jaxpr.eqns[2].primitive)
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
    kept = [(var, x) for var, x in zip(inner.constvars, jaxpr.consts, strict=True) if var in needed]
    return ClosedJaxpr(
        inner.replace(eqns=eqns[::-1], constvars=[var for var, _ in kept]), [x for _, x in kept]
    )


def _run(jaxpr: ClosedJaxpr, arrays: list[Any], data: list[bool]) -> tuple[list[Any], list[bool]]:
    env: dict[Any, tuple[Any, bool]] = {}

    def read(atom: Any) -> tuple[Any, bool]:
        return (atom.val, False) if isinstance(atom, Literal) else env[atom]

    env |= {var: (x, False) for var, x in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)}
    env |= {
        var: pair
        for var, pair in zip(jaxpr.jaxpr.invars, zip(arrays, data, strict=True), strict=True)
    }
    for eqn in jaxpr.jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        with eqn.ctx.manager:
            results, flags = _equation(eqn, [x for x, _ in values], [flag for _, flag in values])
        env |= dict(zip(eqn.outvars, zip(results, flags, strict=True), strict=True))
    read_out = [read(atom) for atom in jaxpr.jaxpr.outvars]
    return [x for x, _ in read_out], [flag for _, flag in read_out]


def _equation(eqn: JaxprEqn, arrays: list[Any], data: list[bool]) -> tuple[list[Any], list[bool]]:
    inside, flag = nested(eqn), any(data)
    if isinstance(inside, Call) and inside.shards is None:
        return _run(inside.body, arrays, data)
    results = _bodies(eqn, inside, arrays, data)
    if results is None:
        rule = RULES.get(eqn.primitive.name)
        made = rule(eqn, arrays, data) if rule else None
        results = evaluate.bind(eqn, arrays) if made is None else [made]
    return results, [flag] * len(results)


def _bodies(eqn: JaxprEqn, inside: Any, arrays: list[Any], data: list[bool]) -> list[Any] | None:
    """Build a loop or a choice again around plain bodies; None for anything else."""
    match inside:
        case Scan() as scan:
            start, end = scan.consts, scan.consts + scan.carry

            def turn(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
                flags = [*data[:start], *[True] * scan.carry, *data[end:]]
                results = _run(scan.body, [*arrays[:start], *carry, *xs], flags)[0]
                return results[: scan.carry], results[scan.carry :]

            options = {key: eqn.params[key] for key in ("reverse", "unroll")}
            carried, ys = lax.scan(
                turn, arrays[start:end], arrays[end:], length=scan.length, **options
            )
            return [*carried, *ys]
        case While() as loop:
            start = loop.condition_consts
            end = start + loop.body_consts
            head, consts, carry = arrays[:start], arrays[start:end], arrays[end:]

            def more(carry: list[Any]) -> Any:
                return _run(loop.condition, [*head, *carry], [*data[:start], *[True] * len(carry)])[
                    0
                ][0]

            def step(carry: list[Any]) -> list[Any]:
                return _run(loop.body, [*consts, *carry], [*data[start:end], *[True] * len(carry)])[
                    0
                ]

            return list(lax.while_loop(more, step, carry))
        case Branches(bodies):
            made = [
                lambda *operands, body=body: _run(body, list(operands), data[1:])[0]
                for body in bodies
            ]
            return list(lax.switch(arrays[0], made, *arrays[1:]))
    return None


def _dot(eqn: JaxprEqn, arrays: list[Any], data: list[bool]) -> Any:
    """Write a product without batch axes as ``[..., k] @ [k, n]``, its parameter on the right."""
    (contracting, batch), preferred = (
        eqn.params["dimension_numbers"],
        eqn.params["preferred_element_type"],
    )
    if batch[0]:
        return None
    swapped = data[1] and not data[0]
    (x, w), (xs, ws) = (arrays[::-1], contracting[::-1]) if swapped else (arrays, contracting)
    rows = [axis for axis in range(x.ndim) if axis not in xs]
    columns = [axis for axis in range(w.ndim) if axis not in ws]
    lead, tail = [x.shape[axis] for axis in rows], [w.shape[axis] for axis in columns]
    size = 1
    for axis in ws:
        size *= w.shape[axis]
    left = jnp.transpose(x, (*rows, *xs)).reshape(*(lead or [1]), size)
    right = jnp.transpose(w, (*ws, *columns)).reshape(size, -1)
    numbers = (((left.ndim - 1,), (0,)), ((), ()))
    y = lax.dot_general(
        left, right, numbers, precision=eqn.params["precision"], preferred_element_type=preferred
    )
    y = y.reshape(*lead, *tail)
    return jnp.transpose(y, (*range(len(lead), y.ndim), *range(len(lead)))) if swapped else y


def _conv(eqn: JaxprEqn, arrays: list[Any], data: list[bool]) -> Any:
    """Write a convolution with channels last, unless the converter supports its layout."""
    numbers, rank = eqn.params["dimension_numbers"], arrays[0].ndim
    window = tuple(range(2, rank))
    first, last = (0, 1, *window), (0, rank - 1, *range(1, rank - 1))
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
    start = np.asarray(
        low, x.dtype
    )  # a constant: JAX has a primitive of its own for windows that start from it
    return lax.reduce_window(x, start, lax.max, **{name: params[name] for name in names})


RULES: dict[str, Callable[[JaxprEqn, list[Any], list[bool]], Any]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "reduce_window_min": _window_min,
    "reduce_window": _window,
}
