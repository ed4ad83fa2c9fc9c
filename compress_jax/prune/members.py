"""The members of a group as criteria see them: a parameter cut along the axis in which its channels lie."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ShapeError
from compress_jax.trace import Group


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


def members(group: Group, leaves: dict[str, Any], contracted: set[str]) -> list[Member]:
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
            found.append(Member(path, axis, cut(leaves[path]), np.shape(leaves[path]), cut, path in contracted))
    return found


def _cutter(group: Group, member: tuple[str, int], shape: tuple[int, ...]) -> Callable[[Any], jax.Array]:
    place = group.coordinates[member]
    inside = np.flatnonzero(place >= 0)
    where = inside[np.argsort(place[inside], kind="stable")]

    def cut(x: Any) -> jax.Array:
        if np.shape(x) != shape:
            raise ShapeError(f"{member[0]!r} has shape {shape}, what it is scored with {np.shape(x)}")
        rows = jnp.take(jnp.asarray(x, jnp.float32), where, axis=member[1])
        return jnp.moveaxis(rows, member[1], 0).reshape(group.size, -1)

    return cut
