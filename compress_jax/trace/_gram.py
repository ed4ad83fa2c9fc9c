"""The Gram matrix of what a site is fed: the Hessian of its squared output error with respect to its weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.trace.reducer import Reducer, of_inputs, total
from compress_jax.trace.site import Site
from compress_jax.trace.unfold import windows


class Gram(NamedTuple):
    """Sums of outer products.

    Attributes:
      gram: float32 ``[*batch, k, k]``, not divided by ``count``.
      count: rows in each sum, int32.
    """

    gram: jax.Array
    count: jax.Array


def gram() -> Reducer:
    r"""Keep :math:`X^\top X` of the rows that meet the weights, and the number of rows.

    With weights W of shape ``[k, n]`` the squared error of the outputs is :math:`\|X \Delta W\|^2 = \langle \Delta W, X^\top
    X \Delta W \rangle`: all of the data that GPTQ, SparseGPT or the output error of any rounding depends on. The Hessian of
    GPTQ is ``2 * gram / count``.

    Column j stands for row j of ``jnp.moveaxis(w, axes, range(len(axes))).reshape(k, -1)``, w being the other operand and
    ``axes`` its ``site.contracting``, in that order. A product with batch axes (one kernel for each expert) has one matrix
    for each of their indices, ``[*batch, k, k]``. A convolution's rows are its windows, k being input channels times window
    (`windows` says how they are ordered); if it is grouped or depthwise, there is one matrix for each group,
    ``[groups, k, k]``, and group g feeds the g-th part of the output channels. A ragged product has one matrix over all its
    rows, as the rows of each group are known only to the computation.

    A convolution's windows of one batch are laid out in memory: as often as they overlap, its input.

    Summed in float32 at the highest precision of the device, whatever the dtype of the data.

    Returns:
      A reducer with statistics and result `Gram`: the sum and not the mean, so that it can be merged further.

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
    return of_inputs(_measure, lambda old, new: Gram(old.gram + new.gram, total(old.count, new.count)))


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
