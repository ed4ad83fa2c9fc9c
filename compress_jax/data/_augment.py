"""Augmentation on the device: pure functions of a key, for use inside the training step."""

from collections.abc import Callable

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
    """Shift each image by up to ``pad`` pixels, and flip it left to right with probability 1/2.

    Args:
      key: a typed PRNG key.
      images: ``[n, height, width, channels]``.
      pad: the largest shift along either axis, in pixels; 0 for none.
      fill: the value of pixels beyond the border: a number, or ``[channels]``. After normalization
        black is ``-mean / std``.
      flip: whether to flip; False for digits and letters, whose mirror images differ in meaning.

    Returns:
      Images of the same shape and dtype.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> images = jnp.arange(9.0).reshape(1, 3, 3, 1)
      >>> cj.data.random_crop_flip(jax.random.key(0), images, pad=1).shape
      (1, 3, 3, 1)

    References:
      He, Zhang, Ren and Sun, "Deep residual learning for image recognition", 2016, section 4.2 (pad
      4 on CIFAR-10).
    """
    shift_key, flip_key = jax.random.split(key)
    n = images.shape[0]
    # The corner of each crop in the padded image; (pad, pad) is no shift.
    corners = jax.random.randint(shift_key, (n, 2), 0, 2 * pad + 1)
    padded = _padded(images, pad, fill)
    cropped = jax.vmap(_crop, in_axes=(0, 0, None))(padded, corners, images.shape[1:])
    if not flip:
        return cropped
    mirrored = jax.random.bernoulli(flip_key, shape=(n, 1, 1, 1))
    return jnp.where(mirrored, cropped[:, :, ::-1], cropped)


def _padded(images: jax.Array, pad: int, fill: float | jax.Array) -> jax.Array:
    """Return the images with a border of width ``pad`` and color ``fill``."""
    n, height, width, channels = images.shape
    color = jnp.broadcast_to(jnp.asarray(fill, images.dtype), (channels,))
    shape = (n, height + 2 * pad, width + 2 * pad, channels)
    frame = jnp.broadcast_to(color[None, None, None], shape)
    return frame.at[:, pad : pad + height, pad : pad + width].set(images)


def _crop(image: jax.Array, corner: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the window of ``shape`` whose upper left pixel is at ``corner``."""
    return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)


def mixup(
    classes: int, alpha: float = 1.0, *, inputs: str = "image", labels: str = "label"
) -> Callable[[jax.Array, Batch], Batch]:
    """Return an augmentation that mixes each example with another one of its batch.

    ``x = m * x_i + (1 - m) * x_j`` and ``y = m * onehot(y_i) + (1 - m) * onehot(y_j)``, with
    ``m ~ Beta(alpha, alpha)`` for each example and j a random permutation of i. In
    `compress_jax.train.distillation` student and teacher get the same mixed images, and a loss of
    logits needs no labels.

    Args:
      classes: the number of classes.
      alpha: above 0; 1 draws m uniformly, with a small one most examples are hardly mixed.
      inputs: the key of the mixed inputs in the batch, floats ``[batch, ...]``.
      labels: the key of the integer labels ``[batch]``; they are replaced by probabilities
        ``[batch, classes]``.

    Returns:
      ``(key, batch) -> batch``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> batch = {"image": jnp.array([[0.0], [1.0]]), "label": jnp.array([0, 1])}
      >>> mixed = cj.data.mixup(2)(jax.random.key(0), batch)
      >>> bool(jnp.allclose(mixed["image"][:, 0], mixed["label"][:, 1]))
      True

    References:
      Zhang, Cisse, Dauphin and Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018,
      equation 1. Beyer et al., "Knowledge Distillation: A Good Teacher Is Patient and Consistent",
      CVPR 2022, section 3.1.
    """

    def augment(key: jax.Array, batch: Batch) -> Batch:
        share_key, order_key = jax.random.split(key)
        images = batch[inputs]
        share = jax.random.beta(share_key, alpha, alpha, (len(images),), images.dtype)
        other = jax.random.permutation(order_key, len(images))

        def mix(x: jax.Array) -> jax.Array:
            m = share.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))  # [batch, 1, ...]
            return m * x + (1 - m) * x[other]

        probabilities = mix(jax.nn.one_hot(batch[labels], classes))
        return {**batch, inputs: mix(images), labels: probabilities}

    return augment
