"""Run a function and return statistics of the operands at its sites."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import JaxprEqn

from compress_jax.trace.evaluate import Hooks, Results
from compress_jax.trace.rebuild import bind
from compress_jax.trace.site import Position, Site
from compress_jax.trace.transform import hooked


def observe(
    fn: Callable[..., Any], reduce: Callable[[Site, Any, Any], Any], where: str | tuple[str, ...] | None = None
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Return ``(params, *inputs) -> (out, {site name: statistics})``.

    ``reduce`` runs inside the computation, so a Gram matrix or a histogram is made without ever keeping the activations.
    A site inside ``scan`` returns its statistics stacked, one entry a turn (`Site.loops` is the leading shape); inside
    ``shard_map``, one a device. Inside a ``while`` loop the turns are merged by ``reduce.merge``, or the last one stays if
    it has none. Where a branch of ``cond`` was not taken, statistics are NaN if floating, else 0.

    Args:
      fn: a pure function of params and inputs.
      reduce: ``(site, lhs, rhs) -> tree of arrays``, or one of the ready `Reducer`.
      where: a glob, or several, over the names of sites; by default all.

    Returns:
      The observing function; jit it. `out` is that of ``fn`` bit for bit. Nothing is differentiated through statistics.

    Raises:
      NoMatchError: when called, if no site's name matches ``where``.

    Example:
      >>> import jax.numpy as jnp
      >>> seen = observe(lambda params, x: x @ params["kernel"], lambda site, lhs, rhs: jnp.abs(lhs).max())
      >>> out, statistics = seen({"kernel": jnp.ones((2, 2))}, jnp.array([[-3.0, 1.0]]))
      >>> float(statistics["kernel"])
      3.0
    """

    def apply(site: Site, eqn: JaxprEqn, operands: list[Any], _: Any) -> Results:
        statistics = jax.tree.map(_strong, reduce(site, *map(jax.lax.stop_gradient, operands[:2])))
        return bind(eqn, operands), {site.name: statistics}

    def hooks(sites: dict[Position, Site]) -> Hooks:
        return Hooks(sites, apply, getattr(reduce, "merge", lambda old, new: new))

    return hooked(fn, hooks, where)


def _strong(x: Any) -> jax.Array:
    """Drop the weak type of Python's numbers: what branches and turns of a loop return must agree."""
    return jax.lax.convert_element_type(x, jax.numpy.result_type(x))
