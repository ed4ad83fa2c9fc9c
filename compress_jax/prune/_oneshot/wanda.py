"""Wanda: prune by weight times the norm of what it is fed, each output by itself; no weight moves."""

import jax.numpy as jnp

from compress_jax.core.paths import Patterns
from compress_jax.core.types import Params
from compress_jax.prune._masks.structures import NofM
from compress_jax.prune._masks.target import Sparsity
from compress_jax.prune._oneshot.layer import Leaf, Method, Solution
from compress_jax.prune._oneshot.post_training import Pruned, prune
from compress_jax.trace import Calibration


def wanda(
    params: Params,
    calibration: Calibration,
    sparsity: Sparsity | None,
    structure: NofM | None = None,
    *,
    where: Patterns = "**",
    held_out: Calibration | None = None,
) -> Pruned:
    r"""Prune the weights of smallest :math:`|w_{ij}| \cdot \|x_i\|_2`, the same share of each output's inputs.

    ``x_i`` are the values that input i took over the calibration rows. Weights are compared within
    an output j, and none is changed but to zero. Of equal scores the earlier input is pruned first.
    An input that was always zero counts as an average one, so that its weights are pruned by
    magnitude, as are those of experts and branches that calibration did not reach: nothing is known
    of either, which is not to say that they do not matter. Notes say where.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      sparsity: share to prune of each output's weights, rounded half up; or ``{glob: share}``:
        leaves that no glob matches are left alone; a schedule counts at step 0. None with `n_m`.
      structure: `n_m`, or None for single weights. Groups run along what a site sums over.
      where: globs of the leaves to prune. Give ``"**/kernel"`` to leave embeddings alone that are
        also the last layer.
      held_out: statistics of other batches: a layer that magnitude serves better there is pruned by
        magnitude, and a note says so. By default Wanda's choice stands.

    Returns:
      ``Pruned``: exact under its own compression. To round what is kept, quantize afterwards, say
      by `gptq` under ``chain(pruned.compression, grid)``.

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
      Sun, Liu, Bair and Kolter, "A Simple and Effective Pruning Approach for Large Language
      Models", 2024, arXiv:2306.11695, equation 1.
    """
    return prune(
        params,
        calibration,
        sparsity,
        structure,
        where,
        None,
        Method(_leaf, "output", False),
        held_out,
    )


def _leaf(leaf: Leaf) -> Solution:
    rows, note = leaf.rows()
    norms = jnp.sqrt(jnp.diagonal(leaf.problem.gram, axis1=1, axis2=2))
    mask = leaf.masks(norms, rows, "output")
    return Solution(jnp.where(mask, leaf.x, jnp.zeros((), leaf.x.dtype)), mask, note)
