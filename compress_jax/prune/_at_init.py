"""Scores of weights before any training, from one batch or from none; for `scored`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError
from compress_jax.core.leafwise import why_not_float
from compress_jax.core.paths import flatten
from compress_jax.core.types import Batch, ModelFn, Params, PyTree
from compress_jax.prune._masks.choose import kept
from compress_jax.prune._masks.target import Target


def snip(loss: Callable[..., jax.Array], params: Params, *batch: Batch) -> Any:
    """Return how much each connection matters to the loss: ``|w * dL/dw|``.

    The derivative of the loss by a mask on the weight, at a mask of ones. The published score
    divides by the sum over the whole model, which changes no order.

    Args:
      loss: ``(params, *batch) -> scalar``.
      params: at initialisation.
      batch: what else the loss takes; a batch or the whole data set.

    Returns:
      Tree like ``params``, float32. Leaves that are not floating-point are zeros.

    Example:
      >>> from compress_jax.prune import scored
      >>> def loss(p, x): return jnp.sum(p["w"] * x)
      >>> params = {"w": jnp.array([3.0, 1.0])}
      >>> scores = snip(loss, params, jnp.array([0.1, 2.0]))
      >>> c = scored(scores, 0.5, scope="global")
      >>> c.view(params, c.init(params))["w"].tolist()
      [0.0, 1.0]

    References:
      Lee, Ajanthan and Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
      2019, equations 6 and 7.
    """
    return _of(params, lambda w: _times(w, jax.grad(_floating(loss, params, batch))(w), jnp.abs))


def grasp(loss: Callable[..., jax.Array], params: Params, *batch: Batch) -> Any:
    r"""Return how much each connection matters to the flow of gradients: ``w * (H g)``.

    Removing the weight changes :math:`\|g\|^2` by :math:`-2 w (H g)` to first order. GraSP keeps
    the weights without which the gradients would be smaller; the paper writes :math:`S = -w (H g)`
    and removes the largest. Divide the logits in the loss by a temperature (200 in the paper's
    code) for its values.

    Args:
      loss: ``(params, *batch) -> scalar``, twice differentiable.
      params: at initialisation.
      batch: what else the loss takes.

    Returns:
      Tree like ``params``, float32, of either sign: larger matters more.

    Example:
      >>> def loss(p): return 0.5 * jnp.sum(jnp.array([1.0, 3.0]) * p["w"] ** 2)
      >>> grasp(loss, {"w": jnp.array([1.0, 1.0])})["w"].tolist()
      [1.0, 9.0]

    References:
      Wang, Zhang and Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow",
      2020, equation 8.
    """

    def score(w: dict[str, jax.Array]) -> dict[str, jax.Array]:
        gradient = jax.grad(_floating(loss, params, batch))
        _, curved = jax.jvp(gradient, (w,), (gradient(w),))
        return _times(w, curved, lambda x: x)

    return _of(params, score)


def synflow(
    fn: ModelFn, params: Params, *inputs: PyTree, sparsity: float = 0.0, rounds: int = 1
) -> Any:
    r"""Return the synaptic flow through each connection, no data needed: ``|w| * dR/d|w|``.

    R is the sum of the outputs of the network with :math:`|w|` for w, on inputs of ones. With
    several rounds, the weights of least flow are removed between them until
    ``1 - (1 - sparsity)**((rounds - 1) / rounds)`` are, over all leaves together; what was removed
    scores 0. `scored` then takes the last step, with the same sparsity and ``scope="global"``.
    Without rounds a whole layer may vanish.

    Args:
      fn: ``(params, *inputs) -> outputs``. What is negative or centred inside (batch normalisation,
        a softmax) has no meaning for the flow: leave it out.
      params: at initialisation.
      inputs: examples of the inputs; only shapes and dtypes count, floating ones become ones.
      sparsity: that will be pruned to; used for the rounds only.
      rounds: how often scores are computed, 100 in the paper.

    Returns:
      Tree like ``params``, float32, none negative.

    Raises:
      ArgumentError: if there is no round, or the sparsity is not in [0, 1).

    Example:
      >>> def fn(p, x): return x @ p["a"] @ p["b"]
      >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [1.0]])}
      >>> synflow(fn, params, jnp.zeros((1, 1)))["a"].tolist()
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
    ones = jax.tree.map(
        lambda x: jnp.ones_like(x) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating) else x,
        inputs,
    )

    def flow(w: dict[str, jax.Array]) -> dict[str, jax.Array]:
        positive = {path: jnp.abs(x) for path, x in w.items()}
        total = _floating(lambda p: _sum(fn(p, *ones)), params, ())
        return _times(positive, jax.grad(total)(positive), lambda x: x)

    def score(w: dict[str, jax.Array]) -> dict[str, jax.Array]:
        for done in range(1, rounds):
            share = 1 - (1 - sparsity) ** (done / rounds)
            masks = kept(flow(w), Target.of(share, scope="global"), 0)
            w = {path: jnp.where(masks[path], x, jnp.zeros((), x.dtype)) for path, x in w.items()}
        return flow(w)

    return _of(params, score)


def _floating(
    fn: ModelFn, params: Params, batch: tuple[Any, ...]
) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """Return a function of the floating leaves alone, by path; the others stay as they are."""
    leaves, rebuild = flatten(params)
    return lambda w: fn(rebuild({**leaves, **w}), *batch)


def _of(params: Params, score: Callable[[dict[str, jax.Array]], dict[str, jax.Array]]) -> Any:
    """Return the scores of the floating leaves in the tree of the params, zeros for the others."""
    leaves, rebuild = flatten(params)
    found = score({path: x for path, x in leaves.items() if why_not_float(path, x) is None})
    return rebuild(
        {path: found.get(path, jnp.zeros(jnp.shape(x), jnp.float32)) for path, x in leaves.items()}
    )


def _times(
    w: dict[str, jax.Array], g: dict[str, jax.Array], sign: Callable[[jax.Array], jax.Array]
) -> dict[str, jax.Array]:
    return {
        path: sign(x.astype(jnp.float32) * g[path].astype(jnp.float32)) for path, x in w.items()
    }


def _sum(outputs: Any) -> jax.Array:
    return sum(
        (x.astype(jnp.float32).sum() for x in jax.tree.leaves(outputs)), jnp.zeros((), jnp.float32)
    )
