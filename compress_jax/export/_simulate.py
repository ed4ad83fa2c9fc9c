"""What an exported model must compute: the simulation in JAX, with the numbers of its grids."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ExportError
from compress_jax.core.packed import is_packed, unpack
from compress_jax.core.paths import flatten
from compress_jax.core.types import Array, Batch, ModelFn, Params, PyTree
from compress_jax.quantize._activations.activations import Ranges, activations
from compress_jax.quantize._activations.quantizer import ActivationQuantizer
from compress_jax.quantize._activations.site_patterns import (
    QuantizerRules,
    SitePatterns,
    match_sites,
    pattern_pairs,
)
from compress_jax.quantize._weights.uniform import uniform
from compress_jax.trace import sites
from compress_jax.trace._jaxpr.site import Site


class Simulation(NamedTuple):
    """A function on quantized weights and activations.

    Attributes:
      fn: the function itself.
      packed: params; the weights of quantized sites are packed.
      sites: of the function, in program order.
      grids: ``(scale float32, zero point uint8)`` of the activations of each quantized site, by
        name.
      apply: ``(*inputs) -> out``.
      left: why a site that was asked for stays in floats, by name.
      ranges: of the activations, as they were given or measured.
    """

    fn: ModelFn
    packed: Params
    sites: tuple[Site, ...]
    grids: dict[str, tuple[np.float32, np.uint8]]
    apply: Callable[..., PyTree]
    left: Mapping[str, str] = MappingProxyType({})
    ranges: Ranges | None = None

    @property
    def dense(self) -> Params:
        """The params as arrays."""
        return unpack(self.packed)


def simulation(
    fn: ModelFn,
    params: Params,
    inputs: Sequence[Array],
    how: QuantizerRules | None,
    ranges: Ranges | None,
    batches: Iterable[Batch],
    where: SitePatterns,
    left: Mapping[str, str] | None = None,
) -> Simulation:
    """Return the simulation that an integer runtime can follow.

    Args:
      fn: a pure function of params and inputs.
      params: packed or not.
      inputs: an example.
      how: static quantizer of activations, pairs, or None.
      ranges: of the activations, or None to calibrate.
      batches: to calibrate with.
      where: which sites.
      left: sites that stay in floats although ``how`` names them, and why; those that no runtime
        computes in integers (inside a loop, a product of two activations) join them.

    Returns:
      The simulation.

    Raises:
      ExportError: if a quantizer is not static, per tensor, asymmetric and of 8 bits, or a range is
        not finite.

    Example:
      >>> fn, inputs = lambda w, x: x @ w, [jnp.ones((1, 2))]
      >>> simulated = simulation(fn, jnp.eye(2), inputs, None, None, (), None)
      >>> simulated.grids, simulated.apply(jnp.ones((1, 2))).tolist()
      ({}, [[1.0, 1.0]])
    """
    dense = unpack(params)
    found = tuple(sites(fn, dense, *inputs))
    if how is None:
        return Simulation(fn, params, found, {}, lambda *x: fn(dense, *x))
    # The quantized sites that no runtime has a kernel for join those left in floats.
    by_name = {site.name: site for site in found}
    left = dict(left or {})
    for name, quantizer in match_sites(found, how, where).items():
        _supported(name, quantizer)
        if reason := _not_in_integers(by_name[name]):
            left.setdefault(name, reason)
    # The first pattern that matches decides, so these come before the user's own.
    how = [*((exactly(name), None) for name in left), *pattern_pairs(how)]
    quantizers = match_sites(found, how, where)
    packed = _packed(params, [by_name[name] for name in quantizers])
    quantized = activations(fn, how, where)
    # Ranges are those of the rounded weights, as the runtime will have them.
    rounded = unpack(packed)
    if ranges is None:
        ranges = quantized.init(rounded, list(batches))
    grids = {name: _grid(by_name[name], each, ranges) for name, each in quantizers.items()}

    def apply(*inputs: PyTree) -> PyTree:
        return quantized.apply(rounded, ranges, *inputs)

    return Simulation(fn, packed, found, grids, apply, left, ranges)


def exactly(name: str) -> str:
    """Return the glob that matches one name.

    Args:
      name: of a site, which may hold ``*``, ``?`` and ``[``.

    Returns:
      The glob.

    Example:
      >>> exactly("layers[0]/kernel")
      'layers[[]0]/kernel'
    """
    return re.sub(r"[*?\[]", r"[\g<0>]", name)


def _packed(params: Params, quantized: Sequence[Site]) -> Params:
    """Pack the weights that are still arrays in 8 bits, with a scale for each output."""
    leaves, rebuild = flatten(params)

    def pack(path: str, leaf: PyTree) -> PyTree:
        own = [site for site in quantized if site.param == path]
        if not own or is_packed(leaf):
            return leaf
        # One scale for the tensor where its sites together sum over every axis of it.
        axes = channels(own, jnp.ndim(leaf))
        granularity = "channel" if axes else "tensor"
        rounded = uniform(8, granularity=granularity, axis=axes or -1)
        return rounded.pack(leaf, rounded.init(leaf))

    return rebuild({path: pack(path, leaf) for path, leaf in leaves.items()})


def channels(uses: Sequence[Site], ndim: int) -> tuple[int, ...]:
    """Return the axes of a parameter that no site sums over: those that may have scales.

    Args:
      uses: the sites that the parameter feeds.
      ndim: of the parameter.

    Returns:
      The axes; none where a site sums over all of them, or it is not known over which (a reshape
      mixes axes).

    Example:
      >>> shapes, dtypes = [(4, 8), (8, 16), (4, 16)], ["float32"] * 3
      >>> product = Site("w", "dot", "w", "rhs", *shapes, *dtypes, ((1,), (0,)), param_axes=(1,))
      >>> channels([product], 2)  # stored as [16, 8]
      (0,)
    """
    if any(site.param_axes is None for site in uses):
        return ()
    summed = {axis for site in uses for axis in site.param_axes or ()}
    return tuple(axis for axis in range(ndim) if axis not in summed)


def _not_in_integers(site: Site) -> str:
    """Return why no runtime has an integer kernel for a site; empty if some may."""
    if site.operand is None:
        return "a product of two activations"
    if site.loops or site.conditional:
        return "inside a loop or a branch"
    return ""


def _supported(name: str, quantizer: ActivationQuantizer) -> None:
    # Without a reducer it is dynamic: its scales are not known before the model runs.
    if quantizer.grid.bits != 8 or quantizer.grid.symmetric or quantizer.reducer is None:
        raise ExportError(
            f"site {name!r} is quantized by {quantizer}, but the runtimes have fast kernels only "
            "for 8-bit asymmetric activations with calibrated ranges: use static(bits=8, "
            "symmetric=False)"
        )


def _grid(
    site: Site, quantizer: ActivationQuantizer, ranges: Ranges
) -> tuple[np.float32, np.uint8]:
    """Return scale and zero point of a site's activations."""
    if site.name not in ranges:
        raise ExportError(
            f"there is no range for site {site.name!r}; pass batches= or ranges of the same "
            "activations"
        )
    key, index = next(iter(site.inputs.items()))
    shape = (site.lhs_shape, site.rhs_shape)[index]
    own = ranges[site.name][key]
    # Static quantizers use the range alone, so zeros may stand for the operand.
    scale, zero = quantizer.scale_fn(site, index, jnp.zeros(shape), own)
    if np.size(scale) != 1:
        raise ExportError(
            f"site {site.name!r} has a scale for each channel; use granularity='tensor'"
        )
    scale = np.float32(np.ravel(scale)[0])
    finite = all(np.isfinite(x).all() for x in jax.tree.leaves(own)) and np.isfinite(scale)
    if not finite or scale <= 0:
        ends = own
        if isinstance(own, Mapping):
            ends = {name: np.ravel(x).tolist() for name, x in own.items()}
        raise ExportError(
            f"the range of site {site.name!r} is {ends}: some calibration batch held inf or NaN, "
            "and integers of such a range would be a constant; calibrate again on finite batches, "
            "or leave the site out of `how`"
        )
    return scale, np.uint8(np.ravel(zero)[0])
