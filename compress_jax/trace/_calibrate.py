"""Statistics of many batches, one batch at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from compress_jax.core.errors import DataError, ShapeError
from compress_jax.trace._observe import observe, observe_masked
from compress_jax.trace.calibration import Calibration
from compress_jax.trace.reducer import Reducer
from compress_jax.trace.traced import trace

Masks: TypeAlias = str | Callable[[Any], Any] | Iterable[Any]
"""The name of a batch's entry, a function of a batch, or a mask for each batch."""


def calibrate(
    fn: Callable[..., Any],
    reduce: Reducer,
    params: Any,
    batches: Iterable[Any],
    where: str | tuple[str, ...] | None = None,
    *,
    mask: Masks | None = None,
) -> Calibration:
    """Return the finished statistics of many batches; memory does not grow with their number.

    Batches may differ in length. A site whose statistics then differ in shape (attention's own products, which hold the
    length) is left out, and listed as such; if ``where`` asks for it, that is an error.

    With a mask, examples or tokens that do not count enter no statistic, be they NaN: no maximum, histogram, moment, Gram
    matrix or count. The mask is followed along axes to every site (`trace.padding`); where it cannot be, the site is refused
    by name. What padding does inside the model, through attention to it say, is the model's affair.

    Args:
      fn: a pure function of params and one batch.
      reduce: what to observe.
      params: tree of arrays.
      batches: what ``fn`` takes after params, one after the other; a tuple is several arguments.
      where: a glob, or several, over the names of sites; by default all.
      mask: which examples or tokens of a batch count: ``batch -> mask``, or a mask for each batch, or the name of an entry
        of batches that are dicts. Booleans (or numbers, of which 0 does not count) with the leading axes of the inputs they
        are of: ``[batch]`` or ``[batch, sequence]``; inputs with other leading axes have none.

    Returns:
      ``{site name: reduce.finish(statistics)}``, with the sites.

    Raises:
      DataError: if there is no batch, or not one mask for each.
      NoMatchError: if no site's name matches ``where``.
      ShapeError: if a mask fits no input, if what counts of a site is not known, or if statistics of a site that was asked
        for differ in shape from batch to batch.
      ArgumentError: if there is a mask and the reducer knows of none.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.trace.reducers import absmax
      >>> batches = [jnp.ones((4, 2)), -2 * jnp.ones((4, 2))]
      >>> ranges = calibrate(lambda params, x: x @ params["kernel"], absmax(), {"kernel": jnp.ones((2, 3))}, batches)
      >>> float(ranges["kernel"]["input"]), ranges.sites["kernel"].param_axes
      (2.0, (0,))
      >>> ranges = calibrate(lambda params, x: x @ params["kernel"], absmax(), {"kernel": jnp.ones((2, 3))}, batches,
      ...                    mask=lambda x: x[:, 0] > 0)
      >>> float(ranges["kernel"]["input"])
      1.0
    """
    seen = observe(fn, reduce, where)

    @jax.jit
    def first(params: Any, inputs: tuple[Any, ...], mask: Any) -> dict[str, Any]:
        if mask is None:
            return seen(params, *inputs)[1]
        return observe_masked(fn, reduce, where, mask)(params, *inputs)[1]

    @jax.jit
    def following(total: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        return {site: reduce.merge(total[site], new[site]) for site in total}

    total, sites, left_out = None, {}, {}
    for batch, own in _with_masks(batches, mask):
        inputs = batch if isinstance(batch, tuple) else (batch,)
        new = first(params, inputs, own)
        if total is None:
            total = new
            sites = {site.name: site for site in trace(fn, params, *inputs).choose(where).values()}
            continue
        for name in [name for name in total if _shapes(total[name]) != _shapes(new[name])]:
            left_out[name] = _differ(name, total.pop(name), new[name], where)
        total = following(total, {name: new[name] for name in total})
    if total is None:
        raise DataError("there is no batch to calibrate with")
    kept = {name: site for name, site in sites.items() if name not in left_out}
    return Calibration({site: reduce.finish(statistics) for site, statistics in total.items()}, kept, left_out)


def _with_masks(batches: Iterable[Any], mask: Masks | None) -> Iterator[tuple[Any, jax.Array | None]]:
    """Yield each batch with its mask as booleans."""
    if mask is None or callable(mask) or isinstance(mask, str):
        for batch in batches:
            own = None if mask is None else mask(batch) if callable(mask) else _entry(batch, mask)
            yield batch, None if mask is None else jnp.asarray(own)
        return
    try:
        for batch, own in zip(batches, mask, strict=True):
            yield batch, jnp.asarray(own)
    except ValueError as error:
        raise DataError("there must be a mask for each batch: give as many, or a function of a batch") from error


def _entry(batch: Any, name: str) -> Any:
    inputs = batch if isinstance(batch, tuple) else (batch,)
    found = [each for each in inputs if isinstance(each, Mapping) and name in each]
    if not found:
        raise DataError(f"a batch has no entry {name!r} to be its mask: give mask=... a function of a batch, or one a batch")
    return found[0][name]


def _shapes(tree: Any) -> list[Any]:
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def _differ(name: str, old: Any, new: Any, where: str | tuple[str, ...] | None) -> str:
    pair = next((a, b) for a, b in zip(_shapes(old), _shapes(new), strict=True) if a != b)
    why = f"its statistics have the shape {pair[0]} for one batch and {pair[1]} for another, and cannot be merged"
    if where is not None:
        raise ShapeError(f"site {name!r}: {why}; leave it out of where={where!r}, or give batches of one shape")
    return why
