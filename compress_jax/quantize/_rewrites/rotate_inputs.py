"""Rotate what enters chosen kernels, at run time, where nothing before can take the rotation."""

import jax
import jax.numpy as jnp

from compress_jax.core.errors import NoMatchError, ShapeError
from compress_jax.core.paths import Patterns, flatten, matches
from compress_jax.core.types import ModelFn, Params, PyTree
from compress_jax.layerwise._result import Rewritten
from compress_jax.quantize._rewrites.rotate import rotation
from compress_jax.trace._jaxpr.find_sites import sites
from compress_jax.trace._jaxpr.rewrite import rewrite
from compress_jax.trace._jaxpr.site import Site


def rotate_inputs(
    fn: ModelFn, params: Params, *inputs: PyTree, key: jax.Array, pattern: Patterns
) -> tuple[ModelFn, Rewritten]:
    r"""Multiply the inputs of kernels by an orthogonal matrix, and the kernels by its inverse.

    :math:`x W = (x Q) (Q^\top W)`. Unlike `rotate` it works behind an activation function, as
    before the second kernel of a perceptron, and costs a product with Q in every call. Kernels of
    one width share one Q, a random Hadamard matrix times one for an odd factor, see `rotate`.

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays.
      inputs: one example of them; only shapes matter.
      key: typed PRNG key.
      pattern: a glob, or several, over names of sites.

    Returns:
      ``(new fn, Rewritten)``: the new function of the new params is the old one of the old.

    Raises:
      NoMatchError: if no site matches.
      ShapeError: if a chosen site is no product of activations with one contracted axis of a
        parameter, or its parameter is used elsewhere too.

    Example:
      >>> fn = lambda p, x: jax.nn.relu(x) @ p["down"]
      >>> p = {"down": jnp.array([[9.0, 0.1], [0.2, 0.3]])}
      >>> x = jnp.array([[8.0, 0.5]])
      >>> new, result = rotate_inputs(fn, p, x, key=jax.random.key(0), pattern="down")
      >>> result.changed, bool(jnp.allclose(new(result.params, x), fn(p, x)))
      ({'down': ('down',)}, True)

    References:
      Ashkboos et al., "QuaRot", 2024, arXiv:2404.00456, section 4, stage 1c.
    """
    leaves, rebuild = flatten(params)
    changed = {}
    found = sites(fn, params, *inputs)
    for site in found:
        if matches(pattern, site.name):
            path, axis = _kernel_axis(site)
            changed[site.name] = (path,)
            leaves[path] = _turned(jnp.asarray(leaves[path]), axis, key)
    if not changed:
        names = ", ".join(site.name for site in found)
        raise NoMatchError(f"pattern {pattern!r} matches no site; there are: {names}")

    def rule(site: Site, lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
        index = site.inputs["input"]
        operands = [lhs, rhs]
        operands[index] = _turned(operands[index], site.contracting[index][0], key)
        return operands[0], operands[1]

    return rewrite(fn, rule, tuple(changed)), Rewritten(rebuild(leaves), changed=changed)


def _kernel_axis(site: Site) -> tuple[str, int]:
    """Return the kernel of a site and its contracted axis."""
    axes = site.param_axes or ()
    if site.kind != "dot" or site.param is None or len(axes) != 1 or site.also or site.uses:
        raise ShapeError(
            f"site {site.name!r} is no product with one contracted axis of a parameter that is "
            "used there alone; leave it out of the pattern"
        )
    if len(site.contracting[0]) != 1:
        raise ShapeError(f"site {site.name!r} sums over {len(site.contracting[0])} axes, not one")
    return site.param, axes[0]


def _turned(x: jax.Array, axis: int, key: jax.Array) -> jax.Array:
    """Multiply one axis by the rotation of its size."""
    with jax.ensure_compile_time_eval():
        q = rotation(x.shape[axis], key)
    rows = jnp.moveaxis(x, axis, -1).astype(jnp.promote_types(x.dtype, jnp.float32))
    turned = jnp.matmul(rows, jnp.asarray(q, rows.dtype), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(turned, -1, axis).astype(x.dtype)
