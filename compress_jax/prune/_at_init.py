"""Scores of weights before any training, from one batch or from no data, for `scored`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from compress_jax.core._leafwise import why_not_float
from compress_jax.core.errors import ArgumentError
from compress_jax.core.paths import flatten
from compress_jax.core.types import Batch, Leaf, ModelFn, Params, PyTree
from compress_jax.prune._masks.choose import keep_masks
from compress_jax.prune._masks.target import Target

Weights = dict[str, jax.Array]
"""The floating-point leaves by path."""


def snip(loss: Callable[..., jax.Array], params: Params, *batch: Batch) -> Params:
    """Return the sensitivity of the loss to each connection: ``|w * dL/dw|``.

    This is the magnitude of the derivative of the loss with respect to a mask on the weights, at a
    mask of ones. The published score divides by the sum over the model, which does not change the
    order.

    Args:
      loss: ``(params, *batch) -> scalar``.
      params: at initialization.
      batch: the other arguments of the loss; a batch or the whole data set.

    Returns:
      Tree like ``params``, float32. The scores of leaves that are not floating-point are zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> def loss(p, x): return jnp.sum(p["w"] * x)
      >>> params = {"w": jnp.array([3.0, 1.0])}
      >>> scores = cj.prune.snip(loss, params, jnp.array([0.1, 2.0]))
      >>> c = cj.prune.scored(scores, 0.5, scope="global")
      >>> c.view(params, c.init(params))["w"].tolist()
      [0.0, 1.0]

    References:
      Lee, Ajanthan and Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
      2019, equations 6 and 7.
    """

    def score(w: Weights) -> Weights:
        # The loss of m * w has at m = 1 the derivative w * dL/dw with respect to m.
        gradient = jax.grad(_of_weights(loss, params, batch))(w)
        return {path: jnp.abs(x) for path, x in _product(w, gradient).items()}

    return _score_tree(params, score)


def grasp(loss: Callable[..., jax.Array], params: Params, *batch: Batch) -> Params:
    r"""Return the effect of each connection on the gradient norm: ``w * (H g)``.

    Removing the weight changes :math:`\|g\|^2` by :math:`-2 w (H g)` to first order. GraSP keeps
    the weights without which the gradients would be smaller. The paper defines
    :math:`S = -w (H g)` and removes the largest. The paper's code divides the logits in the loss by
    a temperature of 200.

    Args:
      loss: ``(params, *batch) -> scalar``, twice differentiable.
      params: at initialization.
      batch: the other arguments of the loss.

    Returns:
      Tree like ``params``, float32, of either sign. A larger score is more important.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> def loss(p): return 0.5 * jnp.sum(jnp.array([1.0, 3.0]) * p["w"] ** 2)
      >>> cj.prune.grasp(loss, {"w": jnp.array([1.0, 1.0])})["w"].tolist()
      [1.0, 9.0]

    References:
      Wang, Zhang and Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow",
      2020, equation 8.
    """

    def score(w: Weights) -> Weights:
        gradient = jax.grad(_of_weights(loss, params, batch))
        # The Hessian times the gradient is the gradient's derivative along itself.
        _, hessian_gradient = jax.jvp(gradient, (w,), (gradient(w),))
        return _product(w, hessian_gradient)

    return _score_tree(params, score)


def synflow(
    fn: ModelFn, params: Params, *inputs: PyTree, sparsity: float = 0.0, rounds: int = 1
) -> Params:
    r"""Return the synaptic flow through each connection without data: ``|w| * dR/d|w|``.

    R is the sum of the outputs of the network with :math:`|w|` in place of w, on inputs of ones.
    With several rounds, the weights of least flow over all leaves are removed between rounds, up to
    a sparsity of ``1 - (1 - sparsity)**((rounds - 1) / rounds)``; the removed weights score 0.
    `scored` then takes the last step, with the same sparsity and ``scope="global"``. With a single
    round a whole layer may vanish.

    Args:
      fn: ``(params, *inputs) -> outputs``. Leave out batch normalization and softmax: the flow is
        not defined through layers that center their inputs.
      params: at initialization.
      inputs: examples of the inputs. Only their shapes and dtypes matter: floating-point ones are
        replaced by ones.
      sparsity: the final sparsity; used for the rounds only.
      rounds: how often scores are computed, 100 in the paper.

    Returns:
      Tree like ``params``, float32, none negative.

    Raises:
      ArgumentError: if rounds is below 1, or the sparsity is not in [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> def fn(p, x): return x @ p["a"] @ p["b"]
      >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [1.0]])}
      >>> cj.prune.synflow(fn, params, jnp.zeros((1, 1)))["a"].tolist()
      [[3.0, 2.0]]

    References:
      Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic
      flow", 2020, algorithm 1.
    """
    if rounds < 1 or not 0 <= sparsity < 1:
        raise ArgumentError(
            f"synflow needs at least one round and a sparsity in [0, 1), got {rounds} and "
            f"{sparsity}"
        )
    # Integers, such as token indices, stay as they are.
    ones = jax.tree.map(_ones, inputs)

    def output(p: Params) -> jax.Array:
        total = jnp.zeros((), jnp.float32)
        for x in jax.tree.leaves(fn(p, *ones)):
            total = total + x.astype(jnp.float32).sum()
        return total

    def flow(w: Weights) -> Weights:
        # The derivative is taken at |w|, so that contributions of opposite signs do not cancel.
        positive = {path: jnp.abs(x) for path, x in w.items()}
        return _product(positive, jax.grad(_of_weights(output, params, ()))(positive))

    def score(w: Weights) -> Weights:
        for done in range(1, rounds):
            # The remaining share falls geometrically, to 1 - sparsity after the last round.
            share = 1 - (1 - sparsity) ** (done / rounds)
            masks = keep_masks(flow(w), Target.of(share, scope="global"), 0)
            w = {path: jnp.where(masks[path], x, jnp.zeros((), x.dtype)) for path, x in w.items()}
        return flow(w)

    return _score_tree(params, score)


def _of_weights(
    fn: ModelFn, params: Params, batch: tuple[Batch, ...]
) -> Callable[[Weights], jax.Array]:
    """Return ``fn`` of the floating-point leaves by path; the other leaves are constants."""
    leaves, rebuild = flatten(params)
    return lambda w: fn(rebuild({**leaves, **w}), *batch)


def _score_tree(params: Params, score: Callable[[Weights], Weights]) -> Params:
    """Return the scores of floating-point leaves as a tree like the params, else zeros."""
    leaves, rebuild = flatten(params)
    found = score({path: x for path, x in leaves.items() if why_not_float(path, x) is None})
    # Zeros stand for what has no score, so that the result has the structure of the params.
    zeros = {
        path: jnp.zeros(jnp.shape(x), jnp.float32)
        for path, x in leaves.items()
        if path not in found
    }
    return rebuild({**zeros, **found})


def _product(w: Weights, g: Weights) -> Weights:
    return {path: x.astype(jnp.float32) * g[path].astype(jnp.float32) for path, x in w.items()}


def _ones(x: Leaf) -> Leaf:
    floating = jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)
    return jnp.ones_like(x) if floating else x
