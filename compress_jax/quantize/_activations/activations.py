"""Quantized activations throughout a model: at its sites, without touching the model."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import JaxprEqn

from compress_jax.core.errors import NonFiniteError, StateError
from compress_jax.core.types import Array, Batch, ModelFn, Params, PyTree
from compress_jax.quantize._activations.quantizer import (
    ActivationQuantizer,
    OperandState,
    require_finite,
)
from compress_jax.quantize._activations.site_patterns import (
    QuantizerRules,
    SitePatterns,
    match_site,
    match_sites,
    pattern_pairs,
)
from compress_jax.trace import calibrate, sites
from compress_jax.trace._jaxpr.evaluate import Hooks, Statistics, Values, bind
from compress_jax.trace._jaxpr.rewrite import hooked
from compress_jax.trace._jaxpr.site import Position, Site
from compress_jax.trace._statistics.calibrate import Masks, masks_of
from compress_jax.trace._statistics.reducer import Reducer

Ranges = dict[str, dict[str, OperandState]]
NON_FINITE = "not finite"  # beside the operands of a site: how many of its statistics were skipped


class Activations(NamedTuple):
    """Pure functions that run a model on quantized activations.

    ``ranges`` is a plain tree, ``{site name: {"input": state}}``, or
    ``{"lhs": state, "rhs": state}`` for a product of two activations. The state of an operand is a
    dict of arrays that its quantizer defines, stacked inside loops.

    Attributes:
      init: ``(params, batches=(), mask=None) -> ranges``, from calibration batches. Each batch is
        what the model takes after params (a tuple is several arguments); the mask selects the
        examples that count, see `trace.calibrate`. Dynamic quantizers need no batches.
      apply: ``(params, ranges, *inputs) -> out``; differentiable in params and in learned ranges.
      update: ``(params, ranges, *inputs, mask=None) -> (out, new ranges)``: ranges move with this
        batch, as far as the mask counts it, and the output is that of the new ones. Where a range
        is NaN, or ``ranges`` is None, this batch sets it. Statistics that are not finite (a batch
        with an overflow) move nothing.
      table: ``(params, *inputs) -> {site name: its quantizer, or why it has none}``.
      watch: as ``update``,
        ``-> (out, new ranges, {site name: int32, how many of its statistics were not finite})``.

    Example:
      >>> import compress_jax as cj
      >>> fn, params, x = lambda p, x: x @ p["kernel"], {"kernel": jnp.eye(2)}, jnp.ones((1, 2))
      >>> quantized = cj.quantize.activations(fn, cj.quantize.static(bits=4))
      >>> ranges = quantized.init(params, [x])
      >>> _, ranges = quantized.update(params, ranges, 2 * x)
      >>> float(ranges["kernel"]["input"]["high"])
      2.0
    """

    init: Callable[..., Ranges]
    apply: Callable[..., PyTree]
    update: Callable[..., tuple[PyTree, Ranges]]
    table: Callable[..., dict[str, str]]
    watch: Callable[..., tuple[PyTree, Ranges, dict[str, jax.Array]]]


def activations(fn: ModelFn, how: QuantizerRules, where: SitePatterns = None) -> Activations:
    """Quantize the activations that enter the contractions of a function.

    Contractions are dense layers, convolutions, einsums, experts.

    Args:
      fn: a pure function of params and inputs.
      how: a quantizer, or pairs of a glob over names of sites and a quantizer, or None to leave
        them; the first that matches decides, and sites that none matches are left.
      where: a glob, or several, over names of sites. By default the sites of which one operand is a
        parameter. A product of two activations (attention scores) has both quantized, if a glob
        here or in ``how`` other than ``"**"`` matches it.

    Returns:
      The functions. `Activations.table` lists what is done at each site.

    Raises:
      NoMatchError: when called, if a glob matches no site.
      NonFiniteError: in ``init``, naming the site, if its activations were not finite or it never
        ran; in ``apply`` and ``update``, if a known range is not finite. With a traced range the
        result is NaN instead.
      StateError: in ``apply`` and ``update``, if ``ranges`` lacks a site.

    Example:
      >>> import compress_jax as cj
      >>> fn, params = lambda w, x: x @ w["kernel"], {"kernel": jnp.eye(2)}
      >>> x = jnp.array([[1.0, 0.3], [-7.0, 2.6]])
      >>> int4 = cj.quantize.activations(fn, cj.quantize.static(bits=4))
      >>> ranges = int4.init(params, [x])
      >>> ranges["kernel"]["input"]["low"].tolist(), int4.apply(params, ranges, x).tolist()
      (-7.0, [[1.0, 0.0], [-7.0, 3.0]])
      >>> int4.table(params, x)
      {'kernel': "static(bits=4, symmetric=True, granularity='tensor', range='minmax')"}
    """
    own = _Quantized(fn, how, where)
    return Activations(own.init, own.apply, own.update, own.table, own.watch)


class _Quantized(NamedTuple):
    """The arguments of `activations`, and the functions that it returns."""

    fn: ModelFn
    how: QuantizerRules
    where: SitePatterns

    def init(
        self, params: Params, batches: Iterable[Batch] = (), mask: Masks | None = None
    ) -> Ranges:
        batches = list(batches)
        needed = any(each.reducer for _, each in pattern_pairs(self.how) if each)
        # Dynamic quantizers alone keep no ranges; static ones without batches raise in `calibrate`.
        if not batches and not needed:
            return {}
        statistics = calibrate(self.fn, _reducer(self.how, self.where), params, batches, mask=mask)
        quantizers = match_sites(statistics.sites.values(), self.how, self.where)
        return {
            name: _calibrated_ranges(statistics.sites[name], each, statistics[name])
            for name, each in quantizers.items()
        }

    def run(
        self,
        params: Params,
        ranges: Ranges | None,
        inputs: tuple[PyTree, ...],
        moving: bool,
        mask: Array | None = None,
    ) -> tuple[PyTree, Statistics]:
        """Run the function; if ranges move, also return the new ones by site, with `NON_FINITE`."""

        # The sites are known once the function is traced on these inputs.
        def hooks(found: dict[Position, Site]) -> Hooks:
            quantizers = match_sites(found.values(), self.how, self.where)
            _require_ranges(quantizers, ranges, moving)
            quantized = {
                position: site for position, site in found.items() if site.name in quantizers
            }

            def contract(
                site: Site, eqn: JaxprEqn, operands: list[jax.Array], given: dict[str, PyTree]
            ) -> Values:
                quantizer = quantizers[site.name]
                return _quantized_contraction(quantizer, moving, site, eqn, operands, given)

            return Hooks(quantized, contract)

        given = _SiteInputs({name: {"ranges": each} for name, each in (ranges or {}).items()})
        # Only for sites with a quantizer: `masks_of` refuses sites where it cannot follow a mask.
        if mask is not None:
            found = sites(self.fn, params, *inputs)
            names = [
                site.name
                for site in found
                if not isinstance(match_site(site, self.how, self.where), str)
            ]
            for name, masks in masks_of(self.fn, names, mask, params, *inputs).items():
                given[name] = {**given[name], "masks": masks}
        return hooked(self.fn, hooks, None, given)(params, *inputs)

    def apply(self, params: Params, ranges: Ranges, *inputs: PyTree) -> PyTree:
        return self.run(params, ranges, inputs, moving=False)[0]

    def watch(
        self, params: Params, ranges: Ranges | None, *inputs: PyTree, mask: Array | None = None
    ) -> tuple[PyTree, Ranges, dict[str, jax.Array]]:
        out, results = self.run(params, ranges, inputs, moving=True, mask=mask)
        moved: Ranges = {}
        skipped: dict[str, jax.Array] = {}
        for name, operands in results.items():
            skipped[name] = operands.pop(NON_FINITE).sum()  # over iterations of loops
            # A batch without any statistics of a site (a branch not taken) leaves its ranges.
            old = (ranges or {}).get(name) or operands
            moved[name] = jax.tree.map(_new_unless_nan, old, operands)
        return out, moved, skipped

    def update(
        self, params: Params, ranges: Ranges | None, *inputs: PyTree, mask: Array | None = None
    ) -> tuple[PyTree, Ranges]:
        return self.watch(params, ranges, *inputs, mask=mask)[:2]

    def table(self, params: Params, *inputs: PyTree) -> dict[str, str]:
        found = sites(self.fn, params, *inputs)
        match_sites(found, self.how, self.where)  # raises if a glob matches no site
        return {site.name: str(match_site(site, self.how, self.where)) for site in found}


class _SiteInputs(dict[str, dict[str, PyTree]]):
    """Ranges and masks by site; an empty dict for every site that has neither."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> dict[str, PyTree]:
        return {}


def _require_ranges(
    quantizers: dict[str, ActivationQuantizer], ranges: Ranges | None, moving: bool
) -> None:
    """Raise if a site that needs ranges has none, or has some that are not finite."""
    if ranges is None and moving:  # this batch sets them all
        return
    known = ranges or {}
    for name, each in quantizers.items():
        if each.reducer is not None and name not in known:
            raise StateError(
                f"there are no ranges for site {name!r}, only for: {', '.join(known) or 'none'}; "
                "calibrate with `init(params, batches)` of the same activations"
            )
        require_finite(name, known.get(name, {}), unknown=moving or each.allow_unknown)


def _reducer(how: QuantizerRules, where: SitePatterns) -> Reducer:
    """Return the reducer that collects at each site what its quantizer needs.

    Statistics are kept under the quantizer's number: ``{"2": statistics}``.
    """
    quantizers = [each for _, each in pattern_pairs(how) if each is not None]

    # `merge` and `finish` do not get the site, so the key tells whose statistics they have.
    def reducer_of(number: str) -> Reducer:
        reducer = quantizers[int(number)].reducer
        assert reducer is not None
        return reducer

    def reduce_masked(
        site: Site, lhs: jax.Array, rhs: jax.Array, masks: dict[int, jax.Array]
    ) -> dict[str, PyTree]:
        each = match_site(site, how, where)
        if isinstance(each, str) or each.reducer is None:
            return {}
        return {str(quantizers.index(each)): each.reducer(site, lhs, rhs, masks)}

    def reduce(site: Site, lhs: jax.Array, rhs: jax.Array) -> dict[str, PyTree]:
        return reduce_masked(site, lhs, rhs, {})

    def merge(old: dict[str, PyTree], new: dict[str, PyTree]) -> dict[str, PyTree]:
        return {number: reducer_of(number).merge(old[number], new[number]) for number in new}

    def finish(statistics: dict[str, PyTree]) -> dict[str, PyTree]:
        return {number: reducer_of(number).finish(each) for number, each in statistics.items()}

    return Reducer(reduce, merge, finish, reduce_masked)


def _calibrated_ranges(
    site: Site, quantizer: ActivationQuantizer, statistics: dict[str, PyTree]
) -> dict[str, OperandState]:
    """Return the state of each operand of a site, and raise for those without finite statistics."""
    if quantizer.reducer is None:
        return {key: {} for key in site.inputs}
    (finished,) = statistics.values()
    result = {key: quantizer.ranges(site, finished[key]) for key in site.inputs}
    for key, state in result.items():
        if all(isinstance(x, Tracer) or jnp.isfinite(x).all() for x in state.values()):
            continue
        # Statistics without an entry are NaN as well: the count tells the two cases apart.
        ran = jnp.asarray(getattr(finished[key], "count", 1)).all()
        why = (
            "they are not finite"
            if ran
            else "it did not run in any batch, or not in every iteration of its loop"
        )
        raise NonFiniteError(
            f"no range for the activations ({key}) of site {site.name!r}: {why}; look at the "
            f"calibration batches, or leave the site out with ({site.name!r}, None) before the "
            "other pairs of `how`"
        )
    return result


def _quantized_contraction(
    quantizer: ActivationQuantizer,
    moving: bool,
    site: Site,
    eqn: JaxprEqn,
    operands: list[jax.Array],
    given: dict[str, PyTree],
) -> Values:
    """Run a contraction on quantized activations; if ranges move, return the new ones too."""
    states = given.get("ranges", {})
    statistics = None
    if moving and quantizer.reducer is not None:
        # Ranges are statistics: no gradient flows through them.
        lhs, rhs = map(jax.lax.stop_gradient, operands[:2])
        observed = quantizer.reducer(site, lhs, rhs, given.get("masks"))
        statistics = quantizer.reducer.finish(observed)
    new: dict[str, OperandState] = {}
    args = list(operands)
    skipped = jnp.zeros((), jnp.int32)
    for key, index in site.inputs.items():
        new[key] = states.get(key, {})
        # Ranges move first, so that the output is that of the new ones.
        if statistics is not None:
            fresh = quantizer.ranges(site, statistics[key])
            new[key], finite = _merge_finite(quantizer, new[key], fresh)
            skipped += jnp.logical_not(finite).astype(jnp.int32)
        args[index] = quantizer.quantize_fn(site, index, operands[index], new[key])
    return bind(eqn, args), {site.name: {**new, NON_FINITE: skipped}} if moving else {}


def _merge_finite(
    quantizer: ActivationQuantizer, old: OperandState, fresh: OperandState
) -> tuple[OperandState, jax.Array]:
    """Merge the state of this batch if it is finite, and return whether it is.

    Where one of the two is NaN, the other is taken.
    """
    finite = jnp.stack([jnp.isfinite(value).all() for value in fresh.values()]).all()
    # One bad number spoils the whole batch: no part of its statistics is used.
    fresh = {name: jnp.where(finite, value, jnp.nan) for name, value in fresh.items()}
    if not old:
        return fresh, finite
    both = quantizer.merge(old, fresh)
    merged = {}
    for name in old:
        # Three cases: the old is unknown, the new is, or neither.
        moved = _new_unless_nan(old[name], both[name])
        merged[name] = jnp.where(jnp.isnan(old[name]), fresh[name], moved)
    return merged, finite


def _new_unless_nan(old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(new), old, new)
