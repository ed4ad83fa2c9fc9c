"""Mixed images: what a patient and consistent teacher is asked about."""

from collections.abc import Callable
from typing import Any

import jax


def mixup(
    classes: int, alpha: float = 1.0, *, inputs: str = "image", labels: str = "label"
) -> Callable[[jax.Array, Any], Any]:
    """Return an augmentation that mixes each example with another one of its batch.

    ``x = m * x_i + (1 - m) * x_j`` and ``y = m * onehot(y_i) + (1 - m) * onehot(y_j)`` with ``m ~ Beta(alpha, alpha)`` of
    each example and j a random permutation of i. Given to `compress_jax.train.distillation` it happens once: student and
    teacher see the same mixed images, and a loss of logits needs no labels at all.

    Args:
      classes: number of classes.
      alpha: above 0; 1 draws m uniformly, small ones leave most examples nearly whole.
      inputs: the batch's entry that is mixed, floats ``[batch, ...]``.
      labels: the batch's entry with integer labels ``[batch]``; probabilities ``[batch, classes]`` take their place.

    Returns:
      ``(key, batch) -> batch``.

    Example:
      >>> import jax.numpy as jnp
      >>> batch = {"image": jnp.array([[0.0], [1.0]]), "label": jnp.array([0, 1])}
      >>> mixed = mixup(2)(jax.random.key(0), batch)
      >>> bool(jnp.allclose(mixed["image"][:, 0], mixed["label"][:, 1]))
      True

    References:
      Zhang, Cisse, Dauphin and Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018, equation 1.
      Beyer et al., "Knowledge Distillation: A Good Teacher Is Patient and Consistent", CVPR 2022, section 3.1.
    """

    def augment(key: jax.Array, batch: Any) -> Any:
        share_key, order_key = jax.random.split(key)
        images = batch[inputs]
        share = jax.random.beta(share_key, alpha, alpha, (len(images),), images.dtype)
        other = jax.random.permutation(order_key, len(images))

        def mixed(x: jax.Array) -> jax.Array:
            m = share.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
            return m * x + (1 - m) * x[other]

        return {**batch, inputs: mixed(images), labels: mixed(jax.nn.one_hot(batch[labels], classes))}

    return augment
