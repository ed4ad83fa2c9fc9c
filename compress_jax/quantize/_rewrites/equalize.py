"""Cross-layer equalization: give both sides of a channel the same range of weights."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from compress_jax.core._leafwise import check_finite
from compress_jax.core.paths import flatten
from compress_jax.core.types import Leaves, ModelFn, Params, PyTree
from compress_jax.layerwise._result import Rewritten
from compress_jax.trace import sites
from compress_jax.trace._symmetry.scaling import Part, Scaling, scalings


def equalize(
    fn: ModelFn, params: Params, *inputs: PyTree, rounds: int = 20, tolerance: float = 1e-3
) -> Rewritten:
    r"""Rescale channels between kernels so that both sides use their ranges evenly.

    Channel j that kernels :math:`W_1` produce and :math:`W_2` read is scaled by
    :math:`s_j = \sqrt{r_{2j} / r_{1j}}` in the former and by its inverse in the latter,
    :math:`r_{1j}` and :math:`r_{2j}` being the largest magnitudes of the channel in each. That
    makes them equal, so that one scale for the whole tensor loses least. As most kernels are on
    both sides, this is repeated until nothing changes. The float function stays the same. Kernels
    with a scale for each output channel gain little.

    The pairs are found in the function's jaxpr (``trace.scaling``): through biases, relu, pooling,
    batch norms (mean and bias are scaled with them), gates, from values to the output projection of
    attention. Only kernels count for the ranges.

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays.
      inputs: one example of them; only shapes matter.
      rounds: at most so many passes over all pairs.
      tolerance: stop when no factor differs from 1 by more.

    Returns:
      ``Rewritten``: params of the same function. ``changed`` says which parameters each kernel
      shares a channel with, ``skipped`` why a kernel is in no pair.

    Raises:
      NonFiniteError: if a parameter holds NaN or infinity.

    Example:
      >>> import jax
      >>> params = {"a": jnp.array([[8.0, 0.5]]), "b": jnp.array([[2.0], [2.0]])}
      >>> result = equalize(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, jnp.ones((1, 1)))
      >>> result.params["a"].tolist(), result.params["b"].tolist()
      ([[4.0, 1.0]], [[4.0], [1.0]])

    References:
      Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019,
      arXiv:1906.04721, equation 11.
    """
    leaves, rebuild = flatten(params)
    for path, x in leaves.items():
        if jnp.issubdtype(x.dtype, jnp.floating):
            check_finite(path, x)
    kernels = {site.param for site in sites(fn, params, *inputs) if site.param is not None}
    # A norm's scale between two kernels could balance either one by itself: it is held, and only
    # what passes from kernel to kernel is found.
    first, _ = scalings(fn, params, *inputs)
    found, why = scalings(fn, params, *inputs, hold=_links(first, kernels))
    pairs = [(scaling, *_sides(scaling, kernels)) for scaling in found]
    pairs = [(scaling, one, other) for scaling, one, other in pairs if one and other]
    for _ in range(rounds):
        largest = 0.0
        for scaling, one, other in pairs:
            # In turn, as a kernel is in the pair before it and in the one after.
            factors = _factors(scaling, one, other, leaves)
            largest = max(largest, float(jnp.abs(jnp.log(factors)).max()))
            leaves |= scaling.apply(leaves, factors)
        if largest < tolerance:
            break
    changed: dict[str, tuple[str, ...]] = {}
    for scaling, one, other in pairs:
        for part in (*one, *other):
            others = (each.path for each in scaling.parts if each.path != part.path)
            changed[part.path] = tuple(dict.fromkeys((*changed.get(part.path, ()), *others)))
    rest = sorted(kernels - set(changed))
    skipped = {path: _reason(path, leaves[path].ndim, why) for path in rest}
    return Rewritten(rebuild(leaves), changed=changed, skipped=skipped)


def _links(found: Sequence[Scaling], kernels: set[str]) -> set[str]:
    """Return parameters between two kernels, such as a norm's scale, that could balance either.

    They are held fixed, so that factors pass from kernel to kernel.
    """
    powers: dict[str, set[int]] = {}
    for scaling in found:
        for part in scaling.parts:
            if part.path not in kernels:
                powers.setdefault(part.path, set()).add(part.power)
    return {path for path, own in powers.items() if min(own) < 0 < max(own)}


def _sides(scaling: Scaling, kernels: set[str]) -> tuple[list[Part], list[Part]]:
    """Return the kernels whose entries grow with the factors, and those whose shrink."""
    parts = [part for part in scaling.parts if part.path in kernels]
    return [part for part in parts if part.power > 0], [part for part in parts if part.power < 0]


def _factors(scaling: Scaling, one: list[Part], other: list[Part], leaves: Leaves) -> jax.Array:
    """Return the factors that make both sides' largest entries equal; 1 where a side is zero."""

    def largest(side: list[Part]) -> jax.Array:
        ranges = [scaling.largest(part, jnp.abs(leaves[part.path])) for part in side]
        return jnp.stack(ranges).max(0)  # [*stack, size]

    r1 = largest(one)
    r2 = largest(other)
    live = (r1 > 0) & (r2 > 0)
    ratio = jnp.where(live, r2, 1.0) / jnp.where(live, r1, 1.0)
    # The square root, if the powers are 1 and -1.
    return ratio ** (1 / (one[0].power - other[0].power))


def _reason(path: str, ndim: int, why: dict[tuple[str, int], str]) -> str:
    """Say why a kernel is in no pair."""
    reasons = dict.fromkeys(why[path, axis] for axis in range(ndim) if (path, axis) in why)
    text = ", ".join(reasons) or "only with norms or biases"
    return f"it shares no channel with another kernel: {text}"
