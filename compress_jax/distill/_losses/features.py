"""Losses between features, after an adapter where shapes differ, and on statistics of features.

Each takes arrays ``[batch, *positions, channels]`` and returns the loss of each example,
``[batch]`` in float32, finite with finite gradients at any finite features; no gradient reaches the
teacher. `hint`, `review` and `mgd` are means over positions and channels, so that a weight does not
depend on sizes. With a ``mask`` (see `masks`) masked entries have loss 0 and are not read; a mask
of positions makes the result ``[batch, *positions]``, to be averaged by `masked_mean`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ShapeError
from compress_jax.distill._adapters.fusion import resize_features
from compress_jax.distill._losses.shapes import (
    bounded,
    flat,
    pair,
    per_channel,
    rescaled,
    rows,
    same_batch,
    same_channels,
    same_positions,
    same_shape,
    unit,
)
from compress_jax.distill._masks import (
    Mask,
    has_positions,
    kept,
    mean_of_each,
    mean_of_positions,
    of_features,
)


def hint(student: jax.Array, teacher: jax.Array, *, mask: Mask | None = None) -> jax.Array:
    """Return the mean squared difference of features: FitNets' hint, and SimKD's loss.

    ``mean((s - t)**2)`` over positions and channels, s being the student's features after a
    regressor (`linear`, `conv`, `deconv`; SimKD: `projector`) where shapes differ. FitNets has half
    the sum; the usual weight of the mean is 100.

    Args:
      student: ``[batch, *positions, channels]``, any floating dtype.
      teacher: same shape.
      mask: which examples or positions count, see `masks`.

    Returns:
      ``[batch]``; with a mask of positions ``[batch, *positions]``.

    Raises:
      ShapeError: if the shapes differ, or the mask does not fit.

    Example:
      >>> hint(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 4.0]])).tolist()
      [2.0]

    References:
      Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, equation 3. Chen et al.,
      "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, equation 3.
    """
    same_shape(student, teacher)
    student, teacher = pair(student, teacher, mask)
    return mean_of_positions(jnp.square(bounded(student, 2) - bounded(teacher, 2)), mask)


def vid(
    mean: jax.Array, teacher: jax.Array, variance: jax.Array, *, mask: Mask | None = None
) -> jax.Array:
    """Return the negative log-likelihood of the teacher's features under the student's Gaussian.

    ``mean(1/2 * ((t - mean)**2 / variance + log(variance)))``, the constant ``log(2 pi) / 2`` left
    out: a bound of the mutual information. A channel that the student cannot predict gets a large
    variance and little weight. The adapter `gaussian` returns ``mean`` and ``variance`` and must
    be trained, variances too.

    Args:
      mean: ``[batch, *positions, channels]``, predicted from the student's features.
      teacher: same shape.
      variance: positive, ``[channels]``. Gradients flow to it.
      mask: which examples or positions count, see `masks`.

    Returns:
      ``[batch]``, or ``[batch, *positions]``; below zero where variances are small.

    Raises:
      ShapeError: if the shapes of mean and teacher differ.

    Example:
      >>> vid(jnp.zeros((1, 2)), jnp.array([[2.0, 0.0]]), jnp.ones(2)).tolist()
      [1.0]

    References:
      Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019, section
      2 (a Gaussian whose variance does not depend on the example).
    """
    same_shape(mean, teacher)
    mean, teacher = pair(mean, teacher, mask)
    square = jnp.square(bounded(mean, 4) - bounded(teacher, 4))
    variance = per_channel(bounded(variance, 4), mean.ndim)
    return mean_of_positions(0.5 * (square / variance + jnp.log(variance)), mask)


def review(
    student: jax.Array,
    teacher: jax.Array,
    levels: tuple[int, ...] = (4, 2, 1),
    *,
    mask: Mask | None = None,
) -> jax.Array:
    """Return ReviewKD's hierarchical context loss: `hint` at several resolutions.

    ``sum_k w[k] * hint(resize(s, k), resize(t, k)) / sum_k w[k]`` with weight 1 for the features
    themselves, 1/2, 1/4 and 1/8 for their averages over grids of 4, 2 and 1 positions a side; grids
    not smaller than the features are left out. ReviewKD adds this loss over its stages, after the
    adapter `fusion`, with weight 1 reached over 20 epochs.

    Args:
      student: ``[batch, *positions, channels]``, any floating dtype.
      teacher: same shape.
      levels: positions a side of each coarser grid.
      mask: which examples or positions count, see `masks`; a coarser position is the mean of those
        in it that count.

    Returns:
      ``[batch]``, also with a mask of positions.

    Raises:
      ShapeError: if the shapes differ.

    Example:
      >>> teacher = jnp.array([1.0, -1.0, 1.0, -1.0]).reshape(1, 2, 2, 1)
      >>> review(jnp.zeros((1, 2, 2, 1)), teacher).round(4).tolist()
      [0.666700005531311]

    References:
      Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, section 3.3 and figure 3.
    """
    same_shape(student, teacher)
    student, teacher = (bounded(each, 2) for each in pair(student, teacher, mask))
    axes = student.ndim - 2
    loss = mean_of_each(jnp.square(student - teacher), mask)
    weight = 1.0
    total_weight = 1.0
    # Each coarser grid has half the weight of the one before it.
    for level in [each for each in levels if each < min(student.shape[1:-1], default=0)]:
        weight /= 2
        s, counts = _coarse(student, mask, (level,) * axes)
        t, _ = _coarse(teacher, mask, (level,) * axes)
        loss = loss + weight * mean_of_each(jnp.square(s - t), counts)
        total_weight = total_weight + weight
    return loss / total_weight


def _coarse(
    features: jax.Array, mask: Mask | None, size: tuple[int, ...]
) -> tuple[jax.Array, Mask | None]:
    """Return features at coarser positions, means over those that count, and the coarser mask."""
    if mask is None or not has_positions(mask):
        return resize_features(features, size), mask
    counts = (of_features(mask, features) > 0).astype(features.dtype)[..., None]
    # The mean of the positions that count: the mean of kept features over the mean of the counts.
    share = resize_features(counts, size)  # [batch, *size, 1], the share of positions that count
    means = resize_features(kept(features, counts[..., 0]), size)
    return means / jnp.where(share > 0, share, 1.0), share[..., 0]


def mgd(
    student: jax.Array,
    teacher: jax.Array,
    generate: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    ratio: float = 0.65,
    *,
    mask: Mask | None = None,
) -> jax.Array:
    """Return the error of generating the teacher's features from masked student features.

    ``mean((generate(mask * s) - t)**2)``; the mask hides a position, all channels of it, with
    probability ``ratio``. The paper has the sum over positions and channels, times 7e-5 for
    classification and 2e-5 for detection.

    Args:
      student: ``[batch, *positions, channels]``, any floating dtype, brought to what ``generate``
        takes.
      teacher: ``[batch, *positions, channels]``.
      generate: ``features -> features`` in the teacher's shape: ``partial(adapter.apply, params)``
        of the adapter `generator`.
      key: typed PRNG key of this step.
      ratio: share of positions hidden, 0 to 1.
      mask: which examples or positions count, see `masks`; ``generate`` gets zeros at the others.

    Returns:
      ``[batch]``; with a mask of positions ``[batch, *positions]``.

    Raises:
      ShapeError: if what is generated has another shape than the teacher's features.

    Example:
      >>> x = jnp.ones((1, 4, 4, 2))
      >>> mgd(x, x, lambda x: x, jax.random.key(0), ratio=0.0).tolist()
      [0.0]

    References:
      Yang et al., "Masked Generative Distillation", ECCV 2022, equations 1 to 4.
    """
    # One draw for all channels of a position: [batch, *positions, 1].
    shown = jax.random.bernoulli(key, 1 - ratio, (*student.shape[:-1], 1))
    student = student if mask is None else kept(student, of_features(mask, student))
    return hint(generate(jnp.where(shown, bounded(student, 2), 0.0)), teacher, mask=mask)


# Losses on statistics of features: channels or positions are summed out, and student and teacher
# may differ there.


def attention(
    student: jax.Array, teacher: jax.Array, p: float = 2, *, mask: Mask | None = None
) -> jax.Array:
    """Return the mean squared difference of attention maps: attention transfer.

    ``mean((Q(s) - Q(t))**2)`` over positions, Q being ``mean(abs(f)**p)`` over channels, divided by
    its Euclidean norm over positions. It does not change with the scale of either; numbers of
    channels may differ. The usual weight is 1000.

    Args:
      student: ``[batch, *positions, channels]``, any floating dtype.
      teacher: ``[batch, *positions, other channels]``.
      p: power, at least 1: the higher, the more the strongest channel counts.
      mask: which examples or positions count, see `masks`.

    Returns:
      ``[batch]``.

    Raises:
      ShapeError: if batch or positions differ.

    Example:
      >>> student, teacher = jnp.array([[[1.0], [0.0]]]), jnp.array([[[0.0, 0.0], [3.0, 3.0]]])
      >>> attention(student, teacher).tolist(), attention(5 * student, student).tolist()
      ([1.0], [0.0])

    References:
      Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, equation 2.
    """
    same_positions(student, teacher)
    positions = student.shape[:-1]
    student, teacher = pair(student, teacher, mask)
    square = jnp.square(_attention(student, p) - _attention(teacher, p))
    # Back to [batch, *positions, 1], the axes that the mask has.
    return mean_of_each(square.reshape(*positions, 1), mask)


def _attention(features: jax.Array, p: float) -> jax.Array:
    """Return ``[batch, positions]`` of norm 1."""
    return unit((jnp.abs(rescaled(rows(features), (1, 2))) ** p).mean(axis=2))


def ft(
    student: jax.Array, teacher: jax.Array, p: float = 1, *, mask: Mask | None = None
) -> jax.Array:
    """Return the mean distance of normalized factors: factor transfer.

    ``mean(abs(s / norm(s) - t / norm(t))**p)`` with norms over all of an example's factor. The
    teacher's factor comes from the adapter `paraphraser`, trained before on its features alone, the
    student's from the adapter `translator`.

    Args:
      student: ``[batch, ...]``, a translator's output, any floating dtype.
      teacher: same shape, a paraphraser's factor.
      p: 1 or 2.
      mask: which examples or positions count, see `masks`.

    Returns:
      ``[batch]``.

    Raises:
      ShapeError: if the shapes differ.

    Example:
      >>> ft(jnp.array([[3.0, 4.0]]), jnp.array([[6.0, 8.0]])).tolist()
      [0.0]
      >>> ft(jnp.eye(2), jnp.eye(2)[::-1]).tolist()
      [1.0, 1.0]

    References:
      Kim, Park and Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer",
      NeurIPS 2018, equation 2.
    """
    same_shape(student, teacher)
    student, teacher = pair(student, teacher, mask)
    difference = jnp.abs(unit(flat(student)) - unit(flat(teacher))) ** p
    return mean_of_each(difference.reshape(student.shape), mask)


def fsp(
    student: tuple[jax.Array, jax.Array],
    teacher: tuple[jax.Array, jax.Array],
    *,
    mask: Mask | None = None,
) -> jax.Array:
    """Return the mean squared difference of the flow of solution procedure (FSP) matrices.

    ``mean((G(s) - G(t))**2)`` with ``G[i, j] = mean(f[i] * g[j])`` over positions, f being the
    features where a stage begins and g those where it ends. Positions of student and teacher may
    differ; the two of a pair must agree (`resize_features`).

    Args:
      student: two arrays ``[batch, *positions, channels]``, any floating dtype, channels as the
        teacher's.
      teacher: two arrays.
      mask: which examples or positions count, see `masks`; one of positions must fit all four
        arrays.

    Returns:
      ``[batch]``.

    Raises:
      ShapeError: if the positions of a pair, or the channels of student and teacher, differ.

    Example:
      >>> f, g = jnp.ones((1, 4, 2)), jnp.ones((1, 4, 3))
      >>> fsp((f, g), (f, 3 * g)).tolist()
      [4.0]

    References:
      Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and
      Transfer Learning", CVPR 2017, equations 1 and 2.
    """
    for own, other in zip(student, teacher, strict=True):
        same_batch(own, other)
        same_channels(own, other)
    # Each is a pair (student's features, teacher's features).
    begin, end = (pair(own, other, mask) for own, other in zip(student, teacher, strict=True))
    difference = _flow(begin[0], end[0], mask) - _flow(begin[1], end[1], mask)  # [batch, i, j]
    return jnp.square(flat(difference)).mean(axis=1)


def _flow(first: jax.Array, second: jax.Array, mask: Mask | None) -> jax.Array:
    """Return ``[batch, channels of first, channels of second]``."""
    if first.shape[:-1] != second.shape[:-1]:
        raise ShapeError(
            f"fsp pairs features of equal positions, got {first.shape} and {second.shape}: "
            "use distill.resize_features on one"
        )
    counts = jnp.ones(first.shape[:-1]) if mask is None else of_features(mask, first) > 0
    number = jnp.maximum(counts.reshape(first.shape[0], -1).sum(axis=1), 1).astype(first.dtype)
    first = rows(bounded(first, 4))  # [batch, positions, channels]
    second = rows(bounded(second, 4))
    return jnp.einsum("bpi,bpj->bij", first, second, precision="highest") / number[:, None, None]


def nst(student: jax.Array, teacher: jax.Array, *, mask: Mask | None = None) -> jax.Array:
    """Return neuron selectivity transfer: the maximum mean discrepancy of activation maps.

    ``mean k(s_i, s_j) + mean k(t_i, t_j) - 2 mean k(s_i, t_j)`` with ``k(x, y) = (x . y)**2``, a
    channel being the vector of its values over positions, of norm 1. Numbers of channels may
    differ. The usual weight is 50.

    Args:
      student: ``[batch, *positions, channels]``, any floating dtype.
      teacher: ``[batch, *positions, other channels]``.
      mask: which examples or positions count, see `masks`.

    Returns:
      ``[batch]``, not below zero but for rounding.

    Raises:
      ShapeError: if batch or positions differ.

    Example:
      >>> nst(jnp.array([[[1.0], [0.0]]]), jnp.array([[[0.0], [7.0]]])).tolist()
      [2.0]

    References:
      Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017,
      section 4 (polynomial kernel, d = 2, c = 0).
    """
    same_positions(student, teacher)
    # [batch, positions, channels], each channel of norm 1 over the positions.
    s, t = (unit(rows(each), axis=1) for each in pair(student, teacher, mask))
    return _kernel(s, s) + _kernel(t, t) - 2 * _kernel(s, t)


def _kernel(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean over pairs of channels of the squared inner product, ``[batch]``."""
    return jnp.square(jnp.einsum("bpi,bpj->bij", x, y, precision="highest")).mean(axis=(1, 2))
