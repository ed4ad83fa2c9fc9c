"""Find the product that makes a function's result: a model's head, and what goes into it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from compress_jax.core.errors import ArgumentError
from compress_jax.core.types import ModelFn, Params, PyTree, Shape
from compress_jax.trace._jaxpr.evaluate import Hooks, Values, bind, evaluate
from compress_jax.trace._jaxpr.find_sites import trace
from compress_jax.trace._jaxpr.primitives import (
    CASTS,
    PASS_THROUGH,
    PLAIN_CALLS,
    Call,
    kind,
    nested,
)
from compress_jax.trace._jaxpr.site import Position, Site


class Product(NamedTuple):
    """The operands of a linear head.

    Attributes:
      hidden: ``[..., width]``.
      kernel: ``[width, outputs]``.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> cj.trace.Product(jnp.ones((2, 5, 3)), jnp.ones((3, 9))).kernel.shape
      (3, 9)
    """

    hidden: jax.Array
    kernel: jax.Array


def with_last_product(fn: ModelFn, who: str = "the model") -> Callable[..., tuple[PyTree, Product]]:
    """Return a function's results, and the operands of the product that makes the first of them.

    The first result is ``hidden @ kernel``, cast or reshaped at most. Where it is not used, the
    compiler does not compute it.

    Args:
      fn: a pure function of params and inputs.
      who: what messages call it.

    Returns:
      ``(params, *inputs) -> (out, product)``.

    Raises:
      ArgumentError: when called, if the first result is made in another way (a bias, a cap of the
        logits); it says by what.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["head"]
      >>> params = {"up": jnp.ones((4, 3)), "head": jnp.ones((3, 9))}
      >>> out, product = cj.trace.with_last_product(fn)(params, jnp.ones((2, 5, 4)))
      >>> out.shape, product.hidden.shape, product.kernel.shape
      ((2, 5, 9), (2, 5, 3), (3, 9))
    """

    def run(params: Params, *inputs: PyTree) -> tuple[PyTree, Product]:
        traced = trace(fn, params, *inputs)
        out = tuple(traced.jaxpr.out_avals[0].shape)
        found = _producer(traced.jaxpr.jaxpr, traced.jaxpr.jaxpr.outvars[0])
        site = traced.sites.get(found) if isinstance(found, tuple) else None
        why = found if isinstance(found, str) else "no product of the trace makes them"
        if site is not None:
            why = _why_not(site, out)
        if site is None or why:
            raise ArgumentError(
                f"the logits of {who} are no plain product of hidden states and a kernel: {why}; "
                "without one they cannot be computed in slices"
            )

        def note(site: Site, eqn: JaxprEqn, operands: list[jax.Array], _: PyTree) -> Values:
            return bind(eqn, operands), {site.name: (operands[0], operands[1])}

        flat = jax.tree.leaves((params, inputs))
        results, noted = evaluate(traced.jaxpr, flat, Hooks({site.position: site}, note), {})
        tree = jax.tree.structure(traced.out)
        return jax.tree.unflatten(tree, results), _as_head(site, out, *noted[site.name])

    return run


def _producer(jaxpr: Jaxpr, var: Var | Literal, position: Position = ()) -> Position | str:
    """Return where the product stands that a variable holds, or why it holds none."""
    producers = {v: (i, eqn) for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    while isinstance(var, Var) and var in producers:
        i, eqn = producers[var]
        name = eqn.primitive.name
        if kind(eqn) == "dot":
            return (*position, i)
        index = eqn.outvars.index(var)
        inner = nested(eqn)
        if isinstance(inner, Call) and name in PLAIN_CALLS:
            body = inner.body.jaxpr
            return _producer(body, body.outvars[index], (*position, i, "body"))
        keeps_rows = name == "reshape" and _last(eqn.outvars[0]) == _last(eqn.invars[0])
        if name not in PASS_THROUGH and name not in CASTS and not keeps_rows:
            return f"after it comes {name!r}"
        var = eqn.invars[min(index, len(eqn.invars) - 1)]
    return "they are an input or a constant"


def _last(atom: Any) -> Shape:
    return tuple(atom.aval.shape[-1:])


def _why_not(site: Site, out: Shape) -> str:
    """Return why a product is no ``[..., width] @ [width, outputs]``; empty if it is one."""
    if any(site.batch):
        return "it is a product for each of several groups"
    if len(site.contracting[0]) != 1:
        return "it sums over several axes"
    if len(site.rhs_shape) != 2 or site.out_shape[-1:] != out[-1:]:
        return f"its right operand has shape {site.rhs_shape}"
    if site.loops or site.conditional:
        return "it stands in a loop or a branch"
    return ""


def _as_head(site: Site, out: Shape, lhs: jax.Array, rhs: jax.Array) -> Product:
    """Return the operands with the width last in one and first in the other."""
    (left,), (right,) = site.contracting
    hidden = jnp.moveaxis(lhs, left, -1)
    kernel = rhs if right == 0 else rhs.T
    return Product(hidden.reshape(*out[:-1], hidden.shape[-1]), kernel)
