"""What each axis of each parameter is for, read from the products it enters: the layouts that compressions work by."""

from collections.abc import Callable
from typing import Any

from compress_jax.core.axes import Axes
from compress_jax.core.compression import Compression, bound
from compress_jax.trace.layouts_of_sites import layouts_of_sites
from compress_jax.trace.traced import Traced, trace


def bind(compression: Compression, fn: Callable[..., Any], params: Any, *inputs: Any) -> Compression:
    """Return the same compression with the layout of every leaf read from the function that uses it.

    Scales by channel then follow the outputs of each product, whichever axis they are stored on; groups and ``n_m`` run
    along what is summed over; a leaf that holds several layers or experts is compressed as each of them alone would be.

    Args:
      compression: any method, or methods combined.
      fn: a pure function of params and inputs. It is traced, not run.
      params: the tree the compression is used on: arrays or ``ShapeDtypeStruct``.
      inputs: trees of arrays or ``ShapeDtypeStruct``.

    Returns:
      The Compression; use it, not the unbound one, for `init` and everything after. ``cj.coverage`` prints the axes.

    Raises:
      ArgumentError: if a function of the compression was replaced after it was made.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"weight": jnp.array([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])}  # stored [out, in]
      >>> int8 = cj.quantize.uniform(8, granularity="channel")
      >>> int8.init(params).fixed["weight"]["scale"].shape
      (1, 2)
      >>> int8 = cj.bind(int8, lambda params, x: x @ params["weight"].T, params, jnp.ones((5, 2)))
      >>> int8.init(params).fixed["weight"]["scale"].shape
      (3, 1)
    """
    return bound(compression, layouts(fn, params, *inputs))


def layouts(fn: Callable[..., Any], params: Any, *inputs: Any) -> dict[str, Axes]:
    """Return what each axis of each parameter is for, as the products that it enters tell.

    Args:
      fn: a pure function of params and inputs. It is traced, not run.
      params: tree of arrays or ``ShapeDtypeStruct``.
      inputs: trees of arrays or ``ShapeDtypeStruct``.

    Returns:
      ``{path: Axes}`` of every leaf. Where no product uses a leaf, or what is done to it on its way cannot be followed, its
      ``source`` is ``"convention"``: outputs last. ``note`` says why, or that its uses disagree.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"layers": jnp.ones((12, 4, 4)), "bias": jnp.ones((12, 4)), "table": jnp.ones((9, 4))}
      >>> def fn(params, tokens):
      ...     step = lambda x, layer: (x @ layer["layers"] + layer["bias"], None)
      ...     x, _ = jax.lax.scan(step, params["table"][tokens], {k: params[k] for k in ("layers", "bias")})
      ...     return x @ params["table"].T
      >>> {path: axes.letters for path, axes in layouts(fn, params, jnp.array([1, 2])).items()}
      {'bias': 'si', 'layers': 'sio', 'table': 'oi'}
    """
    return layouts_of(trace(fn, params, *inputs))


def layouts_of(traced: Traced) -> dict[str, Axes]:
    """Return `layouts` of a function that is traced already."""
    return layouts_of_sites(traced.sites.values(), traced.params, traced.found.stacked)
