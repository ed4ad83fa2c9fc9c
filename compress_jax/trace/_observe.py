"""Run a function and return statistics of the operands at its sites."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import JaxprEqn

from compress_jax.core.errors import DataError
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

    def apply(site: Site, eqn: JaxprEqn, operands: list[Any]) -> Results:
        statistics = reduce(site, *map(jax.lax.stop_gradient, operands[:2]))
        return bind(eqn, operands), {site.name: statistics}

    def hooks(sites: dict[Position, Site]) -> Hooks:
        return Hooks(sites, apply, getattr(reduce, "merge", lambda old, new: new))

    return hooked(fn, hooks, where)


def calibrate(
    fn: Callable[..., Any], reduce: Any, params: Any, batches: Iterable[Any], where: str | tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Return the finished statistics of many batches; memory does not grow with their number.

    Args:
      fn: a pure function of params and one batch.
      reduce: a `Reducer`.
      params: tree of arrays.
      batches: what ``fn`` takes after params, one after the other; a tuple is several arguments.
      where: as for `observe`.

    Returns:
      ``{site name: reduce.finish(statistics)}``.

    Raises:
      DataError: if there is no batch.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.trace.reducers import absmax
      >>> batches = [jnp.ones((4, 2)), -2 * jnp.ones((4, 2))]
      >>> ranges = calibrate(lambda params, x: x @ params["kernel"], absmax(), {"kernel": jnp.ones((2, 3))}, batches)
      >>> float(ranges["kernel"]["input"])
      2.0
    """
    seen = observe(fn, reduce, where)

    @jax.jit
    def first(params: Any, inputs: tuple[Any, ...]) -> dict[str, Any]:
        return seen(params, *inputs)[1]

    @jax.jit
    def following(total: dict[str, Any], params: Any, inputs: tuple[Any, ...]) -> dict[str, Any]:
        return {site: reduce.merge(total[site], new) for site, new in first(params, inputs).items()}

    total = None
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        total = first(params, inputs) if total is None else following(total, params, inputs)
    if total is None:
        raise DataError("there is no batch to calibrate with")
    return {site: reduce.finish(statistics) for site, statistics in total.items()}
