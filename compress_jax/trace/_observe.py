"""Run a function and return statistics of the operands at its sites."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from compress_jax.core.errors import ShapeError
from compress_jax.trace.evaluate import Hooks, Results
from compress_jax.trace.padding import Padding
from compress_jax.trace.rebuild import bind
from compress_jax.trace.reducer import Reducer
from compress_jax.trace.site import Position, Site
from compress_jax.trace.traced import trace
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
    return _observing(fn, reduce, where, None)


def observe_masked(
    fn: Callable[..., Any], reduce: Reducer, where: str | tuple[str, ...] | None, mask: Any
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Return `observe` of what counts.

    Args:
      fn: see `observe`.
      reduce: a reducer that knows of masks.
      where: see `observe`.
      mask: see `masks_of`.

    Returns:
      The observing function; when called it raises a ShapeError that names a site if what counts of it is not known.
    """

    def run(params: Any, *inputs: Any) -> tuple[Any, dict[str, Any]]:
        names = [site.name for site in trace(fn, params, *inputs).choose(where).values()]
        return _observing(fn, reduce, where, masks_of(fn, names, mask, params, *inputs))(params, *inputs)

    return run


def masks_of(fn: Callable[..., Any], names: Iterable[str], mask: Any, params: Any, *inputs: Any) -> dict[str, Any]:
    """Return for each of some sites the masks of its activations, by operand; none of one that does not depend on the mask.

    Args:
      fn: see `observe`.
      names: of the sites.
      mask: booleans or numbers, of which 0 does not count, with the leading axes of those inputs that they are of.
      params: tree of arrays.
      inputs: trees of arrays.

    Returns:
      ``{site name: {operand: booleans}}``, the loops around a site as leading axes.

    Raises:
      ShapeError: if the mask fits no input, or what counts of a site is not known.
    """
    mask = jnp.asarray(mask)
    mask = mask if mask.dtype == bool else mask != jnp.zeros((), mask.dtype)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)]
    given = [len(shape) > 0 and shape[: mask.ndim] == mask.shape[: len(shape)] for shape in shapes]
    if mask.ndim == 0 or not any(given):
        raise ShapeError(f"a mask of shape {mask.shape} fits the leading axes of no input, which have the shapes {shapes}")
    traced = trace(fn, params, *inputs)
    padding = Padding(traced, mask.shape, given)
    sites = {site.name: site for site in traced.sites.values()}
    return {name: _masks(padding, sites[name], mask) for name in names}


def _observing(
    fn: Callable[..., Any], reduce: Callable[..., Any], where: str | tuple[str, ...] | None, masks: dict[str, Any] | None
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    def apply(site: Site, eqn: JaxprEqn, operands: list[Any], own: dict[int, jax.Array] | None) -> Results:
        seen = [jax.lax.stop_gradient(x) for x in operands[:2]]
        statistics = reduce(site, *seen, own) if own else reduce(site, *seen)
        return bind(eqn, operands), {site.name: jax.tree.map(_strong, statistics)}

    def hooks(sites: dict[Position, Site]) -> Hooks:
        return Hooks(sites, apply, getattr(reduce, "merge", lambda old, new: new))

    return hooked(fn, hooks, where, masks)


def _masks(padding: Padding, site: Site, mask: jax.Array) -> dict[int, jax.Array]:
    """Return the masks of the operands that are activations, with the loops around the site as leading axes."""
    found = {index: padding.of(site, index) for index in site.inputs.values()}
    made = {index: place(mask) for index, place in found.items() if place is not None}
    loops = len(site.loops)
    return {index: jnp.broadcast_to(x, (*site.loops, *x.shape[loops:])) for index, x in made.items()}


def _strong(x: Any) -> jax.Array:
    """Drop the weak type of Python's numbers: what branches and turns of a loop return must agree."""
    return jax.lax.convert_element_type(x, jax.numpy.result_type(x))
