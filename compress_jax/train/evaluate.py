"""Evaluation that compiles once and counts every example once."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.data.feed import eval_batches

Apply = Callable[[Any, jax.Array], jax.Array]


def logits(
    apply_fn: Apply, variables: Any, split: Mapping[str, Any], batch_size: int = 500, inputs: str = "image"
) -> np.ndarray:
    """Return the model's logits on a whole split.

    Args:
      apply_fn: ``(variables, x) -> logits`` in eval mode, such as ``model.apply``. Compiled once a function: pass the same
        one (``apply`` of the same model) again rather than a new lambda.
      variables: what apply_fn takes.
      split: arrays by name, all of the same leading length n.
      batch_size: number of examples evaluated at once.
      inputs: the entry given to the model.

    Returns:
      float32 ``[n, classes]``.

    Raises:
      ValueError: if the split is empty.

    Example:
      >>> logits(lambda w, x: x @ w, jnp.ones((2, 3)), {"image": np.ones((5, 2), np.float32)}, batch_size=4).shape
      (5, 3)
    """
    batches = _batches(split, (inputs,), batch_size)
    rows = [np.asarray(_apply(apply_fn, variables, batch[inputs]))[batch["mask"]] for batch in batches]
    return np.concatenate(rows)


def accuracy(
    apply_fn: Apply,
    variables: Any,
    split: Mapping[str, Any],
    batch_size: int = 500,
    *,
    inputs: str = "image",
    labels: str = "label",
) -> float:
    """Return the share of a split's examples whose largest logit is the label's.

    Args:
      apply_fn: ``(variables, x) -> logits`` in eval mode, see `logits`.
      variables: what apply_fn takes.
      split: arrays by name, all of the same leading length.
      batch_size: number of examples evaluated at once.
      inputs: the entry given to the model.
      labels: the entry with integer labels.

    Returns:
      Correct answers over examples, 0 to 1, counted exactly.

    Raises:
      ValueError: if the split is empty or its arrays differ in length.

    Example:
      >>> split = {"image": np.eye(3, dtype=np.float32), "label": np.array([0, 1, 0])}
      >>> round(accuracy(lambda w, x: x * w, 1.0, split, batch_size=2), 4)
      0.6667
    """
    pairs = _batches(split, (inputs, labels), batch_size)
    correct = [_correct(apply_fn, variables, batch[inputs], batch[labels], batch["mask"]) for batch in pairs]
    return sum(int(count) for count in correct) / len(split[labels])


def _batches(split: Mapping[str, Any], names: tuple[str, ...], batch_size: int) -> Iterator[dict[str, Any]]:
    """Cut some arrays of a split into batches of one size with a mask; all of them on each process."""
    sizes = {name: len(split[name]) for name in names}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(f"the arrays of a split must have one length, and not 0; got {sizes}")
    return eval_batches({name: split[name] for name in names}, batch_size, process_index=0, process_count=1)


# The function is a static argument, compared by value: `model.apply` is a new object at every mention of it, and jit
# would compile each anew.
@partial(jax.jit, static_argnums=0)
def _apply(apply_fn: Apply, variables: Any, x: jax.Array) -> jax.Array:
    return apply_fn(variables, x).astype(jnp.float32)


@partial(jax.jit, static_argnums=0)
def _correct(apply_fn: Apply, variables: Any, x: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    hit = apply_fn(variables, x).argmax(axis=-1) == labels
    return jnp.sum(hit & mask, dtype=jnp.int32)
