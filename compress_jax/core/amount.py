"""How many of n weights a sparsity prunes: round half up, in exact arithmetic."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError
from compress_jax.core.exact import Int64, add, multiply, uint64
from compress_jax.core.types import Scalar

MOST = 2**40 - 1  # so that every product with 2**24 stays below 2**64
"""More weights than one threshold can be asked to rank."""


def amount(sparsity: Scalar, size: int) -> Int64:
    """Return how many of ``size`` weights to prune.

    ``pruned = floor(sparsity * size + 1/2)``, without floating-point error at any size. A Python
    number is taken at the decimal value it prints as (0.7 means 7/10, not the nearest binary
    fraction, so half of 5 weights at 0.7 rounds up). An array, which is what most schedules return,
    is taken in float32 and rounded to a multiple of 2**-24, which moves it by less than float32
    itself does above one half. Values outside [0, 1] are clipped to it, and NaN prunes nothing.

    Args:
      sparsity: the share to prune: a Python number or a float scalar array, traced or not.
      size: static, the number of weights, below 2**40.

    Returns:
      The exact integer in ``[0, size]``, unsigned.

    Raises:
      ArgumentError: if ``size`` is 2**40 or more.

    Example:
      >>> int(amount(0.7, 5).low), int(amount(jnp.float32(0.25), 10).low), int(amount(2.0, 10).low)
      (4, 3, 10)
    """
    if size > MOST:
        raise ArgumentError(
            f"one threshold cannot rank {size} weights, only fewer than 2**40; prune them in "
            "several parts"
        )
    if isinstance(sparsity, (int, float)):
        return uint64(amount_exact(float(sparsity), size))
    return _amount_traced(jnp.asarray(sparsity).astype(jnp.float32), size)


def amount_exact(sparsity: float, size: int) -> int:
    """Return `amount` of a Python float as a Python integer."""
    share = Fraction(repr(sparsity)) if math.isfinite(sparsity) else Fraction(int(sparsity > 0))
    return math.floor(min(max(share, Fraction(0)), Fraction(1)) * size + Fraction(1, 2))


def _amount_traced(sparsity: jax.Array, size: int) -> Int64:
    """Return ``floor((t * size + 2**23) / 2**24)`` with ``t = round(sparsity * 2**24)``."""
    share = jnp.where(sparsity >= 1, 1.0, jnp.where(sparsity > 0, sparsity, 0.0))  # and NaN to 0
    # The factor 2**24 only shifts the exponent: the product is exact.
    t = jnp.round(share * 2**24).astype(jnp.uint32)
    low = add(multiply(t, size & 0xFFFFFFFF), uint64(2**23))
    high = low.high + t * jnp.uint32(size >> 32)
    return Int64(high >> 24, (high << 8) | (low.low >> 24))  # both words shifted right by 24 bits
