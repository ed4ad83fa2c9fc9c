"""Criteria that score the channels of a group, for `shrink`.

`shrink` reduces the scores of all parameters of a group to one score for each channel. A criterion
is any function ``(Member) -> [size] or None``; None if it has no score for a parameter. Criteria on
gradients start from `gradients` or `squared_gradients`.
"""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from compress_jax.core.errors import DataError, NoMatchError
from compress_jax.core.paths import Patterns, flatten, matches
from compress_jax.core.types import Batch, Params, PyTree, Scalar
from compress_jax.layerwise._problem import channel_statistic, summed_axes, why_not
from compress_jax.prune._channels.scores import Importance, Member, magnitude
from compress_jax.trace import Calibration, Site

__all__ = [
    "Importance",
    "Member",
    "activation",
    "fpgm",
    "gradients",
    "magnitude",
    "norm_scale",
    "second_order",
    "squared_gradients",
    "taylor",
]


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)


def norm_scale(pattern: Patterns = "**/scale") -> Importance:
    r"""Score a channel by the scales of its normalization layers, :math:`|\gamma|`.

    This is network slimming.

    Args:
      pattern: globs over the paths of scales.

    Returns:
      The criterion. Groups without such a scale have no score and stay whole; the table lists them.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> gamma = jnp.array([[-2.0], [0.5]])
      >>> scale = cj.prune.importance.Member("norm/scale", 0, gamma, (2,), jnp.asarray, False)
      >>> cj.prune.importance.norm_scale()(scale).tolist()
      [2.0, 0.5]

    References:
      Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017.
    """

    def score(member: Member) -> jax.Array | None:
        return jnp.sum(jnp.abs(member.rows), 1) if matches(pattern, member.path) else None

    return score


def taylor(gradients: PyTree, joint: bool = False) -> Importance:
    r"""Score a channel by the first-order effect of its removal on the loss.

    .. math:: \sum_i |g_i w_i|

    Args:
      gradients: the gradient of the loss, a tree like the params or ``{path: gradient}`` from
        `gradients`. Parameters that are not in it have no score.
      joint: use :math:`|\sum_i g_i w_i|`, the effect of removing all entries at once.

    Returns:
      The criterion.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> importance = cj.prune.importance
      >>> w = importance.Member("w", 0, jnp.array([[2.0, 1.0]]), (1, 2), jnp.asarray, True)
      >>> g = {"w": jnp.array([[1.0, -2.0]])}
      >>> importance.taylor(g)(w).tolist(), importance.taylor(g, joint=True)(w).tolist()
      ([4.0], [0.0])

    References:
      Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, equation 8.
    """
    given = flatten(gradients)[0]

    def score(member: Member) -> jax.Array | None:
        if member.path not in given:
            return None
        product = member.rows * member.cut(given[member.path])  # [size, n]
        return jnp.abs(product.sum(1)) if joint else jnp.abs(product).sum(1)

    return score


def second_order(curvature: PyTree) -> Importance:
    r"""Score a channel by the second-order effect of its removal on the loss, at a minimum.

    .. math:: \frac12 \sum_i h_i w_i^2

    Args:
      curvature: the diagonal of the Hessian, a tree like the params or ``{path: array}``: from
        `squared_gradients`, or another estimate. Negative entries keep their sign.

    Returns:
      The criterion.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> importance = cj.prune.importance
      >>> w = importance.Member("w", 0, jnp.array([[2.0, 1.0]]), (1, 2), jnp.asarray, True)
      >>> importance.second_order({"w": jnp.array([[1.0, 4.0]])})(w).tolist()
      [4.0]

    References:
      LeCun, Denker and Solla, "Optimal Brain Damage", 1989, equation 5.
      Liu et al., "Group Fisher Pruning for Practical Network Compression", 2021.
    """
    given = flatten(curvature)[0]

    def score(member: Member) -> jax.Array | None:
        if member.path not in given:
            return None
        return 0.5 * jnp.sum(member.cut(given[member.path]) * member.rows**2, 1)

    return score


def fpgm() -> Importance:
    r"""Score a channel by its distance to all other channels, :math:`\sum_j \|w_i - w_j\|_2`.

    A filter near the geometric median of its layer is redundant, however large it is.

    Returns:
      The criterion.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> rows = jnp.array([[0.0], [1.0], [5.0]])
      >>> w = cj.prune.importance.Member("w", 0, rows, (3, 1), jnp.asarray, True)
      >>> cj.prune.importance.fpgm()(w).tolist()
      [6.0, 5.0, 9.0]

    References:
      He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
      Acceleration", 2019.
    """

    def score(member: Member) -> jax.Array | None:
        if not member.contracted:
            return None

        def distances(row: jax.Array) -> jax.Array:
            return jnp.sqrt(jnp.sum((member.rows - row[None]) ** 2, 1))  # [size]

        # A loop over channels: all differences at once are [size, size, n].
        return jax.lax.map(distances, member.rows).sum(0)

    return score


def gradients(
    loss: Callable[..., Scalar], params: Params, batches: Iterable[Batch]
) -> dict[str, jax.Array]:
    r"""Return the mean gradient over batches, :math:`\frac1n \sum_b \nabla L_b`.

    Args:
      loss: ``(params, *batch) -> scalar``.
      params: tree of arrays; those that are not floating-point have no gradient.
      batches: the arguments of the loss after params; a tuple is several arguments.

    Returns:
      ``{path: float32 array}``, for `taylor`.

    Raises:
      DataError: if there is no batch.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> def loss(p, x): return (p["w"] * x).sum()
      >>> batches = [jnp.array([1.0, 3.0]), jnp.array([3.0, -3.0])]
      >>> cj.prune.importance.gradients(loss, {"w": jnp.ones(2)}, batches)
      {'w': Array([2., 0.], dtype=float32)}
    """
    return _mean(loss, params, batches, lambda g: g)


def squared_gradients(
    loss: Callable[..., Scalar], params: Params, batches: Iterable[Batch]
) -> dict[str, jax.Array]:
    r"""Return the mean squared gradient over batches, :math:`\frac1n \sum_b (\nabla L_b)^2`.

    This is the diagonal of the empirical Fisher matrix up to a factor.

    Args:
      loss: ``(params, *batch) -> scalar``; batches of one example give the Fisher matrix itself.
      params: as of `gradients`.
      batches: as of `gradients`.

    Returns:
      ``{path: float32 array}``, for `second_order`.

    Raises:
      DataError: if there is no batch.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> def loss(p, x): return (p["w"] * x).sum()
      >>> batches = [jnp.array([1.0]), jnp.array([3.0])]
      >>> cj.prune.importance.squared_gradients(loss, {"w": jnp.ones(1)}, batches)
      {'w': Array([5.], dtype=float32)}
    """
    return _mean(loss, params, batches, jnp.square)


def _mean(
    loss: Callable[..., Scalar],
    params: Params,
    batches: Iterable[Batch],
    of: Callable[[jax.Array], jax.Array],
) -> dict[str, jax.Array]:
    """Return the mean over batches of a function of the gradient."""
    leaves, rebuild = flatten(params)
    trained = {
        path: leaf
        for path, leaf in leaves.items()
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    }

    # One program for all batches; leaves that have no gradient are constants of it.
    @jax.jit
    def add(
        total: dict[str, jax.Array], trained: dict[str, jax.Array], batch: tuple[Batch, ...]
    ) -> dict[str, jax.Array]:
        found = jax.grad(lambda trained: loss(rebuild({**leaves, **trained}), *batch))(trained)
        return {path: total[path] + of(g.astype(jnp.float32)) for path, g in found.items()}

    total = {path: jnp.zeros(jnp.shape(leaf), jnp.float32) for path, leaf in trained.items()}
    count = 0
    for batch in batches:
        total = add(total, trained, batch if isinstance(batch, tuple) else (batch,))
        count += 1
    if not count:
        raise DataError("there is no batch to take gradients of")
    return {path: each / count for path, each in total.items()}


def activation(calibration: Calibration, weighted: bool = False) -> Importance:
    r"""Score a channel by its activations at the kernels that read it, the mean of :math:`x^2`.

    Channels that no kernel reads, as queries meet keys alone, are scored at the kernels that make
    them: :math:`\sum_i w_{ij}^2 E[x_i^2]`, the mean square of what comes out if inputs are
    uncorrelated.

    Args:
      calibration: from `compress_jax.trace.calibrate` with ``reducers.moments()``.
      weighted: multiply by the weights that read the channel,
        :math:`\sum_j w_{ij}^2 E[x_i^2]`: Wanda's score over a channel.

    Returns:
      The criterion. A member has no score if another one is read, and no product sums over its
      axis; if it is a depthwise kernel; or if no calibration batch reached it. If only a part of
      it was reached (some experts), the rest gets the average.

    Raises:
      NoMatchError: when it scores, if the calibration is of another reducer.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> def fn(p, x): return x @ p["w"]
      >>> params = {"w": jnp.ones((2, 1))}
      >>> batches = [jnp.array([[1.0, 2.0], [1.0, -4.0]])]
      >>> moments = cj.trace.calibrate(fn, cj.trace.reducers.moments(), params, batches)
      >>> w = cj.prune.importance.Member("w", 0, params["w"], (2, 1), jnp.asarray, True)
      >>> cj.prune.importance.activation(moments)(w).tolist()
      [1.0, 10.0]

    References:
      Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024 (Wanda,
      of single weights).
    """
    # One operand may hold several parameters, such as concatenated kernels: it counts for each.
    sites: dict[str, list[Site]] = {}
    for site in calibration.sites.values():
        for path in dict.fromkeys((site.param or "", *site.also)):
            sites.setdefault(path, []).append(site)

    def score(member: Member) -> jax.Array | None:
        readings = []
        for site in sites.get(member.path, []):
            # In a grouped convolution a channel is read by one group of outputs only.
            if site.groups == 1:
                found = _over_parameter(site, _squares(calibration, site), member)
                if found is not None:
                    readings.append(found)
        if not readings or bool(jnp.isnan(jnp.stack(readings)).all()):
            return None
        # [size, n]: the mean square of the input that each entry of the channel multiplies.
        mean = member.cut(_filled_mean(jnp.stack(readings)))
        if weighted or not member.is_read:
            return jnp.sum(mean * member.rows**2, 1)
        return mean.mean(1)

    return score


def _squares(calibration: Calibration, site: Site) -> jax.Array:
    """Return the mean squared input of a site, ``[*loops, *batch, k]``, NaN where it never ran."""
    statistics: PyTree = calibration[site.name]
    moments: PyTree = statistics.get("input") if isinstance(statistics, dict) else None
    if not hasattr(moments, "variance"):
        raise NoMatchError(
            f"the calibration of {site.name!r} has no moments; calibrate with "
            "trace.reducers.moments()"
        )
    # E[x^2], from the moments that were kept.
    return moments.variance + jnp.square(moments.mean)


def _over_parameter(site: Site, squares: jax.Array, member: Member) -> jax.Array | None:
    """Return the mean squares in the shape of the parameter that reads them, or None.

    Entries that read none are NaN. None if no product sums over the member's axis, though one does
    over another member's.
    """
    values: jax.Array | None = None
    for piece in site.pieces if why_not(site) is None else ():
        answer = ""
        if piece.path == member.path:
            answer = channel_statistic(site, piece, squares, jnp.nanmean)
        if isinstance(answer, str):
            continue
        box, form, own = answer  # own: [batch, k]
        is_summed = member.axis in {box.stored_axes[axis] for axis in summed_axes(form)}
        if is_summed != member.is_read:
            continue
        n = math.prod(form.shape) // own.size
        # Each of the n outputs reads the same inputs: [batch, k] -> [batch, k, n] -> as stored.
        every = form.stored(jnp.broadcast_to(own[..., None], (*own.shape, n)))
        values = box.put(jnp.full(member.shape, jnp.nan) if values is None else values, every)
    return values


def _filled_mean(readings: jax.Array) -> jax.Array:
    """Return the mean of all readings of each entry; entries never read get the average one."""
    is_known = ~jnp.isnan(readings)
    total = jnp.where(is_known, readings, 0).sum(0)
    count = is_known.sum(0).astype(jnp.float32)
    average = total.sum() / jnp.maximum(count.sum(), 1)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), average)
