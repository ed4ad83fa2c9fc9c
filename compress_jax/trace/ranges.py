"""Reducers of the range of activations: what the levels of a static grid should span."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.trace.reducer import Reducer, blank, of_inputs, total
from compress_jax.trace.site import Site
from compress_jax.trace.unfold import channels

Granularity = Literal["tensor", "channel"]


class AbsMax(NamedTuple):
    """The largest magnitude: float32, a scalar or per channel."""

    value: jax.Array
    count: jax.Array


class MinMax(NamedTuple):
    """The smallest and the largest value: float32, scalars or per channel."""

    low: jax.Array
    high: jax.Array
    count: jax.Array


def absmax(granularity: Granularity = "tensor") -> Reducer:
    r"""Keep the largest magnitude seen, :math:`\max |x|`: what an activation's static scale spans, or SmoothQuant balances.

    Args:
      granularity: ``"tensor"`` for one number, ``"channel"`` for one for each channel.

    Returns:
      A reducer with statistics `AbsMax` and for result its ``value``.

    Raises:
      ValueError: if the granularity is neither.

    Example:
      >>> from compress_jax.trace import calibrate
      >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[-3.0, 1.0]])]
      >>> seen = calibrate(lambda w, x: x @ w["kernel"], absmax("channel"), {"kernel": jnp.ones((2, 3))}, batches)
      >>> seen["kernel"]["input"].tolist()
      [3.0, 2.0]

    References:
      Xiao et al., "SmoothQuant", 2023, arXiv:2211.10438, equation 4.
    """
    over = _over(granularity)

    def measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> AbsMax:
        table = channels(site, index, x, mask)
        return AbsMax(over(jnp.max, table, jnp.abs(table.values), 0.0), table.count)

    def combine(old: AbsMax, new: AbsMax) -> AbsMax:
        return AbsMax(jnp.maximum(old.value, new.value), total(old.count, new.count))

    return of_inputs(measure, combine, lambda statistics: blank(statistics).value)


def minmax(momentum: float | None = None, granularity: Granularity = "tensor") -> Reducer:
    r"""Keep the smallest and the largest value seen, or their moving averages over batches.

    With momentum m a further batch moves the range by :math:`low \leftarrow m \, low + (1 - m) \min x`, and ``high``
    likewise; the first batch sets it. That forgets outliers and depends on the order of the batches.

    Args:
      momentum: share of the range that a new batch leaves as it was, from 0 to below 1 (0.99 is usual in training). By
        default nothing that was seen is ever outside.
      granularity: ``"tensor"`` for one range, ``"channel"`` for one for each channel.

    Returns:
      A reducer with statistics and result `MinMax`.

    Raises:
      ValueError: if ``momentum`` or ``granularity`` is not one of the above.

    Example:
      >>> from compress_jax.trace import calibrate
      >>> fn, params = lambda w, x: x @ w["kernel"], {"kernel": jnp.ones((2, 3))}
      >>> batches = [jnp.array([[0.0, 2.0]]), jnp.array([[-4.0, 1.0]])]
      >>> [float(end) for end in calibrate(fn, minmax(), params, batches)["kernel"]["input"]]
      [-4.0, 2.0, 2.0]
      >>> [float(end) for end in calibrate(fn, minmax(momentum=0.75), params, batches)["kernel"]["input"]]
      [-1.0, 1.75, 2.0]

    References:
      Jacob et al., "Quantization and Training of Neural Networks", 2018, arXiv:1712.05877, section 3.1.
    """
    over = _over(granularity)
    if momentum is not None and not 0 <= momentum < 1:
        raise ValueError(f"momentum must be from 0 to below 1, or None to keep the extremes, got {momentum}")

    def measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> MinMax:
        table = channels(site, index, x, mask)
        low, high = over(jnp.min, table, table.values, jnp.inf), over(jnp.max, table, table.values, -jnp.inf)
        return MinMax(low, high, table.count)

    def combine(old: MinMax, new: MinMax) -> MinMax:
        count = total(old.count, new.count)
        if momentum is None:
            return MinMax(jnp.minimum(old.low, new.low), jnp.maximum(old.high, new.high), count)
        low, high = (before + (1 - momentum) * (now - before) for before, now in zip(old[:2], new[:2], strict=True))
        return MinMax(low, high, count)

    return of_inputs(measure, combine)


def _over(granularity: Granularity) -> Callable[..., jax.Array]:
    """Return ``(reduction, table, values, start) -> reduced``, over everything or over rows."""
    if granularity == "tensor":
        return lambda reduction, table, values, start: table.reduced(reduction, values, start)
    if granularity == "channel":
        return lambda reduction, table, values, start: table.flat(table.reduced(reduction, values, start, table.rows))
    raise ValueError(f"granularity must be 'tensor' or 'channel', got {granularity!r}")
