"""Training: one pure step, on one device or many, and the loop that records, saves and resumes."""

from compress_jax.core.deprecated import renamed
from compress_jax.train import evaluate
from compress_jax.train._average import average_of, averaged
from compress_jax.train._best import Best
from compress_jax.train._checkpoint import Checkpoints
from compress_jax.train._chips import peak_flops
from compress_jax.train._distillation import distillation, distilled, supervised
from compress_jax.train._evaluate import accuracy, averages, logits
from compress_jax.train._flops import StepFlops, step_flops
from compress_jax.train._generations import as_teacher, mutual_step
from compress_jax.train._interrupt import Interrupted, watch_signals
from compress_jax.train._ledger import Ledger, ledger
from compress_jax.train._loop import Feed, fit
from compress_jax.train._metrics import JsonLines, Recorder, TensorBoard
from compress_jax.train._parallel import (
    MeshStep,
    jit_step,
    make_mesh,
    place,
    pmap_step,
    replicate,
    shardings,
    unreplicate,
)
from compress_jax.train._progress import progress
from compress_jax.train._quantized import QuantizedModel, quantized
from compress_jax.train._speed import profiling
from compress_jax.train._state import TrainState, create, label_optimizer
from compress_jax.train._step import Loss, Metrics, StatefulLoss, Step, make_step

__all__ = [
    "Best",
    "Checkpoints",
    "Feed",
    "Interrupted",
    "JsonLines",
    "Ledger",
    "Loss",
    "MeshStep",
    "Metrics",
    "QuantizedModel",
    "Recorder",
    "StatefulLoss",
    "Step",
    "StepFlops",
    "TensorBoard",
    "TrainState",
    "accuracy",
    "as_teacher",
    "average_of",
    "averaged",
    "averages",
    "create",
    "distillation",
    "distilled",
    "evaluate",
    "fit",
    "jit_step",
    "label_optimizer",
    "ledger",
    "logits",
    "make_mesh",
    "make_step",
    "mutual_step",
    "peak_flops",
    "place",
    "pmap_step",
    "profiling",
    "progress",
    "quantized",
    "replicate",
    "shardings",
    "step_flops",
    "supervised",
    "unreplicate",
    "watch_signals",
]

__getattr__ = renamed({"graduate": "as_teacher"}, __name__)


def __dir__() -> list[str]:
    """List the public names only, not the modules that define them."""
    return sorted(__all__)
