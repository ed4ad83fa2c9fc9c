"""List every contraction of a function and the parameter that feeds it."""

from collections.abc import Callable
from typing import Any

from compress_jax.core.paths import flatten
from compress_jax.trace.site import Site
from compress_jax.trace.traced import trace


def sites(fn: Callable[..., Any], params: Any, *inputs: Any) -> list[Site]:
    """List every contraction in ``fn(params, *inputs)``: matrix products, convolutions, ragged products.

    The function is traced, not run. A parameter is followed through transposes, reshapes, casts, slices, gathers of stacked
    layers, masks and fake quantization, and into jit, remat, scan, while, cond, custom derivatives and shard_map.

    Args:
      fn: a pure function of params and inputs.
      params: tree of arrays or ``ShapeDtypeStruct``: Linen variables, an NNX state, any pytree.
      inputs: trees of arrays or ``ShapeDtypeStruct``.

    Returns:
      The sites in program order. `unseen` lists what they do not show.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"up": {"kernel": jnp.ones((3, 8))}, "down": {"kernel": jnp.ones((8, 2))}}
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
      >>> [(site.name, site.operand, site.param_axes, site.macs) for site in sites(fn, params, jnp.ones((4, 3)))]
      [('up/kernel', 'rhs', (0,), 96), ('down/kernel', 'rhs', (0,), 64)]
    """
    return list(trace(fn, params, *inputs).sites.values())


def unseen(fn: Callable[..., Any], params: Any, *inputs: Any) -> dict[str, str]:
    """Say what `sites` does not show: parameters of rank 2 or more that nothing contracts, and code nobody looks into.

    Args:
      fn: as for `sites`.
      params: as for `sites`.
      inputs: as for `sites`.

    Returns:
      ``{path or primitive: reason}``; empty if every such parameter has a site.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"table": jnp.ones((10, 4)), "kernel": jnp.ones((4, 2))}
      >>> unseen(lambda params, tokens: params["table"][tokens] @ params["kernel"], params, jnp.array([1, 2]))
      {'table': 'rows of it are looked up (gather); no product uses it'}
    """
    traced = trace(fn, params, *inputs)
    contracted = {path for site in traced.sites.values() for path in (site.param, *site.also)}
    tables = set(traced.found.lookups.values())
    left = [path for path, x in flatten(params)[0].items() if len(x.shape) > 1 and path not in contracted]
    looked_up = "rows of it are looked up (gather); no product uses it"
    other = {path: f"{how}; no contraction uses it" for path, how in traced.found.otherwise.items()}
    hidden = {
        f"{primitive} at {'/'.join(map(str, position))}": "it contracts inside, where the interpreter does not look"
        for position, primitive in traced.found.hidden.items()
    }
    return {path: looked_up if path in tables else other.get(path, "no contraction uses it") for path in left} | hidden
