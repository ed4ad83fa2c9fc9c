"""Training: one pure step over one state, on one device or many, and the loop that records, saves and resumes."""

from compress_jax.train._checkpoint import Checkpoints
from compress_jax.train._distillation import distillation
from compress_jax.train._evaluate import accuracy, averages, logits
from compress_jax.train._generations import graduate, mutual_step
from compress_jax.train._interrupt import Interrupted, watch_signals
from compress_jax.train._ledger import Ledger, ledger
from compress_jax.train._loop import Feed, fit
from compress_jax.train._losses import distilled, supervised
from compress_jax.train._metrics import JsonLines, Recorder, TensorBoard
from compress_jax.train._parallel import (
    jit_step,
    place,
    pmap_step,
    replicate,
    shardings,
    unreplicate,
)
from compress_jax.train._progress import progress
from compress_jax.train._quantized import QuantizedModel, quantized
from compress_jax.train._state import TrainState, create, label_optimizer
from compress_jax.train._step import Loss, Metrics, StatefulLoss, Step, make_step

__all__ = [
    "Checkpoints",
    "Feed",
    "Interrupted",
    "JsonLines",
    "Ledger",
    "Loss",
    "Metrics",
    "QuantizedModel",
    "Recorder",
    "StatefulLoss",
    "Step",
    "TensorBoard",
    "TrainState",
    "accuracy",
    "averages",
    "create",
    "distillation",
    "distilled",
    "fit",
    "graduate",
    "jit_step",
    "label_optimizer",
    "ledger",
    "logits",
    "make_step",
    "mutual_step",
    "place",
    "pmap_step",
    "progress",
    "quantized",
    "replicate",
    "shardings",
    "supervised",
    "unreplicate",
    "watch_signals",
]


def __dir__() -> list[str]:
    """Show what may be called, and no module that holds it."""
    return sorted(__all__)
