"""Rotary positions: pairs of features turn by an angle that grows with the position."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ArgumentError


@dataclass(frozen=True)
class Rope:
    """How fast features turn.

    Attributes:
      theta: the base of the wavelengths.
      factors: by how much each pair of features turns more slowly than that, as contexts that were
        extended have it, see `linear` and `llama3`; empty for 1.

    Example:
      >>> import compress_jax as cj
      >>> cj.models.Rope(theta=1e6).factors
      ()
    """

    theta: float = 10_000.0
    factors: tuple[float, ...] = ()


class Angles(NamedTuple):
    """Cosines and sines, float32 ``[batch or 1, length, 1, head_width / 2]``."""

    cos: jax.Array
    sin: jax.Array


def frequencies(rope: Rope, head_width: int) -> np.ndarray:
    r"""Return by how much each pair of features turns a token, float32 ``[head_width / 2]``.

    Pair i turns by :math:`\theta^{-2i / d}`, divided by its factor.

    Example:
      >>> frequencies(Rope(theta=100.0), 4).tolist()
      [1.0, 0.10000000149011612]
    """
    # In float32 as published implementations have it: angles of far positions depend on it.
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    plain = np.float32(1.0) / np.float32(rope.theta) ** exponents
    if not rope.factors:
        return plain
    if len(rope.factors) != len(plain):
        raise ArgumentError(
            f"a head of {head_width} features has {len(plain)} pairs that turn, and there are "
            f"{len(rope.factors)} factors"
        )
    return plain / np.asarray(rope.factors, np.float32)


def linear(factor: float, head_width: int) -> tuple[float, ...]:
    """Return the factors of positions that are divided by one number.

    Example:
      >>> linear(8.0, 4)
      (8.0, 8.0)
    """
    return (float(factor),) * (head_width // 2)


def llama3(
    theta: float, head_width: int, factor: float, low: float, high: float, length: int
) -> tuple[float, ...]:
    """Return the factors of Llama 3.1: long wavelengths are divided, short ones are not.

    Args:
      theta: the base of the wavelengths.
      head_width: features of a head.
      factor: of wavelengths above ``length / low``.
      low: see ``factor``.
      high: wavelengths below ``length / high`` have the factor 1; those between are blended.
      length: tokens of the context before it was extended.

    Example:
      >>> [round(x, 2) for x in llama3(500_000.0, 16, 8.0, 1.0, 4.0, 8192)]
      [1.0, 1.0, 1.0, 1.0, 2.69, 8.0, 8.0, 8.0]
    """
    wavelengths = 2 * math.pi / frequencies(Rope(theta), head_width).astype(np.float64)
    kept = np.clip((length / wavelengths - low) / (high - low), 0.0, 1.0)
    return tuple((1 / ((1 - kept) / factor + kept)).tolist())


def angles(rope: Rope, head_width: int, positions: jax.Array) -> Angles:
    """Return cosines and sines at positions, int32 ``[batch or 1, length]``.

    Example:
      >>> angles(Rope(), 4, jnp.arange(3)[None]).cos.shape
      (1, 3, 1, 2)
    """
    speeds = frequencies(rope, head_width).reshape(1, 1, 1, -1)
    turned = positions[..., None, None].astype(jnp.float32) * speeds
    return Angles(jnp.cos(turned), jnp.sin(turned))


def rotate(x: jax.Array, by: Angles) -> jax.Array:
    """Turn the pairs of features of heads; a pair is one of the first half, one of the second.

    Args:
      x: ``[batch, length, heads, head_width]``.
      by: the angles.

    Returns:
      An array of the shape and dtype of ``x``.

    Example:
      >>> quarter = Angles(jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1)))
      >>> rotate(jnp.array([[[[1.0, 0.0]]]]), quarter).tolist()
      [[[[0.0, 1.0]]]]

    References:
      Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, section
      3.2.2; the pairing is that of GPT-NeoX and Llama.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * by.cos - second * by.sin, second * by.cos + first * by.sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
