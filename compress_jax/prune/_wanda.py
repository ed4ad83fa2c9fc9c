"""Wanda: prune by weight times the norm of what it is fed, each output by itself; no weight moves."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Params
from compress_jax.core.errors import NonFiniteError
from compress_jax.core.paths import Patterns
from compress_jax.prune.amount import amount_exact
from compress_jax.prune.groups_of_m import largest_of_each
from compress_jax.prune.input_groups import input_order
from compress_jax.prune.post_training import Leaf, Pruned, prune
from compress_jax.prune.select import magnitude_bits, smallest
from compress_jax.prune.structures import NofM
from compress_jax.prune.target import Sparsity
from compress_jax.prune.wide import Wide
from compress_jax.trace import Calibration
from compress_jax.trace.matrix import MatrixForm


def wanda(
    params: Params,
    calibration: Calibration,
    sparsity: Sparsity | None,
    structure: NofM | None = None,
    *,
    where: Patterns = "**",
) -> Pruned:
    r"""Prune the weights of smallest :math:`|w_{ij}| \cdot \|x_i\|_2`, the same share of each output's inputs.

    ``x_i`` are the values that input i took over the calibration rows. Weights are compared within an output j, and none is
    changed but to zero. Of equal scores the earlier input is pruned first.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      sparsity: share to prune of each output's weights, rounded half up; or ``{glob: share}``: leaves that no glob matches
        are left alone; a schedule counts at step 0. None with `n_m`.
      structure: `n_m`, or None for single weights. Groups run along what a site sums over.
      where: globs of the leaves to prune. Give ``"**/kernel"`` to leave embeddings alone that are also the last layer.

    Returns:
      ``Pruned``: exact under its own compression. To round what is kept, quantize afterwards, say by `gptq` under
      ``chain(pruned.compression, grid)``.

    Raises:
      ConfigError: for a structure other than n:m.
      NonFiniteError: if calibration or weights are not finite.

    Example:
      >>> from compress_jax.trace import calibrate, gram
      >>> params, x = {"kernel": jnp.array([[1.0], [3.0]])}, jnp.array([[8.0, 1.0], [8.0, 2.0]])
      >>> solved = wanda(params, calibrate(lambda p, x: x @ p["kernel"], gram(), params, [x]), 0.5)
      >>> solved.params["kernel"].tolist()
      [[1.0], [0.0]]

    References:
      Sun, Liu, Bair and Kolter, "A Simple and Effective Pruning Approach for Large Language Models", 2024,
      arXiv:2306.11695, equation 1.
    """
    return prune(params, calibration, sparsity, structure, where, None, _leaf)


def _leaf(leaf: Leaf) -> tuple[jax.Array, jax.Array, str]:
    if not bool(jnp.isfinite(leaf.problem.gram).all()):
        raise NonFiniteError(f"the calibration statistics of {leaf.path!r} are not finite; look at the calibration batches")
    form, groups = leaf.problem.form, leaf.groups and (leaf.groups.n, leaf.groups.m)
    rows, note = input_order(form, leaf.groups, leaf.groups.m if leaf.groups else 1)
    count = jnp.uint32(amount_exact(leaf.share, form.k))
    mask = _masks(leaf.x, leaf.problem.gram, rows, count, form, groups)
    return jnp.where(mask, leaf.x, jnp.zeros((), leaf.x.dtype)), mask, note


@partial(jax.jit, static_argnames=("form", "groups"))
def _masks(
    x: jax.Array, gram: jax.Array, rows: Any, count: jax.Array, form: MatrixForm, groups: tuple[int, int] | None
) -> jax.Array:
    def one(each: tuple[jax.Array, jax.Array]) -> jax.Array:
        w, gram = each
        score = jnp.abs(w) * jnp.sqrt(jnp.diagonal(gram))[:, None]
        if groups is None:
            column = partial(smallest, k=Wide(jnp.uint32(0), count))
            return ~jax.vmap(lambda score: column([score])[0], 1, 1)(score)
        keys = magnitude_bits(score).at[rows].get(mode="fill", fill_value=2**32 - 1) + 1  # padding wraps around to 0
        kept = largest_of_each(keys, *groups, (0,))
        return jnp.zeros(w.shape, bool).at[rows].set(kept, mode="drop")

    return form.stored(jax.lax.map(one, (form.matrices(x.astype(jnp.float32)), gram)))
