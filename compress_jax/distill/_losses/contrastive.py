"""Contrastive representation distillation: match embeddings of one example against negatives."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.distill._losses.shapes import bounded, same_shape, unit
from compress_jax.distill._masks import Mask, kept, of_examples
from compress_jax.distill._teachers.teacher import at_least_float32


class Bank(NamedTuple):
    """The last embedding of each training example by both models: state of the run.

    `contrast` keeps it in the memory of its term, so it is checkpointed with the run.

    Attributes:
      student: float32 ``[examples, dim]``, of norm about 1.
      teacher: float32 ``[examples, dim]``.

    Example:
      >>> bank = Bank(student=jnp.eye(4), teacher=jnp.eye(4))
      >>> right = crd(jnp.eye(4)[:1], jnp.eye(4)[:1], bank, jnp.array([0]), jnp.array([[1, 2]]))
      >>> right.shape
      (1,)
    """

    student: jax.Array
    teacher: jax.Array


def crd_bank(key: jax.Array, examples: int, dim: int = 128) -> Bank:
    """Return a bank before training: entries uniform within ``sqrt(3 / dim)``, norms about 1.

    Args:
      key: typed PRNG key.
      examples: number of training examples.
      dim: width of the embeddings (the adapter `embedding`).

    Returns:
      A `Bank` of ``2 * 4 * examples * dim`` bytes.

    Example:
      >>> bank = crd_bank(jax.random.key(0), examples=100, dim=16)
      >>> bank.student.shape, bool(abs(jnp.linalg.norm(bank.teacher, axis=1).mean() - 1) < 0.1)
      ((100, 16), True)
    """
    student, teacher = jax.random.split(key)
    bound = math.sqrt(3 / dim)

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, (examples, dim), minval=-bound, maxval=bound)

    return Bank(draw(student), draw(teacher))


def crd_negatives(
    key: jax.Array, index: jax.Array, labels: jax.Array, count: int = 16384
) -> jax.Array:
    """Return examples of other classes for each anchor, drawn uniformly and with replacement.

    Args:
      key: typed PRNG key of this step.
      index: integers ``[batch]``, the anchors' numbers among the training examples.
      labels: integers ``[examples]``, the classes of all training examples; ``arange(examples)`` to
        exclude only the anchor.
      count: negatives of each anchor.

    Returns:
      int32 ``[batch, count]``, numbers of training examples.

    Example:
      >>> labels = jnp.array([0, 1, 0, 2])
      >>> drawn = crd_negatives(jax.random.key(0), jnp.array([0, 3]), labels, count=100)
      >>> sorted(set(drawn[0].tolist())), sorted(set(drawn[1].tolist()))
      ([1, 3], [0, 1, 2])
    """
    order = jnp.argsort(labels)
    sorted_labels = jnp.sort(labels)
    # Sorted by label, the anchor's class is one run; draw among the others and jump over it.
    start = jnp.searchsorted(sorted_labels, labels[index], side="left")[:, None]
    own = jnp.searchsorted(sorted_labels, labels[index], side="right")[:, None] - start
    drawn = jax.random.randint(key, (len(index), count), 0, len(labels) - own)  # [batch, count]
    return order[jnp.where(drawn < start, drawn, drawn + own)].astype(jnp.int32)


def crd(
    student: jax.Array,
    teacher: jax.Array,
    bank: Bank,
    index: jax.Array,
    negatives: jax.Array,
    temperature: float = 0.07,
    *,
    mask: Mask | None = None,
) -> jax.Array:
    """Return the noise-contrastive loss of both models' embeddings against a bank.

    For an anchor a of one model, ``softplus(-l(a, b+)) + sum_k softplus(l(a, b_k))`` with b from
    the bank of the other, b+ of the anchor's own example, and
    ``l(a, b) = a . b / temperature - log(K) - 1 / (2 dim temperature**2)``. This is the authors'
    ``h = e / (e + K / N)``, ``e = exp(a . b / temperature) / Z``, for N examples. They estimate Z,
    which is N times the mean of ``exp(a . b / temperature)``, from the first batch and a new bank;
    here it is what that tends to. The usual weight is 0.8.

    Args:
      student: ``[batch, dim]``, embeddings of norm 1 (the adapter `embedding`), any floating dtype.
      teacher: ``[batch, dim]``, the teacher's features by an adapter of its own. Gradients flow to
        that adapter, so stop them before it:
        ``embed.apply(params, jax.lax.stop_gradient(features))``.
      bank: last embeddings; no gradient flows to them. After the step give it to `crd_update`.
      index: integers ``[batch]``, numbers of the examples in the bank.
      negatives: integers ``[batch, K]`` from `crd_negatives`, or ``[K]`` shared by the batch, which
        takes far less memory.
      temperature: above 0.
      mask: which examples count, see `masks`; the loss of the others is 0.

    Returns:
      ``[batch]``, the sum of both ways.

    Raises:
      ShapeError: if the embeddings differ in shape.

    Example:
      >>> bank = Bank(jnp.eye(4), jnp.eye(4))
      >>> right = crd(jnp.eye(4)[:1], jnp.eye(4)[:1], bank, jnp.array([0]), jnp.array([[1, 2]]))
      >>> wrong = crd(jnp.eye(4)[1:2], jnp.eye(4)[1:2], bank, jnp.array([0]), jnp.array([[1, 2]]))
      >>> bool(right[0] < wrong[0])
      True

    References:
      Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020, equations 10,
      18 and 19.
    """
    same_shape(student, teacher)
    counts = None if mask is None else of_examples(mask, len(student))
    student, teacher, index = (kept(each, counts) for each in (student, teacher, index))
    forward = _one_way(bounded(student, 1), bank.teacher, index, negatives, temperature)
    backward = _one_way(bounded(teacher, 1), bank.student, index, negatives, temperature)
    return kept(forward + backward, counts)


def _one_way(
    anchor: jax.Array, bank: jax.Array, index: jax.Array, negatives: jax.Array, temperature: float
) -> jax.Array:
    """Return the loss ``[batch]`` of anchors ``[batch, dim]`` against one bank."""
    bank = jax.lax.stop_gradient(bank)
    others = "kd" if negatives.ndim == 1 else "bkd"
    positive = jnp.einsum("bd,bd->b", anchor, bank[index], precision="highest")
    negative = jnp.einsum(f"bd,{others}->bk", anchor, bank[negatives], precision="highest")
    offset = math.log(negatives.shape[-1]) + 1 / (2 * anchor.shape[-1] * temperature**2)
    # Equations 18 and 19: -log h for the positive, -log(1 - h) for each negative.
    of_positive = jax.nn.softplus(offset - positive / temperature)  # [batch]
    of_negatives = jax.nn.softplus(negative / temperature - offset).sum(axis=1)
    return of_positive + of_negatives


def crd_update(
    bank: Bank,
    student: jax.Array,
    teacher: jax.Array,
    index: jax.Array,
    momentum: float = 0.5,
    *,
    mask: Mask | None = None,
) -> Bank:
    """Return the bank after a batch: its examples are moved towards their new embeddings.

    ``b[i] = unit(momentum * b[i] + (1 - momentum) * embedding[i])``.

    Args:
      bank: before.
      student: ``[batch, dim]``, the embeddings `crd` was given.
      teacher: ``[batch, dim]``.
      index: integers ``[batch]``, numbers of the examples, each once; if one is given twice, one
        of its embeddings is kept.
      momentum: share of the old embedding.
      mask: which examples count, see `masks`; the others leave the bank as it is, whatever their
        number says.

    Returns:
      A `Bank`; no gradient flows through it.

    Example:
      >>> one, two = jnp.eye(2)[:1], jnp.eye(2)[1:]
      >>> bank = crd_update(Bank(jnp.eye(2), jnp.eye(2)), one, two, jnp.array([0]))
      >>> bank.student.tolist()
      [[1.0, 0.0], [0.0, 1.0]]
      >>> print(bank.teacher.round(4))
      [[0.7071 0.7071]
       [0.     1.    ]]

    References:
      Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR
      2018, section 3.2.
    """
    counts = jnp.ones(len(student)) if mask is None else of_examples(mask, len(student))
    # Masked examples get a row beyond the end, where "drop" writes nothing.
    places = jnp.where(counts != 0, index, len(bank.student))

    def moved(rows: jax.Array, new: jax.Array) -> jax.Array:
        new = jax.lax.stop_gradient(at_least_float32(kept(new, counts)))
        mixed = momentum * rows[kept(index, counts)] + (1 - momentum) * new  # [batch, dim]
        return rows.at[places].set(unit(mixed), mode="drop")

    return Bank(moved(bank.student, student), moved(bank.teacher, teacher))
