"""Losses on correlations between examples (`pkt`, `cc`, `cka_loss`) or channels (`ickd`)."""

import math

import jax
import jax.numpy as jnp

from compress_jax.distill._losses.relations import both, counting, gram, mean_over_examples
from compress_jax.distill._losses.shapes import (
    flat,
    pair,
    rescaled,
    rows,
    same_batch,
    same_channels,
    unit,
)
from compress_jax.distill._masks import Mask, kept
from compress_jax.distill._teachers.fidelity import centered, cka


def pkt(
    student: jax.Array, teacher: jax.Array, epsilon: float = 1e-7, *, mask: Mask | None = None
) -> jax.Array:
    """Return probabilistic knowledge transfer: the divergence of neighbor probabilities.

    ``mean_j p_t[i, j] * log(p_t[i, j] / p_s[i, j])``, ``p[i, j]`` being
    ``(1 + cos(x_i, x_j)) / 2``, each row divided by its sum; ``epsilon`` is added to both in the
    logarithm. It does not change when an example is scaled. The usual weight is 30,000.

    Args:
      student: ``[batch, ...]``, any floating dtype, usually the pooled features.
      teacher: ``[batch, ...]``.
      epsilon: bounds the logarithm where the student's probability is zero.
      mask: which examples (or, of features with positions, which positions) count, see `masks`; no
        other enters a relation.

    Returns:
      ``[batch]``, row i's; the mean over j, not the sum, as in the authors' code.

    Raises:
      ShapeError: if the batches differ.

    Example:
      >>> print(pkt(jnp.eye(2), 2 * jnp.eye(2)), pkt(jnp.eye(2), jnp.ones((2, 2))).round(4))
      [0. 0.] [0.0294 0.0294]

    References:
      Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer",
      ECCV 2018, section 3 (cosine kernel).
    """
    same_batch(student, teacher)
    counts = counting(mask, student)
    s, t = (_neighbors(each, counts) for each in pair(student, teacher, mask))  # [batch, batch]
    return mean_over_examples(t * (jnp.log(t + epsilon) - jnp.log(s + epsilon)), counts)


def _neighbors(x: jax.Array, counts: jax.Array) -> jax.Array:
    """Return ``[batch, batch]`` whose rows are probabilities, those of what counts."""
    # Cosines from -1 to 1 become 0 to 1; rounding could make them negative.
    kernel = kept(jnp.maximum((1 + gram(unit(flat(x)))) / 2, 0.0), both(counts))
    # Rows that do not count are zeros, and stay so: 0 / 0 would be NaN.
    return kernel / jnp.where(counts, kernel.sum(axis=1), 1.0)[:, None]


def cc(
    student: jax.Array,
    teacher: jax.Array,
    gamma: float = 0.4,
    order: int = 2,
    *,
    mask: Mask | None = None,
) -> jax.Array:
    """Return the mean squared difference of correlations between examples: correlation congruence.

    ``mean_j (k(s_i, s_j) - k(t_i, t_j))**2`` with the Gaussian kernel ``exp(-gamma * |x - y|**2)``
    of directions, expanded:
    ``k(x, y) = sum_{p=0..order} exp(-2 gamma) * (2 gamma)**p / p! * (x . y)**p``. It does not
    change when an example is scaled.

    Args:
      student: ``[batch, ...]``, any floating dtype, usually the pooled features.
      teacher: ``[batch, ...]``.
      gamma: of the kernel.
      order: of the Taylor series.
      mask: which examples (or, of features with positions, which positions) count, see `masks`; no
        other enters a relation.

    Returns:
      ``[batch]``, row i's.

    Raises:
      ShapeError: if the batches differ.

    Example:
      >>> print(cc(jnp.eye(2), 2 * jnp.eye(2)), cc(jnp.eye(2), jnp.ones((2, 2))).round(4))
      [0. 0.] [0.1266 0.1266]

    References:
      Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, section 3
      (Gaussian kernel by Taylor series).
    """
    same_batch(student, teacher)
    s, t = (_kernel(each, gamma, order) for each in pair(student, teacher, mask))
    return mean_over_examples(jnp.square(s - t), counting(mask, student))


def _kernel(x: jax.Array, gamma: float, order: int) -> jax.Array:
    """Return ``[batch, batch]``, the Gaussian kernel's Taylor series."""
    # Of directions |x - y|**2 = 2 - 2 x . y, so the kernel is exp(-2 gamma) * exp(2 gamma * x . y);
    # the second factor is expanded in powers of the cosine.
    cosine = gram(unit(flat(x)))  # [batch, batch]
    weights = [
        math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)
    ]
    return jnp.polyval(jnp.array(weights[::-1], cosine.dtype), cosine)  # highest power first


def cka_loss(student: jax.Array, teacher: jax.Array, *, mask: Mask | None = None) -> jax.Array:
    """Return one minus the centered kernel alignment of student and teacher.

    ``1 - CKA(s, t)``, see `cka`: 0 where the student's features are the teacher's, rotated and
    scaled. One number for the whole batch, as alignment is no sum over examples.

    Args:
      student: ``[batch, ...]``, any floating dtype.
      teacher: ``[batch, ...]``.
      mask: which examples (or, of features with positions, which positions) count, see `masks`; no
        other enters a relation.

    Returns:
      A scalar, 0 to 1; 1, with gradient 0, where the student's features do not vary.

    Raises:
      ShapeError: if the batches differ.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> abs(cka_loss(2.0 * x[:, ::-1] + 1.0, x)).round(4).tolist()
      0.0

    References:
      Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, section
      3. Saha, Bialkowski and Khalifa, "Distilling Representational Similarity using Centered Kernel
      Alignment", BMVC 2022.
    """
    same_batch(student, teacher)
    counts = counting(mask, student)
    s, t = (_centered(each, counts) for each in pair(student, teacher, mask))
    return 1 - cka(s, t, mask=counts)


def _centered(x: jax.Array, counts: jax.Array) -> jax.Array:
    """Return ``[batch, features]`` of mean zero and one scale; 0 if they only vary by rounding."""
    x = centered(rescaled(flat(x)), counts)
    # Features were scaled to at most 1: such small ones are rounding, and may have any correlation.
    return jnp.where(jnp.abs(x).max() > 1e-6, x, 0.0)


def ickd(student: jax.Array, teacher: jax.Array, *, mask: Mask | None = None) -> jax.Array:
    """Return how far correlations between channels differ: inter-channel correlation distillation.

    ``sum_ij (R_s[i, j] - R_t[i, j])**2 / channels`` with ``R = F' F``, F being
    ``[positions, channels]``, each row divided by its Euclidean norm. Positions may differ,
    channels must be brought to the teacher's. It does not change with scale. The usual weight is
    500.

    Args:
      student: ``[batch, *positions, channels]``, any floating dtype, after a regressor.
      teacher: ``[batch, *other positions, channels]``.
      mask: which examples or positions count, see `masks`; one of positions must fit both.

    Returns:
      ``[batch]``, each example's own.

    Raises:
      ShapeError: if the batches or channels differ.

    Example:
      >>> x = jnp.eye(2)[None]
      >>> print(ickd(3 * x, x), ickd(x, jnp.ones((1, 2, 2))).round(4))
      [0.] [0.5858]

    References:
      Liu et al., "Exploring Inter-Channel Correlation for Diversity-Preserved Knowledge
      Distillation", ICCV 2021, section 3.
    """
    same_batch(student, teacher)
    same_channels(student, teacher)
    s, t = (_channel_correlations(each) for each in pair(student, teacher, mask))
    return jnp.square(s - t).sum(axis=(1, 2)) / student.shape[-1]


def _channel_correlations(features: jax.Array) -> jax.Array:
    """Return ``[batch, channels, channels]`` with rows of norm 1."""
    x = rescaled(rows(features), (1, 2))  # [batch, positions, channels], one scale an example
    return unit(jnp.einsum("bpi,bpj->bij", x, x, precision="highest"))
