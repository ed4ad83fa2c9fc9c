"""Batch-norm folding: the scale of a batch norm moves into the kernel before it, its shift into its bias."""

from collections.abc import Callable
from typing import Any

from compress_jax.core.compression import Params
from compress_jax.core.paths import flatten
from compress_jax.quantize.folding import Folded
from compress_jax.quantize.folding_norms import Refused, folded_map
from compress_jax.trace.affine_maps import AffineMap, affine_maps
from compress_jax.trace.affine_walk import Walk, walk
from compress_jax.trace.site import Site
from compress_jax.trace.traced import trace


def fold_batch_norm(fn: Callable[..., Any], params: Params, *inputs: Any) -> Folded:
    r"""Fold batch norms into the kernels before them, so that what is quantized is the kernel that inference applies.

    With :math:`g = \gamma / \sqrt{v + \epsilon}` the kernel becomes :math:`W g`, the norm's bias
    :math:`\beta + (c - \mu) g`, c being the layer's own bias, and what is left of the norm is the identity: mean 0, variance
    :math:`1 - \epsilon`, scale 1. So the same function runs the params, and is the float function it was. A norm without a
    bias keeps :math:`(\mu - c) g` as its mean.

    Which norms follow which kernels is read off the function's jaxpr, so it must be the one of evaluation, in which mean and
    variance are among ``params``. Any map :math:`y a + b` of a layer's outputs counts, a and b made of parameters, however
    it is written: ``(y - mean) * (gain * rsqrt(variance + eps)) + bias`` (Flax, Haiku), ``y * inv + (bias - mean * inv)``
    (Keras), a division by a square root, one without gain, bias or mean. It is folded if it is all that happens to the
    layer's outputs, and all that its parameters and the kernel are used for.

    Args:
      fn: a pure function of ``(params, *inputs)``, in evaluation mode.
      params: tree of arrays, running statistics included (``{"params": ..., "batch_stats": ...}``).
      inputs: one example of them; only shapes matter.

    Returns:
      `Folded`: params of the same function; which kernel took up which norm; kernels that took up none and why.

    Example:
      >>> import jax.numpy as jnp
      >>> p = {"kernel": jnp.ones((1, 2)), "mean": jnp.ones(2), "var": jnp.full(2, 3.0), "gain": jnp.full(2, 4.0)}
      >>> def fn(p, x):
      ...     return (x @ p["kernel"] - p["mean"]) / jnp.sqrt(p["var"] + 1.0) * p["gain"]
      >>> result = fold_batch_norm(fn, p, jnp.ones((1, 1)))
      >>> {name: x.reshape(-1).tolist() for name, x in result.params.items()}
      {'gain': [1.0, 1.0], 'kernel': [2.0, 2.0], 'mean': [2.0, 2.0], 'var': [0.0, 0.0]}

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018,
      arXiv:1712.05877, equation 14.
    """
    leaves, rebuild = flatten(params)
    traced = trace(fn, params, *inputs)
    found = walk(traced)
    folded: dict[str, tuple[str, ...]] = {}
    skipped: dict[str, str] = {}
    for site in traced.sites.values():
        if site.param is None or site.param in folded:
            continue
        try:
            new, folded[site.param] = _best(found, site, leaves)
            leaves |= new
        except Refused as refused:
            skipped.setdefault(site.param, str(refused))
    return Folded(rebuild(leaves), folded, skipped)


def _best(found: Walk, site: Site, leaves: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fold the longest scale and shift that can be; raise why even that of the whole norm cannot be."""
    maps = [each for each in affine_maps(found, site) if each.made.scale.paths & leaves.keys()]
    if (why := _kernel_elsewhere(found, site)) or not maps:
        raise Refused(why or _no_norm(found, site))
    reasons = []
    for each in maps[::-1]:
        try:
            _check_uses(found, each)
            new, paths = folded_map(each, found.arrays, leaves)
            if fixed := sorted(found.fixed & new.keys()):
                raise Refused(f"its norm depends on the present value of {fixed[0]!r}, which would change")
            return new, paths
        except Refused as refused:
            reasons.append(refused)
    raise reasons[0]


def _kernel_elsewhere(found: Walk, site: Site) -> str | None:
    uses = sorted(use.name for use in found.uses.get(site.param or "", ()) if use.position != site.position)
    if uses:
        return f"it is used elsewhere too: by {', '.join(dict.fromkeys(uses))}"
    if site.position not in found.kernels:
        return "the site does not see it as it is stored, or contracts in a way that is not followed"
    return None


def _no_norm(found: Walk, site: Site) -> str:
    """Say what happens to what a site gives, if that is no scale by parameters."""
    maps = affine_maps(found, site)
    uses = found.goes.get(maps[-1].made.key if maps else site.position, ())
    names = ", ".join(sorted(use.name for use in uses)) or "nothing"
    after = "its outputs, shifted," if maps else "its outputs"
    what = f"{after} are used {len(uses)} times, by {names}" if len(uses) > 1 else f"{after} are followed by {names}"
    return f"no batch norm with fixed statistics is all that follows it: {what}"


def _check_uses(found: Walk, each: AffineMap) -> None:
    """Refuse a map whose parameters are used for anything beside it."""
    for path in sorted(each.made.scale.paths | each.made.shift.paths):
        others = sorted(use.name for use in found.uses.get(path, ()) if use.position not in each.steps or not use.step)
        if others:
            raise Refused(f"{path!r}, of the norm that follows it, is used elsewhere too: by {others[0]}")
