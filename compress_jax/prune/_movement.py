"""Movement pruning: weights that training moves towards zero are seen as zero."""

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression, CompressionState, Params, bound, stamped
from compress_jax.core.describe import call_of
from compress_jax.prune.masked import Score, Seen, fixed_of, masked
from compress_jax.prune.structures import Structure
from compress_jax.prune.target import Sparsity


def movement(
    sparsity: Sparsity | None = None,
    structure: Structure | None = None,
    *,
    scope: str = "leaf",
    every: int = 1,
    threshold: float | None = None,
    rate: float = 1.0,
    penalty: float = 0.0,
) -> Compression:
    r"""Prune the weights whose accumulated movement away from zero is least: ``-sum(w * g)`` over the steps.

    :math:`s \leftarrow s - \text{rate}\,(w g + \text{penalty}\,\sigma'(s))`, starting from 0. A weight that gradient
    descent drives away from zero gains score, whatever its size. This is what a straight-through gradient on the scores
    learns by descent, so nothing but the weights needs an optimizer. The weights are those `update` sees: in
    `make_step` those after the optimizer's step.

    Hard movement keeps the highest scores at a given sparsity. Soft movement keeps scores above a ``threshold``; how sparse
    that is comes of the data and of the penalty :math:`\sum \sigma(s)`, which pulls scores down.

    `update` needs ``grads``, the gradient at the weights the model used, dense where a mask is on. Until the first update
    everything is kept.

    Args:
      sparsity: as of `magnitude`; None if there is a threshold.
      structure: `n_m`, `block`, `channel` or `head`; None for single weights, and with a threshold.
      scope: ``"leaf"`` or ``"global"``.
      every: masks are chosen anew at steps divisible by it; scores follow every step.
      threshold: of soft movement.
      rate: the learning rate of the scores. It matters beside a threshold only.
      penalty: weight of the regulariser of soft movement.

    Returns:
      The Compression. ``fixed[path]`` is ``{"mask": mask, "carried": scores, float32}``.

    Raises:
      ValueError: for impossible arguments; in `update`, if there are no gradients.

    Example:
      >>> c, params = movement(0.5), {"w": jnp.array([3.0, 1.0])}
      >>> state = c.update(params, c.init(params), step=0, grads={"w": jnp.array([0.5, -1.0])})
      >>> c.view(params, state)["w"].tolist()
      [0.0, 1.0]

    References:
      Sanh, Wolf and Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, section 4, table 1.
    """

    def follow(seen: Seen) -> jax.Array:
        pull = penalty * jax.nn.sigmoid(seen.carried) * jax.nn.sigmoid(-seen.carried)
        return seen.carried - rate * (seen.x.astype(jnp.float32) * seen.grad.astype(jnp.float32) + pull)

    score = Score(lambda seen: seen.carried, _zero, follow, signed=True, needs_grads=True)
    if threshold is None:
        return masked(score, sparsity, structure, scope=scope, every=every)
    if sparsity is not None or structure is not None:
        raise ValueError("soft movement keeps what is above the threshold: give no sparsity and no structure beside it")
    return _soft(masked(score, 0.0, every=every), threshold, every)


def _zero(seen: Seen) -> jax.Array:
    return jnp.zeros_like(seen.x, jnp.float32)


def _soft(hard: Compression, threshold: float, every: int) -> Compression:
    """Replace the masks of a compression that keeps everything by those above the threshold."""

    def update(params: Params, state: CompressionState, *, step: object, **inputs: object) -> CompressionState:
        new = hard.update(params, state, step=step, **inputs)
        due = jnp.asarray(step) % every == 0
        masks = {
            path: jnp.where(due, leaf["carried"] > threshold, fixed_of(state, path)["mask"])
            for path, leaf in new.fixed.items()
        }
        return CompressionState({}, {path: {**leaf, "mask": masks[path]} for path, leaf in new.fixed.items()})

    soft = hard._replace(update=update, bind=lambda known: _soft(bound(hard, known), threshold, every))
    return stamped(soft, call_of("movement", of=hard, threshold=threshold))
