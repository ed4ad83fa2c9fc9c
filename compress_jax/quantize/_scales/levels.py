"""The levels of the common formats below eight bits, other than integers."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.arguments import whole
from compress_jax.core.errors import ArgumentError
from compress_jax.core.layout import Layout
from compress_jax.core.levels import Float, Levels, Table
from compress_jax.quantize._scales.least_squares import fit
from compress_jax.quantize._scales.rules import counts, usable

E4M3 = Float(4, 3, reserved=1)
"""float8_e4m3fn: up to 448. Micikevicius et al., "FP8 Formats for Deep Learning", 2022, table 1."""

E5M2 = Float(5, 2, reserved=4)
"""float8_e5m2: up to 57344; infinities and NaNs are never used. The same table."""

E2M1 = Float(2, 1)
"""float4_e2m1fn: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. OCP MX specification v1.0, table 5."""

NF4 = Table(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)
"""NormalFloat4: quantiles of a normal distribution. Dettmers et al., "QLoRA", 2023, appendix E."""

TERNARY = Table((-1.0, 0.0, 1.0))
BINARY = Table((-1.0, 1.0))


def float_format(exponent_bits: int, mantissa_bits: int, *, reserved: int = 0) -> Float:
    """Return a floating-point format of a sign, an exponent and a mantissa.

    The exponent bias is ``2**(exponent_bits - 1) - 1``, and an exponent of zeros means a subnormal
    number, as in IEEE 754.

    Args:
      exponent_bits: 1 to 7.
      mantissa_bits: 0 to 8; 0 leaves powers of two, where the tie between two of them goes to the
        larger.
      reserved: how many of the largest magnitude codes are kept for infinity and NaN; such codes
        are never used.

    Returns:
      The format, for `codebook`.

    Raises:
      ArgumentError: if the numbers of bits are out of range, or no magnitude but 0 is left.

    Example:
      >>> import jax.numpy as jnp
      >>> e3m2 = float_format(3, 2)  # MXFP6
      >>> e3m2.bits, e3m2.largest, e3m2.round(jnp.array([0.3, -30.0])).tolist()
      (6, 28.0, [0.3125, -28.0])

    References:
      Open Compute Project, "OCP Microscaling Formats (MX) Specification", v1.0, 2023, section 5.3.
    """
    exponent_bits, mantissa_bits = (
        whole("exponent_bits", exponent_bits),
        whole("mantissa_bits", mantissa_bits),
    )
    reserved = whole("reserved", reserved)
    if exponent_bits not in range(1, 8) or mantissa_bits not in range(9):
        raise ArgumentError(
            f"a float takes 1 to 7 exponent and 0 to 8 mantissa bits, got {exponent_bits} and "
            f"{mantissa_bits}"
        )
    magnitudes = 2 ** (exponent_bits + mantissa_bits)
    if reserved not in range(magnitudes - 1):
        raise ArgumentError(
            f"reserved must leave a number above 0 among {magnitudes} magnitudes, got {reserved}"
        )
    return Float(exponent_bits, mantissa_bits, reserved)


# Scale rules for levels that are not evenly spaced, one float32 scale for each set of entries.


Fixed = dict[str, jax.Array]
LevelRule = Callable[[jax.Array, Layout, Levels], Fixed]


def peak(w: jax.Array, layout: Layout) -> jax.Array:
    """Return the largest magnitude of every set that shares a scale, of shape ``layout.scale_shape``.

    Args:
      w: arranged by ``layout``.
      layout: which entries share a scale.

    Returns:
      The magnitudes.
    """
    return jnp.abs(w).max(layout.reduced, keepdims=True)


@partial(jax.jit, static_argnames=("layout", "levels"))
def absmax(w: jax.Array, layout: Layout, levels: Levels) -> Fixed:
    r"""Put the largest magnitude on the largest level, :math:`s = \max |w| / \ell_{max}`; nothing is clipped.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      levels: what they are rounded to.

    Returns:
      ``{"scale": float32}``.

    Example:
      >>> from compress_jax.quantize._scales.levels import E2M1
      >>> absmax(jnp.array([0.5, -3.0]), Layout.of((2,), "tensor"), E2M1)
      {'scale': Array([0.5], dtype=float32)}
    """
    return {"scale": usable(peak(w, layout) * np.float32(1 / levels.largest))}


class _Best(NamedTuple):
    """The best scale of every set so far, the error it has, and the scale it was fitted from."""

    error: jax.Array
    scale: jax.Array
    origin: jax.Array

    def better_of(self, other: "_Best") -> "_Best":
        return jax.tree.map(partial(jnp.where, other.error < self.error), other, self)


@partial(jax.jit, static_argnames=("layout", "levels"))
def mse(w: jax.Array, layout: Layout, levels: Levels) -> Fixed:
    r"""Minimise the error of quantization itself, :math:`\sum (w - s \, \ell(w / s))^2`, where l is the nearest level.

    Scales are tried on a geometric grid, coarse and then fine around the best, each replaced by the
    exact optimum for the levels it gives (`fit`); from the best of all, levels and scale are
    optimised in turns, which can only lower the error.

    The grid reaches down to where the largest level is half the least possible root mean square of
    n entries with that peak, :math:`\max |w| / 2 \sqrt n`.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      levels: what they are rounded to.

    Returns:
      ``{"scale": float32}``.

    Example:
      >>> from compress_jax.quantize._scales.levels import TERNARY
      >>> fixed = mse(jnp.array([-1.1, -1.0, 0.9, 1.0, 2.0]), Layout.of((5,), "tensor"), TERNARY)
      >>> f"{fixed['scale'][0]:.2f}"  # clipping the 2 costs less than rounding the others to 0
      '1.20'
    """
    bound = usable(peak(w, layout))
    unit = w * (1 / bound)  # no square of it overflows, none that matters underflows

    def attempt(scale: jax.Array) -> _Best:
        fitted, error = fit(unit, levels.round(unit * (1 / scale)), scale, layout.reduced)
        fits = (
            fitted > 0
        )  # where levels lie on one side of zero, entries of the other may want a negative scale
        return _Best(jnp.where(fits, error, jnp.inf), jnp.where(fits, fitted, scale), scale)

    def search(best: _Best, factors: np.ndarray) -> _Best:
        def trial(i: jax.Array, found: _Best) -> _Best:
            return found.better_of(attempt(best.origin * jnp.asarray(factors)[i]))

        return jax.lax.fori_loop(0, len(factors), trial, best)

    coarse, fine = _factors(w, layout)
    start = attempt(jnp.full(layout.scale_shape, 1 / levels.largest, jnp.float32))
    best = search(search(start, coarse), fine)
    best = jax.lax.fori_loop(0, 8, lambda _, found: found.better_of(attempt(found.scale)), best)
    return {"scale": usable(best.scale * bound)}


def _factors(w: jax.Array, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return what to multiply a scale with: over all sizes, then between the neighbours of the best."""
    # The fewer entries share a scale, the more rugged is the error as a function of it, and the
    # cheaper is a trial.
    points = max(64, min(1024, 2**24 // w.size))
    coarse = np.geomspace(2, 0.5 / np.sqrt(counts(layout).max()), points)
    fine = np.geomspace(coarse[1] / coarse[0], coarse[0] / coarse[1], 33)
    return coarse.astype(np.float32), fine.astype(np.float32)
