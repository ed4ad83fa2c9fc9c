"""The term of contrastive representation distillation: embeddings that are trained, and a bank that is kept."""

from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ConfigError
from compress_jax.distill.contrastive import Bank, crd, crd_bank, crd_negatives, crd_update
from compress_jax.distill.heads import embedding
from compress_jax.distill.masks import of_examples
from compress_jax.distill.terms import Schedule, Seen, Term
from compress_jax.distill.tokens import Total
from compress_jax.distill.totals import total_of


def contrast(
    student: str,
    teacher: str,
    labels: Any,
    weight: Schedule = 0.8,
    *,
    dim: int = 128,
    negatives: int = 1024,
    temperature: float = 0.07,
    momentum: float = 0.5,
    index: str = "index",
    name: str = "crd",
    mask: str | None = None,
) -> Term:
    """Return the term of `crd`, its two embeddings as parts and its bank as memory.

    The bank is written where the loss is made, so that negatives of a step are those of the steps before. It takes the
    whole batch: train by ``jit`` (a mesh is fine), not by ``pmap``.

    Args:
      student: path of the student's feature, usually the last before the head.
      teacher: path of the teacher's.
      labels: integers ``[examples]``, of all training examples; ``arange(examples)`` to exclude only the anchor itself.
      weight: a number or an optax schedule.
      dim: of the embeddings.
      negatives: of each anchor; the paper has 16384.
      temperature: see `crd`.
      momentum: see `crd_update`.
      index: the batch's entry with the examples' numbers, ``0 .. examples - 1``.
      name: of the term.
      mask: the batch's entry of what counts, see `Term`; examples that do not count leave the bank as it is.

    Returns:
      A `Term`. Its loss raises a ConfigError if the batch has no such entry.

    Example:
      >>> term = contrast("conv_1", "block_2_0", jnp.arange(50), dim=8)
      >>> features = {"conv_1": jnp.ones((4, 2, 2, 3))}, {"block_2_0": jnp.ones((4, 5))}
      >>> parts, memory = term.init(jax.random.key(0), Seen(*[None] * 3, *features, *[None] * 5))
      >>> sorted(parts), memory["bank"].student.shape
      (['student', 'teacher'], (50, 8))

    References:
      Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020.
    """
    part = embedding(dim)

    def init(key: jax.Array, seen: Seen) -> tuple[Any, Any]:
        first, second, third = jax.random.split(key, 3)
        own, other = seen.student[student].shape, seen.teacher[teacher].shape
        parts = {"student": part.init(first, own, own), "teacher": part.init(second, other, other)}
        return parts, {"bank": crd_bank(third, len(labels), dim), "labels": jnp.asarray(labels)}

    def loss(seen: Seen, parts: Any, memory: Any) -> tuple[jax.Array | Total, Any]:
        if index not in seen.batch:
            raise ConfigError(
                f"crd keeps a bank by example: the batch needs their numbers as {index!r}, has {[*seen.batch]}"
            )
        at = seen.batch[index]
        own = part.apply(parts["student"], seen.student[student])
        other = part.apply(parts["teacher"], jax.lax.stop_gradient(seen.teacher[teacher]))
        bank = Bank(*memory["bank"])
        drawn = crd_negatives(seen.key, at, memory["labels"], negatives)
        counts = None if seen.mask is None else of_examples(seen.mask, len(own))
        value = total_of(name, crd(own, other, bank, at, drawn, temperature, mask=counts), counts, True)
        return value, {**memory, "bank": crd_update(bank, own, other, at, momentum, mask=counts)}

    return Term(name, loss, weight, (student,), (teacher,), init, mask)
