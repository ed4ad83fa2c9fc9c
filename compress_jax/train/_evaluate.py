"""Evaluation that compiles once and counts every example once."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.core.types import Array, Batch, Variables
from compress_jax.data._feed import eval_batches
from compress_jax.distill import Total
from compress_jax.distill._masks import fitted

Apply: TypeAlias = Callable[[Variables, jax.Array], jax.Array]
"""``(variables, x) -> logits`` in eval mode."""

OWN = "of the split"  # the split's own mask; "mask" is that of the rows that pad the last batch


def logits(
    apply_fn: Apply,
    variables: Variables,
    split: Mapping[str, Array],
    batch_size: int = 500,
    inputs: str = "image",
) -> np.ndarray:
    """Return the model's logits on a whole split.

    Args:
      apply_fn: ``(variables, x) -> logits`` in eval mode, such as ``model.apply``. Compiled once a
        function: pass the same one (``apply`` of the same model) again rather than a new lambda.
      variables: the variables of apply_fn.
      split: arrays by name, all of the same leading length n.
      batch_size: number of examples evaluated at once.
      inputs: the entry given to the model.

    Returns:
      float32 ``[n, classes]``.

    Raises:
      ArgumentError: if the split is empty.

    Example:
      >>> split = {"image": np.ones((5, 2), np.float32)}
      >>> logits(lambda w, x: x @ w, jnp.ones((2, 3)), split, batch_size=4).shape
      (5, 3)
    """
    batches = _batches(split, (inputs,), batch_size)
    rows = [
        np.asarray(_apply(apply_fn, variables, batch[inputs]))[batch["mask"]] for batch in batches
    ]
    return np.concatenate(rows)


def accuracy(
    apply_fn: Apply,
    variables: Variables,
    split: Mapping[str, Array],
    batch_size: int = 500,
    *,
    inputs: str = "image",
    labels: str = "label",
    mask: str | None = None,
) -> float:
    """Return the share of a split's examples, or tokens, whose largest logit is the label's.

    Args:
      apply_fn: ``(variables, x) -> logits`` in eval mode, see `logits`.
      variables: the variables of apply_fn.
      split: arrays by name, all of the same leading length.
      batch_size: number of examples evaluated at once.
      inputs: the entry given to the model.
      labels: the entry with integer labels, ``[n]`` or ``[n, sequence]``.
      mask: the entry of which examples or tokens count, see `distill/_masks.py`; None
        counts all. For batches of several lengths see `averages`.

    Returns:
      Correct answers over answers that count, 0 to 1, counted exactly.

    Raises:
      ArgumentError: if the split is empty or its arrays differ in length.
      ShapeError: if the mask does not fit the labels.

    Example:
      >>> split = {"image": np.eye(3, dtype=np.float32), "label": np.array([0, 1, 0])}
      >>> round(accuracy(lambda w, x: x * w, 1.0, split, batch_size=2), 4)
      0.6667
    """
    own = {} if mask is None else {OWN: split[mask]}
    arrays = {inputs: split[inputs], labels: split[labels], **own}
    batches = _batches(arrays, tuple(arrays), batch_size)
    pairs = [
        _correct(apply_fn, variables, batch[inputs], batch[labels], batch["mask"], batch.get(OWN))
        for batch in batches
    ]
    correct = sum(int(hits) for hits, _ in pairs)
    number = sum(int(counts) for _, counts in pairs)
    return correct / max(number, 1)


def averages(
    measure: Callable[[Variables, Batch], Mapping[str, Total]],
    variables: Variables,
    batches: Iterable[Batch],
) -> dict[str, float]:
    """Return means over batches of any sizes and lengths: sums and counts are divided last.

    Args:
      measure: ``(variables, batch) -> {name: total}``, with totals such as those of
        `compress_jax.distill.masked_total`; compiled once for each shape of a batch.
      variables: its first argument.
      batches: its second arguments, one after the other.

    Returns:
      ``{name: mean}``; 0 where nothing counted.

    Raises:
      DataError: if there is no batch.

    Example:
      >>> import compress_jax as cj
      >>> def measure(scale, batch):
      ...     losses, mask = batch
      ...     return {"loss": cj.distill.masked_total(scale * losses, mask)}
      >>> long = (jnp.array([1.0, 1.0, 1.0]), jnp.ones(3))
      >>> short = (jnp.array([5.0, 9.0]), jnp.array([1, 0]))
      >>> cj.train.averages(measure, 1.0, [long, short])
      {'loss': 2.0}
    """
    run = jax.jit(measure)
    sums: dict[str, np.ndarray] = {}
    for batch in batches:
        # [sum, count] in float64: float32 sums of many batches would lose single examples.
        for name, each in run(variables, batch).items():
            sums[name] = sums.get(name, np.zeros(2)) + np.array([each.sum, each.count], np.float64)
    if not sums:
        raise DataError("there is no batch to measure")
    return {name: float(total / count) if count else 0.0 for name, (total, count) in sums.items()}


def _batches(
    split: Batch, names: tuple[str, ...], batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Cut a split's arrays into masked batches of one size, all of them on each process."""
    sizes = {name: len(split[name]) for name in names}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ArgumentError(f"the arrays of a split must have one length, and not 0; got {sizes}")
    return eval_batches({name: split[name] for name in names}, batch_size)


# The function is a static argument, compared by value: `model.apply` is a new object at every
# mention of it, and jit would compile each anew.
@partial(jax.jit, static_argnums=0)
def _apply(apply_fn: Apply, variables: Variables, x: jax.Array) -> jax.Array:
    return apply_fn(variables, x).astype(jnp.float32)


@partial(jax.jit, static_argnums=0)
def _correct(
    apply_fn: Apply,
    variables: Variables,
    x: jax.Array,
    labels: jax.Array,
    rows: jax.Array,
    own: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Return how many answers are right, of how many."""
    hit = apply_fn(variables, x).argmax(axis=-1) == labels  # [batch], or [batch, sequence]
    counts = fitted(rows, hit.shape, "the labels") > 0
    if own is not None:
        counts &= fitted(own, hit.shape, "the labels", examples=True) > 0
    return jnp.sum(hit & counts, dtype=jnp.int32), jnp.sum(counts, dtype=jnp.int32)
