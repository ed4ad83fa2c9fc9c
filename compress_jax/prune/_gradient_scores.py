"""Saliency pruning: the weights whose removal changes the loss least, to first order, are seen as zero."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.arguments import number
from compress_jax.core.compression import Compression, CompressionState, bound, stamped
from compress_jax.core.describe import call_of
from compress_jax.core.errors import ArgumentError
from compress_jax.core.finite import saturate
from compress_jax.core.schedules import Scheduled
from compress_jax.core.types import Params, PyTree, Step
from compress_jax.prune._masks.score import Score, Seen, fixed_of, masked
from compress_jax.prune._masks.structures import Structure
from compress_jax.prune._masks.target import Sparsity


def saliency(
    sparsity: Sparsity | None,
    structure: Structure | None = None,
    *,
    scope: str = "leaf",
    every: int = 1,
    decay: float = 0.0,
) -> Compression:
    r"""Prune the weights of smallest first-order effect on the loss, ``|w * g|``.

    The Taylor expansion of the loss at ``w_i = 0`` says that removing a weight changes it by
    :math:`-w_i g_i`. With a decay d the score is the running mean
    :math:`s \leftarrow d\,s + (1 - d) |w g|`, which one noisy batch moves less.

    `update` needs ``grads``, the gradient at the weights the model used, dense where a mask is on.
    Until the first update everything is kept, whatever the sparsity.

    Args:
      sparsity: as of `magnitude`.
      structure: `n_m`, `block`, `channel` or `head`; None for single weights. Units are scored by
        their entries' scores.
      scope: ``"leaf"`` or ``"global"``.
      every: masks are chosen anew at steps divisible by it; the running mean follows every step.
      decay: of the running mean, 0 to below 1; 0 remembers nothing and stores nothing.

    Returns:
      The Compression. ``fixed[path]`` is the mask, or with a decay
      ``{"mask": mask, "carried": running mean, float32}``.

    Raises:
      ArgumentError: for impossible arguments; in `update`, if there are no gradients.

    Example:
      >>> c, params = saliency(0.5), {"w": jnp.array([3.0, 1.0])}
      >>> state = c.update(params, c.init(params), step=0, grads={"w": jnp.array([0.1, -1.0])})
      >>> c.view(params, state)["w"].tolist()
      [0.0, 1.0]

    References:
      Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
      2017, equation 7. Mozer and Smolensky, "Skeletonization: a technique for trimming the fat from
      a network", 1988.
    """
    decay = number("decay", decay)
    if not 0 <= decay < 1:
        raise ArgumentError(f"decay lies between 0 and 1, 1 not included, got {decay}")
    if decay == 0:
        return masked(
            Score(_effect, needs_grads=True), sparsity, structure, scope=scope, every=every
        )

    def follow(seen: Seen) -> jax.Array:
        return saturate(decay * seen.carried + (1 - decay) * _effect(seen), jnp.float32)

    score = Score(
        lambda seen: seen.carried,
        lambda seen: jnp.zeros_like(seen.x, jnp.float32),
        follow,
        needs_grads=True,
    )
    return masked(score, sparsity, structure, scope=scope, every=every)


def _effect(seen: Seen) -> jax.Array:
    return jnp.abs(seen.x.astype(jnp.float32) * seen.grad.astype(jnp.float32))


# Fisher pruning: the weights whose removal changes the loss least, to second order, are seen as
# zero.


def fisher(
    sparsity: Sparsity | None,
    structure: Structure | None = None,
    *,
    scope: str = "leaf",
    every: int = 1,
    decay: float = 0.99,
) -> Compression:
    r"""Prune the weights of smallest second-order effect on the loss, ``w**2 * F / 2``.

    At a minimum the gradient vanishes, and removing a weight costs :math:`w_i^2 H_{ii} / 2`. The
    diagonal of the Hessian is taken to be that of the empirical Fisher matrix, the mean of squared
    gradients, :math:`F \leftarrow d\,F + (1 - d) g^2` from 0; with ``decay=1`` their sum. Squares
    of a batch's mean gradient stand for those of single examples, which scales all of F alike where
    the batches are of one size.

    `update` needs ``grads``, the gradient at the weights the model used, dense where a mask is on.
    Until the first update everything is kept.

    Args:
      sparsity: as of `magnitude`.
      structure: `n_m`, `block`, `channel` or `head`; None for single weights.
      scope: ``"leaf"`` or ``"global"``.
      every: masks are chosen anew at steps divisible by it; the mean follows every step.
      decay: of the running mean, 0 to 1; 1 for a plain sum.

    Returns:
      The Compression. ``fixed[path]`` is ``{"mask": mask, "carried": F, float32}``.

    Raises:
      ArgumentError: for impossible arguments; in `update`, if there are no gradients.

    Example:
      >>> c, params = fisher(0.5), {"w": jnp.array([3.0, 1.0])}
      >>> state = c.update(params, c.init(params), step=0, grads={"w": jnp.array([0.1, -1.0])})
      >>> c.view(params, state)["w"].tolist()
      [0.0, 1.0]

    References:
      LeCun, Denker and Solla, "Optimal Brain Damage", 1989, equation 5. Theis et al., "Faster gaze
      prediction with dense networks and Fisher pruning", 2018, equation 6.
    """
    decay = number("decay", decay)
    if not 0 <= decay <= 1:
        raise ArgumentError(f"decay lies between 0 and 1, got {decay}")
    fresh = 1 - decay if decay < 1 else 1.0

    def follow(seen: Seen) -> jax.Array:
        return saturate(
            decay * seen.carried + fresh * jnp.square(seen.grad.astype(jnp.float32)), jnp.float32
        )

    def measure(seen: Seen) -> jax.Array:
        squares = saturate(
            jnp.square(seen.x.astype(jnp.float32)), jnp.float32
        )  # not infinity, which times 0 is NaN
        return squares * seen.carried * 0.5

    score = Score(
        measure, lambda seen: jnp.zeros_like(seen.x, jnp.float32), follow, needs_grads=True
    )
    return masked(score, sparsity, structure, scope=scope, every=every)


# Movement pruning: weights that training moves towards zero are seen as zero.


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
    descent drives away from zero gains score, whatever its size. This is what a straight-through
    gradient on the scores learns by descent, so nothing but the weights needs an optimizer. The
    weights are those `update` sees: in `make_step` those after the optimizer's step.

    Hard movement keeps the highest scores at a given sparsity. Soft movement keeps scores above a
    ``threshold``; how sparse that is comes of the data and of the penalty :math:`\sum \sigma(s)`,
    which pulls scores down.

    `update` needs ``grads``, the gradient at the weights the model used, dense where a mask is on.
    Until the first update everything is kept.

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
      ArgumentError: for impossible arguments; in `update`, if there are no gradients.

    Example:
      >>> c, params = movement(0.5), {"w": jnp.array([3.0, 1.0])}
      >>> state = c.update(params, c.init(params), step=0, grads={"w": jnp.array([0.5, -1.0])})
      >>> c.view(params, state)["w"].tolist()
      [0.0, 1.0]

    References:
      Sanh, Wolf and Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, section 4,
      table 1.
    """
    rate, penalty = number("rate", rate), number("penalty", penalty)
    threshold = None if threshold is None else number("threshold", threshold)

    def follow(seen: Seen) -> jax.Array:
        pull = penalty * jax.nn.sigmoid(seen.carried) * jax.nn.sigmoid(-seen.carried)
        moved = seen.x.astype(jnp.float32) * seen.grad.astype(jnp.float32)
        return saturate(seen.carried - rate * (moved + pull), jnp.float32)

    score = Score(lambda seen: seen.carried, _zero, follow, signed=True, needs_grads=True)
    if threshold is None:
        return masked(score, sparsity, structure, scope=scope, every=every)
    if sparsity is not None or structure is not None:
        raise ArgumentError(
            "soft movement keeps what is above the threshold: give no sparsity and no structure "
            "beside it"
        )
    return _soft(masked(score, 0.0, every=every), threshold, every)


def _zero(seen: Seen) -> jax.Array:
    return jnp.zeros_like(seen.x, jnp.float32)


def _soft(hard: Compression, threshold: float, every: int) -> Compression:
    """Replace the masks of a compression that keeps everything by those above the threshold."""

    def update(
        params: Params, state: CompressionState, *, step: Step, now: bool = False, **inputs: PyTree
    ) -> CompressionState:
        new = hard.update(params, state, step=step, **inputs)
        due = jnp.asarray(now) | (jnp.asarray(step) % every == 0)
        masks = {
            path: jnp.where(due, leaf["carried"] > threshold, fixed_of(state, path)["mask"])
            for path, leaf in new.fixed.items()
        }
        return CompressionState(
            {}, {path: {**leaf, "mask": masks[path]} for path, leaf in new.fixed.items()}
        )

    def bind(known: Any) -> Compression:
        return _soft(bound(hard, known), threshold, every)

    soft = hard._replace(update=Scheduled(update, at_once=partial(update, now=True)), bind=bind)
    return stamped(soft, call_of("movement", of=hard, threshold=threshold))
