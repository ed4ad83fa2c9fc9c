"""Count what a function costs, from its trace."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from compress_jax.core.compression import Compression, CompressionState, bound
from compress_jax.core.errors import ConfigError
from compress_jax.core.paths import match
from compress_jax.trace._layouts import layouts_of
from compress_jax.trace.costs import Cost, SiteCost
from compress_jax.trace.flops import Operations, operations
from compress_jax.trace.origin import DATA, PARAMETER, Origin
from compress_jax.trace.stored import Stored, dtype_bits, shapes, stored
from compress_jax.trace.traced import Traced, trace

ActivationBits = int | Mapping[str, int] | None


def cost(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    compression: Compression | None = None,
    state: CompressionState | None = None,
    activation_bits: ActivationBits = None,
) -> Cost:
    r"""Count what ``fn(params, *inputs)`` costs, without running it.

    .. math:: \text{bit-operations} = \sum_\text{sites} \text{MACs} \cdot b_\text{lhs} \cdot b_\text{rhs}

    where b is the bits of an operand's numbers: of a parameter stored as codes the width of a code (scales and codebooks do
    not count; factors of low rank are multiplied out), of data ``activation_bits``, else of the dtype. Products with pruned
    weights are counted, as in the papers; the ``effective`` numbers multiply each site by its density, the share of the
    weights that are not zero (a quantizer rounds some to zero too).

    Loops count as often as they run, a ``shard_map`` on every device. A ``while`` loop counts for one turn and a choice with
    every branch; `Cost.notes` says so, and lists what nobody could look into. Results that nobody uses count too, though
    ``jit`` drops them.

    Args:
      fn: a pure function of params and inputs.
      params: tree of arrays, packed leaves or ``ShapeDtypeStruct``.
      inputs: trees of arrays or ``ShapeDtypeStruct``.
      compression: the weights count as it packs them; ``params`` must be arrays then.
      state: its state; by default that of `init` once the compression is bound to the layouts of the trace.
      activation_bits: bits of operands that are data: of all, or ``{glob over names of sites: bits}``, first match wins.

    Returns:
      The cost: ``.macs``, ``.flops``, ``.params``, ``.bit_operations``, ``.by_site``, ...; ``print`` shows a table, with the
      densities and effective bit-operations if a weight is zero, and ``?`` beside the runs of what may not run.

    Raises:
      ShapeError: if there is a compression and ``params`` are shapes.
      StateError: if there is a state without its compression.
      NoMatchError: if a glob matches no site.
      ConfigError: if bits are not a positive integer.

    Example:
      >>> import jax.numpy as jnp
      >>> def fn(params, x):
      ...     return jnp.maximum(x @ params["kernel"] + params["bias"], 0)
      >>> total = cost(fn, {"kernel": jnp.ones((3, 8)), "bias": jnp.ones((1, 8))}, jnp.ones((4, 3)))
      >>> total.macs, total.flops, total.params
      (96, 256, 32)
      >>> print(total)
      site    product          runs  MACs   share  params     bits  bit-ops  bytes out
      kernel  4x3 * 3x8 > 4x8     1    96  100.0%      24  32 x 32    98.3k        128
      total                            96  100.0%      32             98.3k        128
      256 FLOPs: 192 in these products, 64 in other operations; 0 transcendental functions

    References:
      Yao et al., HAWQ-V3: Dyadic Neural Network Quantization, 2021: bit-operations are MACs times both widths. Baskin et
      al., UNIQ: Uniform Noise Injection for Non-Uniform Quantization of Neural Networks, 2018, add the accumulator's bits.
    """
    traced = trace(fn, shapes(params), *inputs)
    if compression is not None and state is None:
        compression = bound(compression, layouts_of(traced))
    leaves = stored(params, compression, state)
    by_site = _by_site(traced, leaves, _chosen(activation_bits, [site.name for site in traced.sites.values()]))
    counted = operations(traced.jaxpr.jaxpr)
    notes, size = _notes(traced, counted), _parameters(leaves)
    return Cost(by_site, size, counted.flops, counted.transcendentals, notes, counted.products)


def _by_site(traced: Traced, leaves: dict[str, Stored], activations: dict[str, int]) -> dict[str, SiteCost]:
    costs = {}
    for position, site in traced.sites.items():
        _, lhs, rhs, _ = traced.found.contractions[position]
        width = activations.get(site.name)
        lhs_bits, lhs_density = _operand(lhs, leaves, dtype_bits(site.lhs_dtype), width)
        rhs_bits, rhs_density = _operand(rhs, leaves, dtype_bits(site.rhs_dtype), width)
        held = sum(leaves[path].size for path in (site.param, *site.also) if path is not None)
        costs[site.name] = SiteCost(site, held, lhs_bits, rhs_bits, lhs_density * rhs_density)
    return costs


def _operand(origin: Origin, leaves: dict[str, Stored], own: int, activation: int | None) -> tuple[float, float]:
    """Return bits and density of an operand; ``own`` are the bits of its dtype."""
    if origin.level == DATA:
        return activation or own, 1.0
    held = [leaves[path] for path in origin.paths if origin.level == PARAMETER]
    if not (size := sum(each.size for each in held)):
        return own, 1.0
    return sum(each.size * (each.bits or own) for each in held) / size, sum(each.nonzero for each in held) / size


def _chosen(bits: ActivationBits, names: Sequence[str]) -> dict[str, int]:
    """Return the bits of activations by site; sites that no glob matches are missing."""
    if bits is None:
        return {}
    chosen: dict[str, int] = {}
    for pattern, width in (bits if isinstance(bits, Mapping) else {"**": bits}).items():
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise ConfigError(f"activation_bits: {width!r} for {pattern!r} is not a number of bits; give an integer from 1")
        chosen = dict.fromkeys(match(pattern, names), width) | chosen
    return chosen


def _parameters(leaves: dict[str, Stored]) -> int:
    inside = [leaf for path, leaf in leaves.items() if path.startswith("params/")]
    return sum(leaf.size for leaf in inside or leaves.values())


def _notes(traced: Traced, counted: Operations) -> dict[str, str]:
    notes = {}
    for primitive, times in counted.uncounted.items():
        missing = "products and operations" if primitive in traced.found.hidden.values() else "operations"
        notes[primitive] = f"its {missing} are not counted (runs: {times})"
    if counted.products:
        notes["dot_general"] = f"products that sum over no axis are no sites, but {counted.products} of the MACs"
    if counted.loops:
        notes["while"] = f"turns that only the data know count as one (loops: {counted.loops})"
    if counted.choices:
        notes["cond"] = f"every branch is counted, though only one is taken (choices: {counted.choices})"
    return notes
