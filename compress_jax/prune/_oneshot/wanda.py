"""Wanda: prune by weight times the norm of its input; no other weight changes."""

import jax.numpy as jnp

from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.paths import Patterns
from compress_jax.core.types import Params
from compress_jax.layerwise._result import Rewritten
from compress_jax.prune._masks.structures import NofM
from compress_jax.prune._masks.target import Sparsity
from compress_jax.prune._oneshot.layer import Leaf, Method, Solution
from compress_jax.prune._oneshot.post_training import prune
from compress_jax.trace._statistics.calibration import Calibration


@renamed_arguments(where="pattern")
def wanda(
    params: Params,
    calibration: Calibration,
    sparsity: Sparsity | None,
    structure: NofM | None = None,
    *,
    pattern: Patterns = "**",
    held_out: Calibration | None = None,
) -> Rewritten:
    r"""Prune the weights of smallest :math:`|w_{ij}| \cdot \|x_i\|_2` of each output.

    :math:`x_i` are the values of input i in all calibration rows. Weights are compared within an
    output j, each of which loses the same fraction, and no other weight changes. Of equal scores
    the earlier input is pruned first.
    An input that was always zero counts as an average one, so that its weights are pruned by
    magnitude, as are those of experts and branches that calibration did not reach: calibration does
    not show whether they matter. Notes say where.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      sparsity: the fraction of each output's weights to prune, rounded half up; or
        ``{glob: fraction}``, where leaves that no glob matches are left alone; of a schedule, its
        value at step 0. None with `n_m`.
      structure: `n_m`, or None for single weights. Groups run along the axes that a site sums over.
      pattern: globs of the leaves to prune. With ``"**/kernel"`` embeddings that are also the last
        layer are left alone.
      held_out: statistics of other batches. A layer for which magnitude is better there is pruned
        by magnitude, with a note. By default none is.

    Returns:
      ``Rewritten``: its ``compression`` holds the masks. To round the remaining weights, quantize
      afterwards, for example by `gptq` under ``chain(pruned.compression, grid)``.

    Raises:
      ConfigError: for a structure other than n:m.
      NonFiniteError: if calibration or weights are not finite.

    Example:
      >>> import compress_jax as cj
      >>> params, x = {"kernel": jnp.array([[1.0], [3.0]])}, jnp.array([[8.0, 1.0], [8.0, 2.0]])
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> seen = cj.trace.calibrate(fn, cj.trace.gram(), params, [x])
      >>> solved = cj.prune.wanda(params, seen, 0.5)
      >>> solved.params["kernel"].tolist()
      [[1.0], [0.0]]

    References:
      Sun, Liu, Bair and Kolter, "A Simple and Effective Pruning Approach for Large Language
      Models", 2024, arXiv:2306.11695, equation 1.
    """
    method = Method(_solve, "output", False)
    return prune(params, calibration, sparsity, structure, pattern, None, method, held_out)


def _solve(leaf: Leaf) -> Solution:
    """Mask one leaf."""
    rows, note = leaf.rows()
    norms = jnp.sqrt(jnp.diagonal(leaf.problem.gram, axis1=1, axis2=2))  # ||x_i||, [batch, k]
    # The weights of an output compete among themselves: each output loses the same fraction.
    mask = leaf.masks(norms, rows, "output")
    return Solution(jnp.where(mask, leaf.x, jnp.zeros((), leaf.x.dtype)), mask, note)
