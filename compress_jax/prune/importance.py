"""How much channels matter: criteria that score what a group of channels holds in each of its parameters.

`shrink` adds up (or averages) what a criterion says about all parameters of a group. A criterion is
any function ``(Member) -> [size] or None``; None where it has nothing to say about a parameter.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import (
    ArgumentError,
    ConfigError,
    DataError,
    NoMatchError,
    NonFiniteError,
    ShapeError,
)
from compress_jax.core.paths import Patterns, flatten, matches
from compress_jax.core.types import Leaves, Params
from compress_jax.layerwise._problem import channel_statistic, summed_axes, why_not
from compress_jax.trace import Calibration, Group, Groups, Site

# Gradients of a loss over batches, and their squares: what Taylor and Fisher criteria start from.


def gradients(
    loss: Callable[..., Any], params: Params, batches: Iterable[Any]
) -> dict[str, jax.Array]:
    r"""Return the mean gradient over batches, :math:`\frac1n \sum_b \nabla L_b`.

    Args:
      loss: ``(params, *batch) -> scalar``.
      params: tree of arrays; those that are not floating have no gradient.
      batches: what loss takes after params; a tuple is several arguments.

    Returns:
      ``{path: float32 array}``, for `taylor`.

    Raises:
      DataError: if there is no batch.

    Example:
      >>> gradients(lambda p, x: (p["w"] * x).sum(), {"w": jnp.ones(2)}, [jnp.array([1.0, 3.0]), jnp.array([3.0, -3.0])])
      {'w': Array([2., 0.], dtype=float32)}
    """
    return _mean(loss, params, batches, lambda g: g)


def squared_gradients(
    loss: Callable[..., Any], params: Params, batches: Iterable[Any]
) -> dict[str, jax.Array]:
    r"""Return the mean squared gradient over batches, the diagonal of the empirical Fisher matrix up to a factor.

    Args:
      loss: ``(params, *batch) -> scalar``; batches of one example give the Fisher matrix itself.
      params: as of `gradients`.
      batches: as of `gradients`.

    Returns:
      ``{path: float32 array}``, for `second_order`.

    Raises:
      DataError: if there is no batch.

    Example:
      >>> squared_gradients(lambda p, x: (p["w"] * x).sum(), {"w": jnp.ones(1)}, [jnp.array([1.0]), jnp.array([3.0])])
      {'w': Array([5.], dtype=float32)}
    """
    return _mean(loss, params, batches, jnp.square)


def _mean(
    loss: Callable[..., Any],
    params: Params,
    batches: Iterable[Any],
    of: Callable[[jax.Array], jax.Array],
) -> dict[str, jax.Array]:
    leaves, rebuild = flatten(params)
    moving = {
        path: leaf
        for path, leaf in leaves.items()
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    }

    @jax.jit
    def add(
        total: dict[str, jax.Array], moving: dict[str, Any], batch: tuple[Any, ...]
    ) -> dict[str, jax.Array]:
        found = jax.grad(lambda moving: loss(rebuild({**leaves, **moving}), *batch))(moving)
        return {path: total[path] + of(g.astype(jnp.float32)) for path, g in found.items()}

    total, count = (
        {path: jnp.zeros(jnp.shape(leaf), jnp.float32) for path, leaf in moving.items()},
        0,
    )
    for batch in batches:
        total = add(total, moving, batch if isinstance(batch, tuple) else (batch,))
        count += 1
    if not count:
        raise DataError("there is no batch to take gradients of")
    return {path: each / count for path, each in total.items()}


# The members of a group as criteria see them: a parameter cut along the axis in which its channels
# lie.


class Member(NamedTuple):
    """One parameter of a group of channels, cut along one of its axes.

    Attributes:
      path: of the parameter.
      axis: along which the channels lie in it.
      rows: float32 ``[size, n]``, all that belongs to each channel.
      shape: of the parameter.
      cut: cuts another array of the parameter's shape likewise (its gradient).
      contracted: whether it is a factor of a product: a kernel, not a bias, a scale or a statistic.
    """

    path: str
    axis: int
    rows: jax.Array
    shape: tuple[int, ...]
    cut: Callable[[Any], jax.Array]
    contracted: bool


Importance = Callable[[Member], jax.Array | None]


def members(group: Group, leaves: Leaves, contracted: set[str]) -> list[Member]:
    """Return the floating-point members of a group, cut.

    Args:
      group: of channels.
      leaves: arrays by path.
      contracted: paths of parameters of products.

    Returns:
      One for each axis in which the group lies.

    Example:
      >>> group = Group("w:1", 2, (("w", 1),), {("w", 1): np.array([0, 1, 0, 1])})
      >>> members(group, {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}, {"w"})[0].rows.tolist()
      [[1.0, 3.0], [2.0, 4.0]]
    """
    found = []
    for path, axis in group.members:
        if jnp.issubdtype(leaves[path].dtype, jnp.floating):
            cut = _cutter(group, (path, axis), np.shape(leaves[path]))
            found.append(
                Member(
                    path, axis, cut(leaves[path]), np.shape(leaves[path]), cut, path in contracted
                )
            )
    return found


def _cutter(
    group: Group, member: tuple[str, int], shape: tuple[int, ...]
) -> Callable[[Any], jax.Array]:
    place = group.coordinates[member]
    inside = np.flatnonzero(place >= 0)
    where = inside[np.argsort(place[inside], kind="stable")]

    def cut(x: Any) -> jax.Array:
        if np.shape(x) != shape:
            raise ShapeError(
                f"{member[0]!r} has shape {shape}, what it is scored with {np.shape(x)}"
            )
        rows = jnp.take(jnp.asarray(x, jnp.float32), where, axis=member[1])
        return jnp.moveaxis(rows, member[1], 0).reshape(group.size, -1)

    return cut


# `activation`: channels scored by what is in them when data flow through the model.


def activation(calibration: Calibration, weighted: bool = False) -> Importance:
    r"""Score a channel by the activations in it where kernels read it, the mean of :math:`x^2`.

    Args:
      calibration: of `compress_jax.trace.calibrate` with ``reducers.moments()``.
      weighted: weigh each by the weights that read it, :math:`\sum_j w_{ij}^2 E[x_i^2]`: Wanda's
        score over a channel.

    Returns:
      The criterion. Members that no product sums over along their axis have no score, nor have
      depthwise kernels, nor what calibration did not reach at all; of a member that it reached in
      part (some experts), the rest counts as average.

    Raises:
      NoMatchError: when it scores, if the calibration is of another reducer.

    Example:
      >>> from compress_jax.trace import calibrate, reducers
      >>> batches = [jnp.array([[1.0, 2.0], [1.0, -4.0]])]
      >>> seen = calibrate(lambda p, x: x @ p["w"], reducers.moments(), {"w": jnp.ones((2, 1))}, batches)
      >>> activation(seen)(Member("w", 0, jnp.ones((2, 1)), (2, 1), jnp.asarray, True)).ravel().tolist()
      [1.0, 10.0]

    References:
      Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024 (Wanda,
      of single weights).
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
        reading = jnp.stack(
            [each for each in found if each is not None] or [jnp.full(member.shape, jnp.nan)]
        )
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
        raise NoMatchError(
            f"the calibration of {site.name!r} has no moments; calibrate with "
            "trace.reducers.moments()"
        )
    return moments.variance + jnp.square(moments.mean)


def _over_parameter(site: Site, squares: jax.Array, member: Member) -> jax.Array | None:
    """Spread mean squares over the shape of the parameter that reads them, NaN beside; None if none is summed there."""
    values: jax.Array | None = None
    for piece in site.pieces if why_not(site) is None else ():
        answer = ""
        if piece.path == member.path:
            answer = channel_statistic(site, piece, squares, jnp.nanmean)
        if isinstance(answer, str):
            continue
        box, form, own = answer
        if member.axis not in {box.stored_axes[axis] for axis in summed_axes(form)}:
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


def magnitude(order: int = 2) -> Importance:
    r"""Score a channel by its kernels' entries, :math:`\sum_i |w_i|^p`: p = 1 for L1, 2 for the square of L2.

    Kernels that produce the channel and those that read it count alike; biases, scales and
    statistics do not.

    Args:
      order: p.

    Returns:
      The criterion.

    Example:
      >>> w = jnp.array([[3.0, -4.0], [1.0, 0.0]])
      >>> magnitude()(Member("kernel", 0, w, (2, 2), jnp.asarray, True)).tolist()
      [25.0, 1.0]

    References:
      Li et al., "Pruning Filters for Efficient ConvNets", 2017. Fang et al., "DepGraph", 2023: over
      the whole group.
    """
    if order < 1:
        raise ArgumentError(f"the order of a norm is at least 1, got {order}")
    return lambda member: jnp.sum(jnp.abs(member.rows) ** order, 1) if member.contracted else None


def norm_scale(pattern: Patterns = "**/scale") -> Importance:
    r"""Score a channel by the scales of the norms it goes through, :math:`|\gamma|`: network slimming.

    Args:
      pattern: globs over the paths of scales.

    Returns:
      The criterion. Groups without such a scale have no score and stay whole, which the table says.

    Example:
      >>> gamma = Member("norm/scale", 0, jnp.array([[-2.0], [0.5]]), (2,), jnp.asarray, False)
      >>> norm_scale()(gamma).tolist()
      [2.0, 0.5]

    References:
      Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017.
    """
    return lambda member: (
        jnp.sum(jnp.abs(member.rows), 1) if matches(pattern, member.path) else None
    )


def taylor(gradients: Any, joint: bool = False) -> Importance:
    r"""Score a channel by what its removal does to the loss to first order, :math:`\sum_i |g_i w_i|`.

    Args:
      gradients: tree of the gradient, or ``{path: gradient}`` as `gradients` returns; parameters
        that are not in it have no score.
      joint: :math:`|\sum_i g_i w_i|` instead, the change when all entries go at once.

    Returns:
      The criterion.

    Raises:
      NoMatchError: when it scores, if no gradient is for a parameter that has channels.

    Example:
      >>> w = Member("w", 0, jnp.array([[2.0, 1.0]]), (1, 2), jnp.asarray, True)
      >>> taylor({"w": jnp.array([[1.0, -2.0]])})(w).tolist(), taylor({"w": jnp.array([[1.0, -2.0]])}, True)(w).tolist()
      ([4.0], [0.0])

    References:
      Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, equation 8.
    """
    given = flatten(gradients)[0]

    def score(member: Member) -> jax.Array | None:
        if member.path not in given:
            return None
        product = member.rows * member.cut(given[member.path])
        return jnp.abs(product.sum(1)) if joint else jnp.abs(product).sum(1)

    return score


def second_order(curvature: Any) -> Importance:
    r"""Score a channel by what its removal does to the loss to second order at a minimum, :math:`\frac12 \sum_i h_i w_i^2`.

    Args:
      curvature: tree, or ``{path: array}``, of the Hessian's diagonal: `squared_gradients`, or any
        estimate of one's own (negative entries count as they are).

    Returns:
      The criterion.

    Example:
      >>> w = Member("w", 0, jnp.array([[2.0, 1.0]]), (1, 2), jnp.asarray, True)
      >>> second_order({"w": jnp.array([[1.0, 4.0]])})(w).tolist()
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
    r"""Score a channel by how far its kernel is from all others, :math:`\sum_j \|w_i - w_j\|_2`.

    A kernel near the geometric median of its layer can be replaced by the others, however large it
    is.

    Returns:
      The criterion.

    Example:
      >>> w = Member("w", 0, jnp.array([[0.0], [1.0], [5.0]]), (3, 1), jnp.asarray, True)
      >>> fpgm()(w).tolist()
      [6.0, 5.0, 9.0]

    References:
      He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
      Acceleration", 2019.
    """

    def score(member: Member) -> jax.Array | None:
        if not member.contracted:
            return None
        apart = jax.lax.map(
            lambda row: jnp.sqrt(jnp.sum((member.rows - row[None]) ** 2, 1)), member.rows
        )
        return apart.sum(0)

    return score


# One number for each channel of each group: what a criterion says about its members, put together
# and made comparable.


Reduction = Callable[[np.ndarray], np.ndarray]
REDUCTIONS: dict[str, Reduction] = {
    "mean": lambda scores: scores.mean(0),
    "sum": lambda scores: scores.sum(0),
    "max": lambda scores: scores.max(0),
}
NORMALISATIONS: dict[str, Callable[[np.ndarray], Any]] = {
    "none": lambda score: 1.0,
    "mean": lambda score: score.mean(),
    "sum": lambda score: score.sum(),
    "max": lambda score: score.max(),
    "l2": lambda score: np.sqrt(np.square(score).sum()),
}


def channel_scores(
    groups: Groups,
    leaves: Leaves,
    contracted: set[str],
    importance: Importance,
    reduction: str = "mean",
    normalise: str = "mean",
) -> dict[str, np.ndarray]:
    r"""Score the channels of each group.

    :math:`I_c = \mathrm{reduce}_m I_{m c}` over the members m that the criterion has something to say about, then divided
    by its mean (or another size) over the group, so that groups of different widths can compete.

    Args:
      groups: of channels.
      leaves: parameters by path.
      contracted: paths of parameters of products.
      importance: the criterion.
      reduction: ``"mean"``, ``"sum"`` or ``"max"``.
      normalise: ``"mean"``, ``"sum"``, ``"max"``, ``"l2"`` or ``"none"``.

    Returns:
      By name of the group a float64 array ``[size]``; groups about which the criterion says nothing
      are missing.

    Raises:
      ConfigError: if a reduction or a normalisation is not known.
      NonFiniteError: if a score is NaN or infinite.
    """
    for name, given, known in (
        ("reduction", reduction, REDUCTIONS),
        ("normalise", normalise, NORMALISATIONS),
    ):
        if given not in known:
            raise ConfigError(
                f"{name}={given!r} is not known; use one of {', '.join(map(repr, known))}"
            )
    found = {}
    for group in groups:
        scores = []
        for member in members(group, leaves, contracted):
            if (score := importance(member)) is not None:
                scores.append(np.asarray(score, np.float64))
                if not np.isfinite(scores[-1]).all():
                    raise NonFiniteError(
                        f"the importance of {member.path!r} along axis {member.axis} is NaN or "
                        "infinite"
                    )
        if scores:
            score = REDUCTIONS[reduction](np.stack(scores))
            size = NORMALISATIONS[normalise](score)
            found[group.name] = score / size if size else score
    return found
