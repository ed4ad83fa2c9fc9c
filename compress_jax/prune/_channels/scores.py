"""The score of each channel of a group: a criterion on its parameters, reduced and normalized."""

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ArgumentError, ConfigError, NonFiniteError, ShapeError
from compress_jax.core.types import Leaf, Leaves, Shape
from compress_jax.trace import Group


class Member(NamedTuple):
    """One parameter of a group of channels, sliced along one of its axes.

    Attributes:
      path: the path of the parameter.
      axis: the axis of the parameter that the channels lie in.
      rows: float32 ``[size, n]``, all entries that belong to each channel.
      shape: the shape of the parameter.
      cut: slices another array of the parameter's shape likewise (its gradient).
      contracted: whether it is a factor of a product: a kernel, not a bias, a scale or a statistic.
      is_read: whether any kernel of the group sums over the channels. None does where activations
        meet each other alone: the features of queries and keys.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> w = jnp.array([[3.0, -4.0], [1.0, 0.0]])
      >>> cj.prune.importance.Member("kernel", 0, w, (2, 2), jnp.asarray, True).rows.shape
      (2, 2)
    """

    path: str
    axis: int
    rows: jax.Array
    shape: Shape
    cut: Callable[[Leaf], jax.Array]
    contracted: bool
    is_read: bool = True


Importance = Callable[[Member], jax.Array | None]
"""A criterion: the scores ``[size]`` of a member, or None if it has none for it."""

Reduction = Callable[[np.ndarray], np.ndarray]
REDUCTIONS: dict[str, Reduction] = {
    "mean": lambda scores: scores.mean(0),
    "sum": lambda scores: scores.sum(0),
    "max": lambda scores: scores.max(0),
}
NORMALIZATIONS: dict[str, Callable[[np.ndarray], float]] = {
    "none": lambda score: 1.0,
    "mean": lambda score: score.mean(),
    "sum": lambda score: score.sum(),
    "max": lambda score: score.max(),
    "l2": lambda score: np.sqrt(np.square(score).sum()),
}


def channel_scores(
    groups: Iterable[Group],
    leaves: Leaves,
    contracted: set[str],
    importance: Importance,
    reduction: str = "mean",
    normalize: str = "mean",
    summed: Collection[tuple[str, int]] | None = None,
) -> dict[str, np.ndarray]:
    r"""Score the channels of each group.

    :math:`I_c = \mathrm{reduce}_m I_{m c}` over the members m that have a score, divided by its
    mean (or another norm) over the group, so that groups of different widths are comparable.

    Args:
      groups: the groups of channels.
      leaves: parameters by path.
      contracted: paths of parameters that are factors of products.
      importance: the criterion.
      reduction: ``"mean"``, ``"sum"`` or ``"max"``.
      normalize: ``"mean"``, ``"sum"``, ``"max"``, ``"l2"`` or ``"none"``.
      summed: the axes ``(path, axis)`` of kernels that products sum over; None if not known.

    Returns:
      By name of the group a float64 array ``[size]``; groups without a score are missing.

    Raises:
      ConfigError: if a reduction or a normalization is not known.
      NonFiniteError: if a score is NaN or infinite.
    """
    _check("reduction", reduction, REDUCTIONS)
    _check("normalize", normalize, NORMALIZATIONS)
    found = {}
    for group in groups:
        scores = []
        for member in members(group, leaves, contracted, summed):
            score = importance(member)
            if score is not None:
                # float64 on the host: neither sums nor squares of scores overflow.
                scores.append(_finite(np.asarray(score, np.float64), member))
        if scores:
            total = REDUCTIONS[reduction](np.stack(scores))  # [members, size] -> [size]
            norm = NORMALIZATIONS[normalize](total)
            # Scores that are all 0 have norm 0, and stay 0.
            found[group.name] = total / norm if norm else total
    return found


def members(
    group: Group,
    leaves: Leaves,
    contracted: set[str],
    summed: Collection[tuple[str, int]] | None = None,
) -> list[Member]:
    """Return the floating-point members of a group.

    Args:
      group: of channels.
      leaves: arrays by path.
      contracted: paths of parameters that are factors of products.
      summed: as of `channel_scores`.

    Returns:
      One member for each parameter and axis of the group.

    Example:
      >>> group = Group("w:1", 2, (("w", 1),), {("w", 1): np.array([0, 1, 0, 1])})
      >>> members(group, {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}, {"w"})[0].rows.tolist()
      [[1.0, 3.0], [2.0, 4.0]]
    """
    found = []
    is_read = summed is None or any(member in summed for member in group.members)
    for path, axis in group.members:
        x = leaves[path]
        if jnp.issubdtype(x.dtype, jnp.floating):
            shape = np.shape(x)
            cut = _cutter(group, path, axis, shape)
            found.append(Member(path, axis, cut(x), shape, cut, path in contracted, is_read))
    return found


def _cutter(group: Group, path: str, axis: int, shape: Shape) -> Callable[[Leaf], jax.Array]:
    """Return the function that slices an array of a parameter's shape into ``[size, n]``."""
    channel = group.coordinates[path, axis]  # the channel at each index, -1 for none
    inside = np.flatnonzero(channel >= 0)
    order = inside[np.argsort(channel[inside], kind="stable")]

    def cut(x: Leaf) -> jax.Array:
        if np.shape(x) != shape:
            raise ShapeError(
                f"{path!r} has shape {shape}, what it is scored with has {np.shape(x)}"
            )
        rows = jnp.take(jnp.asarray(x, jnp.float32), order, axis=axis)  # sorted by channel
        # Each channel has equally many indices: [size * indices, ...] -> [size, n].
        return jnp.moveaxis(rows, axis, 0).reshape(group.size, -1)

    return cut


def _check(name: str, given: str, known: Collection[str]) -> None:
    if given not in known:
        raise ConfigError(
            f"{name}={given!r} is not known; use one of {', '.join(map(repr, known))}"
        )


def _finite(score: np.ndarray, member: Member) -> np.ndarray:
    if not np.isfinite(score).all():
        raise NonFiniteError(
            f"the importance of {member.path!r} along axis {member.axis} is NaN or infinite"
        )
    return score


def magnitude(order: int = 2) -> Importance:
    r"""Score a channel by its kernels' entries, :math:`\sum_i |w_i|^p`.

    With p = 1 this is the L1 norm, with p = 2 the squared L2 norm. Kernels that produce the channel
    and kernels that read it count alike; biases, scales and statistics do not count.

    Args:
      order: p, at least 1.

    Returns:
      The criterion.

    Raises:
      ArgumentError: if the order is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> importance = cj.prune.importance
      >>> w = jnp.array([[3.0, -4.0], [1.0, 0.0]])
      >>> kernel = importance.Member("kernel", 0, w, (2, 2), jnp.asarray, True)
      >>> importance.magnitude()(kernel).tolist()
      [25.0, 1.0]

    References:
      Li et al., "Pruning Filters for Efficient ConvNets", 2017. Fang et al., "DepGraph", 2023: over
      the whole group.
    """
    if order < 1:
        raise ArgumentError(f"the order of a norm is at least 1, got {order}")

    def score(member: Member) -> jax.Array | None:
        return jnp.sum(jnp.abs(member.rows) ** order, 1) if member.contracted else None

    return score
