"""What quantizes activations: from the operand of a site to a grid for it, and how the operand is seen on that grid.

What belongs to one operand of one site (its range, its learned step) is a small dict of arrays,
``own``: inside a scan of L turns the arrays are stacked, ``[L, ...]``, and every turn sees its own.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from compress_jax.core.arguments import flag, whole
from compress_jax.core.errors import NonFiniteError
from compress_jax.core.finite import saturate
from compress_jax.core.types import PyTree
from compress_jax.quantize._scales.grid import Grid
from compress_jax.quantize._scales.rules import usable
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace._statistics.reducer import Reducer

Own = dict[str, jax.Array]
Placed = tuple[jax.Array, jax.Array]


def _nothing(site: Site, statistics: PyTree) -> Own:
    return {}


def _later(old: Own, new: Own) -> Own:
    return old


class ActivationQuantizer(NamedTuple):
    """Pure functions that quantize one operand of a site; `activations` applies them throughout a model.

    Attributes:
      grid: the levels; codes are uint8.
      place: ``(site, index, x, own) -> (scale float32, zero_point uint8)`` which broadcast against
        the operand ``x``, number ``index`` of the site. Dynamic ones look at ``x``, static ones at
        ``own`` only.
      see: ``(site, index, x, own) -> x``: the operand as its codes stand for it,
        ``grid.decode(grid.encode(x, *place), *place)`` bit for bit (NaN stays NaN), in its own
        dtype, with a derivative.
      reducer: the statistics that ``ranges`` needs; None if it needs none.
      ranges: ``(site, finished statistics of this operand) -> own``. Their leading axes are those
        of the statistics.
      merge: ``(old own, new own) -> own``, from one batch to the next in training. By default what
        is there stays.
      learned: names in ``own`` that an optimizer trains.
      call: the call that makes it, for tables and records.
      waits: whether nothing is quantized while a range is NaN, as before the first step of
        training; else that is an error.
    """

    grid: Grid
    place: Callable[[Site, int, jax.Array, Own], Placed]
    see: Callable[[Site, int, jax.Array, Own], jax.Array]
    reducer: Reducer | None = None
    ranges: Callable[[Site, Any], Own] = _nothing
    merge: Callable[[Own, Own], Own] = _later
    learned: tuple[str, ...] = ()
    call: str = "ActivationQuantizer(...)"
    waits: bool = False

    def __repr__(self) -> str:
        """Return the call that makes it."""
        return self.call


def require_finite(name: str, operands: Mapping[str, Own], *, unknown: bool = False) -> None:
    """Raise if what belongs to the operands of a site is known and not finite: all values would be seen as one.

    Args:
      name: of the site.
      operands: ``{"input": own}`` or the like.
      unknown: whether NaN, which stands for a range that is not known yet, is accepted.

    Raises:
      NonFiniteError: naming the site.

    Example:
      >>> require_finite("kernel", {"input": {"low": jnp.float32(0), "high": jnp.float32(1)}})
    """
    for key, own in operands.items():
        for end, value in own.items():
            if isinstance(value, Tracer):
                continue
            found = np.asarray(value, np.float64)
            if not (np.isfinite(found) | (np.isnan(found) & unknown)).all():
                raise NonFiniteError(
                    f"the range of the activations ({key}) of site {name!r} is not finite: {end} "
                    f"is {found.tolist()}; "
                    "calibrate anew, on batches without NaN or infinity that reach this site"
                )


def spanned(low: jax.Array, high: jax.Array, grid: Grid) -> Placed:
    r"""Place a grid on a range, as `scales.spanning` does but with the very same bits compiled or not.

    :math:`s = (high / 2 - low / 2) \cdot 2 / (2^{bits} - 1)`: halves are exact, so that no fused multiply-add can round
    otherwise than two operations do. Where ``low`` is not below 0 an asymmetric grid has the zero
    point 0.

    Of a range that is not finite the scale is NaN, and so is all that is seen on that grid.

    Args:
      low: float32; what is above 0 counts as 0.
      high: float32 of the same shape; what is below 0 counts as 0.
      grid: the levels.

    Returns:
      ``(scale, zero_point)`` of the shape of ``low``, or a scalar zero point if symmetric.

    Example:
      >>> spanned(jnp.array(0.0), jnp.array(5.1), Grid(8, symmetric=False))
      (Array(0.02, dtype=float32), Array(0, dtype=uint8))
    """
    known = jnp.isfinite(low) & jnp.isfinite(high)
    low, high = (
        jnp.where(known, jnp.minimum(low, 0), jnp.nan),
        jnp.where(known, jnp.maximum(high, 0), jnp.nan),
    )
    if grid.symmetric:
        return usable(jnp.maximum(-low, high) * np.float32(1 / grid.qmax)), grid.middle
    scale = usable((0.5 * high - 0.5 * low) * np.float32(2 / grid.top))
    return scale, jnp.clip(jnp.round(-low * (1 / scale)), 0, grid.top).astype(jnp.uint8)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def rounded(
    grid: Grid, clipped: bool, x: jax.Array, scale: jax.Array, zero_point: jax.Array
) -> jax.Array:
    """Return ``x`` on a grid, with the derivative of the identity; NaN stays NaN.

    Args:
      grid: the levels.
      clipped: whether the derivative is 0 where ``x`` is beyond the levels.
      x: any float array.
      scale: float32, broadcasts against ``x``; no derivative.
      zero_point: uint8, likewise.

    Returns:
      ``grid.decode(grid.encode(x, ...), ...)`` in the dtype of ``x``.

    Example:
      >>> step = jax.value_and_grad(lambda x: rounded(Grid(8), True, x, jnp.float32(0.5), jnp.uint8(128)))
      >>> [tuple(map(float, step(jnp.float32(x)))) for x in (0.9, 99.0)]
      [(1.0, 1.0), (63.5, 0.0)]
    """
    seen = saturate(grid.decode(grid.encode(x, scale, zero_point), scale, zero_point), x.dtype)
    return jnp.where(jnp.isnan(x), x, seen)


@rounded.defjvp
def _(
    grid: Grid, clipped: bool, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    (x, scale, zero_point), dx = primals, tangents[0]
    seen = rounded(grid, clipped, x, scale, zero_point)
    if not clipped:
        return seen, dx
    nearest = jnp.round(x.astype(jnp.float32) * (1 / scale))
    return seen, jnp.where(nearest == grid.levels(x, scale, zero_point), dx, jnp.zeros_like(dx))


def checked(bits: int, symmetric: bool) -> Grid:
    """Return the grid for activations.

    Args:
      bits: 2 to 8.
      symmetric: whether zero is the middle code; else every range has its own zero point.

    Returns:
      The grid.

    Raises:
      ArgumentError: if either is something else.

    Example:
      >>> checked(8, False).top
      255
    """
    return Grid(whole("bits", bits, 2, 8), flag("symmetric", symmetric))
