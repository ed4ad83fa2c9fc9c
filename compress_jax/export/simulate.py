"""What an exported model must compute: the simulation in JAX, with the numbers of its grids."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ExportError
from compress_jax.core.packed import is_packed, unpack
from compress_jax.core.paths import flatten
from compress_jax.quantize._uniform import uniform
from compress_jax.quantize.activation import require_finite
from compress_jax.trace import sites
from compress_jax.trace.site import Site


class Simulation(NamedTuple):
    """A function on quantized weights and activations.

    Attributes:
      fn: the function itself.
      packed: params; the weights of quantized sites are packed.
      sites: of the function, in program order.
      grids: ``(scale float32, zero point uint8)`` of the activations of each quantized site, by name.
      apply: ``(*inputs) -> out``.
    """

    fn: Callable[..., Any]
    packed: Any
    sites: tuple[Site, ...]
    grids: dict[str, tuple[np.float32, np.uint8]]
    apply: Callable[..., Any]

    @property
    def dense(self) -> Any:
        """The params as arrays."""
        return unpack(self.packed)


def simulation(
    fn: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    how: Any,
    ranges: Mapping[str, Any] | None,
    batches: Iterable[Any],
    where: Any,
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

    Returns:
      The simulation.

    Raises:
      ExportError: if a quantizer is not static, per tensor, asymmetric and of 8 bits.

    Example:
      >>> simulated = simulation(lambda w, x: x @ w, jnp.eye(2), [jnp.ones((1, 2))], None, None, (), None)
      >>> simulated.grids, simulated.apply(jnp.ones((1, 2))).tolist()
      ({}, [[1.0, 1.0]])
    """
    dense = unpack(params)
    found = tuple(sites(fn, dense, *inputs))
    if how is None:
        return Simulation(fn, params, found, {}, lambda *x: fn(dense, *x))
    from compress_jax.quantize._activations import activations
    from compress_jax.quantize.choice import chosen

    quantizers = chosen(found, how, where)
    by_name = {site.name: site for site in found}
    packed = _packed(params, {by_name[name].param for name in quantizers})
    quantized, seen = activations(fn, how, where), unpack(packed)
    if ranges is None:
        ranges = quantized.init(seen, list(batches))
    grids = {name: _grid(by_name[name], each, ranges) for name, each in quantizers.items()}
    return Simulation(fn, packed, found, grids, lambda *x: quantized.apply(seen, ranges, *x))


def _packed(params: Any, paths: Iterable[str | None]) -> Any:
    """Pack the weights that are still arrays, 8 bits a channel."""
    leaves, rebuild = flatten(params)
    rounded, paths = uniform(8, granularity="channel"), set(paths)

    def pack(path: str, leaf: Any) -> Any:
        return leaf if path not in paths or is_packed(leaf) else rounded.pack(leaf, rounded.init(leaf))

    return rebuild({path: pack(path, leaf) for path, leaf in leaves.items()})


def _grid(site: Site, quantizer: Any, ranges: Mapping[str, Any]) -> tuple[np.float32, np.uint8]:
    """Return scale and zero point of a site's activations."""
    if quantizer.grid.bits != 8 or quantizer.grid.symmetric or quantizer.reducer is None:
        raise ExportError(
            f"site {site.name!r} is quantized by {quantizer}, but the runtimes have fast kernels only for 8-bit asymmetric "
            "activations with calibrated ranges: use static(bits=8, symmetric=False)"
        )
    if site.operand is None or site.loops:
        raise ExportError(f"site {site.name!r} is a product of two activations or inside a loop; leave it out of `how`")
    if site.name not in ranges:
        raise ExportError(f"there is no range for site {site.name!r}; pass batches= or ranges of the same activations")
    require_finite(site.name, ranges[site.name])
    (key, index), shape = next(iter(site.inputs.items())), (site.lhs_shape, site.rhs_shape)
    scale, zero = quantizer.place(site, index, jnp.zeros(shape[index]), ranges[site.name][key])
    if np.size(scale) != 1:
        raise ExportError(f"site {site.name!r} has a scale for each channel; use granularity='tensor'")
    return np.float32(np.ravel(scale)[0]), np.uint8(np.ravel(zero)[0])
