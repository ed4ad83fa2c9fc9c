"""Augmentation on the device: pure functions of a key, for use inside the training step."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from compress_jax.core.arguments import one_of
from compress_jax.core.errors import ArgumentError
from compress_jax.core.types import Batch

DRAWS = 10  # of a box, before the middle of the image is taken


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


def random_resized_crop(
    key: jax.Array,
    images: jax.Array,
    size: int | None = None,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
) -> jax.Array:
    r"""Resize a random part of each image, and flip it left to right with probability 1/2.

    The part's share of the image is :math:`a \sim U(\text{area})`, its width over its height is
    :math:`r`, with :math:`\log r \sim U(\log \text{ratio})`: it has :math:`\sqrt{a h w / r}` rows
    and :math:`\sqrt{a h w r}` columns, at a place that is drawn uniformly. Of ten draws the first
    that fits into the image is taken; where none does, the largest part in the middle whose ratio
    is allowed. Rows and columns need not be whole numbers, see `resized_crop`.

    Args:
      key: a typed PRNG key.
      images: ``[n, height, width, channels]``.
      size: height and width of the results; None for those of the images.
      area: the smallest and the largest share of an image, above 0 and at most 1.
      ratio: the smallest and the largest ratio of width to height.
      flip: whether to flip.

    Returns:
      Images ``[n, size, size, channels]`` of the same dtype.

    Raises:
      ArgumentError: if a range is empty or goes beyond what it may be.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> images = jnp.ones((2, 8, 8, 3))
      >>> cj.data.random_resized_crop(jax.random.key(0), images, 4).shape
      (2, 4, 4, 3)

    References:
      Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, section 6.
    """
    if not 0 < area[0] <= area[1] <= 1:
        raise ArgumentError(f"area must be two shares in order, above 0 and at most 1; got {area}")
    if not 0 < ratio[0] <= ratio[1]:
        raise ArgumentError(f"ratio must be two numbers above 0 in order; got {ratio}")
    n, height, width, _ = images.shape
    box_key, flip_key = jax.random.split(key)
    keys = jax.random.split(box_key, n)
    boxes = jax.vmap(lambda own: _random_box(own, height, width, area, ratio))(keys)  # [n, 4]
    parts = resized_crop(images, boxes, size)
    if not flip:
        return parts
    mirrored = jax.random.bernoulli(flip_key, shape=(n, 1, 1, 1))
    return jnp.where(mirrored, parts[:, :, ::-1], parts)


def _random_box(
    key: jax.Array,
    height: int,
    width: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> jax.Array:
    """Return the first of some drawn boxes that fits, ``[top, left, rows, columns]``."""
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    shares = jax.random.uniform(area_key, (DRAWS,), minval=area[0], maxval=area[1])
    logs = jnp.log(jnp.array(ratio))
    ratios = jnp.exp(jax.random.uniform(ratio_key, (DRAWS,), minval=logs[0], maxval=logs[1]))
    pixels = shares * height * width
    sides = jnp.stack([jnp.sqrt(pixels / ratios), jnp.sqrt(pixels * ratios)], axis=1)  # [draws, 2]
    whole = jnp.array([height, width], sides.dtype)
    # What is too large by rounding alone fits: a share of 1 at the image's own ratio.
    fits = (sides <= whole[None] * (1 + 1e-6)).all(axis=1)
    drawn = jnp.minimum(sides[jnp.argmax(fits)], whole)
    place = jax.random.uniform(place_key, (2,))
    own = min(max(width / height, ratio[0]), ratio[1])
    middle = jnp.array([min(height, width / own), min(width, height * own)], sides.dtype)
    size = jnp.where(fits.any(), drawn, middle)  # [2], rows and columns
    corner = jnp.where(fits.any(), place, 0.5) * (whole - size)
    return jnp.concatenate([corner, size])


def resized_crop(images: jax.Array, boxes: jax.Array, size: int | None = None) -> jax.Array:
    """Return a part of each image, resized by linear interpolation.

    The center of row i of the result lies at ``top + (i + 1/2) rows / size`` of the image, whose
    own rows have theirs at 1/2, 3/2, and so on. Where a part gets smaller, the triangle of the
    interpolation is as much wider, so that no row is skipped. Pixels beyond the box, but within the
    image, count at its border; those beyond the image do not.

    Args:
      images: ``[n, height, width, channels]``.
      boxes: ``[n, 4]`` of top, left, rows and columns, in pixels, not only whole ones.
      size: height and width of the results; None for those of the images.

    Returns:
      Images ``[n, size, size, channels]`` of the same dtype, integers rounded.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> images = jnp.arange(16.0).reshape(1, 4, 4, 1)
      >>> box = jnp.array([[0.0, 2.0, 2.0, 2.0]])
      >>> cj.data.resized_crop(images, box, 2)[0, :, :, 0].round(4).tolist()
      [[2.0, 3.0], [6.0, 7.0]]
    """
    _, height, width, channels = images.shape
    shape = (height, width) if size is None else (size, size)
    floats = images if jnp.issubdtype(images.dtype, jnp.floating) else images.astype(jnp.float32)

    def one(image: jax.Array, box: jax.Array) -> jax.Array:
        corner, sides = jnp.split(box, 2)
        scale = jnp.array(shape, box.dtype) / sides
        return jax.image.scale_and_translate(
            image, (*shape, channels), (0, 1), scale, -corner * scale, method="linear"
        )

    parts = jax.vmap(one)(floats, boxes)
    if floats is images:
        return parts
    return jnp.round(parts).astype(images.dtype)


def mixup(
    classes: int,
    alpha: float = 1.0,
    *,
    inputs: str = "image",
    labels: str = "label",
    partner: Literal["random", "next"] = "random",
) -> Callable[[jax.Array, Batch], Batch]:
    """Return an augmentation that mixes each example with another one of its batch.

    ``x = m * x_i + (1 - m) * x_j`` and ``y = m * onehot(y_i) + (1 - m) * onehot(y_j)``, with
    ``m ~ Beta(alpha, alpha)`` for each example and j a random permutation of i, or i + 1. In
    `compress_jax.train.distillation` student and teacher get the same mixed images, and a loss of
    logits needs no labels.

    Args:
      classes: the number of classes.
      alpha: above 0; 1 draws m uniformly, with a small one most examples are hardly mixed.
      inputs: the key of the mixed inputs in the batch, floats ``[batch, ...]``.
      labels: the key of the integer labels ``[batch]``; they are replaced by probabilities
        ``[batch, classes]``.
      partner: ``"random"``, or ``"next"`` for the next example, the last one's being the first. In
        batches that are shuffled the one is as random as the other, and a batch that is divided
        over devices is not gathered: each device needs one example of another.

    Returns:
      ``(key, batch) -> batch``.

    Raises:
      ArgumentError: if ``partner`` is another word.

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
    is_random = one_of("partner", partner, ("random", "next")) == "random"

    def augment(key: jax.Array, batch: Batch) -> Batch:
        share_key, order_key = jax.random.split(key)
        images = batch[inputs]
        share = jax.random.beta(share_key, alpha, alpha, (len(images),), images.dtype)
        order = jax.random.permutation(order_key, len(images)) if is_random else None

        def mix(x: jax.Array) -> jax.Array:
            m = share.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))  # [batch, 1, ...]
            other = jnp.roll(x, -1, axis=0) if order is None else x[order]
            return m * x + (1 - m) * other

        probabilities = mix(jax.nn.one_hot(batch[labels], classes))
        return {**batch, inputs: mix(images), labels: probabilities}

    return augment
