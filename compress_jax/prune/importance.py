"""How much channels matter: criteria that score what a group of channels holds in each of its parameters.

`shrink` adds up (or averages) what a criterion says about all parameters of a group. A criterion is any function
``(Member) -> [size] or None``; None where it has nothing to say about a parameter.
"""

from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError
from compress_jax.core.paths import Patterns, flatten, matches
from compress_jax.prune._activation import activation
from compress_jax.prune.loss_statistics import gradients, squared_gradients
from compress_jax.prune.members import Importance, Member

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

    Kernels that produce the channel and those that read it count alike; biases, scales and statistics do not.

    Args:
      order: p.

    Returns:
      The criterion.

    Example:
      >>> w = jnp.array([[3.0, -4.0], [1.0, 0.0]])
      >>> magnitude()(Member("kernel", 0, w, (2, 2), jnp.asarray, True)).tolist()
      [25.0, 1.0]

    References:
      Li et al., "Pruning Filters for Efficient ConvNets", 2017. Fang et al., "DepGraph", 2023: over the whole group.
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
    return lambda member: jnp.sum(jnp.abs(member.rows), 1) if matches(pattern, member.path) else None


def taylor(gradients: Any, joint: bool = False) -> Importance:
    r"""Score a channel by what its removal does to the loss to first order, :math:`\sum_i |g_i w_i|`.

    Args:
      gradients: tree of the gradient, or ``{path: gradient}`` as `gradients` returns; parameters that are not in it have no
        score.
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

    A kernel near the geometric median of its layer can be replaced by the others, however large it is.

    Returns:
      The criterion.

    Example:
      >>> w = Member("w", 0, jnp.array([[0.0], [1.0], [5.0]]), (3, 1), jnp.asarray, True)
      >>> fpgm()(w).tolist()
      [6.0, 5.0, 9.0]

    References:
      He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration", 2019.
    """

    def score(member: Member) -> jax.Array | None:
        if not member.contracted:
            return None
        apart = jax.lax.map(lambda row: jnp.sqrt(jnp.sum((member.rows - row[None]) ** 2, 1)), member.rows)
        return apart.sum(0)

    return score
