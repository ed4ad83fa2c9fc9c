"""The quantizer of activations: how one operand of a site gets a grid and is rounded to it.

The state of one operand of one site (its range, its learned step) is a small dict of arrays. Inside
a scan of L iterations the arrays are stacked, ``[L, ...]``, and every iteration gets its own slice.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from compress_jax.core.arguments import flag, whole
from compress_jax.core.errors import NonFiniteError
from compress_jax.core.finite import saturate
from compress_jax.core.types import PyTree
from compress_jax.quantize._scales.grid import Grid
from compress_jax.quantize._scales.rules import Scale, safe_scale
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace._statistics.reducer import Reducer

OperandState = dict[str, jax.Array]
"""What one operand of one site is quantized with: ``{"low", "high"}``, ``{"scale", ...}``."""


def _no_ranges(site: Site, statistics: PyTree) -> OperandState:
    return {}


def _keep_old(old: OperandState, new: OperandState) -> OperandState:
    return old


class ActivationQuantizer(NamedTuple):
    """Pure functions that quantize one operand of a site; `activations` applies them to a model.

    Attributes:
      grid: the levels; codes are uint8.
      scale_fn: ``(site, index, x, state) -> (scale float32, zero_point uint8)`` which broadcast
        against the operand ``x``, number ``index`` of the site. Dynamic quantizers use ``x``,
        static ones only ``state``.
      quantize_fn: ``(site, index, x, state) -> x``: the operand rounded to the grid,
        ``grid.decode(grid.encode(x, *scale_fn), *scale_fn)`` bit for bit (NaN stays NaN), in its
        own dtype, with a derivative.
      reducer: the statistics that ``ranges`` needs; None if it needs none.
      ranges: ``(site, finished statistics of this operand) -> state``. Its leading axes are those
        of the statistics.
      merge: ``(old state, new state) -> state``, from one batch to the next in training. By default
        the old state stays.
      learned: names in the state that an optimizer trains.
      call: the call that makes it, for tables and records.
      allow_unknown: whether a NaN range is accepted, as before the first step of training; else it
        is an error.

    Example:
      >>> import compress_jax as cj
      >>> cj.quantize.dynamic(bits=4)
      dynamic(bits=4, symmetric=True, granularity='tensor')
      >>> cj.quantize.static(bits=4).grid.qmax
      7
    """

    grid: Grid
    scale_fn: Callable[[Site, int, jax.Array, OperandState], Scale]
    quantize_fn: Callable[[Site, int, jax.Array, OperandState], jax.Array]
    reducer: Reducer | None = None
    ranges: Callable[[Site, PyTree], OperandState] = _no_ranges
    merge: Callable[[OperandState, OperandState], OperandState] = _keep_old
    learned: tuple[str, ...] = ()
    call: str = "ActivationQuantizer(...)"
    allow_unknown: bool = False

    def __repr__(self) -> str:
        """Return the call that makes it."""
        return self.call

    @property
    def place(self) -> Callable[[Site, int, jax.Array, OperandState], Scale]:
        """Return `scale_fn`, by its old name."""
        _warn_renamed("place", "scale_fn")
        return self.scale_fn

    @property
    def see(self) -> Callable[[Site, int, jax.Array, OperandState], jax.Array]:
        """Return `quantize_fn`, by its old name."""
        _warn_renamed("see", "quantize_fn")
        return self.quantize_fn


def _warn_renamed(old: str, new: str) -> None:
    text = f"ActivationQuantizer.{old} is now {new}; the old name goes in the next version"
    warnings.warn(text, DeprecationWarning, stacklevel=3)


def activation_grid(bits: int, symmetric: bool) -> Grid:
    """Return the grid for activations, its arguments checked.

    Args:
      bits: 2 to 8.
      symmetric: whether zero is the middle code; else every range has its own zero point.

    Returns:
      The grid.

    Raises:
      ArgumentError: if either is something else.

    Example:
      >>> activation_grid(8, False).top
      255
    """
    return Grid(whole("bits", bits, 2, 8), flag("symmetric", symmetric))


def stable_scale_from_range(low: jax.Array, high: jax.Array, grid: Grid) -> Scale:
    r"""Place a grid on a range, with the same bits compiled or not.

    Unlike `scale_from_range` it computes :math:`s = (high / 2 - low / 2) \cdot 2 / (2^{bits} - 1)`:
    halves are exact, so that a fused multiply-add rounds as two operations do. Where ``low`` is not
    below 0 an asymmetric grid has the zero point 0.

    If the range is not finite, the scale is NaN, and so is everything rounded to that grid.

    Args:
      low: float32; what is above 0 counts as 0.
      high: float32 of the same shape; what is below 0 counts as 0.
      grid: the levels.

    Returns:
      ``(scale, zero_point)`` of the shape of ``low``, or a scalar zero point if symmetric.

    Example:
      >>> stable_scale_from_range(jnp.array(0.0), jnp.array(5.1), Grid(8, symmetric=False))
      (Array(0.02, dtype=float32), Array(0, dtype=uint8))
    """
    known = jnp.isfinite(low) & jnp.isfinite(high)
    # A range always contains 0, so that zero is a level.
    low = jnp.where(known, jnp.minimum(low, 0), jnp.nan)
    high = jnp.where(known, jnp.maximum(high, 0), jnp.nan)
    if grid.symmetric:
        return safe_scale(jnp.maximum(-low, high) * np.float32(1 / grid.qmax)), grid.middle
    scale = safe_scale((0.5 * high - 0.5 * low) * np.float32(2 / grid.top))
    return scale, jnp.clip(jnp.round(-low * (1 / scale)), 0, grid.top).astype(jnp.uint8)


def nearest_level(grid: Grid, x: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
    """Return ``grid.decode(grid.encode(x, ...), ...)`` in the dtype of ``x``; NaN stays NaN.

    Unlike `Grid.round` it clips infinity.
    """
    decoded = grid.decode(grid.encode(x, scale, zero_point), scale, zero_point)
    # Codes are integers and cannot hold NaN.
    return jnp.where(jnp.isnan(x), x, saturate(decoded, x.dtype))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def round_to_grid(
    grid: Grid, clipped: bool, x: jax.Array, scale: jax.Array, zero_point: jax.Array
) -> jax.Array:
    """Return ``x`` rounded to a grid, with the derivative of the identity; NaN stays NaN.

    Args:
      grid: the levels.
      clipped: whether the derivative is 0 where ``x`` is beyond the levels.
      x: any float array.
      scale: float32, broadcasts against ``x``; no derivative.
      zero_point: uint8, likewise.

    Returns:
      As `nearest_level`.

    Example:
      >>> def fn(x):
      ...     return round_to_grid(Grid(8), True, x, jnp.float32(0.5), jnp.uint8(128))
      >>> [tuple(map(float, jax.value_and_grad(fn)(jnp.float32(x)))) for x in (0.9, 99.0)]
      [(1.0, 1.0), (63.5, 0.0)]
    """
    return nearest_level(grid, x, scale, zero_point)


@round_to_grid.defjvp
def _(
    grid: Grid, clipped: bool, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    x, scale, zero_point = primals
    dx = tangents[0]  # scale and zero point count as constants
    rounded = round_to_grid(grid, clipped, x, scale, zero_point)
    if not clipped:
        return rounded, dx
    # Inside the range the nearest whole number of steps is a level; beyond it is not.
    nearest = jnp.round(x.astype(jnp.float32) * (1 / scale))
    inside = nearest == grid.levels(x, scale, zero_point)
    return rounded, jnp.where(inside, dx, jnp.zeros_like(dx))


def require_finite(
    name: str, operands: Mapping[str, OperandState], *, unknown: bool = False
) -> None:
    """Raise if the known ranges of a site are not finite: all values would round to one.

    Args:
      name: of the site.
      operands: the states by operand, ``{"input": state}`` or the like.
      unknown: whether NaN, which stands for a range that is not known yet, is accepted.

    Raises:
      NonFiniteError: naming the site.

    Example:
      >>> require_finite("kernel", {"input": {"low": jnp.float32(0), "high": jnp.float32(1)}})
    """
    for key, state in operands.items():
        for end, value in state.items():
            if isinstance(value, Tracer):  # not known while tracing; the result is NaN instead
                continue
            found = np.asarray(value, np.float64)
            if not (np.isfinite(found) | (np.isnan(found) & unknown)).all():
                raise NonFiniteError(
                    f"the range of the activations ({key}) of site {name!r} is not finite: {end} "
                    f"is {found.tolist()}; calibrate anew, on batches without NaN or infinity that "
                    "reach this site"
                )
