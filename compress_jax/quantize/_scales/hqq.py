"""HQQ's half-quadratic splitting as a scale rule: a grid that fits most weights well and lets a few outliers go."""

from functools import partial

import jax
import jax.numpy as jnp

from compress_jax.core.layout import Layout
from compress_jax.quantize._scales.grid import Grid
from compress_jax.quantize._scales.rules import Scale, minmax, usable


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
    r"""Minimise :math:`\sum |w - \hat w|^p`, p below 1, without data: a scale rule, ``uniform(scale=hqq, ...)``.

    An outlier matrix E is split off: :math:`E \leftarrow shrink_p(w - \hat w, \beta)` with
    :math:`shrink_p(x, \beta) = sign(x) \, relu(|x| - |x|^{p-1} / \beta)`; then zero point and scale
    are fitted to what is left, :math:`z \leftarrow mean(c - (w - E) / s)` and, d being
    :math:`c - z`, :math:`s \leftarrow \langle w - E, d \rangle / \langle d, d \rangle`, c being the
    codes; :math:`\beta` grows in every step. Weights are measured in steps of the grid that
    `minmax` places, so that :math:`\beta` means the same for all; of all steps, that one included,
    each set keeps its best.

    Here zero points are codes, as every grid's are, so z is rounded, and the scale, which the paper
    leaves as it is, makes up for it.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      grid: the levels. On a symmetric one only the scale is fitted.
      power: p.
      beta: weight of the quadratic term, at first.
      growth: of ``beta``, in each step.
      steps: how many.

    Returns:
      ``(scale, zero_point)``.

    Example:
      >>> from compress_jax.quantize import uniform
      >>> w = jax.random.laplace(jax.random.key(0), (64, 8))
      >>> views = [c.view(w, c.init(w)) for c in (uniform(3, False, 64), uniform(3, False, 64, scale=hqq))]
      >>> [round(float((jnp.abs(v - w) ** 0.7).mean()), 2) for v in views]
      [0.38, 0.33]

    References:
      Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023,
      equations 3 to 6.
    """
    return _hqq(w, layout, grid, power, beta, growth, steps)


@partial(jax.jit, static_argnames=("layout", "grid", "power", "beta", "growth", "steps"))
def _hqq(
    w: jax.Array, layout: Layout, grid: Grid, power: float, beta: float, growth: float, steps: int
) -> Scale:
    total = partial(jnp.sum, axis=layout.reduced, keepdims=True)
    inside = layout.arrange(jnp.ones(layout.shape))  # padding has no weight
    start, zero = minmax(w, layout, grid)
    zero = jnp.broadcast_to(zero, start.shape).astype(jnp.float32)
    n = jnp.maximum(total(jnp.broadcast_to(inside, w.shape)), 1.0)

    def levels(s: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(w * (1 / s)), int(grid.narrow) - z, grid.top - z)

    def loss(s: jax.Array, z: jax.Array) -> jax.Array:
        far = jnp.abs(w - s * levels(s, z)) / start
        return total(jnp.where(far > 0, far, 1.0) ** power * jnp.where(far > 0, inside, 0.0))

    def turn(i: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        s, z, best_s, best_z, least = carry
        q = levels(s, z)
        left = (w - s * q) / start
        size = jnp.abs(left)
        kept = jnp.maximum(
            size - jnp.where(size > 0, size, 1.0) ** (power - 1) / (beta * growth**i), 0
        ) * jnp.sign(left)
        target = (w - kept * start) * inside
        if not grid.symmetric:
            z = jnp.clip(jnp.round(total((q + z - target / s) * inside) / n), 0, grid.top)
        q = levels(s, z) * inside
        squares = total(q * q)
        s = usable(
            jnp.abs(
                jnp.where(squares > 0, total(target * q) / jnp.where(squares > 0, squares, 1), s)
            )
        )
        now = loss(s, z)
        better = now < least
        return (
            s,
            z,
            jnp.where(better, s, best_s),
            jnp.where(better, z, best_z),
            jnp.where(better, now, least),
        )

    _, _, scale, zero, _ = jax.lax.fori_loop(
        0, steps, turn, (start, zero, start, zero, loss(start, zero))
    )
    return scale, grid.middle if grid.symmetric else zero.astype(jnp.uint8)
