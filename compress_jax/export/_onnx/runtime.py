"""ONNX Runtime: run, optimize and evaluate a model."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from compress_jax.core.errors import ExportError
from compress_jax.core.types import Model
from compress_jax.export._extras import extra


class Named(Protocol):
    """A tensor, an input, a result or an attribute of a model."""

    name: str


class Session(Protocol):
    """An ``InferenceSession`` of ONNX Runtime."""

    def get_inputs(self) -> Sequence[Named]:
        """Return the inputs that the model takes."""
        ...

    def run(self, names: Sequence[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return some results by name, or all, for inputs by name."""
        ...


def session(model: Model, level: str = "ALL", threads: int = 0, save: str = "") -> Session:
    """Return a session of a model.

    Args:
      model: a ``ModelProto``, or the path of a file.
      level: of graph optimization: ``"DISABLE_ALL"``, ``"BASIC"``, ``"EXTENDED"`` or ``"ALL"``.
      threads: how many; 0 is one for each core.
      save: file to write the optimized graph to, if any.

    Returns:
      The session.

    Raises:
      ExportError: if the runtime refuses the model.
    """
    runtime = extra("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # fatal errors only
    options.intra_op_num_threads = threads
    levels = runtime.GraphOptimizationLevel
    # The runtime's names are ORT_DISABLE_ALL, ORT_ENABLE_BASIC and so on.
    name = level if level.startswith("DISABLE") else f"ENABLE_{level}"
    options.graph_optimization_level = getattr(levels, f"ORT_{name}")
    if save:
        options.optimized_model_filepath = save
    source = str(model) if isinstance(model, (str, Path)) else model.SerializeToString()
    try:
        return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exceptions have no common base
        raise ExportError(f"ONNX Runtime refuses the exported model: {error}") from error


def optimized(model: Model, level: str) -> Model:
    """Return the graph that the runtime optimizes a model to.

    At ``"BASIC"`` it has standard operators only.
    """
    # The runtime hands its optimized graph out only as a file.
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "optimized.onnx")
        session(model, level, save=file)
        return extra("onnx", "onnx").load(file)


def run(model: Model, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return all results of a model for an example.

    Args:
      model: a ``ModelProto``.
      inputs: in the order of the function's; those that it does not use may be missing from the
        model.

    Returns:
      The results.

    Raises:
      ExportError: if the runtime refuses the model or fails while it runs.
    """
    made = session(model)
    every = ["x"] if len(inputs) == 1 else [f"x{i}" for i in range(len(inputs))]
    taken = {each.name for each in made.get_inputs()}
    feed = {name: x for name, x in zip(every, inputs, strict=True) if name in taken}
    return _run(made, None, feed)


def _run(
    made: Session, names: Sequence[str] | None, feed: dict[str, np.ndarray]
) -> list[np.ndarray]:
    try:
        return made.run(names, feed)
    except Exception as error:  # the runtime's own exceptions have no common base
        raise ExportError(f"ONNX Runtime cannot run the exported model: {error}") from error


def evaluate(
    model: Model, names: Sequence[str], inputs: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the values of any tensors of a model for some inputs."""
    # An inner tensor is read as one more result of a copy; without optimization, which would fuse
    # it away.
    onnx = extra("onnx", "onnx")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    there = {out.name for out in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    made = session(copy, "DISABLE_ALL")
    feed = {each.name: x for each, x in zip(made.get_inputs(), inputs, strict=True)}
    # An input of the model is no result that the runtime returns.
    wanted = [name for name in names if name not in feed]
    found = dict(zip(wanted, _run(made, wanted, feed), strict=True)) if wanted else {}
    return {name: found[name] if name in found else feed[name] for name in names}


def extremes(
    model: Model, names: Sequence[str], batches: Iterable[Sequence[np.ndarray]]
) -> dict[str, tuple[np.float32, np.float32]]:
    """Return the smallest and the largest entry of tensors over batches."""
    ranges: dict[str, tuple[np.float32, np.float32]] = {}
    for inputs in batches:
        for name, x in evaluate(model, names, inputs).items():
            low, high = ranges.get(name, (x.min(), x.max()))
            ranges[name] = (min(low, x.min()), max(high, x.max()))
    return ranges
