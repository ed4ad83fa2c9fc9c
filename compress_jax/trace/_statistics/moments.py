"""The Gram matrix of what a site is fed: the Hessian of its squared output error with respect to its weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace._statistics.calibration import Gram
from compress_jax.trace._statistics.reducer import (
    Reducer,
    Table,
    aligned,
    blank,
    channels,
    of_inputs,
    total,
    windows,
)


def gram() -> Reducer:
    r"""Keep :math:`X^\top X` of the rows that meet the weights, and the number of rows.

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

    A convolution's windows of one batch are laid out in memory: as often as they overlap, its
    input.

    Summed in float32 at the highest precision of the device, whatever the dtype of the data.

    Returns:
      A reducer with statistics and result `Gram`: the sum and not the mean, so that it can be
      merged further.

    Example:
      >>> from compress_jax.trace import calibrate
      >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 1.0]])]
      >>> seen = calibrate(lambda w, x: x @ w["kernel"], gram(), {"kernel": jnp.ones((2, 3))}, batches)
      >>> seen["kernel"]["input"].gram.tolist(), int(seen["kernel"]["input"].count)
      ([[1.0, 2.0], [2.0, 5.0]], 2)

    References:
      Frantar et al., "GPTQ", 2023, arXiv:2210.17323, equation 1 and section 3.
      Frantar and Alistarh, "Optimal Brain Compression", 2022, arXiv:2208.11580.
    """
    return of_inputs(
        _measure, lambda old, new: Gram(old.gram + new.gram, total(old.count, new.count))
    )


def _measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> Gram:
    table = windows(site, index, x, mask)
    batch = tuple(range(table.batch))
    sums = jax.lax.dot_general(
        table.values,
        table.values,
        ((table.rows, table.rows), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return Gram(table.flat(sums, 2), table.count)


# Reducers that weigh the channels of activations: mean, norm and outliers of each.


class Moments(NamedTuple):
    """Mean and variance over rows (divided by ``count``, not by one less): float32 per channel."""

    mean: jax.Array
    variance: jax.Array
    count: jax.Array


class Norm(NamedTuple):
    """Sum of squares over rows: float32 per channel."""

    squares: jax.Array
    count: jax.Array


class Outliers(NamedTuple):
    """How many entries are outliers: int32 per channel, of ``count`` in each."""

    entries: jax.Array
    count: jax.Array


def moments() -> Reducer:
    r"""Keep mean and variance of each channel, stable however far the mean is from zero.

    Two batches of n and m rows, w = m / (n + m), combine by :math:`\mu = \mu_n + w (\mu_m - \mu_n)`
    and :math:`\sigma^2 = (1 - w) \sigma_n^2 + w \sigma_m^2 + w (1 - w)(\mu_m - \mu_n)^2`.

    Returns:
      A reducer with statistics and result `Moments`.

    Example:
      >>> from compress_jax.trace import calibrate
      >>> batches = [jnp.array([[1.0], [2.0]]), jnp.array([[6.0], [7.0]])]
      >>> seen = calibrate(lambda w, x: x @ w["kernel"], moments(), {"kernel": jnp.ones((1, 3))}, batches)["kernel"]["input"]
      >>> seen.mean.tolist(), seen.variance.tolist(), int(seen.count)
      ([4.0], [6.5], 4)

    References:
      Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983: the pairwise
      update.
    """
    return of_inputs(lambda site, index, x, mask: _moments(channels(site, index, x, mask)), _pooled)


def absmean() -> Reducer:
    r"""Keep the mean magnitude of each channel, :math:`\bar x = \mathrm{mean} |x|`: how AWQ tells which channels matter.

    Returns:
      A reducer with statistics `Moments`, of magnitudes, and for result their ``mean``.

    Example:
      >>> from compress_jax.trace import calibrate
      >>> batches = [jnp.array([[1.0, 0.0]]), jnp.array([[-3.0, 1.0]])]
      >>> seen = calibrate(lambda w, x: x @ w["kernel"], absmean(), {"kernel": jnp.ones((2, 3))}, batches)
      >>> seen["kernel"]["input"].tolist()
      [2.0, 0.5]

    References:
      Lin et al., "AWQ", 2024, arXiv:2306.00978, equation 5.
    """

    def measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> Moments:
        table = channels(site, index, x, mask)
        return _moments(table._replace(values=jnp.abs(table.values)))

    return of_inputs(measure, _pooled, lambda statistics: blank(statistics).mean)


def norm() -> Reducer:
    r"""Keep the L2 norm of each channel over all rows, :math:`\|X_j\|_2`.

    Wanda scores the weight :math:`W_{ij}` by :math:`|W_{ij}| \|X_j\|_2`.

    Of a convolution these are the norms of its input channels; the norm of each entry of the
    window, padding and stride counted, is the root of the diagonal of `gram`.

    Returns:
      A reducer with statistics `Norm` and for result the norms.

    Example:
      >>> from compress_jax.trace import calibrate
      >>> batches = [jnp.array([[3.0, 0.0]]), jnp.array([[-4.0, 1.0]])]
      >>> seen = calibrate(lambda w, x: x @ w["kernel"], norm(), {"kernel": jnp.ones((2, 3))}, batches)
      >>> seen["kernel"]["input"].tolist()
      [5.0, 1.0]

    References:
      Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024,
      arXiv:2306.11695, equation 1.
    """

    def measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> Norm:
        table = channels(site, index, x, mask)
        return Norm(
            table.flat(table.reduced(jnp.sum, jnp.square(table.values), 0.0, table.rows)),
            table.count,
        )

    def combine(old: Norm, new: Norm) -> Norm:
        return Norm(old.squares + new.squares, total(old.count, new.count))

    return of_inputs(measure, combine, lambda statistics: jnp.sqrt(blank(statistics).squares))


def outliers(threshold: float = 6.0) -> Reducer:
    r"""Count in each channel the entries of magnitude :math:`|x| \ge` threshold; NaN counts as one.

    Args:
      threshold: positive, in units of the activation. LLM.int8() keeps in 16 bits the channels that
        reach 6 anywhere.

    Returns:
      A reducer with statistics and result `Outliers`.

    Raises:
      ValueError: if the threshold is not positive.

    Example:
      >>> from compress_jax.trace import calibrate
      >>> batches = [jnp.array([[7.0, 5.0]]), jnp.array([[-6.0, 0.0]])]
      >>> seen = calibrate(lambda w, x: x @ w["kernel"], outliers(), {"kernel": jnp.ones((2, 3))}, batches)
      >>> seen["kernel"]["input"].entries.tolist(), int(seen["kernel"]["input"].count)
      ([2, 0], 2)

    References:
      Dettmers et al., "LLM.int8()", 2022, arXiv:2208.07339, section 3.2.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold}")

    def measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> Outliers:
        table = channels(site, index, x, mask)
        far = ~(jnp.abs(table.values) < threshold)
        return Outliers(table.flat(far.sum(table.rows, dtype=jnp.int32)), table.count)

    def combine(old: Outliers, new: Outliers) -> Outliers:
        return Outliers(total(old.entries, new.entries), total(old.count, new.count))

    return of_inputs(measure, combine)


def _moments(table: Table) -> Moments:
    count = aligned(jnp.maximum(table.numbers, 1).astype(jnp.float32), table.values)
    mean = table.values.sum(table.rows, keepdims=True) / count
    far = jnp.square(table.values - mean)
    far = far if table.there is None else jnp.where(table.there, far, 0.0)
    variance = far.sum(table.rows, keepdims=True) / count
    return Moments(table.flat(mean), table.flat(variance), table.count)


def _pooled(old: Moments, new: Moments) -> Moments:
    before, now = (aligned(each.count, each.mean).astype(jnp.float32) for each in (old, new))
    share, apart = now / jnp.maximum(before + now, 1), new.mean - old.mean
    variance = (
        old.variance
        + share * (new.variance - old.variance)
        + share * (1 - share) * jnp.square(apart)
    )
    return Moments(old.mean + share * apart, variance, total(old.count, new.count))
