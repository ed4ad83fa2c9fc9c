"""Measures of fidelity: agreement of predictions, similarity of features, and calibration."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core import ShapeError
from compress_jax.distill._losses.temperature import bounded, pair
from compress_jax.distill._masks import Mask, kept, of_examples
from compress_jax.distill._teachers.teacher import at_least_float32


def agreement(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Return where student and teacher predict the same class, right or wrong.

    ``1[argmax s == argmax t]``; its mean is the top-1 agreement. For the divergence of the
    predictions see `kl`.

    Args:
      student_logits: ``[..., classes]``.
      teacher_logits: same shape.

    Returns:
      float32 ``[...]``, 0 or 1.

    Raises:
      ShapeError: if the shapes of the logits differ.

    Example:
      >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> teacher = jnp.array([[9.0, 0.0], [9.0, 0.0]])
      >>> agreement(student, teacher).tolist()
      [1.0, 0.0]

    References:
      Stanton et al., "Does Knowledge Distillation Really Work?", NeurIPS 2021 (average top-1
      agreement).
    """
    student, teacher = pair(student_logits, teacher_logits)
    return (student.argmax(axis=-1) == teacher.argmax(axis=-1)).astype(jnp.float32)


def cka(x: jax.Array, y: jax.Array, *, mask: Mask | None = None) -> jax.Array:
    """Return the linear centered kernel alignment of two representations, in float32.

    ``||Y' X||**2 / (||X' X|| * ||Y' Y||)``, Frobenius norms, with X and Y centered over the
    examples. It does not change when either is rotated or scaled, so that the widths of student and
    teacher may differ. Computed from the Gram matrices ``X X'`` and ``Y Y'``, of a size that does
    not depend on the widths.

    Args:
      x: ``[examples, ...]``, any floating dtype; features are flattened.
      y: ``[examples, ...]``.
      mask: which examples count, see `masks`.

    Returns:
      A scalar, 0 to 1; 0 if either does not vary over the examples. Both arrays get gradients. With
      fewer examples than features it is biased upwards: compare values of the same number of
      examples only.

    Raises:
      ShapeError: if the numbers of examples differ.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> cka(x, 2.0 * x[:, ::-1] + 1.0).round(4).tolist()
      1.0

    References:
      Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, section
      3 (linear CKA).
    """
    if x.shape[0] != y.shape[0]:
        raise ShapeError(
            f"both representations must be of the same examples, got {x.shape[0]} and "
            f"{y.shape[0]} of them"
        )
    counts = jnp.ones(x.shape[0], bool) if mask is None else of_examples(mask, x.shape[0]) > 0
    gram_x = _gram(x, counts)
    gram_y = _gram(y, counts)
    # ||Y' X||**2 = sum(X X' * Y Y'), likewise the two norms below.
    return (gram_x * gram_y).sum() / jnp.maximum(_length(gram_x) * _length(gram_y), 1e-12)


def centered(x: jax.Array, counts: jax.Array) -> jax.Array:
    """Return ``[examples, features]`` minus the mean over examples that count, 0 for the others.

    Example:
      >>> centered(jnp.array([[1.0], [3.0], [jnp.nan]]), jnp.array([True, True, False])).tolist()
      [[-1.0], [1.0], [0.0]]
    """
    x = kept(x, counts)
    mean = x.sum(axis=0, keepdims=True) / jnp.maximum(counts.sum(), 1).astype(x.dtype)
    # Masked rows were zeros and are minus the mean now: zeros again.
    return kept(x - mean, counts)


def _gram(x: jax.Array, counts: jax.Array) -> jax.Array:
    """Return the centered Gram matrix ``[examples, examples]``, after scaling to at most 1."""
    x = centered(at_least_float32(x).reshape(x.shape[0], -1), counts)
    # The alignment does not depend on scale, and squares of large features would overflow.
    largest = jax.lax.stop_gradient(jnp.abs(x).max())
    x = x / jnp.where(largest > 0, largest, 1)
    return jnp.matmul(x, x.T, precision="highest")


def _length(x: jax.Array) -> jax.Array:
    """Return the Frobenius norm, with gradient 0 at 0."""
    square = jnp.square(x).sum()
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


class CalibrationBins(NamedTuple):
    """Sums per bin of confidence; add them over batches and devices.

    Attributes:
      count: float32 ``[bins]``, how many examples fell into a bin.
      confidence: float32 ``[bins]``, the sum of their confidences.
      correct: float32 ``[bins]``, how many of them were right.

    Example:
      >>> import compress_jax as cj
      >>> one = cj.distill.calibration(jnp.array([[0.0, 99.0]]), jnp.array([1]), bins=2)
      >>> sums = jax.tree.map(jnp.add, one, one)
      >>> sums.count.tolist(), sums.correct.tolist()
      ([0.0, 2.0], [0.0, 2.0])
    """

    count: jax.Array
    confidence: jax.Array
    correct: jax.Array


def calibration(logits: jax.Array, labels: jax.Array, bins: int = 15) -> CalibrationBins:
    """Count the right predictions per bin of confidence, the largest probability.

    Bins have equal width.

    Args:
      logits: ``[..., classes]``, any floating dtype, any finite values.
      labels: integers ``[...]``; a negative one marks an example that does not count, such as
        padding. With a teacher's predictions as labels, it measures how well the student's
        confidence predicts agreement with its teacher.
      bins: number of bins; bin i holds confidences above ``i / bins`` and to ``(i + 1) / bins``.

    Returns:
      The sums, for `calibration_error`. Add those of several batches by
      ``jax.tree.map(jnp.add, a, b)``.

    Example:
      >>> logits, labels = jnp.array([[0.0, 0.0], [0.0, 99.0]]), jnp.array([0, 0])
      >>> calibration(logits, labels, bins=2).count.tolist()
      [1.0, 1.0]

    References:
      Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2.
    """
    logits = bounded(logits).reshape(-1, logits.shape[-1])  # [examples, classes]
    labels = labels.ravel()
    confidence = jnp.exp(jax.nn.log_softmax(logits).max(axis=-1)).astype(jnp.float32)
    # Bin i is (i / bins, (i + 1) / bins], so its upper edge belongs to it.
    at = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    counts = labels >= 0
    right = logits.argmax(axis=-1) == labels
    each = (
        counts.astype(jnp.float32),
        confidence * counts.astype(jnp.float32),
        (counts & right).astype(jnp.float32),
    )
    return CalibrationBins(*(jnp.zeros(bins, jnp.float32).at[at].add(value) for value in each))


def calibration_error(sums: CalibrationBins) -> jax.Array:
    """Return the expected calibration error: the mean distance of confidence from accuracy.

    ``sum over bins of count / N * |correct / count - confidence / count|``.

    Args:
      sums: the sums over the whole data set, see `calibration`.

    Returns:
      A float32 scalar, 0 to 1; 0 if nothing was counted.

    Example:
      >>> sure = jnp.array([[99.0, 0.0], [99.0, 0.0]])
      >>> calibration_error(calibration(sure, jnp.array([0, 1]))).tolist()
      0.5

    References:
      Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    return jnp.abs(sums.correct - sums.confidence).sum() / jnp.maximum(sums.count.sum(), 1)
