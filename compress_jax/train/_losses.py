"""Losses of classifiers, as the training step takes them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.types import Batch, Params, PyTree, Variables
from compress_jax.distill import cross_entropy
from compress_jax.distill._masks import fitted, kept
from compress_jax.distill._objective.totals import masked, total_of
from compress_jax.train._objective import Objective, PlainLoss, chosen, everything, total
from compress_jax.train._quantized import QuantizedModel
from compress_jax.train._step import Loss, Metrics

Augment = Callable[[jax.Array, Any], Any]


def supervised(
    model: nn.Module,
    *,
    smoothing: float = 0.0,
    augment: Augment | None = None,
    inputs: str = "image",
    labels: str = "label",
    mask: str = "mask",
) -> Loss:
    """Return the loss that trains a classifier on labels: mean cross entropy of what counts, with metric ``accuracy``.

    Args:
      model: Linen module called as ``model(x, train=...)``; dropout gets the step's key.
      smoothing: of the labels, see `compress_jax.distill.cross_entropy`.
      augment: ``(key, batch) -> batch``, applied in training only.
      inputs: the batch's entry that is given to the model.
      labels: the batch's entry with integer labels, ``[batch]`` or ``[batch, sequence]``.
      mask: the batch's entry of which examples or tokens count, if it is there, see
        `compress_jax.distill.masks`.

    Returns:
      A `Loss`; it ignores the teacher.

    Example:
      >>> from compress_jax.models import LeNet300100
      >>> model, batch = LeNet300100(), {"image": jnp.ones((2, 4)), "label": jnp.array([0, 1])}
      >>> params = model.init(jax.random.key(0), batch["image"])["params"]
      >>> value, (model_state, metrics) = supervised(model)(params, {}, batch, jax.random.key(1), None)
      >>> value.shape, model_state, sorted(metrics)
      ((), {}, ['accuracy'])
    """

    def per_example(student: jax.Array, given: Any, targets: jax.Array, mask: Any) -> jax.Array:
        return cross_entropy(student, targets, smoothing)

    return _classifier(model, per_example, augment, inputs, labels, mask)


def distilled(
    model: nn.Module,
    teacher_apply: Callable[[Any, jax.Array], jax.Array],
    loss_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    *,
    augment: Augment | None = None,
    inputs: str = "image",
    labels: str = "label",
    mask: str = "mask",
) -> Loss:
    """Return the loss that trains a student on its teacher's logits for the same, equally augmented, inputs.

    Args:
      model: the student, a Linen module called as ``model(x, train=...)``.
      teacher_apply: ``(teacher, x) -> logits``, in eval mode; ``teacher`` is the tree given to the
        step.
      loss_fn: ``(student_logits, teacher_logits, labels) -> loss of each example``.
      augment: ``(key, batch) -> batch``, applied in training only.
      inputs: the batch's entry that is given to both models.
      labels: the batch's entry with integer labels, ``[batch]`` or ``[batch, sequence]``.
      mask: the batch's entry of which examples or tokens count, if it is there, see
        `compress_jax.distill.masks`.

    Returns:
      A `Loss` with metric ``accuracy``. No gradient reaches the teacher.

    Example:
      >>> from compress_jax.models import LeNet300100
      >>> model, batch = LeNet300100(), {"image": jnp.ones((2, 4)), "label": jnp.array([0, 1])}
      >>> variables = model.init(jax.random.key(0), batch["image"])
      >>> loss = distilled(model, model.apply, lambda s, t, y: jnp.square(s - t).mean(-1))
      >>> value, _ = loss(variables["params"], {}, batch, jax.random.key(1), variables)
      >>> float(value)
      0.0
    """

    def per_example(student: jax.Array, given: jax.Array, targets: jax.Array, mask: Any) -> Any:
        return masked(
            "the loss of distilled", loss_fn, (student, given, targets), mask, student.ndim - 1
        )

    return _classifier(model, per_example, augment, inputs, labels, mask, teacher_apply)


def _classifier(
    model: nn.Module,
    per_example: Callable[..., jax.Array],
    augment: Augment | None,
    inputs: str,
    labels: str,
    mask: str,
    teacher_apply: Callable[[Any, jax.Array], jax.Array] | None = None,
) -> Loss:
    """Return the loss that is the mean of ``per_example(logits, teacher's logits, labels, mask)`` over what counts."""

    def totals(
        params: Params,
        model_state: PyTree,
        batch: Batch,
        key: jax.Array,
        teacher: Any,
        train: bool = True,
    ) -> tuple[Objective, tuple[Any, Metrics]]:
        augment_key, dropout_key = jax.random.split(key)
        if train and augment is not None:
            batch = augment(augment_key, batch)
        x, targets = batch[inputs], batch[labels]
        counts = chosen(batch, mask)
        logits, model_state = _forward(
            model, {"params": params, **model_state}, x, dropout_key, train, counts
        )
        given = None if teacher_apply is None else jax.lax.stop_gradient(teacher_apply(teacher, x))
        if counts is not None:
            counts = fitted(counts, logits.shape[:-1], "the logits", examples=True)
            logits, given, targets = jax.tree.map(
                lambda x: kept(x, counts), (logits, given, targets)
            )
        loss = everything(
            total_of("loss", per_example(logits, given, targets, counts), counts, told=True)
        )
        hits = (logits.argmax(axis=-1) == targets).astype(jnp.float32)
        return ((1.0, loss),), (model_state, {"accuracy": total(hits, counts)})

    return PlainLoss(totals)


def _forward(
    model: nn.Module, variables: Variables, x: jax.Array, key: jax.Array, train: bool, mask: Any
) -> tuple[jax.Array, Any]:
    """Return logits and the model state after them, which is the one before in eval mode."""
    state = {name: collection for name, collection in variables.items() if name != "params"}
    if not train:
        return jnp.asarray(model.apply(variables, x, train=False)), state
    seen = {"counts": mask} if mask is not None and isinstance(model, QuantizedModel) else {}
    logits, updated = model.apply(
        variables, x, train=True, mutable=list(state), rngs={"dropout": key}, **seen
    )
    return logits, {**state, **updated}
