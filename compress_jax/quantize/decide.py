"""How each contraction is computed: in integers, or in floats and why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from compress_jax.core.packed import Quantized, is_packed
from compress_jax.quantize.activation import ActivationQuantizer
from compress_jax.quantize.choice import How, Where, choose, chosen
from compress_jax.quantize.feed import Feed
from compress_jax.quantize.integer_dot import fits
from compress_jax.quantize.route import Lost, Route, Value, routes
from compress_jax.quantize.sides import side
from compress_jax.quantize.stored import Stored
from compress_jax.trace.site import Site
from compress_jax.trace.traced import Traced

FLOAT = "its activations are not quantized"


@dataclass(frozen=True)
class Step:
    """What is done at one site.

    Attributes:
      site: the site.
      quantizer: of its activations, or None.
      feed: how its quantized parameter arrives, or None.
      weight: the parameter's format in words.
      activation: the activations'.
      packed: whether the parameter is.
      reason: why it is not computed in integers; empty if it is.
    """

    site: Site
    quantizer: ActivationQuantizer | None
    feed: Feed | None
    weight: str
    activation: str
    packed: bool
    reason: str

    @property
    def compute(self) -> str:
        """What is multiplied and added, in words."""
        if not self.reason:
            names = [each.split()[0] for each in (self.activation, self.weight or self.activation)]
            return " x ".join(reversed(names) if self.site.operand == "lhs" else names) + " -> int32"
        parts = ["weights unpacked"] * self.packed + ["activations rounded"] * (self.quantizer is not None)
        return ", ".join([self.site.out_dtype, *parts])


def decide(
    traced: Traced, leaves: Mapping[str, Any], how: How | None, where: Where
) -> tuple[dict[str, Stored], dict[str, Step]]:
    """Return what is done at every site.

    Args:
      traced: the function's trace.
      leaves: arrays and packed nodes by path.
      how: the quantizers of activations, or None.
      where: which sites' activations are quantized.

    Returns:
      How each quantized parameter is kept, by path, and the steps by the names of sites, in program order.

    Raises:
      NoMatchError: if a glob matches no site.
    """
    found = routes(traced)
    every = [value for operands in found.values() for value in operands if isinstance(value, Route)]
    stored = {
        path: Stored.of(leaf, max((route.stacked for route in every if route.path == path), default=0))
        for path, leaf in leaves.items()
        if isinstance(leaf, Quantized)
    }
    if how is not None:
        chosen(traced.sites.values(), how, where)  # a glob that matches nothing is an error
    steps = {site.name: _step(site, found[position], leaves, stored, how, where) for position, site in traced.sites.items()}
    return stored, steps


def _step(
    site: Site,
    operands: Sequence[Value],
    leaves: Mapping[str, Any],
    stored: Mapping[str, Stored],
    how: How | None,
    where: Where,
) -> Step:
    answer = FLOAT if how is None else choose(site, how, where)
    quantizer = None if isinstance(answer, str) else answer
    feed, weight, reason = _weight(site, operands, leaves, stored)
    reasons = [reason, quantizer and _not_exact(site, quantizer, feed), None if quantizer else answer]
    reason = next((each for each in reasons if each), "")
    return Step(
        site, quantizer, feed, weight, _activation(site, quantizer), is_packed(leaves.get(site.param or "")), str(reason)
    )


def _weight(
    site: Site, operands: Sequence[Value], leaves: Mapping[str, Any], stored: Mapping[str, Stored]
) -> tuple[Feed | None, str, str]:
    """Return how the parameter of a site arrives, its format, and why its codes cannot be computed with."""
    if site.param is None:
        return None, "", "" if site.kind == "dot" else "both operands are activations"
    leaf, value = leaves[site.param], operands[site.operand == "rhs"]
    if not is_packed(leaf):
        return None, str(leaf.dtype), "its parameter is not quantized"
    if site.param not in stored:
        return None, type(leaf).__name__, f"its parameter is packed as {type(leaf).__name__}, not as integers with a scale"
    form = stored[site.param]
    if not isinstance(value, Route):
        return None, form.format, value.reason if isinstance(value, Lost) else "no parameter feeds it"
    feed = Feed.of(form, value, side(site, int(site.operand == "rhs")))
    if feed.groups == feed.side.products > 1:
        return None, form.format, "the parameter's scale varies along the axes that are summed over"
    return feed, form.format, ""


def _not_exact(site: Site, quantizer: ActivationQuantizer, feed: Feed | None) -> str:
    """Say why a site's products cannot be summed exactly in int32 before they are scaled."""
    if site.kind == "ragged_dot":
        return "a ragged product: the sizes of its groups are data"
    if site.kind == "conv" and site.params["batch_group_count"] > 1:
        return "a convolution with groups of examples"
    if site.kind == "conv" and feed is not None and feed.groups > 1:
        return "scales of groups along what a convolution sums over"
    sharing = [_sharing(site, index, quantizer) for index in site.inputs.values()]
    if "channel" in sharing:
        return "the activations' scale varies along the axes that are summed over"
    largest = 2 ** (quantizer.grid.bits - 1) if quantizer.grid.symmetric else quantizer.grid.top
    other = largest if feed is None else feed.stored.middle * (1 if feed.stored.symmetric else 2)
    products = side(site, 1).products // (1 if feed is None else feed.groups)
    return "" if fits(products, (largest, other)) else f"sums of {products} products may not fit in int32"


def _sharing(site: Site, index: int, quantizer: ActivationQuantizer) -> str:
    """Return which entries of an activation share a scale: ``"tensor"``, ``"token"`` or ``"channel"``."""

    def place(lhs: jax.Array, rhs: jax.Array) -> Any:
        key = next(key for key, each in site.inputs.items() if each == index)
        reducer = quantizer.reducer
        own = {} if reducer is None else quantizer.ranges(site, reducer.finish(reducer(site, lhs, rhs))[key])
        return quantizer.place(site, index, (lhs, rhs)[index], own)[0]

    lhs = jax.ShapeDtypeStruct(site.lhs_shape, site.lhs_dtype)
    shape = jax.eval_shape(place, lhs, jax.ShapeDtypeStruct(site.rhs_shape, site.rhs_dtype)).shape
    if math.prod(shape) == 1:
        return "tensor"
    return "channel" if any(shape[axis] > 1 for axis in side(site, index).summed) else "token"


def _activation(site: Site, quantizer: ActivationQuantizer | None) -> str:
    if quantizer is None:
        return (site.lhs_dtype, site.rhs_dtype)[next(iter(site.inputs.values()))]
    kind = quantizer.call.partition("(")[0]
    sharing = _sharing(site, next(iter(site.inputs.values())), quantizer)
    return f"int{quantizer.grid.bits} {sharing} {kind}" + ("" if quantizer.grid.symmetric else " asymmetric")
