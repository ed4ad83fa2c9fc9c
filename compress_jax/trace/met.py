"""Statistics of a site's input channels, laid out as the parameter that they meet."""

import math
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp

from compress_jax.trace.box import Box
from compress_jax.trace.matrix import MatrixForm, laid, why_not
from compress_jax.trace.site import Axes, Site
from compress_jax.trace.strided import Piece


def met(
    site: Site, piece: Piece, channels: jax.Array, fold: Callable[..., jax.Array]
) -> tuple[Box, MatrixForm, jax.Array] | str:
    """Return what each entry of a part of a parameter meets, by a statistic of the site's input channels.

    Args:
      site: where the parameter is used.
      piece: the part, one of ``site.pieces``.
      channels: ``[*loops, *batch, channels]``, as the reducers of channels keep it.
      fold: ``(x, axes) -> x`` over what does not run along the parameter, such as ``jnp.max``.

    Returns:
      ``(box, form, array)``: which part it is, its matrices, and the statistic ``[matrices, k]``; or why it cannot be told.

    Example:
      >>> from compress_jax.trace import sites
      >>> (site,) = sites(lambda p, x: x[:, 1:] @ p["w"][:2], {"w": jnp.ones((3, 4))}, jnp.ones((5, 3)))
      >>> box, _, values = met(site, site.pieces[0], jnp.array([7.0, 8.0]), jnp.max)
      >>> box.starts, box.sizes, values.tolist()
      ((0, 0), (2, 4), [[7.0, 8.0]])
    """
    if reason := why_not(site):
        return reason
    answer = laid(site, piece)
    if isinstance(answer, str):
        return answer
    if site.kind == "conv" and site.operand == "lhs":
        return "it is what a convolution's kernel slides over"
    box, form, place = answer
    x = fold(channels, place.added) if place.added else channels
    x = x[tuple(slice(*span) for span in place.turns)]
    lead = len(place.turns)
    repeated = tuple(lead + i for i, span in enumerate(place.batch) if span is None)
    x = x[(*(slice(None),) * lead, *(slice(None) if span is None else slice(*span) for span in place.batch))]
    x = fold(x, repeated) if repeated else x
    x = _windows(site, x) if site.kind == "conv" else x
    sizes, own = [size for size, _ in place.summed], [slice(*span) for _, span in place.summed]
    x = x.reshape(-1, *sizes)[(slice(None), *own)]
    return box, form, x.reshape(x.shape[0], -1)


def _windows(site: Site, x: jax.Array) -> jax.Array:
    """Repeat the channels of a convolution's input along its window, ``[..., groups, *(window and channels)]``."""
    contracting, into = site.contracting[1], site.params["dimension_numbers"].rhs_spec[1]
    x = x.reshape(*x.shape[:-1], site.groups, x.shape[-1] // site.groups)
    shape = [site.rhs_shape[axis] for axis in contracting]
    x = x.reshape(*x.shape[:-1], *(n if axis == into else 1 for axis, n in zip(contracting, shape, strict=True)))
    return jnp.broadcast_to(x, (*x.shape[: x.ndim - len(shape)], *shape))


def beside(box: Box, form: MatrixForm, values: jax.Array) -> jax.Array:
    """Return a statistic ``[matrices, k]`` in an array that broadcasts against the parameter; 0 beside the box.

    Args:
      box: the part of the parameter.
      form: its matrices.
      values: the statistic.

    Returns:
      float32, axes of size 1 where nothing varies.
    """
    if form.groups == 1 and box.whole:
        kept = kept_axes(form)
        small = replace(form, shape=tuple(1 if axis in kept else n for axis, n in enumerate(form.shape)))
        return small.stored(values[..., None])
    n = math.prod(form.shape) // values.size
    every = form.stored(jnp.broadcast_to(values[..., None], (*values.shape, n)))
    return box.put(jnp.zeros(box.shape, every.dtype), every)


def kept_axes(form: MatrixForm) -> Axes:
    """Return the axes of an array that are neither stacked nor summed over: those of its outputs."""
    return form.order[_ends(form)[1] :]


def summed_axes(form: MatrixForm) -> Axes:
    """Return the axes of an array that are summed over."""
    start, end = _ends(form)
    return form.order[start:end]


def _ends(form: MatrixForm) -> tuple[int, int]:
    """Return where in the order the axes that are summed over begin and end; those of size 1 count to what they follow."""
    sizes = [math.prod(form.shape[axis] for axis in form.order[:i]) for i in range(len(form.order) + 1)]
    last = len(sizes) - 1
    start = last - sizes[::-1].index(form.batch)
    return start, max(start, sizes.index(form.batch * form.k))
