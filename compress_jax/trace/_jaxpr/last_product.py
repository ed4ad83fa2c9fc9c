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

    The first result is ``hidden @ kernel``, cast, transposed or reshaped at most. Where it is not
    used, the compiler does not compute it.

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
        var = traced.jaxpr.jaxpr.outvars[0]
        found = _producer(traced.jaxpr.jaxpr, var, tuple(range(len(out))))
        site, order = (None, ()) if isinstance(found, str) else (traced.sites[found[0]], found[1])
        why = found if isinstance(found, str) else _why_not(traced.sites[found[0]], found[1])
        if site is None or why:
            raise ArgumentError(
                f"the logits of {who} are no plain product of hidden states and a kernel: {why}; "
                "without one they cannot be computed in slices; compare whole logits (on_logits)"
            )

        def note(site: Site, eqn: JaxprEqn, operands: list[jax.Array], _: PyTree) -> Values:
            return bind(eqn, operands), {site.name: (operands[0], operands[1])}

        flat = jax.tree.leaves((params, inputs))
        results, noted = evaluate(traced.jaxpr, flat, Hooks({site.position: site}, note), {})
        tree = jax.tree.structure(traced.out)
        return jax.tree.unflatten(tree, results), _as_head(site, order, out, *noted[site.name])

    return run


Order = tuple[int, ...]
"""For each axis of the logits, the axis of the product's result that it is."""


def _producer(
    jaxpr: Jaxpr, var: Var | Literal, order: Order, position: Position = ()
) -> tuple[Position, Order] | str:
    """Return where the product stands that a variable holds, or why it holds none."""
    producers = {v: (i, eqn) for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    while isinstance(var, Var) and var in producers:
        i, eqn = producers[var]
        name = eqn.primitive.name
        if kind(eqn) == "dot":
            return (*position, i), order
        index = eqn.outvars.index(var)
        inner = nested(eqn)
        if isinstance(inner, Call) and name in PLAIN_CALLS:
            body = inner.body.jaxpr
            return _producer(body, body.outvars[index], order, (*position, i, "body"))
        if name == "transpose":  # a kernel that is stored [outputs, width] may come first
            order = tuple(eqn.params["permutation"][axis] for axis in order)
        elif name == "reshape" and _keeps_rows(eqn) and order == tuple(sorted(order)):
            order = tuple(range(len(eqn.invars[0].aval.shape)))  # pyright: ignore
        elif name not in PASS_THROUGH and name not in CASTS:
            return f"after it comes {name!r}"
        var = eqn.invars[min(index, len(eqn.invars) - 1)]
    return "they are an input or a constant"


def _keeps_rows(eqn: JaxprEqn) -> bool:
    return _last(eqn.outvars[0]) == _last(eqn.invars[0])


def _last(atom: Any) -> Shape:
    return tuple(atom.aval.shape[-1:])


def _why_not(site: Site, order: Order) -> str:
    """Return why a product is no ``[..., width] @ [width, outputs]``; empty if it is one."""
    if any(site.batch):
        return "it is a product for each of several groups"
    if len(site.contracting[0]) != 1:
        return "it sums over several axes"
    if len(_kernel_shape(site, order)) != 2:
        return f"its operands have shapes {site.lhs_shape} and {site.rhs_shape}"
    if site.loops or site.conditional:
        return "it stands in a loop or a branch"
    return ""


def _kernel_side(site: Site, order: Order) -> int:
    """Return which operand has the outputs: the left one if its free axes come to stand last."""
    return int(order[-1] >= len(site.lhs_shape) - 1)


def _kernel_shape(site: Site, order: Order) -> Shape:
    return (site.lhs_shape, site.rhs_shape)[_kernel_side(site, order)]


def _as_head(site: Site, order: Order, out: Shape, lhs: jax.Array, rhs: jax.Array) -> Product:
    """Return the operands with the width last in one and first in the other."""
    side = _kernel_side(site, order)
    kernel, hidden = (rhs, lhs) if side else (lhs, rhs)
    (width,), (other,) = site.contracting[side], site.contracting[1 - side]
    # The result's axes are those of lhs that are left, then those of rhs.
    first = 0 if side else 1
    hidden = jnp.moveaxis(hidden, other, -1)
    hidden = hidden.transpose([*(axis - first for axis in order[:-1]), hidden.ndim - 1])
    kernel = kernel if width == 0 else kernel.T
    return Product(hidden.reshape(*out[:-1], hidden.shape[-1]), kernel)
