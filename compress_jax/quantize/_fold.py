"""Batch-norm folding: the scale of a batch norm moves into the kernel before it, its shift into its bias."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from compress_jax.core.compression import Params
from compress_jax.core.paths import flatten
from compress_jax.quantize.folding import Folded
from compress_jax.trace import sites
from compress_jax.trace.batch_norms import BatchNorm, batch_norms
from compress_jax.trace.site import Site


def fold_batch_norm(fn: Callable[..., Any], params: Params, *inputs: Any) -> Folded:
    r"""Fold batch norms into the kernels before them, so that what is quantized is the kernel that inference applies.

    With :math:`g = \gamma / \sqrt{v + \epsilon}` the kernel becomes :math:`W g`, the norm's bias
    :math:`\beta + (c - \mu) g`, c being the layer's own bias, and what is left of the norm is the identity: mean 0, variance
    :math:`1 - \epsilon`, scale 1. So the same function runs the params, and is the float function it was. A norm without a
    bias keeps :math:`(\mu - c) g` as its mean.

    Which norms follow which kernels is read off the function's jaxpr, so it must be the one of evaluation, in which mean and
    variance are among ``params``.

    Args:
      fn: a pure function of ``(params, *inputs)``, in evaluation mode.
      params: tree of arrays, running statistics included (``{"params": ..., "batch_stats": ...}``).
      inputs: one example of them; only shapes matter.

    Returns:
      `Folded`: params of the same function; which kernel took up which norm; kernels that took up none and why.

    Example:
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
    norms = batch_norms(fn, params, *inputs)
    taken: set[str] = set()
    folded: dict[str, tuple[str, ...]] = {}
    skipped: dict[str, str] = {}
    for site in sites(fn, params, *inputs):
        if site.param is None:
            continue
        norm = norms.get(site.name)
        if (reason := _why_not(site, norm, leaves, taken)) or norm is None:
            skipped[site.param] = reason or ""
            continue
        leaves |= _fold(site, norm, leaves)
        folded[site.param] = _paths(norm)
        taken |= {site.param, *folded[site.param]}
    return Folded(rebuild(leaves), folded, skipped)


def _paths(norm: BatchNorm) -> tuple[str, ...]:
    return tuple(path for path in (norm.mean, norm.variance, norm.scale, norm.bias, norm.before) if path is not None)


def _why_not(site: Site, norm: BatchNorm | None, leaves: dict[str, Any], taken: set[str]) -> str | None:
    if norm is None:
        return "no batch norm with fixed statistics is all that follows it"
    if site.uses or site.also or taken & {site.param, *_paths(norm)}:
        return "it, or its norm, is used more than once"
    if site.param_axes is None or site.batch_axes is None or None in site.stack_loops:
        return "a reshape mixes the axes that are summed over with others"
    shape = leaves[site.param or ""].shape
    axes = _axes(site, len(shape))
    if any(leaves[path].shape != tuple(shape[axis] for axis in axes) for path in _paths(norm)):
        return "its norm's statistics do not have the shape of its outputs"
    return None


def _axes(site: Site, ndim: int) -> tuple[int, ...]:
    """Return the axes of a kernel that its norm's parameters have: those of loops, then those of outputs."""
    kept = [axis for axis in range(ndim) if axis not in (*(site.param_axes or ()), *site.stack_axes)]
    return (*site.stack_axes, *kept)


def _fold(site: Site, norm: BatchNorm, leaves: dict[str, Any]) -> dict[str, Any]:
    assert site.param is not None
    old = {path: leaves[path].astype(jnp.float32) for path in (site.param, *_paths(norm))}
    gain = 1 / jnp.sqrt(old[norm.variance] + norm.epsilon)
    gain = gain * old[norm.scale] if norm.scale else gain
    kernel = old[site.param]
    axes = _axes(site, kernel.ndim)
    spread = jnp.expand_dims(gain, tuple(range(gain.ndim, kernel.ndim)))
    order = (*axes, *(axis for axis in range(kernel.ndim) if axis not in axes))
    new = {site.param: kernel * jnp.transpose(spread, tuple(order.index(axis) for axis in range(kernel.ndim)))}
    new[norm.variance] = jnp.full_like(gain, 1 - norm.epsilon)
    shift = -old[norm.mean] * gain
    if norm.scale:
        new[norm.scale] = jnp.ones_like(gain)
    if norm.before:
        shift = shift + old[norm.before] * gain
        new[norm.before] = jnp.zeros_like(gain)
    new[norm.mean] = jnp.zeros_like(gain) if norm.bias else -shift
    if norm.bias:
        new[norm.bias] = old[norm.bias] + shift
    return {path: x.astype(leaves[path].dtype) for path, x in new.items()}
