"""Pruning by scores that need gradients: first-order, second-order, accumulated movement."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from compress_jax.core.arguments import number
from compress_jax.core.axes import Axes
from compress_jax.core.compression import Compression, CompressionState, bound, stamped
from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.describe import call_of
from compress_jax.core.errors import ArgumentError
from compress_jax.core.finite import saturate
from compress_jax.core.schedules import Scheduled
from compress_jax.core.types import Params, PyTree, Step
from compress_jax.prune._masks.score import Score, ScoreInputs, by_score, fixed_of
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

    To first order, removing a weight changes the loss by :math:`-w_i g_i`. With a decay d the score
    is the running mean :math:`s \leftarrow d\,s + (1 - d) |w g|`, which is less noisy.

    `update` needs ``grads``, the gradient at the weights the model used, dense under the mask.
    Before the first update nothing is pruned.

    Args:
      sparsity: as of `magnitude`.
      structure: `n_m`, `block`, `channel` or `head`; None for single weights.
      scope: ``"leaf"`` or ``"global"``.
      every: masks are recomputed at steps divisible by it; the running mean is updated at every
        step.
      decay: the decay of the running mean, 0 to below 1; with 0 there is no state.

    Returns:
      The Compression. ``fixed[path]`` is the mask, or with a decay
      ``{"mask": mask, "carried": running mean, float32}``.

    Raises:
      ArgumentError: for impossible arguments; in `update`, if there are no gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> c = cj.prune.saliency(0.5)
      >>> params = {"w": jnp.array([3.0, 1.0])}
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

    def follow(inputs: ScoreInputs) -> jax.Array:
        return saturate(decay * inputs.carried + (1 - decay) * _effect(inputs), jnp.float32)

    # Without a decay the score of a step needs nothing from the steps before.
    score = Score(_effect, needs_grads=True)
    if decay > 0:
        score = Score(
            lambda inputs: inputs.carried, lambda inputs: _zero(inputs), follow, needs_grads=True
        )
    return by_score(score, sparsity, structure, scope=scope, every=every)


def _effect(inputs: ScoreInputs) -> jax.Array:
    return jnp.abs(inputs.x.astype(jnp.float32) * inputs.grad.astype(jnp.float32))


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
    diagonal of the Hessian is approximated by that of the empirical Fisher matrix, the running mean
    of squared gradients, :math:`F \leftarrow d\,F + (1 - d) g^2` from 0; with ``decay=1`` their
    sum. The gradient is that of a batch, not of single examples; for batches of one size this
    scales all of F alike.

    `update` needs ``grads``, the gradient at the weights the model used, dense under the mask.
    Before the first update nothing is pruned.

    Args:
      sparsity: as of `magnitude`.
      structure: `n_m`, `block`, `channel` or `head`; None for single weights.
      scope: ``"leaf"`` or ``"global"``.
      every: masks are recomputed at steps divisible by it; the mean is updated at every step.
      decay: the decay of the running mean, 0 to 1; 1 for a plain sum.

    Returns:
      The Compression. ``fixed[path]`` is ``{"mask": mask, "carried": F, float32}``.

    Raises:
      ArgumentError: for impossible arguments; in `update`, if there are no gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> c = cj.prune.fisher(0.5)
      >>> params = {"w": jnp.array([3.0, 1.0])}
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
    # With decay 1 a running mean would never move: F is then the plain sum.
    fresh = 1 - decay if decay < 1 else 1.0

    def follow(inputs: ScoreInputs) -> jax.Array:
        squares = jnp.square(inputs.grad.astype(jnp.float32))
        return saturate(decay * inputs.carried + fresh * squares, jnp.float32)

    def measure(inputs: ScoreInputs) -> jax.Array:
        # Saturated, because infinity times a Fisher entry of 0 is NaN.
        squares = saturate(jnp.square(inputs.x.astype(jnp.float32)), jnp.float32)
        return squares * inputs.carried * 0.5

    score = Score(measure, lambda inputs: _zero(inputs), follow, needs_grads=True)
    return by_score(score, sparsity, structure, scope=scope, every=every)


@renamed_arguments(rate="learning_rate")
def movement(
    sparsity: Sparsity | None = None,
    structure: Structure | None = None,
    *,
    scope: str = "leaf",
    every: int = 1,
    threshold: float | None = None,
    learning_rate: float = 1.0,
    penalty: float = 0.0,
) -> Compression:
    r"""Prune the weights that training has moved least away from zero, ``-sum(w * g)``.

    The score starts at 0 and follows, with the learning rate :math:`\eta` and the penalty
    :math:`\lambda`, :math:`s \leftarrow s - \eta\,(w g + \lambda\,\sigma'(s))`. A weight that
    gradient descent drives away from zero gains score, whatever its size. A score that is trained
    with a straight-through gradient learns the same, so the scores need no optimizer. The weights
    are those given to `update`: in `make_step` those after the optimizer's step.

    Hard movement keeps the highest scores at a given sparsity. Soft movement keeps scores above a
    ``threshold``; the resulting sparsity depends on the data and on the penalty
    :math:`\sum \sigma(s)`, which pulls scores down.

    `update` needs ``grads``, the gradient at the weights the model used, dense under the mask.
    Before the first update nothing is pruned.

    Args:
      sparsity: as of `magnitude`; None if there is a threshold.
      structure: `n_m`, `block`, `channel` or `head`; None for single weights, and with a threshold.
      scope: ``"leaf"`` or ``"global"``.
      every: masks are recomputed at steps divisible by it; scores are updated at every step.
      threshold: the threshold of soft movement; None for hard movement.
      learning_rate: of the scores. It matters for soft movement only.
      penalty: the weight of the penalty of soft movement.

    Returns:
      The Compression. ``fixed[path]`` is ``{"mask": mask, "carried": scores, float32}``.

    Raises:
      ArgumentError: for impossible arguments; in `update`, if there are no gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> c = cj.prune.movement(0.5)
      >>> params = {"w": jnp.array([3.0, 1.0])}
      >>> state = c.update(params, c.init(params), step=0, grads={"w": jnp.array([0.5, -1.0])})
      >>> c.view(params, state)["w"].tolist()
      [0.0, 1.0]

    References:
      Sanh, Wolf and Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, section 4,
      table 1.
    """
    # Variables that `follow` closes over keep their names: they are part of the stamps in saved
    # states (see `core.describe`).
    rate = number("learning_rate", learning_rate)
    penalty = number("penalty", penalty)
    threshold = None if threshold is None else number("threshold", threshold)

    def follow(inputs: ScoreInputs) -> jax.Array:
        # The derivative of the sigmoid is sigmoid(s) * sigmoid(-s).
        pull = penalty * jax.nn.sigmoid(inputs.carried) * jax.nn.sigmoid(-inputs.carried)
        moved = inputs.x.astype(jnp.float32) * inputs.grad.astype(jnp.float32)
        # Saturated: a later sum of infinities of both signs would be NaN, which has no rank.
        return saturate(inputs.carried - rate * (moved + pull), jnp.float32)

    score = Score(lambda inputs: inputs.carried, _zero, follow, signed=True, needs_grads=True)
    if threshold is None:
        return by_score(score, sparsity, structure, scope=scope, every=every)
    if sparsity is not None or structure is not None:
        raise ArgumentError(
            "soft movement keeps the scores above the threshold, so give no sparsity and no "
            "structure with it"
        )
    return _soft(by_score(score, 0.0, every=every), threshold, every)


def _zero(inputs: ScoreInputs) -> jax.Array:
    return jnp.zeros_like(inputs.x, jnp.float32)


def _soft(hard: Compression, threshold: float, every: int) -> Compression:
    """Replace the masks of a compression that prunes nothing by ``score > threshold``."""

    def update(
        params: Params, state: CompressionState, *, step: Step, now: bool = False, **inputs: PyTree
    ) -> CompressionState:
        # `hard` has sparsity 0: it keeps the scores, and its masks are all true.
        new = hard.update(params, state, step=step, **inputs)
        is_due = jnp.asarray(now) | (jnp.asarray(step) % every == 0)
        fixed = {}
        for path, leaf in new.fixed.items():
            old = fixed_of(state, path)["mask"]
            mask = jnp.where(is_due, leaf["carried"] > threshold, old)
            fixed[path] = {**leaf, "mask": mask}
        return CompressionState({}, fixed)

    def bind(known: Mapping[str, Axes]) -> Compression:
        return _soft(bound(hard, known), threshold, every)

    soft = hard._replace(update=Scheduled(update, at_once=partial(update, now=True)), bind=bind)
    return stamped(soft, call_of("movement", of=hard, threshold=threshold))
