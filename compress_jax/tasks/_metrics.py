"""Metrics: sums over batches that are divided last, so that every example counts once."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ArgumentError
from compress_jax.core.types import Array


class Metric(NamedTuple):
    """A number that says how good the outputs of a model are.

    Attributes:
      name: as it is called in tables.
      sums: ``(outputs, labels, counts) -> array`` of one batch, which is added up over batches;
        counts are weights >= 0 of the shape of the labels' leading axes, 0 for what does not count.
      value: ``sums -> number``, given the float64 sums of a whole split.
      higher_is_better: False for errors.
      percent: whether it is a share, from 0 to 1, shown in percent.
      on_host: True if ``sums`` is NumPy code that cannot be traced.

    Example:
      >>> import compress_jax as cj
      >>> largest = cj.tasks.Metric("largest", lambda y, t, counts: jnp.max(y)[None], float)
      >>> largest.text(2.5), cj.tasks.accuracy().text(0.975)
      ('2.5', '97.50 %')
    """

    name: str
    sums: Callable[[Array, Array, Array], Array]
    value: Callable[[np.ndarray], float]
    higher_is_better: bool = True
    percent: bool = False
    on_host: bool = False

    def text(self, value: float | None) -> str:
        """Return a value as it is shown, ``-`` for None."""
        return number_text(value, self.percent)

    def loss(self, value: float, reference: float) -> float:
        """Return by how much a value is worse than a reference; below 0 if it is better."""
        return reference - value if self.higher_is_better else value - reference


def number_text(value: float | None, percent: bool) -> str:
    """Return a metric's value as text: in percent, or with four digits that count.

    Example:
      >>> number_text(0.5, True), number_text(21.3456, False), number_text(None, True)
      ('50.00 %', '21.35', '-')
    """
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if percent else f"{value:.4g}"


def _ratio(sums: np.ndarray) -> float:
    """Return sum over count; 0 where nothing counted."""
    return float(sums[0] / sums[1]) if sums[1] else 0.0


def _mean_of(
    score: Callable[[Array, Array], jax.Array],
) -> Callable[[Array, Array, Array], jax.Array]:
    """Return the sums ``[score, number]`` of a score of each entry."""

    def sums(outputs: Array, labels: Array, counts: Array) -> jax.Array:
        entries = score(outputs, labels).astype(jnp.float32)
        # NaN in padding times 0 would be NaN.
        counted = jnp.where(counts > 0, entries * counts, 0)
        return jnp.stack([counted.sum(), jnp.sum(counts, dtype=jnp.float32)])  # [2]

    return sums


def mean(
    name: str,
    score: Callable[[Array, Array], jax.Array],
    *,
    higher_is_better: bool = True,
    percent: bool = False,
) -> Metric:
    """Return the mean of a score of each example or token as a metric.

    Args:
      name: of the metric.
      score: ``(outputs, labels) -> [...]``, one number an example or token.
      higher_is_better: False for errors.
      percent: whether it is shown in percent.

    Returns:
      A `Metric`.

    Example:
      >>> import compress_jax as cj
      >>> off_by = cj.tasks.mean("off by", lambda y, t: abs(y - t), higher_is_better=False)
      >>> off_by.value(off_by.sums(jnp.array([1.0, 4.0]), jnp.array([1.0, 2.0]), jnp.ones(2)))
      1.0
    """
    return Metric(name, _mean_of(score), _ratio, higher_is_better, percent)


def accuracy(top: int = 1) -> Metric:
    """Return the share of examples, or tokens, whose label is among the ``top`` largest logits.

    Args:
      top: 1 compares the largest logit alone.

    Returns:
      A `Metric` of logits ``[..., classes]`` and integer labels ``[...]``.

    Example:
      >>> metric = accuracy()
      >>> metric.value(metric.sums(jnp.eye(3), jnp.array([0, 1, 0]), jnp.array([1, 1, 0])))
      1.0
    """

    def hit(logits: Array, labels: Array) -> jax.Array:
        if top == 1:
            return logits.argmax(-1) == labels
        if logits.shape[-1] <= top:
            raise ArgumentError(
                f"top-{top} accuracy is 1 for {logits.shape[-1]} classes; choose a smaller number"
            )
        return (jax.lax.top_k(logits, top)[1] == labels[..., None]).any(-1)

    return mean("accuracy" if top == 1 else f"top-{top} accuracy", hit, percent=True)


def f1(positive: int | None = None) -> Metric:
    r"""Return the F1 score: :math:`2 tp / (2 tp + fp + fn)`.

    Args:
      positive: the class that is looked for; None for the mean over all classes that occur in
        labels or predictions (macro F1).

    Returns:
      A `Metric` of logits ``[..., classes]`` and integer labels ``[...]``.

    Example:
      >>> metric = f1(positive=1)
      >>> logits = jax.nn.one_hot(jnp.array([1, 1, 0, 0]), 2)
      >>> metric.value(metric.sums(logits, jnp.array([1, 0, 1, 0]), jnp.ones(4)))
      0.5
    """

    def sums(logits: Array, labels: Array, counts: Array) -> jax.Array:
        classes = logits.shape[-1]
        weight = (counts > 0).astype(jnp.float32).ravel()  # [entries]
        predicted = jax.nn.one_hot(logits.argmax(-1).ravel(), classes) * weight[:, None]
        true = jax.nn.one_hot(labels.ravel(), classes) * weight[:, None]
        both = (predicted * true).sum(0)
        return jnp.stack([both, predicted.sum(0), true.sum(0)])  # [3, classes]

    def value(sums: np.ndarray) -> float:
        hits, predicted, true = sums
        total = predicted + true  # 2 tp + fp + fn
        scores = 2 * hits / np.where(total > 0, total, 1)
        return float(scores[total > 0].mean() if positive is None else scores[positive])

    return Metric("F1", sums, value, percent=True)


def perplexity() -> Metric:
    r"""Return :math:`\exp` of the mean cross entropy of the labels, in nats.

    Returns:
      A `Metric` of logits ``[..., classes]`` and integer labels ``[...]``; lower is better.

    Example:
      >>> metric = perplexity()
      >>> round(metric.value(metric.sums(jnp.zeros((1, 4)), jnp.array([2]), jnp.ones(1))), 4)
      4.0
    """

    def score(logits: Array, labels: Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))  # [..., classes]
        return -jnp.take_along_axis(log_probs, labels[..., None], -1)[..., 0]

    return Metric("perplexity", _mean_of(score), lambda s: float(np.exp(_ratio(s))), False)


def mean_squared_error() -> Metric:
    """Return the mean square of ``outputs - labels`` over examples and their entries.

    Returns:
      A `Metric`; lower is better.

    Example:
      >>> metric = mean_squared_error()
      >>> metric.value(metric.sums(jnp.array([[1.0, 3.0]]), jnp.array([[1.0, 1.0]]), jnp.ones(1)))
      2.0
    """

    def score(outputs: Array, labels: Array) -> jax.Array:
        squares = jnp.square(outputs - labels)
        return squares.reshape(len(squares), -1).mean(-1)

    return mean("mean squared error", score, higher_is_better=False)


def cosine() -> Metric:
    """Return the mean cosine between outputs and labels, as directions along the last axis.

    Returns:
      A `Metric`.

    Example:
      >>> metric = cosine()
      >>> metric.value(metric.sums(jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 0.0]]), jnp.ones(1)))
      1.0
    """
    return mean("cosine", similarity)


def similarity(x: Array, y: Array) -> jax.Array:
    """Return the cosine between arrays along their last axis; 0 where one of them is zero."""
    lengths = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return (x * y).sum(-1) / jnp.where(lengths > 0, lengths, 1)


def error_rate(blank: int = 0, padding: int = 0, name: str = "label error rate") -> Metric:
    """Return edits over labels: how far decoded sequences are from the right ones.

    A sequence is decoded greedily, as connectionist temporal classification has it: the largest
    logit of each frame, repeats merged, blanks dropped. The edit distance to the labels is summed
    over sequences and divided by the number of labels, so it may exceed 1.

    Args:
      blank: the class that stands for no label.
      padding: fills up labels; they are ``[batch, labels]``.
      name: "word error rate" where a label is a word.

    Returns:
      A `Metric` of logits ``[batch, frames, classes]``; lower is better.

    Example:
      >>> logits = jax.nn.one_hot(jnp.array([[1, 1, 0, 2, 0]]), 3)
      >>> metric = error_rate()
      >>> metric.value(metric.sums(logits, np.array([[1, 2, 2]]), np.ones(1)))
      0.3333333333333333
    """

    def sums(logits: Array, labels: Array, counts: Array) -> np.ndarray:
        found = np.zeros(2)
        rows = np.asarray(counts).reshape(len(counts), -1)
        for frames, wanted, row in zip(np.asarray(logits), np.asarray(labels), rows, strict=True):
            if not row.any():
                continue
            right = wanted[wanted != padding]
            # Counts are one a sequence, or one a frame with 0 for padding of the outputs.
            best = frames[row > 0] if row.size == len(frames) else frames
            found += edit_distance(collapsed(best.argmax(-1), blank), right), len(right)
        return found

    return Metric(name, sums, _ratio, False, percent=True, on_host=True)


def collapsed(classes: np.ndarray, blank: int = 0) -> np.ndarray:
    """Return a path of classes without repeats and blanks.

    Example:
      >>> collapsed(np.array([1, 1, 0, 1, 2, 2])).tolist()
      [1, 1, 2]
    """
    changes = np.r_[True, classes[1:] != classes[:-1]]
    return classes[changes & (classes != blank)]


def edit_distance(a: np.ndarray, b: np.ndarray) -> int:
    """Return the least number of insertions, deletions and changes from one sequence to another.

    Example:
      >>> edit_distance(np.array([1, 2, 3]), np.array([1, 3, 3, 4]))
      2
    """
    # Wagner and Fischer: row[j] edits turn the first i entries of a into the first j of b.
    row = np.arange(len(b) + 1)
    for i, each in enumerate(a, 1):
        # Change or keep, or delete; insertions then run from left to right.
        best = np.minimum(row[:-1] + (b != each), row[1:] + 1)
        # row[j] = min over k <= j of best[k] + (j - k), as a running minimum.
        row = np.r_[i, best]
        row = np.minimum.accumulate(row - np.arange(len(row))) + np.arange(len(row))
    return int(row[-1])
