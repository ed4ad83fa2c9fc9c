"""Which weights of a layer's matrices to keep, by their size times a norm of each input: Wanda's score, or magnitude."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from compress_jax.prune.groups_of_m import largest_of_each
from compress_jax.prune.select import magnitude_bits, smallest
from compress_jax.prune.wide import Wide
from compress_jax.trace.matrix import MatrixForm


@partial(jax.jit, static_argnames=("form", "groups", "within"))
def matrix_masks(
    x: jax.Array,
    norms: jax.Array,
    rows: Any,
    count: jax.Array,
    form: MatrixForm,
    groups: tuple[int, int] | None,
    within: Literal["output", "matrix"],
) -> jax.Array:
    r"""Return which weights are kept: those of largest :math:`|w_{ij}| \, n_i`; of equal ones the later input.

    Args:
      x: what ``form`` makes matrices of.
      norms: of the inputs, ``[batch, k]``.
      rows: the order of inputs in which groups are consecutive, see `input_order`; of no meaning without groups.
      count: how many are pruned within each output, or each matrix; of no meaning with groups.
      form: how ``x`` becomes matrices.
      groups: ``(n, m)``, or None.
      within: what weights are compared in.

    Returns:
      bool, the shape of ``x``.

    Example:
      >>> form, w = MatrixForm((2, 2), (0, 1), 1, 2), jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> keep = lambda count, within: matrix_masks(w, jnp.ones((1, 2)), None, jnp.uint32(count), form, None, within)
      >>> keep(1, "output").tolist(), keep(2, "matrix").tolist()
      ([[False, False], [True, True]], [[False, False], [True, True]])
    """

    def one(each: tuple[jax.Array, jax.Array]) -> jax.Array:
        w, norm = each
        score = jnp.abs(w) * norm[:, None]
        if groups is None:
            pruned = partial(smallest, k=Wide(jnp.uint32(0), count))
            return ~(jax.vmap(lambda s: pruned([s])[0], 1, 1)(score) if within == "output" else pruned([score])[0])
        keys = magnitude_bits(score).at[rows].get(mode="fill", fill_value=2**32 - 1) + 1  # padding wraps around to 0
        kept = largest_of_each(keys, *groups, (0,))
        return jnp.zeros(w.shape, bool).at[rows].set(kept, mode="drop")

    return form.stored(jax.lax.map(one, (form.matrices(x.astype(jnp.float32)), norms)))
