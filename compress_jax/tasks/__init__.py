"""Tasks: what a batch is, how a model is called, what is lost and what is measured."""

from compress_jax.tasks._measure import Measured, measure, outputs, scored
from compress_jax.tasks._metrics import (
    Metric,
    accuracy,
    cosine,
    error_rate,
    f1,
    mean,
    mean_squared_error,
    perplexity,
)
from compress_jax.tasks._model import PureModel, pure
from compress_jax.tasks._task import (
    Task,
    classification,
    embedding,
    labels_term,
    language_modelling,
    regression,
    teacher_term,
    token_classification,
    transcription,
)

__all__ = [
    "Measured",
    "Metric",
    "PureModel",
    "Task",
    "accuracy",
    "classification",
    "cosine",
    "embedding",
    "error_rate",
    "f1",
    "labels_term",
    "language_modelling",
    "mean",
    "mean_squared_error",
    "measure",
    "outputs",
    "perplexity",
    "pure",
    "regression",
    "scored",
    "teacher_term",
    "token_classification",
    "transcription",
]


def __dir__() -> list[str]:
    """List the public names only, not the modules that define them."""
    return sorted(__all__)
