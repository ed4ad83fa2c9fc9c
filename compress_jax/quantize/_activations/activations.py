"""Quantized activations throughout a model: at its sites, without touching the model."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import JaxprEqn

from compress_jax.core.errors import NonFiniteError, StateError
from compress_jax.core.types import ModelFn, Params, PyTree
from compress_jax.quantize._activations.quantizer import ActivationQuantizer, Own, require_finite
from compress_jax.quantize._activations.site_patterns import How, Where, choose, chosen, pairs
from compress_jax.trace import calibrate, sites
from compress_jax.trace._jaxpr.evaluate import Hooks, Values, bind
from compress_jax.trace._jaxpr.rewrite import hooked
from compress_jax.trace._jaxpr.site import Position, Site
from compress_jax.trace._statistics.calibrate import Masks, masks_of
from compress_jax.trace._statistics.reducer import Reducer

Ranges = dict[str, dict[str, Own]]
BROKEN = "not finite"  # beside the operands of a site: how many of its statistics were left out


class Activations(NamedTuple):
    """Pure functions that run a model on quantized activations.

    ``ranges`` is a plain tree, ``{site name: {"input": own}}``, or ``{"lhs": own, "rhs": own}`` of
    a product of two activations; what ``own`` holds is its quantizer's affair, stacked inside
    loops.

    Attributes:
      init: ``(params, batches=(), mask=None) -> ranges``, from calibration batches, each what the
        model takes after params (a tuple is several arguments), and of them what counts, see
        `trace.calibrate`. Dynamic quantizers need none.
      apply: ``(params, ranges, *inputs) -> out``; differentiable in params and in learned ranges.
      update: ``(params, ranges, *inputs, mask=None) -> (out, new ranges)``: ranges move with this
        batch, with what of it counts, and the output is that of the new ones. Where a range is NaN,
        or ``ranges`` is None, this batch sets it. Statistics that are not finite (a batch with an
        overflow) move nothing.
      table: ``(params, *inputs) -> {site name: what is done there, or why nothing is}``.
      watch: as ``update``,
        ``-> (out, new ranges, {site name: int32, how many of its statistics were not finite})``.
    """

    init: Callable[..., Ranges]
    apply: Callable[..., Any]
    update: Callable[..., tuple[Any, Ranges]]
    table: Callable[..., dict[str, str]]
    watch: Callable[..., tuple[Any, Ranges, dict[str, jax.Array]]]


def activations(fn: ModelFn, how: How, where: Where = None) -> Activations:
    """Quantize the activations that enter the contractions of a function: dense layers, convolutions, einsums, experts.

    Args:
      fn: a pure function of params and inputs.
      how: a quantizer, or pairs of a glob over names of sites and a quantizer, or None to leave
        them; the first that matches decides, and sites that none matches are left.
      where: a glob, or several, over names of sites. By default the sites of which one operand is a
        parameter. A product of two activations (attention scores) has both quantized, if a glob
        here or in ``how`` other than ``"**"`` matches it.

    Returns:
      The functions. `Activations.table` tells what is done where.

    Raises:
      NoMatchError: when called, if a glob matches no site.
      NonFiniteError: in ``init``, naming the site, if its activations were not finite or it never
        ran; in ``apply`` and ``update``, if a known range is not finite. Of a traced one the result
        is NaN.
      StateError: in ``apply`` and ``update``, if ``ranges`` lacks a site.

    Example:
      >>> from compress_jax.quantize._activations.static import static
      >>> fn, params, x = lambda w, x: x @ w["kernel"], {"kernel": jnp.eye(2)}, jnp.array([[1.0, 0.3], [-7.0, 2.6]])
      >>> int4 = activations(fn, static(bits=4))
      >>> ranges = int4.init(params, [x])
      >>> ranges["kernel"]["input"]["low"].tolist(), int4.apply(params, ranges, x).tolist()
      (-7.0, [[1.0, 0.0], [-7.0, 3.0]])
      >>> int4.table(params, x)
      {'kernel': "static(bits=4, symmetric=True, granularity='tensor', range='minmax')"}
    """

    def init(params: Params, batches: Iterable[Any] = (), mask: Masks | None = None) -> Ranges:
        batches = list(batches)
        if not batches and not any(each.reducer for _, each in pairs(how) if each):
            return {}
        seen = calibrate(fn, _reducer(how, where), params, batches, mask=mask)
        quantizers = chosen(seen.sites.values(), how, where)
        return {
            name: _calibrated(seen.sites[name], each, seen[name])
            for name, each in quantizers.items()
        }

    def run(
        params: Params,
        ranges: Ranges | None,
        inputs: tuple[Any, ...],
        moving: bool,
        mask: Any = None,
    ) -> tuple[Any, Ranges]:
        def hooks(found: dict[Position, Site]) -> Hooks:
            quantizers = chosen(found.values(), how, where)
            _require(quantizers, ranges, moving)
            kept = {position: site for position, site in found.items() if site.name in quantizers}
            return Hooks(
                kept, lambda site, *rest: _quantized(quantizers[site.name], moving, site, *rest)
            )

        own = {name: {"own": each} for name, each in (ranges or {}).items()}
        if mask is not None:
            found = [
                site
                for site in sites(fn, params, *inputs)
                if not isinstance(choose(site, how, where), str)
            ]
            for name, masks in masks_of(
                fn, [site.name for site in found], mask, params, *inputs
            ).items():
                own[name] = {**own.get(name, {}), "masks": masks}
        return hooked(fn, hooks, None, _Given(own))(params, *inputs)

    def apply(params: Params, ranges: Ranges, *inputs: PyTree) -> Any:
        return run(params, ranges, inputs, moving=False)[0]

    def watch(
        params: Params, ranges: Ranges | None, *inputs: PyTree, mask: Any = None
    ) -> tuple[Any, Ranges, dict[str, jax.Array]]:
        out, new = run(params, ranges, inputs, moving=True, mask=mask)
        counts: dict[str, Any] = {name: own.pop(BROKEN) for name, own in new.items()}
        broken = {name: count.sum() for name, count in counts.items()}
        return (
            out,
            {
                name: jax.tree.map(_known, (ranges or {}).get(name) or own, own)
                for name, own in new.items()
            },
            broken,
        )

    def update(
        params: Params, ranges: Ranges | None, *inputs: PyTree, mask: Any = None
    ) -> tuple[Any, Ranges]:
        return watch(params, ranges, *inputs, mask=mask)[:2]

    def table(params: Params, *inputs: PyTree) -> dict[str, str]:
        found = sites(fn, params, *inputs)
        chosen(found, how, where)
        return {site.name: str(choose(site, how, where)) for site in found}

    return Activations(init, apply, update, table, watch)


class _Given(dict[str, Any]):
    """Ranges and masks by site, and nothing for every site that has none."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> dict[str, Own]:
        return {}


def _require(
    quantizers: dict[str, ActivationQuantizer], ranges: Ranges | None, moving: bool
) -> None:
    if ranges is None and moving:
        return
    for name, each in quantizers.items():
        if each.reducer is not None and name not in (ranges or {}):
            raise StateError(
                f"there are no ranges for site {name!r}, only for: "
                f"{', '.join(ranges or {}) or 'none'}; calibrate with "
                "`init(params, batches)` of the same activations"
            )
        require_finite(name, (ranges or {}).get(name, {}), unknown=moving or each.waits)


def _reducer(how: How, where: Where) -> Reducer:
    """Return the reducer that keeps at each site what its quantizer needs, under the number of that quantizer."""
    every = [each for _, each in pairs(how) if each is not None]

    def masked(
        site: Site, lhs: jax.Array, rhs: jax.Array, masks: dict[int, jax.Array]
    ) -> dict[str, Any]:
        each = choose(site, how, where)
        if isinstance(each, str) or each.reducer is None:
            return {}
        return {str(every.index(each)): each.reducer(site, lhs, rhs, masks)}

    def reduce(site: Site, lhs: jax.Array, rhs: jax.Array) -> dict[str, Any]:
        return masked(site, lhs, rhs, {})

    def of(number: str) -> Reducer:
        reducer = every[int(number)].reducer
        assert reducer is not None
        return reducer

    return Reducer(
        reduce,
        lambda old, new: {number: of(number).merge(old[number], new[number]) for number in new},
        lambda seen: {number: of(number).finish(statistics) for number, statistics in seen.items()},
        masked,
    )


def _calibrated(site: Site, quantizer: ActivationQuantizer, seen: dict[str, Any]) -> dict[str, Own]:
    """Return what belongs to each operand of a site; what no number was seen for is an error."""
    if quantizer.reducer is None:
        return {key: {} for key in site.inputs}
    (finished,) = seen.values()
    result = {key: quantizer.ranges(site, finished[key]) for key in site.inputs}
    for key, own in result.items():
        if any(not isinstance(x, Tracer) and not jnp.isfinite(x).all() for x in own.values()):
            never = not jnp.asarray(getattr(finished[key], "count", 1)).all()
            why = (
                "it did not run in any batch, or not in every turn of its loop"
                if never
                else "they are not finite"
            )
            raise NonFiniteError(
                f"no range for the activations ({key}) of site {site.name!r}: {why}; look at the "
                "calibration batches, or "
                f"leave the site out with ({site.name!r}, None) before the other pairs of `how`"
            )
    return result


def _quantized(
    quantizer: ActivationQuantizer,
    moving: bool,
    site: Site,
    eqn: JaxprEqn,
    operands: list[Any],
    told: dict[str, Any],
) -> Values:
    """Run a contraction on quantized activations; if ranges move, return those that this batch led to."""
    seen, new, args, given = None, {}, list(operands), told.get("own", {})
    broken = jnp.zeros((), jnp.int32)
    if moving and quantizer.reducer is not None:
        lhs, rhs = map(jax.lax.stop_gradient, operands[:2])
        seen = quantizer.reducer.finish(quantizer.reducer(site, lhs, rhs, told.get("masks")))
    for key, index in site.inputs.items():
        new[key] = given.get(key, {})
        if seen is not None:
            new[key], sound = _moved(quantizer, new[key], quantizer.ranges(site, seen[key]))
            broken += jnp.logical_not(sound).astype(jnp.int32)
        args[index] = quantizer.see(site, index, operands[index], new[key])
    return bind(eqn, args), {site.name: {**new, BROKEN: broken}} if moving else {}


def _moved(quantizer: ActivationQuantizer, old: Own, fresh: Own) -> tuple[Own, jax.Array]:
    """Merge what is finite and tell whether it is; what is NaN on one side is what the other side says."""
    sound = jnp.stack([jnp.isfinite(value).all() for value in fresh.values()]).all()
    fresh = {name: jnp.where(sound, value, jnp.nan) for name, value in fresh.items()}
    if not old:
        return fresh, sound
    both = quantizer.merge(old, fresh)
    return {
        name: jnp.where(jnp.isnan(old[name]), fresh[name], _known(old[name], both[name]))
        for name in old
    }, sound


def _known(old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(new), old, new)
