"""Half-quadratic quantization (HQQ): a scale rule that fits most weights and gives up outliers."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.layout import Layout
from compress_jax.quantize._scales.grid import Grid
from compress_jax.quantize._scales.rules import Scale, minmax, safe_scale


def hqq(
    w: jax.Array,
    layout: Layout,
    grid: Grid,
    *,
    power: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    steps: int = 20,
) -> Scale:
    r"""Minimise :math:`\sum |w - \hat w|^p` with p < 1, without data: ``uniform(scale=hqq)``.

    An outlier matrix E is split off: :math:`E \leftarrow shrink_p(w - \hat w, \beta)` with
    :math:`shrink_p(x, \beta) = sign(x) \, relu(|x| - |x|^{p-1} / \beta)`. Then zero point and scale
    are fitted to the rest: :math:`z \leftarrow mean(c - (w - E) / s)` and
    :math:`s \leftarrow \langle w - E, d \rangle / \langle d, d \rangle` with the codes c and
    :math:`d = c - z`. In every step :math:`\beta` grows.

    Weights are measured in steps of the grid that `minmax` places, so that :math:`\beta` means the
    same for every group. Each group keeps its best step, the start included. Zero points are codes,
    so z is rounded; the paper leaves the scale as it is, here it is fitted to the rounded z.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      grid: the levels. On a symmetric one only the scale is fitted.
      power: p.
      beta: first weight of the quadratic term.
      growth: factor of ``beta`` in each step.
      steps: number of steps.

    Returns:
      ``(scale, zero_point)``.

    Example:
      >>> import compress_jax as cj
      >>> w = jax.random.laplace(jax.random.key(0), (64, 8))
      >>> def error(scale):
      ...     c = cj.quantize.uniform(3, symmetric=False, granularity=64, scale=scale)
      ...     return round(float((jnp.abs(c.view(w, c.init(w)) - w) ** 0.7).mean()), 2)
      >>> error("minmax"), error(cj.quantize.hqq)
      (0.38, 0.33)

    References:
      Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023,
      equations 3 to 6.
    """
    return _hqq(w, layout, grid, power, beta, growth, steps)


class _Iterate(NamedTuple):
    """The current grid of every group, and its best grid so far with the loss there."""

    scale: jax.Array
    zero: jax.Array
    best_scale: jax.Array
    best_zero: jax.Array
    best_loss: jax.Array


@partial(jax.jit, static_argnames=("layout", "grid", "power", "beta", "growth", "steps"))
def _hqq(
    w: jax.Array, layout: Layout, grid: Grid, power: float, beta: float, growth: float, steps: int
) -> Scale:
    total = partial(jnp.sum, axis=layout.reduced, keepdims=True)
    inside = layout.arrange(jnp.ones(layout.shape))  # 0 at padding, which has no weight in the fit
    unit, zero = minmax(w, layout, grid)
    zero = jnp.broadcast_to(zero, unit.shape).astype(jnp.float32)
    n = jnp.maximum(total(jnp.broadcast_to(inside, w.shape)), 1.0)  # entries of each group

    def levels(s: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(w * (1 / s)), int(grid.narrow) - z, grid.top - z)

    def loss(s: jax.Array, z: jax.Array) -> jax.Array:
        distance = jnp.abs(w - s * levels(s, z)) / unit
        # An entry without error costs nothing, also where p is 0.
        powers = jnp.where(distance > 0, distance, 1.0) ** power
        return total(powers * jnp.where(distance > 0, inside, 0.0))

    def outliers(residual: jax.Array, i: int) -> jax.Array:
        """Return shrink_p of the residual, in steps of the first grid (eq. 4)."""
        size = jnp.abs(residual)
        # 0 to the negative power p - 1 would be infinite.
        slope = jnp.where(size > 0, size, 1.0) ** (power - 1) / (beta * growth**i)
        return jnp.maximum(size - slope, 0) * jnp.sign(residual)

    def step(i: int, at: _Iterate) -> _Iterate:
        s = at.scale
        z = at.zero
        # E by eq. 4, then the zero point and the scale that fit w - E best.
        q = levels(s, z)
        target = (w - outliers((w - s * q) / unit, i) * unit) * inside  # w - E
        if not grid.symmetric:
            z = jnp.clip(jnp.round(total((q + z - target / s) * inside) / n), 0, grid.top)
        q = levels(s, z) * inside
        squares = total(q * q)
        # The scale of least squares for the levels q; a group of zeros keeps its own.
        fitted = total(target * q) / jnp.where(squares > 0, squares, 1)
        s = safe_scale(jnp.abs(jnp.where(squares > 0, fitted, s)))
        now = loss(s, z)
        better = now < at.best_loss
        return _Iterate(
            s,
            z,
            jnp.where(better, s, at.best_scale),
            jnp.where(better, z, at.best_zero),
            jnp.where(better, now, at.best_loss),
        )

    start = _Iterate(unit, zero, unit, zero, loss(unit, zero))
    best = jax.lax.fori_loop(0, steps, step, start)
    return best.best_scale, grid.middle if grid.symmetric else best.best_zero.astype(jnp.uint8)
