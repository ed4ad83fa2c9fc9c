"""Rounding whose step size, offset or clipping bound is trained: the values of a grid with the papers' derivatives."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.finite import saturate
from compress_jax.core.straight_through import straight_through
from compress_jax.quantize._scales.grid import Grid

FLOOR = 2.0**-60
Tangent = tuple[jax.Array, jax.Array]


at_least_floor = straight_through(lambda x: jnp.maximum(x, FLOOR))


def positive(x: jax.Array) -> jax.Array:
    r"""Return :math:`|x|`, at least 2^-60, with a derivative of 1 or -1 everywhere: a step cannot get stuck at zero.

    Args:
      x: float32, what an optimizer made of a step or bound.

    Returns:
      The step or bound itself where it is usable.

    Example:
      >>> value, slope = jax.value_and_grad(positive)(jnp.float32(0))
      >>> float(value) == 2.0**-60, float(slope), float(positive(jnp.float32(-0.5)))
      (True, 1.0, 0.5)
    """
    return at_least_floor(jnp.where(x < 0, -x, x))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def stepped(
    grid: Grid, x: jax.Array, scale: jax.Array, zero_point: jax.Array, gain: jax.Array
) -> jax.Array:
    r"""Return ``x`` on a grid of learned step s, with the derivatives of LSQ.

    With :math:`v = x / s`, :math:`Q_N = z`, :math:`Q_P = 2^{bits} - 1 - z`:

    .. math:: \frac{\partial \hat x}{\partial s} = g \cdot \begin{cases}
                  round(v) - v & -Q_N < v < Q_P \\ -Q_N & v \le -Q_N \\ Q_P & v \ge Q_P \end{cases}, \qquad
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
      >>> seen = lambda x, s: stepped(Grid(3), x, s, jnp.uint8(4), jnp.float32(1))
      >>> [float(d) for d in jax.grad(seen, argnums=(0, 1))(jnp.float32(1.25), jnp.float32(1))]
      [1.0, -0.25]
      >>> [float(d) for d in jax.grad(seen, argnums=(0, 1))(jnp.float32(-9), jnp.float32(1))]
      [0.0, -4.0]

    References:
      Esser et al., "Learned Step Size Quantization", 2020, arXiv:1902.08153, equations 3 and 5.
    """
    return _on_grid(grid, x, scale, zero_point)


@stepped.defjvp
def _(grid: Grid, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Tangent:
    (x, scale, zero_point, gain), (dx, ds, *_) = primals, tangents
    v, low, high = _place(grid, x, scale, zero_point)
    slope = jnp.where(v <= low, low, jnp.where(v >= high, high, jnp.round(v) - v))
    inside = ((v > low) & (v < high)).astype(dx.dtype)
    return _on_grid(grid, x, scale, zero_point), dx * inside + (gain * slope * ds).astype(dx.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def shifted(
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
      ``x`` as its codes stand for it, in its dtype; NaN stays NaN.

    Example:
      >>> seen = lambda x, s, b: shifted(Grid(2, False), x, s, b, jnp.float32(1))
      >>> [float(d) for d in jax.grad(seen, argnums=(0, 1, 2))(jnp.float32(9), jnp.float32(1), jnp.float32(-1))]
      [0.0, 3.0, 1.0]

    References:
      Bhalgat et al., "LSQ+", 2020, arXiv:2004.09576, equations 4 to 6.
    """
    return _on_grid(grid, x, scale, zero_of(grid, scale, offset))


@shifted.defjvp
def _(grid: Grid, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Tangent:
    (x, scale, offset, gain), (dx, ds, db, _) = primals, tangents
    zero_point = zero_of(grid, scale, offset)
    v, low, high = _place(grid, x, scale, zero_point)
    inside = (v > low) & (v < high)
    slope = jnp.where(v <= low, 0, jnp.where(v >= high, grid.top, jnp.round(v) - v))
    rest = gain * slope * ds + gain * jnp.where(inside, 0, db)
    return _on_grid(grid, x, scale, zero_point), dx * inside.astype(dx.dtype) + rest.astype(
        dx.dtype
    )


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def bounded(grid: Grid, x: jax.Array, bound: jax.Array, zero_point: jax.Array) -> jax.Array:
    r"""Return ``x`` clipped at a learned bound and on the grid below it, with the derivatives of PACT.

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
      ``x`` as its codes stand for it, in its dtype; NaN stays NaN.

    Example:
      >>> seen = lambda x, a: bounded(Grid(2, False), x, a, jnp.uint8(0))
      >>> [tuple(float(d) for d in jax.grad(seen, argnums=(0, 1))(jnp.float32(x), jnp.float32(3))) for x in (-1, 1.2, 5)]
      [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]

    References:
      Choi et al., "PACT", 2018, arXiv:1805.06085, equations 1 to 3.
    """
    return _on_grid(grid, x, step_of(grid, bound, zero_point), zero_point)


@bounded.defjvp
def _(grid: Grid, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Tangent:
    (x, bound, zero_point), (dx, da, _) = primals, tangents
    scale = step_of(grid, bound, zero_point)
    v, low, high = _place(grid, x, scale, zero_point)
    slope = jnp.where(v >= high, 1, jnp.where(v < low, low / high, 0))
    inside = ((v >= low) & (v < high)).astype(dx.dtype)
    return _on_grid(grid, x, scale, zero_point), dx * inside + (slope * da).astype(dx.dtype)


def zero_of(grid: Grid, scale: jax.Array, offset: jax.Array) -> jax.Array:
    """Return the zero point of an offset: ``clip(round(-offset / scale), 0, top)``, uint8."""
    return jnp.clip(jnp.round(-offset * (1 / scale)), 0, grid.top).astype(jnp.uint8)


def step_of(grid: Grid, bound: jax.Array, zero_point: jax.Array) -> jax.Array:
    """Return the step of a grid whose highest level is ``bound``."""
    return bound * (1 / (grid.top - zero_point.astype(jnp.float32)))


def _on_grid(grid: Grid, x: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
    seen = saturate(grid.decode(grid.encode(x, scale, zero_point), scale, zero_point), x.dtype)
    return jnp.where(jnp.isnan(x), x, seen)


def _place(
    grid: Grid, x: jax.Array, scale: jax.Array, zero_point: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return where ``x`` is in steps from zero, and the lowest and highest level."""
    zero = zero_point.astype(jnp.float32)
    return x.astype(jnp.float32) * (1 / scale), int(grid.narrow) - zero, grid.top - zero
