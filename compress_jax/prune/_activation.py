"""`activation`: channels scored by what is in them when data flow through the model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import NoMatchError
from compress_jax.prune.members import Importance, Member
from compress_jax.trace import Calibration, Site


def activation(calibration: Calibration, weighted: bool = False) -> Importance:
    r"""Score a channel by the activations in it where kernels read it, the mean of :math:`x^2`.

    Args:
      calibration: of `compress_jax.trace.calibrate` with ``reducers.moments()``.
      weighted: weigh each by the weights that read it, :math:`\sum_j w_{ij}^2 E[x_i^2]`: Wanda's score over a channel.

    Returns:
      The criterion. Members that no product sums over along their axis have no score, nor have depthwise kernels.

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
        sites.setdefault(site.param or "", []).append(site)

    def score(member: Member) -> jax.Array | None:
        reading = [
            site for site in sites.get(member.path, []) if site.groups == 1 and member.axis in (site.param_axes or ())
        ]
        if not reading:
            return None
        values = [member.cut(_over_parameter(site, _squares(calibration, site), member)) for site in reading]
        mean = jnp.mean(jnp.stack(values), 0)
        return jnp.sum(mean * member.rows**2, 1) if weighted else mean.mean(1)

    return score


def _squares(calibration: Calibration, site: Site) -> jax.Array:
    """Return the mean squares of a site's input, ``[*stacked, *batch, k]``."""
    moments: Any = calibration[site.name]
    moments = moments.get("input") if isinstance(moments, dict) else None
    if not hasattr(moments, "variance"):
        raise NoMatchError(f"the calibration of {site.name!r} has no moments; calibrate with trace.reducers.moments()")
    return moments.variance + jnp.square(moments.mean)


def _over_parameter(site: Site, squares: jax.Array, member: Member) -> jax.Array:
    """Spread mean squares over the shape of the parameter that reads them: the same for all its outputs."""
    summed = (member.axis,) if site.kind == "conv" else site.param_axes or ()
    around = (*site.stack_axes, *(site.batch_axes or ()))
    sizes = [member.shape[axis] for axis in summed]
    if squares.ndim != 1 + len(around):  # turns of a loop that share the kernel
        around, squares = (), squares.reshape(-1, squares.shape[-1]).mean(0)
    order = (*around, *summed)
    values = squares.reshape(*squares.shape[:-1], *sizes)
    values = jnp.transpose(values, np.argsort(order).tolist())
    full = [n if axis in order else 1 for axis, n in enumerate(member.shape)]
    return jnp.broadcast_to(values.reshape(full), member.shape)
