"""Reducers of sums over rows: the Gram matrix, and mean, norm and outliers of each channel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError
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


def gram() -> Reducer:
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

    return per_input(_gram, combine)


def _gram(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> Gram:
    table = windows(site, index, x, mask)
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
    """

    mean: jax.Array
    variance: jax.Array
    count: jax.Array


class Norm(NamedTuple):
    """Sum of squares over rows.

    Attributes:
      squares: float32, per channel.
      count: rows, int32.
    """

    squares: jax.Array
    count: jax.Array


class Outliers(NamedTuple):
    """How many entries are outliers.

    Attributes:
      entries: int32, per channel.
      count: rows, int32: the entries of each channel.
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
    # Masked values are 0, so the sum needs no mask; squares about the mean do.
    mean = table.values.sum(table.rows, keepdims=True) / count
    squares = jnp.square(table.values - mean)
    if table.mask is not None:
        squares = jnp.where(table.mask, squares, 0.0)
    variance = squares.sum(table.rows, keepdims=True) / count
    return Moments(table.flat(mean), table.flat(variance), table.count)


def _pooled(old: Moments, new: Moments) -> Moments:
    """Combine the moments of two batches: the pairwise update of Chan et al."""
    n = expand_count(old.count, old.mean).astype(jnp.float32)
    m = expand_count(new.count, new.mean).astype(jnp.float32)
    w = m / jnp.maximum(n + m, 1)
    apart = new.mean - old.mean
    within = old.variance + w * (new.variance - old.variance)
    variance = within + w * (1 - w) * jnp.square(apart)
    return Moments(old.mean + w * apart, variance, add_counts(old.count, new.count))
