"""Losses on pairwise relations between examples; widths of student and teacher may differ.

Each takes ``[batch, ...]`` (the rest is flattened) and returns the share of each example,
``[batch]`` in float32. The loss is its mean, yet each share depends on the whole batch that the
function is given: under `train.pmap_step`, a device's own. Finite with finite gradients at any
finite features; no gradient reaches the teacher. With a ``mask`` (see `masks`) the result is that
of the examples that count alone, and 0 for the others; positions that do not count are zeros.
"""

import jax
import jax.numpy as jnp
import optax

from compress_jax.distill._losses.shapes import flat, length, pair, rescaled, same_batch, unit
from compress_jax.distill._masks import Mask, kept, of_examples
from compress_jax.distill._teachers.teacher import at_least_float32


def rkd_distance(student: jax.Array, teacher: jax.Array, *, mask: Mask | None = None) -> jax.Array:
    """Return the Huber loss between normalized pairwise distances: relational distillation.

    ``mean_j huber(d_s[i, j] / mean(d_s) - d_t[i, j] / mean(d_t))`` with Euclidean distances d,
    means over distances that are not zero, and ``huber(x) = x**2 / 2`` up to 1, ``abs(x) - 1/2``
    beyond. It does not change when either is moved, rotated or scaled. The usual weight is 25.

    Args:
      student: ``[batch, ...]``, any floating dtype; takes ``batch**2`` times the memory of one
        example.
      teacher: ``[batch, ...]``.
      mask: which examples (or, of features with positions, which positions) count, see `masks`; no
        other enters a relation.

    Returns:
      ``[batch]``, example i's.

    Raises:
      ShapeError: if the batches differ.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> rkd_distance(2.0 * x[:, ::-1] + 1.0, x).round(5).tolist() == [0.0] * 8
      True

    References:
      Park et al., "Relational Knowledge Distillation", CVPR 2019, section 3.2.1.
    """
    same_batch(student, teacher)
    counts = counting(mask, student)
    s, t = (_distances(each, counts) for each in pair(student, teacher, mask))  # [batch, batch]
    return mean_over_examples(optax.losses.huber_loss(s, t), counts)


def _distances(x: jax.Array, counts: jax.Array) -> jax.Array:
    """Return ``[batch, batch]`` distances, of mean 1 where they are not zero."""
    distances = length(_differences(x, counts))
    # Zeros are an example's distances to itself, to masked ones and to its equals.
    mean = distances.sum() / jnp.maximum((distances > 0).sum(), 1).astype(distances.dtype)
    return distances / jnp.where(mean > 0, mean, 1.0)


def _differences(x: jax.Array, counts: jax.Array) -> jax.Array:
    """Return ``[batch, batch, features]``, ``x_i - x_j`` on one scale; 0 if either is masked.

    Equal examples must differ by exactly 0, also where XLA fuses a product into the difference: so
    the scale comes after, and before it only a power of two, against overflow.
    """
    x = flat(at_least_float32(x)) / 4
    return rescaled(kept(x[:, None] - x[None], both(counts)))  # [batch, batch, features]


def rkd_angle(student: jax.Array, teacher: jax.Array, *, mask: Mask | None = None) -> jax.Array:
    """Return the Huber loss between angles of example triplets: relational distillation.

    ``mean_jk huber(cos_s[j, i, k] - cos_t[j, i, k])``, the angle at example i between the
    directions to j and k; 0 where one of them is i. It does not change when either is moved,
    rotated or scaled. The usual weight is 50.

    Args:
      student: ``[batch, ...]``, any floating dtype; takes ``batch**2`` times the memory of one
        example.
      teacher: ``[batch, ...]``.
      mask: which examples (or, of features with positions, which positions) count, see `masks`; no
        other enters a relation.

    Returns:
      ``[batch]``, example i's.

    Raises:
      ShapeError: if the batches differ.

    Example:
      >>> student = jnp.array([[0.0], [1.0], [-1.0]])
      >>> teacher = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> print((9 * rkd_angle(student, teacher)).round(4))
      [1.     0.0858 0.0858]

    References:
      Park et al., "Relational Knowledge Distillation", CVPR 2019, section 3.2.2.
    """
    same_batch(student, teacher)
    counts = counting(mask, student)
    s, t = (_cosines(each, counts) for each in pair(student, teacher, mask))
    return mean_over_examples(optax.losses.huber_loss(s, t), counts)


def _cosines(x: jax.Array, counts: jax.Array) -> jax.Array:
    """Return ``[i, j, k]``, the cosine of the angle at i between j and k."""
    directions = unit(_differences(x, counts))  # [j, i, features]: from i to j
    return jnp.einsum("jid,kid->ijk", directions, directions, precision="highest")


def rkd(
    student: jax.Array,
    teacher: jax.Array,
    distance: float = 25.0,
    angle: float = 50.0,
    *,
    mask: Mask | None = None,
) -> jax.Array:
    """Return relational distillation, distances and angles together.

    ``distance * rkd_distance + angle * rkd_angle``.

    Args:
      student: ``[batch, ...]``, any floating dtype, usually the pooled features.
      teacher: ``[batch, ...]``.
      distance: weight of `rkd_distance`.
      angle: weight of `rkd_angle`.
      mask: which examples (or, of features with positions, which positions) count, see `masks`; no
        other enters a relation.

    Returns:
      ``[batch]``.

    Raises:
      ShapeError: if the batches differ.

    Example:
      >>> rkd(jnp.eye(4), 4.0 * jnp.eye(4)).tolist()
      [0.0, 0.0, 0.0, 0.0]

    References:
      Park et al., "Relational Knowledge Distillation", CVPR 2019, section 3.2.
    """
    by_distance = rkd_distance(student, teacher, mask=mask)
    by_angle = rkd_angle(student, teacher, mask=mask)
    return distance * by_distance + angle * by_angle


def similarity(student: jax.Array, teacher: jax.Array, *, mask: Mask | None = None) -> jax.Array:
    """Return how far inner products between examples differ: similarity-preserving distillation.

    ``sum_j (G_s[i, j] - G_t[i, j])**2 / batch`` with ``G = X X'``, each row divided by its
    Euclidean norm: the mean over i is ``norm(G_s - G_t)**2 / batch**2``. It does not change when
    either is rotated or scaled. The usual weight is 3000.

    Args:
      student: ``[batch, ...]``, any floating dtype, features with all their positions.
      teacher: ``[batch, ...]``.
      mask: which examples (or, of features with positions, which positions) count, see `masks`; no
        other enters a relation.

    Returns:
      ``[batch]``, row i's.

    Raises:
      ShapeError: if the batches differ.

    Example:
      >>> print(similarity(jnp.eye(2), jnp.eye(2)))
      [0. 0.]
      >>> print(similarity(jnp.eye(2), jnp.ones((2, 3))).round(4))
      [0.2929 0.2929]

    References:
      Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, equations 2 to 4.
    """
    same_batch(student, teacher)
    s, t = (unit(gram(rescaled(flat(each)))) for each in pair(student, teacher, mask))
    return mean_over_examples(jnp.square(s - t), counting(mask, student))


def counting(mask: Mask | None, features: jax.Array) -> jax.Array:
    """Return which examples of a batch count, ``[batch]`` booleans.

    Example:
      >>> counting(jnp.array([[1, 0], [0, 0]]), jnp.ones((2, 2, 3))).tolist()
      [True, False]
    """
    if mask is None:
        return jnp.ones(features.shape[0], bool)
    return of_examples(mask, features.shape[0]) > 0


def both(counts: jax.Array) -> jax.Array:
    """Return ``[batch, batch]``, which pairs of examples count.

    Example:
      >>> both(jnp.array([True, False])).tolist()
      [[True, False], [False, False]]
    """
    return counts[:, None] & counts[None]


def mean_over_examples(shares: jax.Array, counts: jax.Array) -> jax.Array:
    """Return the mean of each example's shares over the examples that count, 0 if it does not.

    Args:
      shares: ``[batch, batch]``, or ``[batch, batch, batch]``: of pairs and triplets.
      counts: ``[batch]``.

    Returns:
      ``[batch]``.

    Example:
      >>> counts = jnp.array([True, True, False])
      >>> mean_over_examples(jnp.array([[1.0, 3.0, 9.0]] * 3), counts).tolist()
      [2.0, 2.0, 0.0]
    """
    members = both(counts)
    if shares.ndim == 3:
        members = members[:, :, None] & counts[None, None]
    # Partners of one example that count: n for pairs, n**2 for triplets.
    number = jnp.maximum(counts.sum(), 1).astype(shares.dtype) ** (shares.ndim - 1)
    return kept(shares, members).sum(axis=tuple(range(1, shares.ndim))) / number


def gram(x: jax.Array) -> jax.Array:
    """Return ``X X'``, ``[batch, batch]``, of ``[batch, features]``.

    Example:
      >>> gram(jnp.array([[1.0, 2.0], [0.0, 1.0]])).tolist()
      [[5.0, 2.0], [2.0, 1.0]]
    """
    return jnp.matmul(x, x.T, precision="highest")
