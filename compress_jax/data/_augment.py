"""Augmentation on the device: pure functions of an explicit key, to be called inside the training step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.types import Batch


def random_crop_flip(
    key: jax.Array,
    images: jax.Array,
    pad: int = 2,
    *,
    fill: float | jax.Array = 0.0,
    flip: bool = True,
) -> jax.Array:
    """Shift each image by -pad to pad pixels along both axes, and mirror it left to right with probability one half.

    Args:
      key: a typed PRNG key; one key, one result.
      images: ``[n, height, width, channels]``.
      pad: the largest shift, in pixels; 0 leaves the position alone.
      fill: what comes in at the border: a number, or ``[channels]``. After normalisation black is
        ``-mean / std``.
      flip: whether to mirror; False for digits and letters, whose mirror image means something
        else.

    Returns:
      Images of the same shape and dtype.

    Example:
      >>> images = jnp.arange(9.0).reshape(1, 3, 3, 1)
      >>> random_crop_flip(jax.random.key(0), images, pad=1).shape
      (1, 3, 3, 1)

    References:
      He, Zhang, Ren and Sun, "Deep residual learning for image recognition", 2016, section 4.2 (pad
      4 on CIFAR-10).
    """
    shift_key, flip_key = jax.random.split(key)
    n = images.shape[0]
    corners = jax.random.randint(shift_key, (n, 2), 0, 2 * pad + 1)
    cropped = jax.vmap(_crop, in_axes=(0, 0, None))(
        _padded(images, pad, fill), corners, images.shape[1:]
    )
    if not flip:
        return cropped
    mirrored = jax.random.bernoulli(flip_key, shape=(n, 1, 1, 1))
    return jnp.where(mirrored, cropped[:, :, ::-1], cropped)


def _padded(images: jax.Array, pad: int, fill: float | jax.Array) -> jax.Array:
    """Return the images in a frame of width ``pad`` and colour ``fill``."""
    n, height, width, channels = images.shape
    colour = jnp.broadcast_to(jnp.asarray(fill, images.dtype), (channels,))
    frame = jnp.broadcast_to(
        colour[None, None, None], (n, height + 2 * pad, width + 2 * pad, channels)
    )
    return frame.at[:, pad : pad + height, pad : pad + width].set(images)


def _crop(image: jax.Array, corner: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the window of ``shape`` whose upper left pixel is at ``corner``."""
    return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)


# Mixed images: what a patient and consistent teacher is asked about.


def mixup(
    classes: int, alpha: float = 1.0, *, inputs: str = "image", labels: str = "label"
) -> Callable[[jax.Array, Any], Any]:
    """Return an augmentation that mixes each example with another one of its batch.

    ``x = m * x_i + (1 - m) * x_j`` and ``y = m * onehot(y_i) + (1 - m) * onehot(y_j)`` with
    ``m ~ Beta(alpha, alpha)`` of each example and j a random permutation of i. Given to
    `compress_jax.train.distillation` it happens once: student and teacher see the same mixed
    images, and a loss of logits needs no labels at all.

    Args:
      classes: number of classes.
      alpha: above 0; 1 draws m uniformly, small ones leave most examples nearly whole.
      inputs: the batch's entry that is mixed, floats ``[batch, ...]``.
      labels: the batch's entry with integer labels ``[batch]``; probabilities ``[batch, classes]``
        take their place.

    Returns:
      ``(key, batch) -> batch``.

    Example:
      >>> import jax.numpy as jnp
      >>> batch = {"image": jnp.array([[0.0], [1.0]]), "label": jnp.array([0, 1])}
      >>> mixed = mixup(2)(jax.random.key(0), batch)
      >>> bool(jnp.allclose(mixed["image"][:, 0], mixed["label"][:, 1]))
      True

    References:
      Zhang, Cisse, Dauphin and Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018,
      equation 1. Beyer et al., "Knowledge Distillation: A Good Teacher Is Patient and Consistent",
      CVPR 2022, section 3.1.
    """

    def augment(key: jax.Array, batch: Batch) -> Any:
        share_key, order_key = jax.random.split(key)
        images = batch[inputs]
        share = jax.random.beta(share_key, alpha, alpha, (len(images),), images.dtype)
        other = jax.random.permutation(order_key, len(images))

        def mixed(x: jax.Array) -> jax.Array:
            m = share.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
            return m * x + (1 - m) * x[other]

        return {
            **batch,
            inputs: mixed(images),
            labels: mixed(jax.nn.one_hot(batch[labels], classes)),
        }

    return augment
