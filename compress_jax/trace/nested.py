"""Jaxprs inside equations, in four forms: a call, a scan, a while loop, a choice of branches."""

import math
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

CALLS = {  # primitive -> the parameter that holds the body, which takes the equation's operands as they stand
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "call": "call_jaxpr",
    "composite": "jaxpr",
    "custom_vmap_call": "call",
    "closed_call": "call_jaxpr",
    "core_closed_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "shard_map": "jaxpr",
}


@dataclass(frozen=True)
class Call:
    """A body that is run once on the operands.

    Attributes:
      body: the jaxpr.
      shards: how many devices run it side by side; None outside ``shard_map``.
    """

    body: ClosedJaxpr
    shards: int | None = None


@dataclass(frozen=True)
class Scan:
    """A body that is run ``length`` times: ``(consts, carry, slices of xs) -> (carry, slices of ys)``.

    Attributes:
      body: the jaxpr.
      consts: how many of the operands are constants of the loop.
      carry: how many of the operands after them are carried.
      length: number of iterations.
    """

    body: ClosedJaxpr
    consts: int
    carry: int
    length: int


@dataclass(frozen=True)
class While:
    """A body that is run while a condition holds, on ``(condition's consts, body's consts, carry)``.

    Attributes:
      condition: ``(consts, carry) -> bool``.
      body: ``(consts, carry) -> carry``.
      condition_consts: how many operands are the condition's own.
      body_consts: how many operands after them are the body's own.
    """

    condition: ClosedJaxpr
    body: ClosedJaxpr
    condition_consts: int
    body_consts: int


@dataclass(frozen=True)
class Branches:
    """One of several bodies, chosen by the first operand, is run on the others.

    Attributes:
      bodies: the jaxprs.
    """

    bodies: tuple[ClosedJaxpr, ...]


Nested = Call | Scan | While | Branches


def closed(jaxpr: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
    """Return a jaxpr with its constants; those that have none are kept open by some primitives."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, [])


def opened(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """Return a jaxpr that takes what it captured as its first arguments."""
    inner = jaxpr.jaxpr
    return ClosedJaxpr(inner.replace(constvars=[], invars=[*inner.constvars, *inner.invars]), [])


def nested(eqn: JaxprEqn) -> Nested | None:
    """Return what an equation runs inside, or None if it runs nothing or nothing that is known here.

    Args:
      eqn: an equation of a jaxpr.

    Returns:
      Its bodies and how its operands reach them.

    Example:
      >>> import jax
      >>> eqn = jax.make_jaxpr(jax.jit(lambda x: x + 1))(1.0).jaxpr.eqns[0]
      >>> nested(eqn).body.jaxpr.eqns[0].primitive.name
      'add'
    """
    name, p = eqn.primitive.name, eqn.params
    if name == "scan":
        return Scan(p["jaxpr"], *_scan_sizes(p), p["length"])
    if name == "while":
        return While(p["cond_jaxpr"], p["body_jaxpr"], p["cond_nconsts"], p["body_nconsts"])
    if name == "cond":
        return Branches(tuple(p["branches"]))
    body = p.get(CALLS.get(name, ""))
    return None if body is None else Call(closed(body), _shards(p) if name == "shard_map" else None)


def bodies(form: Nested | None) -> dict[int | str, ClosedJaxpr]:
    """Return the jaxprs of a form by the step of a position that leads into them.

    Example:
      >>> import jax
      >>> loop = jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x < 3, lambda x: x + 1, x))(1)
      >>> list(bodies(nested(loop.jaxpr.eqns[0])))
      ['cond', 'body']
    """
    match form:
        case Call(body) | Scan(body):
            return {"body": body}
        case While(condition, body):
            return {"cond": condition, "body": body}
        case Branches(every):
            return dict(enumerate(every))
    return {}


def _scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """Return how many operands of a scan are constants and how many are carried; newer JAX keeps them as trees."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _shards(params: dict[str, Any]) -> int:
    """Return how many devices a shard_map runs its body on: the product of the mesh axes it makes manual."""
    return math.prod(params["mesh"].shape[axis] for axis in manual_axes(params))


def manual_axes(params: dict[str, Any]) -> tuple[str, ...]:
    """Return the mesh axes a shard_map equation makes manual, in the order of the mesh."""
    manual = params.get("newly_manual_axes", params.get("manual_axes", frozenset()))
    return tuple(axis for axis in params["mesh"].axis_names if axis in manual)
