"""Scale rules for levels that are not evenly spaced: one float32 scale for each group of entries.

A rule is a pure function ``(w, layout, levels) -> {"scale": float32}`` of a float32 array in the
arrangement of a `Layout`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.layout import Layout
from compress_jax.core.levels import Levels
from compress_jax.quantize._scales.least_squares import fit
from compress_jax.quantize._scales.rules import group_absmax, group_counts, safe_scale

Fixed = dict[str, jax.Array]
"""What `CompressionState.fixed` holds for one leaf."""

LevelRule = Callable[[jax.Array, Layout, Levels], Fixed]


@partial(jax.jit, static_argnames=("layout", "levels"))
def absmax(w: jax.Array, layout: Layout, levels: Levels) -> Fixed:
    r"""Put the largest magnitude on the largest level, :math:`s = \max |w| / \ell_{max}`.

    Nothing is clipped.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      levels: what they are rounded to.

    Returns:
      ``{"scale": float32}``.

    Example:
      >>> from compress_jax.core.levels import Float
      >>> absmax(jnp.array([0.5, -3.0]), Layout.of((2,), "tensor"), Float(2, 1))
      {'scale': Array([0.5], dtype=float32)}
    """
    return {"scale": safe_scale(group_absmax(w, layout) * np.float32(1 / levels.largest))}


class _Best(NamedTuple):
    """The best scale of every group so far, its error, and the scale it was fitted from."""

    error: jax.Array
    scale: jax.Array
    origin: jax.Array

    def better_of(self, other: "_Best") -> "_Best":
        return jax.tree.map(partial(jnp.where, other.error < self.error), other, self)


@partial(jax.jit, static_argnames=("layout", "levels"))
def mse(w: jax.Array, layout: Layout, levels: Levels) -> Fixed:
    r"""Minimise the error, :math:`\sum (w - s \, \ell(w / s))^2`, where l is the nearest level.

    Scales are tried on a geometric grid, coarse and then fine around the best. Each is replaced by
    the exact optimum for the levels it gives (`fit`). From the best of all, levels and scale are
    optimised in alternation, which can only lower the error.

    The grid reaches down to where the largest level is half the least possible root mean square of
    n entries with that absolute maximum, :math:`\max |w| / 2 \sqrt n`.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      levels: what they are rounded to.

    Returns:
      ``{"scale": float32}``.

    Example:
      >>> from compress_jax.core.levels import Table
      >>> w, ternary = jnp.array([-1.1, -1.0, 0.9, 1.0, 2.0]), Table((-1.0, 0.0, 1.0))
      >>> fixed = mse(w, Layout.of((5,), "tensor"), ternary)
      >>> f"{fixed['scale'][0]:.2f}"  # clipping the 2 costs less than rounding the others to 0
      '1.20'
    """
    bound = safe_scale(group_absmax(w, layout))
    unit = w * (1 / bound)  # in [-1, 1]: no square of it overflows, none that matters underflows

    def attempt(scale: jax.Array) -> _Best:
        fitted, error = fit(unit, levels.round(unit * (1 / scale)), scale, layout.reduced)
        # Where all levels have one sign, entries of the other sign may want a negative scale.
        valid = fitted > 0
        return _Best(jnp.where(valid, error, jnp.inf), jnp.where(valid, fitted, scale), scale)

    def search(best: _Best, factors: np.ndarray) -> _Best:
        def trial(i: jax.Array, found: _Best) -> _Best:
            return found.better_of(attempt(best.origin * jnp.asarray(factors)[i]))

        return jax.lax.fori_loop(0, len(factors), trial, best)

    def alternate(_: jax.Array, best: _Best) -> _Best:
        return best.better_of(attempt(best.scale))

    coarse, fine = _factors(w, layout)
    start = attempt(jnp.full(layout.scale_shape, 1 / levels.largest, jnp.float32))
    best = search(search(start, coarse), fine)
    best = jax.lax.fori_loop(0, 8, alternate, best)
    return {"scale": safe_scale(best.scale * bound)}


def _factors(w: jax.Array, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of a scale: over all sizes, then between the neighbours of the best."""
    # The fewer entries share a scale, the more rugged is the error as a function of it, and the
    # cheaper is a trial.
    points = max(64, min(1024, 2**24 // w.size))
    coarse = np.geomspace(2, 0.5 / np.sqrt(group_counts(layout).max()), points)
    fine = np.geomspace(coarse[1] / coarse[0], coarse[0] / coarse[1], 33)
    return coarse.astype(np.float32), fine.astype(np.float32)
