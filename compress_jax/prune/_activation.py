"""`activation`: channels scored by what is in them when data flow through the model."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.errors import NoMatchError
from compress_jax.prune.members import Importance, Member
from compress_jax.trace import Calibration, Site
from compress_jax.trace.matrix import why_not
from compress_jax.trace.met import met, summed_axes


def activation(calibration: Calibration, weighted: bool = False) -> Importance:
    r"""Score a channel by the activations in it where kernels read it, the mean of :math:`x^2`.

    Args:
      calibration: of `compress_jax.trace.calibrate` with ``reducers.moments()``.
      weighted: weigh each by the weights that read it, :math:`\sum_j w_{ij}^2 E[x_i^2]`: Wanda's score over a channel.

    Returns:
      The criterion. Members that no product sums over along their axis have no score, nor have depthwise kernels, nor what
      calibration did not reach at all; of a member that it reached in part (some experts), the rest counts as average.

    Raises:
      NoMatchError: when it scores, if the calibration is of another reducer.

    Example:
      >>> from compress_jax.trace import calibrate, reducers
      >>> batches = [jnp.array([[1.0, 2.0], [1.0, -4.0]])]
      >>> seen = calibrate(lambda p, x: x @ p["w"], reducers.moments(), {"w": jnp.ones((2, 1))}, batches)
      >>> activation(seen)(Member("w", 0, jnp.ones((2, 1)), (2, 1), jnp.asarray, True)).ravel().tolist()
      [1.0, 10.0]

    References:
      Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024 (Wanda, of single weights).
    """
    sites: dict[str, list[Site]] = {}
    for site in calibration.sites.values():
        for path in dict.fromkeys((site.param or "", *site.also)):
            sites.setdefault(path, []).append(site)

    def score(member: Member) -> jax.Array | None:
        found = [
            _over_parameter(site, _squares(calibration, site), member)
            for site in sites.get(member.path, [])
            if site.groups == 1
        ]
        reading = jnp.stack([each for each in found if each is not None] or [jnp.full(member.shape, jnp.nan)])
        if bool(jnp.isnan(reading).all()):
            return None
        mean = member.cut(_known(reading))
        return jnp.sum(mean * member.rows**2, 1) if weighted else mean.mean(1)

    return score


def _squares(calibration: Calibration, site: Site) -> jax.Array:
    """Return the mean squares of a site's input, ``[*loops, *batch, k]``; NaN where it never ran."""
    moments: Any = calibration[site.name]
    moments = moments.get("input") if isinstance(moments, dict) else None
    if not hasattr(moments, "variance"):
        raise NoMatchError(f"the calibration of {site.name!r} has no moments; calibrate with trace.reducers.moments()")
    return moments.variance + jnp.square(moments.mean)


def _over_parameter(site: Site, squares: jax.Array, member: Member) -> jax.Array | None:
    """Spread mean squares over the shape of the parameter that reads them, NaN beside; None if none is summed there."""
    values: jax.Array | None = None
    for piece in site.pieces if why_not(site) is None else ():
        answer = met(site, piece, squares, jnp.nanmean) if piece.path == member.path else ""
        if isinstance(answer, str):
            continue
        box, form, own = answer
        if member.axis not in {box.of[axis] for axis in summed_axes(form)}:
            continue
        n = math.prod(form.shape) // own.size
        every = form.stored(jnp.broadcast_to(own[..., None], (*own.shape, n)))
        values = box.put(jnp.full(member.shape, jnp.nan) if values is None else values, every)
    return values


def _known(readings: jax.Array) -> jax.Array:
    """Return the mean of all readings of each entry; what was never read counts as an average one."""
    seen = ~jnp.isnan(readings)
    total, count = jnp.where(seen, readings, 0).sum(0), seen.sum(0).astype(jnp.float32)
    average = total.sum() / jnp.maximum(count.sum(), 1)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), average)
