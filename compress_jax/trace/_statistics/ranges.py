"""Reducers of the range of activations: what the levels of a static grid should span."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.exact import Int64, add, choose, widened
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace._statistics.reducer import Reducer, blank, channels, of_inputs, total

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

    With momentum m a further batch moves the range by
    :math:`low \leftarrow m \, low + (1 - m) \min x`, and ``high`` likewise; the first batch sets
    it. That forgets outliers and depends on the order of the batches.

    Args:
      momentum: share of the range that a new batch leaves as it was, from 0 to below 1 (0.99 is
        usual in training). By default nothing that was seen is ever outside.
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
      Jacob et al., "Quantization and Training of Neural Networks", 2018, arXiv:1712.05877, section
      3.1.
    """
    over = _over(granularity)
    if momentum is not None and not 0 <= momentum < 1:
        raise ValueError(
            f"momentum must be from 0 to below 1, or None to keep the extremes, got {momentum}"
        )

    def measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> MinMax:
        table = channels(site, index, x, mask)
        low, high = (
            over(jnp.min, table, table.values, jnp.inf),
            over(jnp.max, table, table.values, -jnp.inf),
        )
        return MinMax(low, high, table.count)

    def combine(old: MinMax, new: MinMax) -> MinMax:
        count = total(old.count, new.count)
        if momentum is None:
            return MinMax(jnp.minimum(old.low, new.low), jnp.maximum(old.high, new.high), count)
        low, high = (
            before + (1 - momentum) * (now - before)
            for before, now in zip(old[:2], new[:2], strict=True)
        )
        return MinMax(low, high, count)

    return of_inputs(measure, combine)


def _over(granularity: Granularity) -> Callable[..., jax.Array]:
    """Return ``(reduction, table, values, start) -> reduced``, over everything or over rows."""
    if granularity == "tensor":
        return lambda reduction, table, values, start: table.reduced(reduction, values, start)
    if granularity == "channel":
        return lambda reduction, table, values, start: table.flat(
            table.reduced(reduction, values, start, table.rows)
        )
    raise ValueError(f"granularity must be 'tensor' or 'channel', got {granularity!r}")


# Histograms of unbounded data that merge exactly.


SMALLEST = -96  # exponent of the narrowest range; one bin of it, at most 2**20 times as narrow, is still a normal float32


class Histogram(NamedTuple):
    """How often values fell into each of the bins between ``edges(histogram)``.

    Attributes:
      counts: of each bin, in ascending order, unsigned; both words ``[bins]``. A language model's
        batch may hold 2**28 activations at one site.
      exponent: int32 e: the bins cover -2**e to 2**e.
      low: smallest value seen, float32; not finite if any value was not.
      high: largest value seen.
      count: rows seen (not values), int32.
    """

    counts: Int64
    exponent: jax.Array
    low: jax.Array
    high: jax.Array
    count: jax.Array


def histogram(bins: int = 2048) -> Reducer:
    r"""Keep a histogram of all entries: what percentile and entropy (KL) calibration choose a range from.

    Bin i of n holds :math:`i - n/2 \le x n / 2^{e+1} < i - n/2 + 1`, mirrored below zero (there the
    edge nearer to zero is the open one). Merging gives exactly the histogram of all batches
    together. Values that are not finite are in no bin.

    Args:
      bins: a power of two from 4 to 2**21. The largest magnitude lies in the outer half of the
        range, so that at least a quarter of the bins serve its side.

    Returns:
      A reducer with statistics and result `Histogram`: one for the whole operand.

    Raises:
      ValueError: if ``bins`` is not such a number.

    Example:
      >>> from compress_jax.trace import calibrate
      >>> batches = [jnp.array([[0.5, 0.75]]), jnp.array([[-3.0, 0.0]])]
      >>> fn, params = lambda w, x: x @ w["kernel"], {"kernel": jnp.ones((2, 3))}
      >>> seen = calibrate(fn, histogram(8), params, batches)["kernel"]["input"]
      >>> seen.counts.to_float().tolist()
      [1.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0]
      >>> edges(seen).tolist(), float(percentile(seen, 100)), float(percentile(magnitudes(seen), 100))
      ([-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0], 0.75, 3.0)

    References:
      Migacz, "8-bit Inference with TensorRT", 2017: a range from a histogram of activations.
    """
    if bins not in (2**n for n in range(2, 22)):
        raise ValueError(f"bins must be a power of two from 4 to {2**21}, got {bins!r}")
    return of_inputs(lambda site, index, x, mask: _measure(site, index, x, mask, bins), _merge)


def edges(histogram: Histogram) -> jax.Array:
    """Return the ends of the bins.

    Args:
      histogram: of n bins; may be stacked.

    Returns:
      float32 ``[..., n + 1]``, exact. (Above 2**127 the outermost are infinite.)

    Example:
      >>> from compress_jax.trace import calibrate
      >>> fn, params, x = lambda w, x: x @ w["kernel"], {"kernel": jnp.ones((1, 1))}, jnp.array([[0.5], [-1.0]])
      >>> seen = calibrate(fn, histogram(4), params, [x])["kernel"]["input"]
      >>> edges(seen).tolist()
      [-2.0, -1.0, 0.0, 1.0, 2.0]
    """
    half = _bins(histogram) // 2
    steps = jnp.arange(-half, half + 1, dtype=jnp.float32)
    return jnp.ldexp(steps.reshape(*(1,) * histogram.exponent.ndim, -1), _bin_exponent(histogram))


def magnitudes(histogram: Histogram) -> Histogram:
    r"""Return the histogram of :math:`|x|`: for ranges that are symmetric about zero.

    Args:
      histogram: of x; may be stacked.

    Returns:
      One with as many bins, those below zero empty. Its ``low`` is 0 if x took either sign.

    Example:
      >>> from compress_jax.trace import calibrate
      >>> fn, params, x = lambda w, x: x @ w["kernel"], {"kernel": jnp.ones((1, 1))}, jnp.array([[0.5], [-1.0]])
      >>> seen = calibrate(fn, histogram(4), params, [x])["kernel"]["input"]
      >>> seen.counts.to_float().tolist(), magnitudes(seen).counts.to_float().tolist()
      ([1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0])
    """
    half = _bins(histogram) // 2
    above = histogram.counts.map(lambda word: word[..., half:])
    below = histogram.counts.map(lambda word: word[..., half - 1 :: -1])
    counts = add(above, below).map(
        lambda word: jnp.pad(word, [(0, 0)] * (word.ndim - 1) + [(half, 0)])
    )
    low, high = histogram.low, histogram.high
    return histogram._replace(
        counts=counts,
        low=jnp.where(jnp.isnan(low), low, jnp.maximum(jnp.maximum(low, -high), 0)),
        high=jnp.maximum(high, -low),
    )


def percentile(histogram: Histogram, percent: float) -> jax.Array:
    r"""Return the value that a given share of the entries does not exceed.

    Counts from the nearer end, so that the last thousandth of a percent is resolved as well as the
    first, and interpolates within the bin: at most the width of a bin, :math:`2^{e+1} / n`, from an
    entry of that rank. 0 and 100 give the smallest and the largest value exactly (but not the
    smallest magnitude).

    Args:
      histogram: may be stacked; take `magnitudes` of it for a symmetric range.
      percent: from 0 to 100.

    Returns:
      float32, one for each histogram; NaN if nothing was seen, or if any value was not finite.

    Raises:
      ValueError: if ``percent`` is outside.

    Example:
      >>> from compress_jax.trace import calibrate
      >>> fn, params = lambda w, x: x @ w["kernel"], {"kernel": jnp.ones((1, 1))}
      >>> seen = calibrate(fn, histogram(), params, [jnp.arange(100.0)[:, None]])
      >>> round(float(percentile(seen["kernel"]["input"], 90)))
      90
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be from 0 to 100, got {percent}")
    if percent > 50:
        return -_from_bottom(_mirrored(histogram), (100 - percent) / 100)
    return _from_bottom(histogram, percent / 100)


def _measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None, bins: int) -> Histogram:
    table, half = channels(site, index, x, mask), bins // 2
    x = table.values
    low, high = table.reduced(jnp.min, x, jnp.inf), table.reduced(jnp.max, x, -jnp.inf)
    exponent = _exponent(jnp.maximum(high, -low))
    # A power of two scales exactly; the magnitude and then the sign, or what underflows would
    # change sides.
    steps = jnp.floor(jnp.ldexp(jnp.abs(x), half.bit_length() - 1 - exponent))
    place = jnp.where(x < 0, half - 1 - steps, half + steps)
    place = jnp.where(
        jnp.isfinite(x) if table.there is None else jnp.isfinite(x) & table.there, place, bins
    ).astype(jnp.int32)
    # Not flattened: each device counts its own part.
    counts = jnp.zeros(bins, jnp.uint32).at[place].add(jnp.uint32(1), mode="drop")
    return Histogram(widened(counts), exponent, low, high, table.count)


def _exponent(bound: jax.Array) -> jax.Array:
    """Return the smallest e with ``bound < 2**e``, but no less than `SMALLEST`, which is also that of 0."""
    exponent = jnp.frexp(bound)[1]
    return jnp.where(bound > 0, jnp.maximum(exponent, SMALLEST), SMALLEST).astype(jnp.int32)


def _merge(old: Histogram, new: Histogram) -> Histogram:
    exponent = jnp.maximum(old.exponent, new.exponent)
    counts = add(
        _folded(old.counts, exponent - old.exponent), _folded(new.counts, exponent - new.exponent)
    )
    low, high = jnp.minimum(old.low, new.low), jnp.maximum(old.high, new.high)
    return Histogram(counts, exponent, low, high, total(old.count, new.count))


@jax.jit
def _folded(counts: Int64, times: jax.Array) -> Int64:
    """Double the range so many times; once only two bins are filled, nothing changes any more."""
    bins = counts.low.shape[-1]
    ends = [(0, 0)] * (counts.low.ndim - 1) + [(bins // 4, bins // 4)]

    def once(time: jax.Array, counts: Int64) -> Int64:
        even = counts.map(lambda word: word[..., 0::2])
        odd = counts.map(lambda word: word[..., 1::2])
        halved = add(even, odd).map(lambda word: jnp.pad(word, ends))
        return choose(time < times[..., None], halved, counts)

    return jax.lax.fori_loop(0, bins.bit_length() - 2, once, counts)


def _mirrored(histogram: Histogram) -> Histogram:
    flipped = histogram.counts.map(lambda word: word[..., ::-1])
    return histogram._replace(counts=flipped, low=-histogram.high, high=-histogram.low)


def _from_bottom(histogram: Histogram, share: float) -> jax.Array:
    counts = histogram.counts.to_float()
    upto = counts.cumsum(-1)
    rank = share * upto[..., -1:]
    place = jnp.argmax((upto >= rank) & (counts > 0), axis=-1, keepdims=True)
    inside, here = (jnp.take_along_axis(each, place, axis=-1) for each in (upto - counts, counts))
    step = (place - _bins(histogram) // 2).astype(jnp.float32) + jnp.clip(
        (rank - inside) / jnp.maximum(here, 1), 0, 1
    )
    value = jnp.ldexp(step, _bin_exponent(histogram))[..., 0]
    low, high, known = histogram.low, histogram.high, blank(histogram)
    return jnp.where(
        jnp.isfinite(known.low) & jnp.isfinite(known.high), jnp.clip(value, low, high), jnp.nan
    )


def _bins(histogram: Histogram) -> int:
    return histogram.counts.low.shape[-1]


def _bin_exponent(histogram: Histogram) -> jax.Array:
    """Return the exponent of the width of a bin, ``[..., 1]``."""
    return (histogram.exponent - ((_bins(histogram) // 2).bit_length() - 1))[..., None]
