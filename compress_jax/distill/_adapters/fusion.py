"""Resizing and pooling of features, and the adapter of ReviewKD that is built on them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ShapeError
from compress_jax.core.types import Params
from compress_jax.distill._adapters.adapter import Adapter, Shape, conv, linear, norm, sequential
from compress_jax.distill._masks import Mask, kept, of_features


def resize_features(features: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Return features at other positions by adaptive average pooling.

    Along an axis from n to m positions, position i is the mean of the old ones from
    ``floor(i n / m)`` up to, not including, ``ceil((i + 1) n / m)``. Where m divides n this is
    average pooling, where n divides m it repeats (nearest neighbor).

    Args:
      features: ``[batch, *positions, channels]``, any floating dtype.
      size: the new positions, one number for each axis: ``(4, 4)`` for images, ``(16,)`` for
        sequences.

    Returns:
      ``[batch, *size, channels]``, the dtype of ``features``.

    Raises:
      ShapeError: if ``size`` has another number of axes than the positions.

    Example:
      >>> resize_features(jnp.arange(4.0).reshape(1, 4, 1), (2,)).ravel().tolist()
      [0.5, 2.5]
      >>> resize_features(jnp.arange(2.0).reshape(1, 2, 1), (4,)).ravel().tolist()
      [0.0, 0.0, 1.0, 1.0]
    """
    if len(size) != features.ndim - 2 or min(size, default=1) < 1:
        raise ShapeError(
            f"features {features.shape} have {features.ndim - 2} axes of positions, "
            f"resize_features was given {size}"
        )
    # One axis at a time, as the mean of a box is the mean of the means along its axes.
    for axis, new in enumerate(size, start=1):
        if features.shape[axis] != new:
            means = jnp.asarray(_means(features.shape[axis], new), features.dtype)
            # tensordot puts the new positions after the channels.
            mixed = jnp.tensordot(features, means, axes=[[axis], [0]], precision="highest")
            features = jnp.moveaxis(mixed, -1, axis)
    return features


def pool(features: jax.Array, *, mask: Mask | None = None) -> jax.Array:
    """Return the mean of features over their positions that count.

    Relations between sequences (`similarity`, `pkt`) compare such means.

    Args:
      features: ``[batch, *positions, channels]``, any floating dtype.
      mask: which examples or positions count, see `masks`; without any, the mean is 0.

    Returns:
      ``[batch, channels]``, the dtype of ``features``.

    Raises:
      ShapeError: if the mask does not fit.

    Example:
      >>> pool(jnp.array([[[1.0], [3.0], [9.0]]]), mask=jnp.array([[1, 1, 0]])).tolist()
      [[2.0]]
    """
    positions = tuple(range(1, features.ndim - 1))
    if mask is None:
        return features.mean(positions)
    counts = of_features(mask, features)
    number = jnp.maximum((counts > 0).sum(positions), 1).astype(features.dtype)  # [batch]
    return kept(features, counts).sum(positions) / number[:, None]


def _means(old: int, new: int) -> np.ndarray:
    """Return the matrix ``[old, new]`` whose columns average the positions that each covers."""
    i = np.arange(new)
    start = i * old // new
    stop = -((i + 1) * old // -new)  # rounded up
    at = np.arange(old)[:, None]  # [old, 1] against [new]
    return ((at >= start) & (at < stop)) / (stop - start)


_out = sequential(conv(bias=False), norm())


def fusion(width: int | None = None) -> Adapter:
    """Return the adapter of `review`: attention-based fusion of each stage with those after it.

    From the last stage to the first, with ``x = norm(linear(f))``: the last has ``z = x``; the
    others, with y the z of the stage after it, resized to their positions,
    ``z = a[0] * x + a[1] * y``, ``a = sigmoid(linear([x, y]))`` at each position. The output of a
    stage is ``norm(conv(z))``.

    Args:
      width: channels of z; None for those of the student's last stage, at most 512.

    Returns:
      An `Adapter` over lists of features, first stage first: ``init`` takes lists of shapes and
      raises a ShapeError if the positions of a stage differ (use `resize_features` on the
      teacher's), ``apply`` returns a list in the teacher's shapes.

    Example:
      >>> student = [(8, 4, 4, 2), (8, 2, 2, 4)]
      >>> teacher = [(8, 4, 4, 6), (8, 2, 2, 12)]
      >>> params = fusion().init(jax.random.key(0), student, teacher)
      >>> [each.shape for each in fusion().apply(params, [jnp.ones(shape) for shape in student])]
      [(8, 4, 4, 6), (8, 2, 2, 12)]

    References:
      Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, section 3.2 and figure 3
      (ABF).
    """

    def init(
        key: jax.Array, student_shape: Sequence[Shape], teacher_shape: Sequence[Shape]
    ) -> Params:
        positions = [tuple(shape[1:-1]) for shape in student_shape]
        if positions != [tuple(shape[1:-1]) for shape in teacher_shape]:
            raise ShapeError(
                f"stages {student_shape} and {teacher_shape} differ in positions: use "
                "distill.resize_features on the teacher's"
            )
        middle = min(512, student_shape[-1][-1]) if width is None else width
        keys = jax.random.split(key, len(student_shape))
        stages = zip(keys, student_shape, teacher_shape, strict=True)
        return {str(i): _stage(*stage, middle) for i, stage in enumerate(stages)}

    return Adapter(init, _apply)


def _stage(key: jax.Array, student_shape: Shape, teacher_shape: Shape, middle: int) -> Params:
    """Return the params of one stage."""
    first, second, third = jax.random.split(key, 3)
    fused = (*student_shape[:-1], middle)
    # Attention reads x and y side by side, and returns a weight for each.
    pair = (*student_shape[:-1], 2 * middle)
    return {
        "in": _into(middle).init(first, student_shape, fused),
        "attention": linear().init(second, pair, (*student_shape[:-1], 2)),
        "out": _out.init(third, fused, teacher_shape),
    }


def _into(middle: int) -> Adapter:
    return sequential(linear(middle, bias=False), norm())


def _apply(params: Params, features: Sequence[jax.Array]) -> list[jax.Array]:
    """Return what comes out of each stage."""
    out = []
    deeper = None
    for i in reversed(range(len(features))):
        own = params[str(i)]
        # `apply` reads the number of channels from the params: the width given here is not used.
        x = _into(1).apply(own["in"], features[i])
        if deeper is not None:
            x = _fused(own["attention"], x, resize_features(deeper, x.shape[1:-1]))
        deeper = x
        out.insert(0, _out.apply(own["out"], deeper))
    return out


def _fused(attention: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    both = jnp.concatenate([x, y], axis=-1)  # [batch, *positions, 2 * channels]
    weights = jax.nn.sigmoid(linear().apply(attention, both))  # [batch, *positions, 2]
    return weights[..., :1] * x + weights[..., 1:] * y
