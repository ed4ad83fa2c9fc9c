"""A task: what a batch is, what is given to the model, the loss, the metrics."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.core.types import Array, Batch, Leaf, PyTree
from compress_jax.distill import LossContext, Term, Total, kl, on_labels, on_logits
from compress_jax.distill._objective.totals import of_logits
from compress_jax.tasks._metrics import (
    Metric,
    accuracy,
    cosine,
    error_rate,
    f1,
    mean,
    mean_squared_error,
    perplexity,
    similarity,
)

REFERENCE = "reference outputs"
"""Entry of a batch with what the teacher said, for tasks without labels."""

LabelLoss = Callable[[Array, Array, Array | None], jax.Array]
"""``(outputs, labels, mask) -> [...]``, the loss of each example or token."""


class Task(NamedTuple):
    """What a batch is, what is given to the model, what is lost and what is measured.

    Change a ready one by ``task._replace(...)``, or build your own: all fields are values and pure
    functions.

    Attributes:
      name: short, for logs.
      inputs: the batch's entries that are given to the model, in this order.
      labels: the entry with labels; None if the labels are what the teacher says.
      on_labels: ``weight -> Term``, the loss on labels.
      on_teacher: ``(weight, temperature) -> Term``, the loss on the teacher's outputs.
      metrics: the first is the one that requirements speak of.
      agreement: how like other outputs some outputs are; labels are the other outputs.
      mask: the entry that says which examples or tokens count, where the batch has it.
      per_token: whether each position of an output counts by itself; False if an example does.
      logits: whether outputs are logits, the largest of which is the answer.
      prepare: ``batch -> batch``, before anything else is done with a batch, such as a shift of
        tokens by one.
      check_labels: ``(labels, classes) -> None``, raises an error if labels cannot be right.
      check_outputs: ``(outputs, labels, classes) -> None``, given shapes, raises an error if
        outputs do not fit labels.

    Example:
      >>> import compress_jax as cj
      >>> task = cj.tasks.classification(inputs="x", labels="y")
      >>> task.inputs, task.metric.name
      (('x',), 'accuracy')
    """

    name: str
    inputs: tuple[str, ...]
    labels: str | None
    on_labels: Callable[[float], Term]
    on_teacher: Callable[[float, float], Term]
    metrics: tuple[Metric, ...]
    agreement: Metric
    mask: str = "mask"
    per_token: bool = True
    logits: bool = True
    prepare: Callable[[Batch], Batch] = lambda batch: batch
    check_labels: Callable[[Array, int | None], None] = lambda labels, classes: None
    check_outputs: Callable[[PyTree, Leaf, int | None], None] = lambda out, labels, n: None

    @property
    def metric(self) -> Metric:
        """The metric that requirements speak of."""
        return self.metrics[0]

    @property
    def label_entry(self) -> str:
        """The entry with labels, or with what the teacher said."""
        return REFERENCE if self.labels is None else self.labels

    def inputs_of(self, batch: Batch) -> tuple[PyTree, ...]:
        """Return what the model is given of a batch."""
        return tuple(batch[name] for name in self.inputs)

    def distillation(self, alpha: float = 0.5, temperature: float = 1.0) -> tuple[Term, ...]:
        """Return the terms that learn from labels and teacher.

        Args:
          alpha: weight of the labels; the teacher has ``1 - alpha``.
          temperature: of the teacher's probabilities; no part of tasks without probabilities.

        Returns:
          Terms for `search.Experiment` or `train.distillation`; one where the other has no weight.
        """
        if not 0 <= alpha <= 1:
            raise ArgumentError(f"alpha is the share of the labels, from 0 to 1; got {alpha!r}")
        if self.labels is None or alpha == 0:
            return (self.on_teacher(1.0, temperature),)
        if alpha == 1:
            return (self.on_labels(1.0),)
        return self.on_labels(alpha), self.on_teacher(1 - alpha, temperature)


def labels_term(loss: LabelLoss) -> Callable[[float], Term]:
    """Return the ``on_labels`` of a task from its loss of each example or token.

    Args:
      loss: ``(outputs, labels, mask) -> [...]``; the mask is the batch's or None.

    Returns:
      ``weight -> Term``.

    Example:
      >>> import compress_jax as cj
      >>> absolute = cj.tasks.labels_term(lambda y, t, mask: jnp.abs(y - t).mean(-1))
      >>> cj.tasks.regression()._replace(on_labels=absolute).on_labels(0.5).weight
      0.5
    """

    def of_weight(weight: float = 1.0) -> Term:
        def term_loss(
            context: LossContext, adapter_params: PyTree, memory: PyTree
        ) -> tuple[jax.Array | Total, PyTree]:
            outputs = context.student_logits
            losses = loss(outputs, context.labels, context.mask)
            return of_logits("labels", losses, outputs, context.mask, False), memory

        return Term("labels", term_loss, weight)

    return of_weight


def teacher_term(loss: Callable[[Array, Array], jax.Array]) -> Callable[[float, float], Term]:
    """Return the ``on_teacher`` of a task whose outputs are no logits.

    Args:
      loss: ``(student_outputs, teacher_outputs) -> [...]``.

    Returns:
      ``(weight, temperature) -> Term``; outputs that are no logits have no temperature.

    Example:
      >>> import compress_jax as cj
      >>> cj.tasks.teacher_term(cj.distill.mse)(0.5, 1.0).name
      'teacher'
    """
    return lambda weight=1.0, temperature=1.0: on_logits(loss, weight, name="teacher")


def _on_logits(weight: float = 1.0, temperature: float = 1.0) -> Term:
    return on_logits(kl, weight, temperature=temperature)


def _names(inputs: str | tuple[str, ...]) -> tuple[str, ...]:
    return (inputs,) if isinstance(inputs, str) else tuple(inputs)


# Ready tasks.


def classification(
    inputs: str | tuple[str, ...] = "image",
    labels: str | None = "label",
    *,
    metrics: tuple[Metric, ...] = (accuracy(),),
    label_smoothing: float = 0.0,
) -> Task:
    """Return the task of one class for each example: images, texts, sounds.

    Cross entropy of logits ``[batch, classes]`` with integer labels ``[batch]``; the teacher is
    followed by the KL divergence.

    Args:
      inputs: the entry, or entries, given to the model: ``"image"``, ``("tokens", "mask")``.
      labels: the entry with labels; None for the teacher's choice, where agreement with it is the
        aim.
      metrics: the first is the one that requirements speak of.
      label_smoothing: see `compress_jax.distill.cross_entropy`.

    Returns:
      A `Task`.

    Example:
      >>> import compress_jax as cj
      >>> metrics = (cj.tasks.f1(positive=1), cj.tasks.accuracy())
      >>> spam = cj.tasks.classification(("tokens", "attention"), metrics=metrics)
      >>> spam.metric.name
      'F1'
    """

    def of_weight(weight: float = 1.0) -> Term:
        return on_labels(weight, label_smoothing=label_smoothing)

    if not metrics:
        raise ArgumentError("a task needs a metric, such as tasks.accuracy()")
    if labels is None:
        metrics = (_as_classes(metrics[0]), *map(_as_classes, metrics[1:]))
    return Task(
        "classification",
        _names(inputs),
        labels,
        of_weight,
        _on_logits,
        metrics,
        _same_class(),
        check_labels=lambda y, classes: None if labels is None else _classes(y, classes, 1),
        check_outputs=_fewer_logits if labels is not None else _any_logits,
    )


def token_classification(
    inputs: str | tuple[str, ...] = ("tokens", "mask"),
    labels: str = "label",
    *,
    mask: str = "mask",
    metrics: tuple[Metric, ...] = (accuracy(), f1()),
) -> Task:
    """Return the task of one class for each token: parts of speech, names.

    Args:
      inputs: the entries given to the model.
      labels: the entry with integer labels ``[batch, sequence]``.
      mask: the entry that is true for tokens and false for padding.
      metrics: the first is the one that requirements speak of.

    Returns:
      A `Task` of logits ``[batch, sequence, classes]``.

    Example:
      >>> import compress_jax as cj
      >>> [metric.name for metric in cj.tasks.token_classification().metrics]
      ['accuracy', 'F1']
    """
    task = classification(inputs, labels, metrics=metrics)
    return task._replace(
        name="token classification", mask=mask, check_labels=lambda y, n: _classes(y, n, 2)
    )


def language_modelling(tokens: str = "tokens", *, mask: str = "mask") -> Task:
    """Return the task of the next token: the model sees all tokens but the last of a sequence.

    Args:
      tokens: the entry with integers ``[batch, length + 1]``.
      mask: the entry ``[batch, length + 1]``, false for padding, if there is one.

    Returns:
      A `Task` of logits ``[batch, length, vocabulary]``, measured by perplexity.

    Example:
      >>> import compress_jax as cj
      >>> task = cj.tasks.language_modelling()
      >>> batch = task.prepare({"tokens": jnp.array([[5, 6, 7]])})
      >>> task.inputs_of(batch)[0].tolist(), batch[task.labels].tolist()
      ([[5, 6]], [[6, 7]])
    """

    def prepare(batch: Batch) -> Batch:
        ids = batch[tokens]  # [batch, length + 1]
        shifted = {**batch, "seen": ids[:, :-1], "next": ids[:, 1:]}
        if mask in batch:
            shifted[mask] = batch[mask][:, 1:]  # a prediction counts if the token it predicts does
        return shifted

    task = classification("seen", "next", metrics=(perplexity(), accuracy()))
    return task._replace(
        name="language modelling",
        mask=mask,
        prepare=prepare,
        check_labels=lambda y, n: _classes(y, n, 2),
    )


def regression(inputs: str | tuple[str, ...] = "x", labels: str = "y") -> Task:
    """Return the task of numbers: mean squared error of outputs ``[batch, ...]``.

    The teacher is followed by the mean squared error too.

    Args:
      inputs: the entry, or entries, given to the model.
      labels: the entry with floating-point labels, of the shape of the outputs.

    Returns:
      A `Task`.

    Example:
      >>> import compress_jax as cj
      >>> cj.tasks.regression().metric.name
      'mean squared error'
    """

    def squares(outputs: Array, labels: Array, mask: Array | None = None) -> jax.Array:
        difference = jnp.square(outputs - labels)
        return difference.reshape(len(difference), -1).mean(-1)  # [batch]

    def agreement(outputs: Array, others: Array) -> jax.Array:
        return jnp.sqrt(squares(outputs, others))

    return Task(
        "regression",
        _names(inputs),
        labels,
        labels_term(squares),
        teacher_term(squares),
        (mean_squared_error(),),
        mean("distance", agreement, higher_is_better=False),
        per_token=False,
        logits=False,
        check_labels=_floats,
        check_outputs=_same_shape,
    )


def embedding(inputs: str | tuple[str, ...] = "x", labels: str | None = None) -> Task:
    """Return the task of directions: the cosine to the teacher's embedding, or to a given one.

    Args:
      inputs: the entry, or entries, given to the model.
      labels: the entry with embeddings ``[batch, width]``; None for the teacher's.

    Returns:
      A `Task` of outputs ``[batch, width]``.

    Example:
      >>> import compress_jax as cj
      >>> task = cj.tasks.embedding("tokens")
      >>> task.metric.name, task.label_entry
      ('cosine', 'reference outputs')
    """

    def distance(outputs: Array, labels: Array, mask: Array | None = None) -> jax.Array:
        return 1 - similarity(outputs, labels)

    return Task(
        "embedding",
        _names(inputs),
        labels,
        labels_term(distance),
        teacher_term(distance),
        (cosine(),),
        cosine(),
        per_token=False,
        logits=False,
        check_labels=_floats if labels is not None else lambda labels, classes: None,
        check_outputs=_same_shape,
    )


def transcription(
    inputs: str | tuple[str, ...] = "sound",
    labels: str = "label",
    *,
    blank: int = 0,
    mask: str = "mask",
    unit: Literal["label", "word", "character"] = "label",
) -> Task:
    """Return the task of a sequence of labels for a longer sequence of frames, by CTC.

    Args:
      inputs: the entry, or entries, given to the model.
      labels: the entry with integers ``[batch, labels]``, filled up with ``blank``.
      blank: the class of frames without a label, and the padding of labels.
      mask: the entry ``[batch, frames]``, false for padding of the outputs, if there is one.
      unit: what a label is, for the name of the error rate.

    Returns:
      A `Task` of logits ``[batch, frames, classes]``, measured by the label error rate. The teacher
      is followed frame by frame, by the KL divergence.

    Example:
      >>> import compress_jax as cj
      >>> cj.tasks.transcription(unit="word").metric.name
      'word error rate'

    References:
      Graves et al., "Connectionist Temporal Classification", ICML 2006.
    """

    def loss(logits: Array, labels: Array, frames: Array | None) -> jax.Array:
        # optax wants paddings, 1 for what does not count; a mask of examples fits all their frames.
        shown = jnp.ones(logits.shape[:2]) if frames is None else jnp.asarray(frames, jnp.float32)
        absent = 1 - shown.reshape(*shown.shape, *(1,) * (2 - shown.ndim))
        absent = jnp.broadcast_to(absent, logits.shape[:2])  # [batch, frames]
        padding = (labels == blank).astype(jnp.float32)  # [batch, labels]
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 and floats
            return optax.ctc_loss(logits, absent, labels, padding, blank_id=blank)

    rate = error_rate(blank, blank, f"{unit} error rate")
    return Task(
        "transcription",
        _names(inputs),
        labels,
        labels_term(loss),
        _on_logits,
        (rate,),
        _same_class(),
        mask=mask,
        check_labels=lambda y, n: _classes(y, n, 2),
        check_outputs=_fewer_logits,
    )


# What labels and outputs must be.


def _same_class() -> Metric:
    return mean("agreement", lambda y, other: y.argmax(-1) == other.argmax(-1), percent=True)


def _as_classes(metric: Metric) -> Metric:
    """Return a metric of labels for labels that are the teacher's logits."""
    return metric._replace(sums=lambda y, other, n: metric.sums(y, other.argmax(-1), n))


def _classes(labels: Array, classes: int | None, ndim: int) -> None:
    shapes = {1: "one an example, [examples]", 2: "one a token, [examples, sequence]"}
    if labels.ndim != ndim or not np.issubdtype(labels.dtype, np.integer):
        raise ShapeError(
            f"labels are {labels.dtype}{list(labels.shape)}; they must be integers, {shapes[ndim]}"
        )
    low = int(labels.min())
    high = int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        limit = f"there are {classes} classes, so they" if classes is not None else "they"
        end = f"0 to {classes - 1}" if classes is not None else "0 or more"
        raise ArgumentError(f"labels are {low} to {high}, but {limit} must be {end}")


def _floats(labels: Array, classes: int | None) -> None:
    if not np.issubdtype(labels.dtype, np.floating):
        raise ShapeError(f"labels are {labels.dtype}{list(labels.shape)}; they must be floats")


def _any_logits(outputs: PyTree, labels: Leaf, classes: int | None) -> None:
    if getattr(outputs, "ndim", 0) < 2:
        raise ShapeError(f"the model must give logits [batch, classes]; it gives {_shape(outputs)}")


def _fewer_logits(outputs: PyTree, labels: Leaf, classes: int | None) -> None:
    """Raise unless there is a vector of at least as many logits as classes for each label."""
    leading = list(labels.shape)
    shape = list(getattr(outputs, "shape", ()))
    fits = len(shape) > 1 and shape[0] == leading[0] and shape[-1] >= (classes or 1)
    # Transcription has more frames than labels; everything else has as many.
    if fits and (shape[:-1] == leading or len(shape) == len(leading) + 1 > 2):
        return
    needed = f"{[*leading, classes or 'classes']}".replace("'", "")
    reason = f", as the data have {classes} classes" if classes else ""
    raise ShapeError(
        f"the model must give logits {needed} or more for {leading[0]} examples{reason}; it gives "
        f"{_shape(outputs)}"
    )


def _same_shape(outputs: PyTree, labels: Leaf, classes: int | None) -> None:
    if labels is not None and getattr(outputs, "shape", None) != labels.shape:
        raise ShapeError(
            f"the model must give {list(labels.shape)}, as labels are; it gives {_shape(outputs)}"
        )


def _shape(outputs: PyTree) -> str:
    if not hasattr(outputs, "shape"):
        return f"a {type(outputs).__name__}"
    return f"{outputs.dtype}{list(outputs.shape)}"
