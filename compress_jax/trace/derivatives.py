"""Keep custom derivative rules on a function whose body is changed: the value is the new body's, the rule the author's."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from compress_jax.trace.nested import opened

Results = tuple[list[Any], dict[str, Any]]


def custom_jvp(original: Callable[..., Any], args: Sequence[Any], body: Callable[..., Results]) -> Results:
    """Run another body under the tangent rule of the original.

    Args:
      original: the function with its rule.
      args: its operands.
      body: the new body. What it captures (a learned scale) gets no gradient here: the rule knows nothing of it.

    Returns:
      The body's results.
    """
    run, consts = _closed(body, args)

    @jax.custom_jvp
    def function(consts: Any, args: Any) -> Results:
        return run(consts, args)

    @function.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Results, Results]:
        results = function(*primals)
        _, tangent = jax.jvp(original, primals[1], tangents[1])
        return results, (list(tangent), jax.tree.map(_no_tangent, results[1]))

    return function(consts, tuple(args))


def custom_vjp(original: Callable[..., Any], args: Sequence[Any], body: Callable[..., Results]) -> Results:
    """Run another body under the cotangent rule of the original; arguments as for `custom_jvp`."""
    run, consts = _closed(body, args)

    @jax.custom_vjp
    def function(consts: Any, args: Any) -> Results:
        return run(consts, args)

    def forward(consts: Any, args: Any) -> Any:
        return run(consts, args), jax.vjp(original, *args)[1]

    def backward(pullback: Any, cotangents: Results) -> Any:
        return None, pullback(cotangents[0])

    function.defvjp(forward, backward)
    return function(consts, tuple(args))


def _closed(body: Callable[..., Results], args: Sequence[Any]) -> tuple[Callable[[Any, Any], Results], list[Any]]:
    """Make what a body captures its argument: functions with custom rules must not close over values of other traces."""
    made, shape = jax.make_jaxpr(body, return_shape=True)(*args)
    flat = jaxpr_as_fun(opened(made))
    tree = jax.tree.structure(shape)
    return lambda consts, args: jax.tree.unflatten(tree, flat(*consts, *args)), list(made.consts)


def _no_tangent(x: jax.Array) -> Any:
    return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else np.zeros(x.shape, jax.dtypes.float0)
