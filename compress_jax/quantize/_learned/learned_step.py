"""Rounding with a trained step size, offset or clipping bound: LSQ, LSQ+ and PACT."""

from functools import partial

import jax
import jax.numpy as jnp

from compress_jax.core._straight_through import straight_through
from compress_jax.quantize._activations.quantizer import nearest_level
from compress_jax.quantize._scales.grid import Grid

FLOOR = 2.0**-60
PrimalAndTangent = tuple[jax.Array, jax.Array]

_at_least_floor = straight_through(lambda x: jnp.maximum(x, FLOOR))


def positive(x: jax.Array) -> jax.Array:
    r"""Return :math:`|x|`, at least 2^-60, with a derivative of 1 or -1 everywhere.

    So a step cannot get stuck at zero.

    Args:
      x: float32, a step or bound that an optimizer updated.

    Returns:
      The step or bound itself where it is at least 2^-60.

    Example:
      >>> value, slope = jax.value_and_grad(positive)(jnp.float32(0))
      >>> float(value) == 2.0**-60, float(slope), float(positive(jnp.float32(-0.5)))
      (True, 1.0, 0.5)
    """
    return _at_least_floor(jnp.where(x < 0, -x, x))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def lsq_round(
    grid: Grid, x: jax.Array, scale: jax.Array, zero_point: jax.Array, gain: jax.Array
) -> jax.Array:
    r"""Return ``x`` on a grid of learned step s, with the derivatives of LSQ.

    With :math:`v = x / s`, :math:`Q_N = z`, :math:`Q_P = 2^{bits} - 1 - z`:

    .. math:: \frac{\partial \hat x}{\partial s} = g \cdot \begin{cases}
                  round(v) - v & -Q_N < v < Q_P \\ -Q_N & v \le -Q_N \\ Q_P & v \ge Q_P
                  \end{cases}, \qquad
              \frac{\partial \hat x}{\partial x} = [-Q_N < v < Q_P]

    Args:
      grid: the levels.
      x: float array.
      scale: s > 0, float32, broadcasts against ``x``.
      zero_point: z, uint8, likewise; no derivative.
      gain: g, float32, likewise; no derivative.

    Returns:
      ``grid.decode(grid.encode(x, ...), ...)`` in the dtype of ``x``; NaN stays NaN.

    Example:
      >>> fn = lambda x, s: lsq_round(Grid(3), x, s, jnp.uint8(4), jnp.float32(1))
      >>> [float(d) for d in jax.grad(fn, argnums=(0, 1))(jnp.float32(1.25), jnp.float32(1))]
      [1.0, -0.25]
      >>> [float(d) for d in jax.grad(fn, argnums=(0, 1))(jnp.float32(-9), jnp.float32(1))]
      [0.0, -4.0]

    References:
      Esser et al., "Learned Step Size Quantization", 2020, arXiv:1902.08153, equations 3 and 5.
    """
    return nearest_level(grid, x, scale, zero_point)


@lsq_round.defjvp
def _(
    grid: Grid, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> PrimalAndTangent:
    x, scale, zero_point, gain = primals
    dx, ds, _, _ = tangents
    v, low, high = _steps_and_ends(grid, x, scale, zero_point)
    slope = jnp.where(v <= low, low, jnp.where(v >= high, high, jnp.round(v) - v))  # eq. 3
    inside = ((v > low) & (v < high)).astype(dx.dtype)  # eq. 5
    out = nearest_level(grid, x, scale, zero_point)
    return out, dx * inside + (gain * slope * ds).astype(dx.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def lsq_plus_round(
    grid: Grid, x: jax.Array, scale: jax.Array, offset: jax.Array, gain: jax.Array
) -> jax.Array:
    r"""Return ``x`` on a grid of learned step s and learned offset b, with the derivatives of LSQ+.

    The offset is used as the nearest multiple of the step, b = -z s, so that zero stays a level and
    the codes are those of integers. With :math:`v = (x - b) / s` and :math:`p = 2^{bits} - 1`:

    .. math:: \frac{\partial \hat x}{\partial s} = g \cdot \begin{cases}
                  round(v) - v & 0 < v < p \\ 0 & v \le 0 \\ p & v \ge p \end{cases}, \qquad
              \frac{\partial \hat x}{\partial b} = g \cdot [v \le 0 \lor v \ge p], \qquad
              \frac{\partial \hat x}{\partial x} = [0 < v < p]

    Args:
      grid: asymmetric levels.
      x: float array.
      scale: s > 0, float32, broadcasts against ``x``.
      offset: b, likewise.
      gain: g, likewise; no derivative.

    Returns:
      ``x`` rounded, in its dtype; NaN stays NaN.

    Example:
      >>> fn = lambda x, s, b: lsq_plus_round(Grid(2, False), x, s, b, jnp.float32(1))
      >>> at = jnp.float32(9), jnp.float32(1), jnp.float32(-1)
      >>> [float(d) for d in jax.grad(fn, argnums=(0, 1, 2))(*at)]
      [0.0, 3.0, 1.0]

    References:
      Bhalgat et al., "LSQ+", 2020, arXiv:2004.09576, equations 4 to 6.
    """
    return nearest_level(grid, x, scale, zero_point_from_offset(grid, scale, offset))


@lsq_plus_round.defjvp
def _(
    grid: Grid, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> PrimalAndTangent:
    x, scale, offset, gain = primals
    dx, ds, db, _ = tangents
    zero_point = zero_point_from_offset(grid, scale, offset)
    v, low, high = _steps_and_ends(grid, x, scale, zero_point)
    inside = (v > low) & (v < high)
    # Beyond the ends the value is the offset plus 0 or `top` steps (eq. 4 to 6). Within them it is
    # s round((x - b) / s) + b, where the derivatives in b cancel.
    slope = jnp.where(v <= low, 0, jnp.where(v >= high, grid.top, jnp.round(v) - v))
    rest = gain * slope * ds + gain * jnp.where(inside, 0, db)
    out = nearest_level(grid, x, scale, zero_point)
    return out, dx * inside.astype(dx.dtype) + rest.astype(dx.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def pact_round(grid: Grid, x: jax.Array, bound: jax.Array, zero_point: jax.Array) -> jax.Array:
    r"""Return ``x`` on a grid that ends at a learned bound, with the derivatives of PACT.

    .. math:: \frac{\partial \hat x}{\partial \alpha} = [x \ge \alpha], \qquad
              \frac{\partial \hat x}{\partial x} = [0 \le x < \alpha]

    With a zero point z above 0 the grid reaches down to :math:`-\alpha z / (2^{bits} - 1 - z)`, and
    below that the derivative in alpha is that of this end.

    Args:
      grid: the levels.
      x: float array.
      bound: alpha > 0, float32, broadcasts against ``x``; the highest level.
      zero_point: z, uint8, likewise; no derivative.

    Returns:
      ``x`` rounded, in its dtype; NaN stays NaN.

    Example:
      >>> fn = lambda x, a: pact_round(Grid(2, False), x, a, jnp.uint8(0))
      >>> slopes = jax.vmap(jax.grad(fn, argnums=(0, 1)), (0, None))
      >>> [each.tolist() for each in slopes(jnp.array([-1.0, 1.2, 5.0]), jnp.float32(3))]
      [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]

    References:
      Choi et al., "PACT", 2018, arXiv:1805.06085, equations 1 to 3.
    """
    return nearest_level(grid, x, scale_from_bound(grid, bound, zero_point), zero_point)


@pact_round.defjvp
def _(
    grid: Grid, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> PrimalAndTangent:
    x, bound, zero_point = primals
    dx, da, _ = tangents
    scale = scale_from_bound(grid, bound, zero_point)
    # The paper's x >= alpha and x >= 0, in steps: v >= high, and for z = 0 v >= low.
    v, low, high = _steps_and_ends(grid, x, scale, zero_point)
    # The lower end of the range is low / high times the bound, and moves with it.
    slope = jnp.where(v >= high, 1, jnp.where(v < low, low / high, 0))
    inside = ((v >= low) & (v < high)).astype(dx.dtype)
    out = nearest_level(grid, x, scale, zero_point)
    return out, dx * inside + (slope * da).astype(dx.dtype)


def zero_point_from_offset(grid: Grid, scale: jax.Array, offset: jax.Array) -> jax.Array:
    """Return the zero point of an offset: ``clip(round(-offset / scale), 0, top)``, uint8."""
    return jnp.clip(jnp.round(-offset * (1 / scale)), 0, grid.top).astype(jnp.uint8)


def zero_point_from_sign(grid: Grid, low: jax.Array) -> jax.Array:
    """Return the zero point 0 where no activation is negative, else the middle of the grid.

    Args:
      grid: the levels.
      low: the smallest value in calibration.

    Returns:
      float32 of the shape of ``low``; NaN where ``low`` is not finite.

    Example:
      >>> zero_point_from_sign(Grid(4, False), jnp.array([0.0, -0.1])).tolist()
      [0.0, 8.0]
    """
    zero_point = jnp.where(low >= 0, 0.0, 2.0 ** (grid.bits - 1))
    return jnp.where(jnp.isfinite(low), zero_point, jnp.nan)


def scale_from_bound(grid: Grid, bound: jax.Array, zero_point: jax.Array) -> jax.Array:
    """Return the scale of a grid whose highest level is ``bound``."""
    return bound * (1 / (grid.top - zero_point.astype(jnp.float32)))


def _steps_and_ends(
    grid: Grid, x: jax.Array, scale: jax.Array, zero_point: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return ``x`` in steps from zero, and the lowest and highest level."""
    zero = zero_point.astype(jnp.float32)
    # The same product as in `Grid.levels`, so that value and derivative agree on what is clipped.
    return x.astype(jnp.float32) * (1 / scale), int(grid.narrow) - zero, grid.top - zero
