"""The ready reducers: ranges, histograms, Gram matrices and moments of activations.

Ranges, which the levels of a static grid span: extremes (`absmax`, `minmax`), and a `histogram` of
unbounded data that merges exactly, with the `percentile` of it. Sums over rows: the Gram matrix
(`gram`), and mean, norm and outliers of each channel.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError
from compress_jax.core.exact import Int64, add, choose, widened
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace._statistics.calibration import Gram
from compress_jax.trace._statistics.reducer import (
    Reducer,
    Table,
    add_counts,
    channels,
    expand_count,
    nan_if_empty,
    per_input,
    windows,
)

Granularity = Literal["tensor", "channel"]
Reduction = Callable[..., jax.Array]  # jnp.max or the like


class AbsMax(NamedTuple):
    """The largest magnitude.

    Attributes:
      value: float32, a scalar or per channel.
      count: rows, int32.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> observed = cj.trace.observe(fn, cj.trace.reducers.absmax())
      >>> _, found = observed({"kernel": jnp.ones((2, 3))}, jnp.array([[1.0, -2.0]]))
      >>> value, count = found["kernel"]["input"]
      >>> float(value), int(count)
      (2.0, 1)
    """

    value: jax.Array
    count: jax.Array


class MinMax(NamedTuple):
    """The smallest and the largest value.

    Attributes:
      low: float32, a scalar or per channel.
      high: likewise.
      count: rows, int32.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> observed = cj.trace.observe(fn, cj.trace.reducers.minmax())
      >>> _, found = observed({"kernel": jnp.ones((2, 3))}, jnp.array([[1.0, -2.0]]))
      >>> [float(end) for end in found["kernel"]["input"]]
      [-2.0, 1.0, 1.0]
    """

    low: jax.Array
    high: jax.Array
    count: jax.Array


def absmax(granularity: Granularity = "tensor") -> Reducer:
    r"""Keep the largest magnitude, :math:`\max |x|`.

    An activation's static scale spans it; SmoothQuant balances it against the weights.

    Args:
      granularity: ``"tensor"`` for one number, ``"channel"`` for one for each channel.

    Returns:
      A reducer with statistics `AbsMax` and for result its ``value``.

    Raises:
      ArgumentError: if the granularity is neither.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[-3.0, 1.0]])]
      >>> found = cj.trace.calibrate(fn, cj.trace.reducers.absmax("channel"), params, batches)
      >>> found["kernel"]["input"].tolist()
      [3.0, 2.0]

    References:
      Xiao et al., "SmoothQuant", 2023, arXiv:2211.10438, equation 4.
    """
    reduced = _reduction(granularity)

    def measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> AbsMax:
        table = channels(site, index, x, mask)
        return AbsMax(reduced(jnp.max, table, jnp.abs(table.values), 0.0), table.count)

    def combine(old: AbsMax, new: AbsMax) -> AbsMax:
        return AbsMax(jnp.maximum(old.value, new.value), add_counts(old.count, new.count))

    return per_input(measure, combine, lambda statistics: nan_if_empty(statistics).value)


def minmax(momentum: float | None = None, granularity: Granularity = "tensor") -> Reducer:
    r"""Keep the smallest and the largest value, or their moving averages over batches.

    With momentum m a further batch moves the range by
    :math:`low \leftarrow m \, low + (1 - m) \min x`, and ``high`` likewise; the first batch sets
    it. That forgets outliers and depends on the order of the batches.

    Args:
      momentum: decay of the moving average, from 0 to below 1 (0.99 is usual in training). By
        default the extremes over all batches.
      granularity: ``"tensor"`` for one range, ``"channel"`` for one for each channel.

    Returns:
      A reducer with statistics and result `MinMax`.

    Raises:
      ArgumentError: if ``momentum`` or ``granularity`` is not one of the above.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> batches = [jnp.array([[0.0, 2.0]]), jnp.array([[-4.0, 1.0]])]
      >>> extremes = cj.trace.calibrate(fn, cj.trace.reducers.minmax(), params, batches)
      >>> [float(end) for end in extremes["kernel"]["input"]]
      [-4.0, 2.0, 2.0]
      >>> moving = cj.trace.reducers.minmax(momentum=0.75)
      >>> [float(end) for end in cj.trace.calibrate(fn, moving, params, batches)["kernel"]["input"]]
      [-1.0, 1.75, 2.0]

    References:
      Jacob et al., "Quantization and Training of Neural Networks", 2018, arXiv:1712.05877, section
      3.1.
    """
    reduced = _reduction(granularity)
    if momentum is not None and not 0 <= momentum < 1:
        raise ArgumentError(
            f"momentum must be from 0 to below 1, or None to keep the extremes, got {momentum}"
        )

    def measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> MinMax:
        table = channels(site, index, x, mask)
        low = reduced(jnp.min, table, table.values, jnp.inf)
        high = reduced(jnp.max, table, table.values, -jnp.inf)
        return MinMax(low, high, table.count)

    def combine(old: MinMax, new: MinMax) -> MinMax:
        count = add_counts(old.count, new.count)
        if momentum is None:
            return MinMax(jnp.minimum(old.low, new.low), jnp.maximum(old.high, new.high), count)
        low = old.low + (1 - momentum) * (new.low - old.low)
        high = old.high + (1 - momentum) * (new.high - old.high)
        return MinMax(low, high, count)

    return per_input(measure, combine)


def _reduction(granularity: Granularity) -> Callable[..., jax.Array]:
    """Return ``(reduction, table, values, start) -> reduced``, over everything or over rows."""

    def over_all(reduction: Reduction, table: Table, values: jax.Array, start: float) -> jax.Array:
        return table.reduced(reduction, values, start)  # a scalar

    def over_rows(reduction: Reduction, table: Table, values: jax.Array, start: float) -> jax.Array:
        return table.flat(table.reduced(reduction, values, start, table.rows))  # [*batch, k]

    if granularity == "tensor":
        return over_all
    if granularity == "channel":
        return over_rows
    raise ArgumentError(f"granularity must be 'tensor' or 'channel', got {granularity!r}")


# Exponent of the narrowest range: a bin of it, at most 2**20 times as narrow, is a normal float32.
SMALLEST = -96


class Histogram(NamedTuple):
    """How often values fell into each of the bins between ``edges(histogram)``.

    Attributes:
      counts: count of each bin, in ascending order, unsigned; both words ``[bins]``. A batch may
        hold 2**28 activations at one site.
      exponent: int32 e: the bins cover -2**e to 2**e.
      low: smallest value, float32; not finite if any value was not.
      high: largest value.
      count: rows (not values), int32.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> observed = cj.trace.observe(fn, cj.trace.reducers.histogram(4))
      >>> _, found = observed({"kernel": jnp.ones((2, 3))}, jnp.array([[1.0, -2.0]]))
      >>> made = found["kernel"]["input"]
      >>> made.counts.to_float().tolist(), int(made.exponent), int(made.count)
      ([1.0, 0.0, 1.0, 0.0], 2, 1)
    """

    counts: Int64
    exponent: jax.Array
    low: jax.Array
    high: jax.Array
    count: jax.Array


def histogram(bins: int = 2048) -> Reducer:
    r"""Keep a histogram of all entries, from which percentile and entropy (KL) calibration choose.

    Bin i of n holds :math:`i - n/2 \le x n / 2^{e+1} < i - n/2 + 1`, mirrored below zero (there the
    edge nearer to zero is the open one). Merging gives exactly the histogram of all batches
    together. Values that are not finite are in no bin.

    Args:
      bins: a power of two from 4 to 2**21. The largest magnitude lies in the outer half of the
        range, so that at least a quarter of the bins serve its side.

    Returns:
      A reducer with statistics and result `Histogram`: one for the whole operand.

    Raises:
      ArgumentError: if ``bins`` is not such a number.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> batches = [jnp.array([[0.5, 0.75]]), jnp.array([[-3.0, 0.0]])]
      >>> found = cj.trace.calibrate(fn, cj.trace.reducers.histogram(8), params, batches)
      >>> found["kernel"]["input"].counts.to_float().tolist()
      [1.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0]
      >>> cj.trace.reducers.edges(found["kernel"]["input"]).tolist()
      [-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0]

    References:
      Migacz, "8-bit Inference with TensorRT", 2017: a range from a histogram of activations.
    """
    if bins not in (2**n for n in range(2, 22)):
        raise ArgumentError(f"bins must be a power of two from 4 to {2**21}, got {bins!r}")

    def measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> Histogram:
        return _histogram(channels(site, index, x, mask), bins)

    return per_input(measure, _merge)


def edges(histogram: Histogram) -> jax.Array:
    """Return the ends of the bins.

    Args:
      histogram: of n bins; may be stacked.

    Returns:
      float32 ``[..., n + 1]``, exact. (Above 2**127 the outermost are infinite.)

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((1, 1))}
      >>> batches = [jnp.array([[0.5], [-1.0]])]
      >>> found = cj.trace.calibrate(fn, cj.trace.reducers.histogram(4), params, batches)
      >>> cj.trace.reducers.edges(found["kernel"]["input"]).tolist()
      [-2.0, -1.0, 0.0, 1.0, 2.0]
    """
    half = _bins(histogram) // 2
    steps = jnp.arange(-half, half + 1, dtype=jnp.float32)  # [bins + 1], in bins from zero
    return jnp.ldexp(steps.reshape(*(1,) * histogram.exponent.ndim, -1), _bin_exponent(histogram))


def magnitudes(histogram: Histogram) -> Histogram:
    r"""Return the histogram of :math:`|x|`: for ranges that are symmetric about zero.

    Args:
      histogram: of x; may be stacked.

    Returns:
      One with as many bins, those below zero empty. Its ``low`` is 0 if x took either sign.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((1, 1))}
      >>> batches = [jnp.array([[0.5], [-1.0]])]
      >>> found = cj.trace.calibrate(fn, cj.trace.reducers.histogram(4), params, batches)
      >>> signed = found["kernel"]["input"]
      >>> signed.counts.to_float().tolist()
      [1.0, 0.0, 1.0, 0.0]
      >>> cj.trace.reducers.magnitudes(signed).counts.to_float().tolist()
      [0.0, 0.0, 1.0, 1.0]
    """
    half = _bins(histogram) // 2
    # |x|: bin -1-i of x is bin i of the magnitude.
    above = histogram.counts.map(lambda word: word[..., half:])  # [..., bins / 2]
    below = histogram.counts.map(lambda word: word[..., half - 1 :: -1])  # [..., bins / 2]
    widths = [(0, 0)] * (histogram.counts.low.ndim - 1) + [(half, 0)]
    counts = add(above, below).map(lambda word: jnp.pad(word, widths))  # [..., bins]
    low = histogram.low
    high = histogram.high
    # The smallest magnitude: low if all values are positive, -high if all are negative, else 0.
    return histogram._replace(
        counts=counts,
        low=jnp.where(jnp.isnan(low), low, jnp.maximum(jnp.maximum(low, -high), 0)),
        high=jnp.maximum(high, -low),
    )


def percentile(histogram: Histogram, percent: float) -> jax.Array:
    r"""Return the value that a given share of the entries does not exceed.

    Entries are counted from the nearer end, so that the last thousandth of a percent is resolved as
    well as the first. The value is interpolated within the bin: at most the width of a bin,
    :math:`2^{e+1} / n`, from an entry of that rank. 0 and 100 give the smallest and the largest
    value exactly (but not the smallest magnitude).

    Args:
      histogram: may be stacked; take `magnitudes` of it for a symmetric range.
      percent: from 0 to 100.

    Returns:
      float32, one for each histogram; NaN if it is empty, or if any value was not finite.

    Raises:
      ArgumentError: if ``percent`` is outside.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((1, 1))}
      >>> batches = [jnp.arange(100.0)[:, None]]
      >>> found = cj.trace.calibrate(fn, cj.trace.reducers.histogram(), params, batches)
      >>> round(float(cj.trace.reducers.percentile(found["kernel"]["input"], 90)))
      90
    """
    if not 0 <= percent <= 100:
        raise ArgumentError(f"percent must be from 0 to 100, got {percent}")
    # Float32 cannot resolve counts near the total: upper ranks are counted from above.
    if percent > 50:
        return -_from_bottom(_mirrored(histogram), (100 - percent) / 100)
    return _from_bottom(histogram, percent / 100)


def _histogram(table: Table, bins: int) -> Histogram:
    half = bins // 2
    x = table.values
    low = table.reduced(jnp.min, x, jnp.inf)
    high = table.reduced(jnp.max, x, -jnp.inf)
    exponent = _exponent(jnp.maximum(high, -low))
    # |x| in bins, from zero: the width of a bin is 2**e / half. A power of two scales exactly. The
    # sign comes after the floor of the magnitude: a value that underflows would change sides
    # otherwise.
    steps = jnp.floor(jnp.ldexp(jnp.abs(x), half.bit_length() - 1 - exponent))
    place = jnp.where(x < 0, half - 1 - steps, half + steps)
    counted = jnp.isfinite(x)
    if table.mask is not None:
        counted &= table.mask
    place = jnp.where(counted, place, bins).astype(jnp.int32)  # `bins` is dropped
    # Not flattened: each device counts its own shard. Float32 would stop counting at 2**24.
    counts = jnp.zeros(bins, jnp.uint32).at[place].add(jnp.uint32(1), mode="drop")
    return Histogram(widened(counts), exponent, low, high, table.count)


def _exponent(bound: jax.Array) -> jax.Array:
    """Return the smallest e from `SMALLEST` with ``bound < 2**e``."""
    exponent = jnp.frexp(bound)[1]  # bound = m * 2**e with 0.5 <= m < 1
    return jnp.where(bound > 0, jnp.maximum(exponent, SMALLEST), SMALLEST).astype(jnp.int32)


def _merge(old: Histogram, new: Histogram) -> Histogram:
    # Both on the wider range: bins of powers of two merge in pairs, exactly.
    exponent = jnp.maximum(old.exponent, new.exponent)
    first = _folded(old.counts, exponent - old.exponent)
    second = _folded(new.counts, exponent - new.exponent)
    low = jnp.minimum(old.low, new.low)
    high = jnp.maximum(old.high, new.high)
    return Histogram(add(first, second), exponent, low, high, add_counts(old.count, new.count))


@jax.jit
def _folded(counts: Int64, times: jax.Array) -> Int64:
    """Double the range so many times.

    Once all is in the two bins next to zero, further doublings change nothing: the loop's length is
    fixed, and compiled once.
    """
    bins = counts.low.shape[-1]
    ends = [(0, 0)] * (counts.low.ndim - 1) + [(bins // 4, bins // 4)]

    def double(i: jax.Array, counts: Int64) -> Int64:
        # Two neighbors become one bin; they fill the inner half of the doubled range.
        even = counts.map(lambda word: word[..., 0::2])  # [..., bins / 2]
        odd = counts.map(lambda word: word[..., 1::2])
        halved = add(even, odd).map(lambda word: jnp.pad(word, ends))  # [..., bins]
        return choose(i < times[..., None], halved, counts)

    return jax.lax.fori_loop(0, bins.bit_length() - 2, double, counts)


def _mirrored(histogram: Histogram) -> Histogram:
    flipped = histogram.counts.map(lambda word: word[..., ::-1])
    return histogram._replace(counts=flipped, low=-histogram.high, high=-histogram.low)


def _from_bottom(histogram: Histogram, share: float) -> jax.Array:
    """Return the value below which a share of the entries lies, counted from the smallest."""
    counts = histogram.counts.to_float()  # [..., bins]
    cumulative = counts.cumsum(-1)
    # The first bin that is not empty and reaches the rank; then linear within it.
    rank = share * cumulative[..., -1:]  # [..., 1]
    place = jnp.argmax((cumulative >= rank) & (counts > 0), axis=-1, keepdims=True)  # [..., 1]
    below = jnp.take_along_axis(cumulative - counts, place, axis=-1)  # [..., 1]
    inside = jnp.take_along_axis(counts, place, axis=-1)
    fraction = jnp.clip((rank - below) / jnp.maximum(inside, 1), 0, 1)
    step = (place - _bins(histogram) // 2).astype(jnp.float32) + fraction
    value = jnp.ldexp(step, _bin_exponent(histogram))[..., 0]
    # The ends of the bin may lie outside what was seen. Infinities are in no bin, so the rank of
    # what was counted is not the rank of all.
    known = nan_if_empty(histogram)
    finite = jnp.isfinite(known.low) & jnp.isfinite(known.high)
    return jnp.where(finite, jnp.clip(value, histogram.low, histogram.high), jnp.nan)


def _bins(histogram: Histogram) -> int:
    return histogram.counts.low.shape[-1]


def _bin_exponent(histogram: Histogram) -> jax.Array:
    """Return the exponent of the width of a bin, ``[..., 1]``."""
    return (histogram.exponent - ((_bins(histogram) // 2).bit_length() - 1))[..., None]


# Sums over rows.


def gram(normalize: bool = False) -> Reducer:
    r"""Keep :math:`X^\top X` of the rows that the weights multiply, and the number of rows.

    With weights W of shape ``[k, n]`` the squared error of the outputs is
    :math:`\|X \Delta W\|^2 = \langle \Delta W, X^\top X \Delta W \rangle`: all of the data that
    GPTQ, SparseGPT or the output error of any rounding depends on. The Hessian of GPTQ is
    ``2 * gram / count``.

    Column j stands for row j of ``jnp.moveaxis(w, axes, range(len(axes))).reshape(k, -1)``, w being
    the other operand and ``axes`` its ``site.contracting``, in that order. A product with batch
    axes (one kernel for each expert) has one matrix for each of their indices, ``[*batch, k, k]``.
    A convolution's rows are its windows, k being input channels times window (`windows` says how
    they are ordered); if it is grouped or depthwise, there is one matrix for each group,
    ``[groups, k, k]``, and group g feeds the g-th part of the output channels. A ragged product has
    one matrix over all its rows, as the rows of each group are known only to the computation.

    A convolution's windows of one batch are laid out in memory: its input, as often as they
    overlap. Sums are in float32 at the highest precision of the device, whatever the dtype of the
    data.

    Args:
      normalize: divide each row by its root mean square first, so that every row weighs alike. In
        language models a few tokens, the first of a text above all, have activations a hundred
        times those of others: solvers then fit those tokens alone, and may be worse than rounding
        to nearest.

    Returns:
      A reducer with statistics and result `Gram`: the sum and not the mean, so that it can be
      merged further.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 1.0]])]
      >>> found = cj.trace.calibrate(fn, cj.trace.gram(), params, batches)["kernel"]["input"]
      >>> found.gram.tolist(), int(found.count)
      ([[1.0, 2.0], [2.0, 5.0]], 2)

    References:
      Frantar et al., "GPTQ", 2023, arXiv:2210.17323, equation 1 and section 3.
      Frantar and Alistarh, "Optimal Brain Compression", 2022, arXiv:2208.11580.
    """

    def combine(old: Gram, new: Gram) -> Gram:
        return Gram(old.gram + new.gram, add_counts(old.count, new.count))

    return per_input(partial(_gram, normalize), combine)


def _gram(normalize: bool, site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> Gram:
    table = windows(site, index, x, mask)
    if normalize:
        columns = tuple(range(table.values.ndim - table.columns, table.values.ndim))
        square = jnp.square(table.values).mean(columns, keepdims=True)
        scale = jnp.where(square > 0, jax.lax.rsqrt(square), 0.0)  # rows of zeros stay so
        table = table._replace(values=table.values * scale)
    batch = tuple(range(table.batch))
    # X^T X, batch axes running along: [*batch, *columns, *columns]
    sums = jax.lax.dot_general(
        table.values,
        table.values,
        ((table.rows, table.rows), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return Gram(table.flat(sums, 2), table.count)


class Moments(NamedTuple):
    """Mean and variance over rows.

    Attributes:
      mean: float32, per channel.
      variance: likewise, divided by ``count``, not by one less.
      count: rows, int32.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> observed = cj.trace.observe(fn, cj.trace.reducers.moments())
      >>> _, found = observed({"kernel": jnp.ones((2, 3))}, jnp.array([[1.0, 2.0], [3.0, 2.0]]))
      >>> [x.tolist() for x in found["kernel"]["input"]]
      [[2.0, 2.0], [1.0, 0.0], 2]
    """

    mean: jax.Array
    variance: jax.Array
    count: jax.Array


class Norm(NamedTuple):
    """Sum of squares over rows.

    Attributes:
      squares: float32, per channel.
      count: rows, int32.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> observed = cj.trace.observe(fn, cj.trace.reducers.norm())
      >>> _, found = observed({"kernel": jnp.ones((2, 3))}, jnp.array([[3.0, 0.0], [4.0, 1.0]]))
      >>> [x.tolist() for x in found["kernel"]["input"]]
      [[25.0, 1.0], 2]
    """

    squares: jax.Array
    count: jax.Array


class Outliers(NamedTuple):
    """How many entries are outliers.

    Attributes:
      entries: int32, per channel.
      count: rows, int32: the entries of each channel.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> observed = cj.trace.observe(fn, cj.trace.reducers.outliers(6.0))
      >>> _, found = observed({"kernel": jnp.ones((2, 3))}, jnp.array([[7.0, 5.0], [-6.0, 0.0]]))
      >>> [x.tolist() for x in found["kernel"]["input"]]
      [[2, 0], 2]
    """

    entries: jax.Array
    count: jax.Array


def moments() -> Reducer:
    r"""Keep mean and variance of each channel, stable however far the mean is from zero.

    Two batches of n and m rows, w = m / (n + m), combine by :math:`\mu = \mu_n + w (\mu_m - \mu_n)`
    and :math:`\sigma^2 = (1 - w) \sigma_n^2 + w \sigma_m^2 + w (1 - w)(\mu_m - \mu_n)^2`.

    Returns:
      A reducer with statistics and result `Moments`.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((1, 3))}
      >>> batches = [jnp.array([[1.0], [2.0]]), jnp.array([[6.0], [7.0]])]
      >>> found = cj.trace.calibrate(fn, cj.trace.reducers.moments(), params, batches)
      >>> mean, variance, count = found["kernel"]["input"]
      >>> mean.tolist(), variance.tolist(), int(count)
      ([4.0], [6.5], 4)

    References:
      Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983: the pairwise
      update.
    """

    def measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> Moments:
        return _moments(channels(site, index, x, mask))

    return per_input(measure, _pooled)


def absmean() -> Reducer:
    r"""Keep the mean magnitude of each channel, :math:`\bar x = \mathrm{mean} |x|`.

    AWQ weighs channels by it.

    Returns:
      A reducer with statistics `Moments`, of magnitudes, and for result their ``mean``.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> batches = [jnp.array([[1.0, 0.0]]), jnp.array([[-3.0, 1.0]])]
      >>> found = cj.trace.calibrate(fn, cj.trace.reducers.absmean(), params, batches)
      >>> found["kernel"]["input"].tolist()
      [2.0, 0.5]

    References:
      Lin et al., "AWQ", 2024, arXiv:2306.00978, equation 5.
    """

    def measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> Moments:
        table = channels(site, index, x, mask)
        return _moments(table._replace(values=jnp.abs(table.values)))

    return per_input(measure, _pooled, lambda statistics: nan_if_empty(statistics).mean)


def norm() -> Reducer:
    r"""Keep the L2 norm of each channel over all rows, :math:`\|X_j\|_2`.

    Wanda scores the weight :math:`W_{ij}` by :math:`|W_{ij}| \|X_j\|_2`.

    For a convolution these are the norms of its input channels; the norm of each entry of the
    window, with padding and stride, is the root of the diagonal of `gram`.

    Returns:
      A reducer with statistics `Norm` and for result the norms.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> batches = [jnp.array([[3.0, 0.0]]), jnp.array([[-4.0, 1.0]])]
      >>> found = cj.trace.calibrate(fn, cj.trace.reducers.norm(), params, batches)
      >>> found["kernel"]["input"].tolist()
      [5.0, 1.0]

    References:
      Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024,
      arXiv:2306.11695, equation 1.
    """

    def measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> Norm:
        table = channels(site, index, x, mask)
        squares = table.reduced(jnp.sum, jnp.square(table.values), 0.0, table.rows)
        # [*batch, *columns] -> [*batch, k]
        return Norm(table.flat(squares), table.count)

    def combine(old: Norm, new: Norm) -> Norm:
        return Norm(old.squares + new.squares, add_counts(old.count, new.count))

    return per_input(
        measure, combine, lambda statistics: jnp.sqrt(nan_if_empty(statistics).squares)
    )


def outliers(threshold: float = 6.0) -> Reducer:
    r"""Count in each channel the entries of magnitude :math:`|x| \ge` threshold; NaN counts as one.

    Args:
      threshold: positive, in units of the activation. LLM.int8() computes in 16 bits the channels
        that reach 6 anywhere.

    Returns:
      A reducer with statistics and result `Outliers`.

    Raises:
      ArgumentError: if the threshold is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> batches = [jnp.array([[7.0, 5.0]]), jnp.array([[-6.0, 0.0]])]
      >>> found = cj.trace.calibrate(fn, cj.trace.reducers.outliers(), params, batches)
      >>> found["kernel"]["input"].entries.tolist(), int(found["kernel"]["input"].count)
      ([2, 0], 2)

    References:
      Dettmers et al., "LLM.int8()", 2022, arXiv:2208.07339, section 3.2.
    """
    if not threshold > 0:
        raise ArgumentError(f"threshold must be positive, got {threshold}")

    def measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> Outliers:
        table = channels(site, index, x, mask)
        large = ~(jnp.abs(table.values) < threshold)  # true of NaN
        return Outliers(table.flat(large.sum(table.rows, dtype=jnp.int32)), table.count)

    def combine(old: Outliers, new: Outliers) -> Outliers:
        return Outliers(add_counts(old.entries, new.entries), add_counts(old.count, new.count))

    return per_input(measure, combine)


def _moments(table: Table) -> Moments:
    count = expand_count(jnp.maximum(table.counts, 1).astype(jnp.float32), table.values)
    # Two passes: the mean of squares less the squared mean would cancel where the mean is large.
    # Masked values are 0, so the sum needs no mask; squares about the mean do.
    mean = table.values.sum(table.rows, keepdims=True) / count  # [*batch, 1, ..., *columns]
    squares = jnp.square(table.values - mean)
    if table.mask is not None:
        squares = jnp.where(table.mask, squares, 0.0)
    variance = squares.sum(table.rows, keepdims=True) / count
    return Moments(table.flat(mean), table.flat(variance), table.count)


def _pooled(old: Moments, new: Moments) -> Moments:
    """Combine the moments of two batches: the pairwise update of Chan et al."""
    n = expand_count(old.count, old.mean).astype(jnp.float32)  # [*loops, 1, ...]
    m = expand_count(new.count, new.mean).astype(jnp.float32)
    w = m / jnp.maximum(n + m, 1)  # 0, not NaN, where both are empty
    apart = new.mean - old.mean
    within = old.variance + w * (new.variance - old.variance)
    variance = within + w * (1 - w) * jnp.square(apart)
    return Moments(old.mean + w * apart, variance, add_counts(old.count, new.count))
