"""Count the products of a computation by the named scope that they stand in."""

import math
from collections import Counter
from typing import NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr

from compress_jax.trace._jaxpr import primitives
from compress_jax.trace._jaxpr.primitives import Branches, Call, Scan, While, nested
from compress_jax.trace._jaxpr.site import Site


class Scoped(NamedTuple):
    """The products of a computation.

    Attributes:
      macs: multiply-accumulates by scope. A scope is written as JAX writes it, the outermost name
        first: ``"jvp(student)/dense"`` in a forward pass, ``"transpose(jvp(student))/dense"`` in
        its backward pass.
      hidden: primitives with products inside that are not counted, such as a kernel's call.

    Example:
      >>> Scoped({"student": 96}).hidden
      ()
    """

    macs: dict[str, int]
    hidden: tuple[str, ...] = ()


def products_by_scope(closed: ClosedJaxpr) -> Scoped:
    """Return the multiply-accumulates of a computation by scope.

    What no result needs is not counted, as the compiler leaves it out. Loops count as often as they
    run, a ``while`` loop once; of a choice the branch with the most products counts.

    Args:
      closed: the computation.

    Returns:
      The products.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import compress_jax as cj
      >>> def fn(w, x):
      ...     with jax.named_scope("first"):
      ...         x = x @ w
      ...     return x @ w
      >>> made = jax.make_jaxpr(fn)(jnp.ones((3, 3)), jnp.ones((4, 3)))
      >>> cj.trace.products_by_scope(made).macs
      {'first': 36, '': 36}
    """
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    hidden: dict[str, None] = {}
    macs = _walk(jaxpr, "", hidden)
    return Scoped(dict(macs), tuple(hidden))


def _walk(jaxpr: Jaxpr, around: str, hidden: dict[str, None]) -> Counter[str]:
    total: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        own = str(eqn.source_info.name_stack)
        # Names inside a body begin anew, so those around it go in front.
        scope = f"{around}/{own}" if around and own else around or own
        for name, macs in _of_equation(eqn, scope, hidden).items():
            total[name] += macs
    return total


def _of_equation(eqn: JaxprEqn, scope: str, hidden: dict[str, None]) -> dict[str, int]:
    match nested(eqn):
        case Call(body, shards):
            return _times(_walk(body.jaxpr, scope, hidden), shards or 1)
        case Scan() as scan:
            return _times(_walk(scan.body.jaxpr, scope, hidden), scan.length)
        case While(condition, body):
            return _walk(condition.jaxpr, scope, hidden) + _walk(body.jaxpr, scope, hidden)
        case Branches(bodies):
            return max((_walk(body.jaxpr, scope, hidden) for body in bodies), key=Counter.total)
        case _:
            if primitives.contracts_inside(eqn):
                hidden[eqn.primitive.name] = None
            macs = _macs(eqn)
            return {scope: macs} if macs else {}


def _times(counts: Counter[str], number: int) -> dict[str, int]:
    return {name: number * macs for name, macs in counts.items()}


def _macs(eqn: JaxprEqn) -> int:
    """Return the multiply-accumulates of one run of an equation; 0 if it is no product."""
    kind = primitives.kind(eqn)
    if kind is None:
        # Without a sum each result is one multiplication.
        is_product = eqn.primitive.name == "dot_general"
        return math.prod(eqn.outvars[0].aval.shape) if is_product else 0  # pyright: ignore
    lhs, rhs = (each.aval for each in eqn.invars[:2])
    out = eqn.outvars[0].aval
    contracting, batch = primitives.axes(eqn)
    site = Site(
        name="",
        kind=kind,
        param=None,
        operand=None,
        lhs_shape=lhs.shape,  # pyright: ignore
        rhs_shape=rhs.shape,  # pyright: ignore
        out_shape=out.shape,  # pyright: ignore
        lhs_dtype=str(lhs.dtype),  # pyright: ignore
        rhs_dtype=str(rhs.dtype),  # pyright: ignore
        out_dtype=str(out.dtype),  # pyright: ignore
        contracting=contracting,
        batch=batch,
        params=dict(eqn.params),
    )
    return site.macs
