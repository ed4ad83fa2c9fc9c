"""A reducer: what to keep of the operands at a site, how two batches of it combine, and what comes of it in the end."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from compress_jax.core.errors import ArgumentError
from compress_jax.trace.site import Site

MOST = 2**31 - 1


class Reducer(NamedTuple):
    """Three pure functions that make one statistic over any number of batches. Give it to `observe` as it is.

    Attributes:
      reduce: ``(site, lhs, rhs) -> statistics``, a tree of arrays, of one batch at one site.
      merge: ``(old, new) -> statistics`` of both, of one site. Takes statistics stacked over loops as well.
      finish: ``statistics -> result``, once all batches are in.
      masked: ``(site, lhs, rhs, masks) -> statistics`` of what counts: ``masks`` has booleans for operands of which not all
        does, by their index, of the operand's rank and 1 along axes that they do not tell apart. None refuses masks.
    """

    reduce: Callable[[Site, jax.Array, jax.Array], Any]
    merge: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any] = lambda statistics: statistics
    masked: Callable[[Site, jax.Array, jax.Array, dict[int, jax.Array]], Any] | None = None

    def __call__(self, site: Site, lhs: jax.Array, rhs: jax.Array, masks: dict[int, jax.Array] | None = None) -> Any:
        """Return ``reduce(site, lhs, rhs)``, of what counts if there are masks of the operands, by their index."""
        if not masks:
            return self.reduce(site, lhs, rhs)
        if self.masked is None:
            raise ArgumentError(
                "this reducer does not know of masks, so padding would be in its statistics: make it by reducer.of_inputs "
                "with measure(site, index, x, mask), or as Reducer(..., masked=(site, lhs, rhs, masks) -> statistics)"
            )
        return self.masked(site, lhs, rhs, masks)


def blank(statistics: Any) -> Any:
    """Return statistics with NaN for every floating entry where ``count`` is 0: of nothing, no number means anything.

    Args:
      statistics: NamedTuple of arrays with a field ``count``, which may be stacked over loops.

    Returns:
      The like.
    """

    def fill(x: jax.Array) -> jax.Array:
        return jnp.where(aligned(statistics.count, x) == 0, jnp.nan, x) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(fill, statistics)


def of_inputs(
    measure: Callable[..., Any],
    combine: Callable[[Any, Any], Any],
    result: Callable[[Any], Any] = blank,
) -> Reducer:
    """Return the reducer that measures each activation of a site by itself.

    Its statistics are ``{"input": measured}`` beside a parameter, else ``{"lhs": measured, "rhs": measured}``
    (`Site.inputs`). What has ``count`` 0 is neutral: the site did not run, in a branch not taken say, and whatever else its
    statistics hold is ignored. Arrays that carry an explicit sharding are measured under an automatic one.

    Args:
      measure: ``(site, index of the operand, operand, mask) -> NamedTuple`` of arrays, among them ``count``, int32 scalar.
        The mask is what `channels` and `windows` take, often None. A measure without this argument refuses masks.
      combine: ``(old, new) -> NamedTuple`` of both. In either, all arrays may have the axes of loops in front.
      result: ``NamedTuple -> result``; by default `blank`.

    Returns:
      The reducer.

    Example:
      >>> from compress_jax.trace import calibrate
      >>> class Most(NamedTuple):
      ...     value: jax.Array
      ...     count: jax.Array
      >>> def larger(old, new):
      ...     return Most(jnp.maximum(old.value, new.value), total(old.count, new.count))
      >>> most = of_inputs(lambda site, index, x: Most(x.max(), jnp.int32(1)), larger)
      >>> batches = [jnp.ones((3, 2)), jnp.zeros((3, 2))]
      >>> calibrate(lambda w, x: x @ w["kernel"], most, {"kernel": jnp.eye(2)}, batches)["kernel"]["input"]
      Most(value=Array(1., dtype=float32), count=Array(2, dtype=int32))
    """
    knows = len(inspect.signature(measure).parameters) > 3

    def masked(site: Site, lhs: jax.Array, rhs: jax.Array, masks: dict[int, jax.Array]) -> dict[str, Any]:
        operands = {key: (index, jnp.asarray((lhs, rhs)[index]), masks.get(index)) for key, index in site.inputs.items()}
        return {
            key: _unsharded(lambda *x, i=index: measure(site, i, *x, *(None,) * (knows and len(x) < 2)), x, mask)
            for key, (index, x, mask) in operands.items()
        }

    def reduce(site: Site, lhs: jax.Array, rhs: jax.Array) -> dict[str, Any]:
        return masked(site, lhs, rhs, {})

    def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        return {key: _skipping_empty(combine, old[key], new[key]) for key in old}

    def finish(statistics: dict[str, Any]) -> dict[str, Any]:
        return {key: result(each) for key, each in statistics.items()}

    return Reducer(reduce, merge, finish, masked if knows else None)


def total(old: jax.Array, new: jax.Array) -> jax.Array:
    """Return the sum of two counts, int32; it stays at 2**31 - 1 rather than overflow.

    Example:
      >>> int(total(jnp.int32(2**31 - 3), jnp.int32(9))) == 2**31 - 1
      True
    """
    return jnp.where(old > MOST - new, MOST, old + new)


def aligned(count: jax.Array, x: jax.Array) -> jax.Array:
    """Return a count, one for each turn of the loops, in the shape that broadcasts against ``x``, which has more axes."""
    return count.reshape(*count.shape, *(1,) * (x.ndim - count.ndim))


def _skipping_empty(combine: Callable[[Any, Any], Any], old: Any, new: Any) -> Any:
    def choose(both: jax.Array, old_leaf: jax.Array, new_leaf: jax.Array) -> jax.Array:
        some = jnp.where(aligned(old.count, both) == 0, new_leaf, both)
        return jnp.where(aligned(new.count, both) == 0, old_leaf, some)

    return jax.tree.map(choose, combine(old, new), old, new)


def _unsharded(measure: Callable[..., Any], x: jax.Array, mask: jax.Array | None) -> Any:
    """Sums over a sharded axis are ambiguous where shardings are explicit: leave them to the compiler, the result whole."""
    mesh = jax.typeof(x).sharding.mesh
    explicit = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)
    given = (x,) if mask is None else (x, mask)
    if not explicit:
        return measure(*given)
    with jax.sharding.use_abstract_mesh(mesh):
        automatic = jax.sharding.auto_axes(measure, axes=explicit, out_sharding=PartitionSpec())
        return automatic(*given)
