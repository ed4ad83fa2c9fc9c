"""The scale of least squared error: a search over clipping ranges, each fitted exactly."""

from functools import partial
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.layout import Layout
from compress_jax.quantize._scales.grid import Grid
from compress_jax.quantize._scales.rules import Scale, group_minmax, scale_from_range

Axes = tuple[int, ...] | None


def fit(
    w: jax.Array, levels: jax.Array, scale: jax.Array, axis: Axes = None
) -> tuple[jax.Array, jax.Array]:
    r"""Return the scale of least squared error for given levels, and that error.

    .. math:: s^* = \frac{\langle w, c \rangle}{\langle c, c \rangle}
                  = s + \frac{\langle w - s c, c \rangle}{\langle c, c \rangle}, \qquad
              \sum (w - s^* c)^2
                  = \sum (w - s c)^2 - \frac{\langle w - s c, c \rangle^2}{\langle c, c \rangle}

    Written around a scale s that is nearly right, nothing cancels in float32.

    Args:
      w: what to approximate, float32.
      levels: c, of the shape of ``w``.
      scale: s, any scale; broadcasts against ``w``.
      axis: the axes that share a scale; None for all.

    Returns:
      ``(scale, error)``, the reduced axes kept at size 1. Where all levels are 0, ``scale`` is s.

    Example:
      The best factor of the 0/1 matrix nearest to W; without a factor, half the squared error is
      0.47.

      >>> import compress_jax as cj
      >>> w = jnp.array([[0.5, 0.3, 0.2], [0.4, 0.5, 0.1], [0.1, 0.2, 0.7]])
      >>> f"{0.5 * ((w - jnp.eye(3)) ** 2).sum():.5f}"
      '0.47000'
      >>> scale, error = cj.quantize.fit(w, jnp.eye(3), jnp.ones((1, 1)))
      >>> f"{scale[0, 0]:.4f} {0.5 * error[0, 0]:.5f}"
      '0.5667 0.18833'
    """
    total = partial(jnp.sum, axis=axis, keepdims=True)
    residual = w - scale * levels
    # The scale moves by slope / weight, and the error falls by slope^2 / weight.
    slope = total(residual * levels)
    weight = jnp.maximum(total(levels**2), jnp.finfo(jnp.float32).tiny)
    return scale + slope / weight, total(residual**2) - slope**2 / weight


class _Best(NamedTuple):
    """The best grid of every group so far, and the range of values it was derived from."""

    error: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    low: jax.Array
    high: jax.Array

    def better_of(self, other: "_Best") -> "_Best":
        win = other.error < self.error
        return jax.tree.map(partial(jnp.where, win), other, self)


@partial(jax.jit, static_argnames=("layout", "grid", "norm", "points"))
def mse(
    w: jax.Array, layout: Layout, grid: Grid, *, norm: float = 2.0, points: int | None = None
) -> Scale:
    r"""Minimise the error, :math:`\sum |w - s \, clip(round(w / s))|^2`, over scale and zero point.

    Clipping ranges are tried on a geometric grid, coarse and then fine around the best. The scale
    of each is replaced by the exact optimum for the levels it gives (`fit`). From the best of all,
    levels and scale are optimised in alternation, which can only lower the error. On an asymmetric
    grid both ends of the range are searched.

    Everything happens in one compiled loop whose memory is that of a few copies of ``w``.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      grid: the levels.
      norm: the exponent of the error; other than 2, scales are only searched, not fitted.
      points: size of the coarse grid. Default: 64, and more for arrays of less than 2**18 entries,
        up to 1024: the fewer entries share a scale, the more rugged is the error as a function of
        it, and the cheaper a trial.

    Returns:
      ``(scale, zero_point)``.

    Example:
      >>> import compress_jax as cj
      >>> w = jnp.array([-1.1, -1.0, -0.9, 1.0, 2.0])
      >>> scale, _ = cj.quantize.mse(w, Layout.of(w.shape, "tensor"), cj.quantize.Grid(bits=2))
      >>> f"{scale[0]:.2f}"  # clipping the 2 at 1.2 costs less than a step of 2 would
      '1.20'
    """
    bound = jnp.abs(w).max(layout.reduced, keepdims=True)
    bound = jnp.where(bound == 0, 1.0, jnp.maximum(bound, jnp.finfo(jnp.float32).tiny))
    unit = w * (1 / bound)  # in [-1, 1]: no square of it overflows, none that matters underflows

    def attempt(scale: jax.Array, zero_point: jax.Array, low: jax.Array, high: jax.Array) -> _Best:
        levels = grid.levels(unit, scale, zero_point)
        # Only for squares is the best scale of given levels known in closed form.
        if norm == 2:
            scale, error = fit(unit, levels, scale, layout.reduced)
        else:
            error = (jnp.abs(unit - scale * levels) ** norm).sum(layout.reduced, keepdims=True)
        return _Best(error, scale, jnp.broadcast_to(zero_point, scale.shape), low, high)

    def search(best: _Best, factors: np.ndarray) -> _Best:
        def trial(i: jax.Array, found: _Best) -> _Best:
            low = best.low * jnp.asarray(factors)[i, 0]
            high = best.high * jnp.asarray(factors)[i, 1]
            return found.better_of(attempt(*scale_from_range(low, high, grid), low, high))

        return jax.lax.fori_loop(0, len(factors), trial, best)

    # Levels for the best scale, then the best scale for these levels.
    def alternate(_: jax.Array, best: _Best) -> _Best:
        return best.better_of(attempt(best.scale, best.zero_point, best.low, best.high))

    points = points or max(64, min(1024, 2**24 // w.size))
    coarse, fine = _factors(grid, points)
    low, high = _whole_range(unit, layout, grid)
    start = attempt(*scale_from_range(low, high, grid), low, high)
    best = search(search(start, coarse), fine)
    best = jax.lax.fori_loop(0, 8, alternate, best)
    # Back in units of w; a subnormal scale would be flushed to 0.
    scale = jnp.maximum(best.scale * bound, jnp.finfo(jnp.float32).tiny)
    return scale, grid.middle if grid.symmetric else best.zero_point


def _whole_range(unit: jax.Array, layout: Layout, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Return the range of all entries, zero included; symmetric on a symmetric grid."""
    low, high = group_minmax(unit, layout)
    if not grid.symmetric:
        return jnp.minimum(low, 0), jnp.maximum(high, 0)
    high = jnp.maximum(-low, high)
    return -high, high


def _factors(grid: Grid, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of both ends of the range, ``[trials, 2]``: coarse, then fine."""
    # The largest factor is above 1: weights that lie on a coarser grid already need a wider range.
    if grid.symmetric:
        coarse = np.geomspace(2 * grid.qmax / (grid.qmax + 1), 1 / 512, points)
        return _same_factors(coarse), _same_factors(_between_neighbours(coarse, 33))
    coarse = np.geomspace(3 / 2, 1 / 64, round(1.25 * points**0.5))
    return _all_pairs(coarse), _all_pairs(_between_neighbours(coarse, 9))


def _between_neighbours(coarse: np.ndarray, points: int) -> np.ndarray:
    """Return factors that reach from one point of a geometric grid to the neighbours of it."""
    return np.geomspace(coarse[1] / coarse[0], coarse[0] / coarse[1], points)


def _same_factors(factors: np.ndarray) -> np.ndarray:
    return np.stack([factors] * 2, 1).astype(np.float32)


def _all_pairs(factors: np.ndarray) -> np.ndarray:
    return np.array(list(product(factors, factors)), np.float32)
