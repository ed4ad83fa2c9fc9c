"""From a function to the same function with hooks at its sites, traced anew for every shape it is called with."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from compress_jax.core.errors import NoMatchError, ShapeError
from compress_jax.trace.evaluate import Hooks, evaluate
from compress_jax.trace.site import Position, Site
from compress_jax.trace.traced import trace

CACHED = 16  # shapes of arguments kept for calls outside jit


def hooked(
    fn: Callable[..., Any],
    hooks: Callable[[dict[Position, Site]], Hooks],
    where: str | tuple[str, ...] | None,
    given: Mapping[str, Any] | None = None,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Return ``(params, *inputs) -> (out, statistics)``, which runs ``fn`` with hooks at the chosen sites.

    Args:
      fn: a pure function of params and inputs.
      hooks: from the chosen sites to what is done at them.
      where: a glob, or several, over the names of sites; None chooses all.
      given: a tree for each chosen site by name, handed to its hook.

    Returns:
      The function. Inside ``jit`` or another transformation it is part of the trace; outside, it is traced once for each
      shape of arguments, like a function under ``jit``.
    """
    cache: dict[ClosedJaxpr, tuple[ClosedJaxpr, Any]] = {}

    def run(params: Any, *inputs: Any) -> tuple[Any, dict[str, Any]]:
        traced = trace(fn, params, *inputs)
        flat = jax.tree.leaves((params, inputs))
        tree = jax.tree.structure(traced.out)

        def with_hooks(*flat: Any) -> tuple[Any, dict[str, Any]]:
            chosen = traced.choose(where)
            results, statistics = evaluate(traced.jaxpr, flat, hooks(chosen), _placed(chosen, given))
            return jax.tree.unflatten(tree, results), statistics

        if any(isinstance(x, Tracer) for x in (*flat, *traced.jaxpr.consts)):
            return with_hooks(*flat)
        made, shape = cache.get(traced.jaxpr) or jax.make_jaxpr(with_hooks, return_shape=True)(*flat)
        if not any(isinstance(x, Tracer) for x in made.consts):
            if len(cache) >= CACHED:
                cache.clear()
            cache[traced.jaxpr] = (made, shape)
        return jax.tree.unflatten(jax.tree.structure(shape), jaxpr_as_fun(made)(*flat))

    return run


def _placed(chosen: dict[Position, Site], given: Mapping[str, Any] | None) -> dict[Position, Any]:
    """Return what is given by position; every chosen site needs something, with the loops around it as leading axes."""
    if given is None:
        return {}
    for site in chosen.values():
        if site.name not in given:
            raise NoMatchError(f"nothing is given for site {site.name!r}, only for: {', '.join(given) or 'none'}")
        for leaf in jax.tree.leaves(given[site.name]):
            if jnp.shape(leaf)[: len(site.loops)] != site.loops:
                raise ShapeError(
                    f"what is given for site {site.name!r} has shape {jnp.shape(leaf)}, but the loops around the site need "
                    f"leading axes {site.loops}"
                )
    return {position: given[site.name] for position, site in chosen.items()}
