"""What a compressed network costs when it runs: work, parameters, memory, measured time."""

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import CompressError
from compress_jax.core.packed import nbytes, to_dense, unpack
from compress_jax.core.paths import flatten
from compress_jax.core.types import Leaf, PyTree, Variables
from compress_jax.search._experiment import Experiment
from compress_jax.search._requirement import Requirement
from compress_jax.tasks import PureModel
from compress_jax.trace import cost

ROUNDS = 20
SUFFIX = {"onnx": ".onnx", "litert": ".tflite"}


def costs(
    experiment: Experiment, model: PureModel, packed: PyTree, folder: Path
) -> dict[str, float]:
    """Return what a network costs, by name: of one example, or of a call where it is timed.

    Args:
      experiment: for the shapes of inputs, and what is required: time and memory are measured only
        where a requirement speaks of them.
      model: the network as pure functions.
      packed: its variables, as they are stored.
      folder: where a file of another runtime is written.

    Returns:
      ``macs``, ``bitops`` and ``parameters``; ``latency_ms`` and ``memory`` if they are required.
    """
    requirement = experiment.requirement
    total = cost(model.apply, packed, *experiment.example)
    leaves = flatten(packed)[0] if isinstance(packed, dict) else {}
    found: dict[str, float] = {
        "macs": total.macs,
        "bitops": round(total.bit_operations),
        "parameters": sum(_nonzero(x) for path, x in leaves.items() if _is_param(path)),
    }
    if requirement.remembered:
        found["memory"] = _memory(experiment, model, packed, requirement.batch)
    if requirement.timed:
        found["latency_ms"] = 1e3 * _seconds(experiment, model, packed, folder, requirement)
    return found


def _is_param(path: str) -> bool:
    return path.startswith("params/")


def _nonzero(leaf: Leaf) -> int:
    return int(np.count_nonzero(np.asarray(to_dense(leaf))))


def _example(experiment: Experiment, batch: int) -> list[np.ndarray]:
    """Return the inputs of a call: the first examples of train, again and again."""
    task = experiment.task
    rows = {name: np.asarray(x[:batch]) for name, x in experiment.data.train.items()}
    inputs = task.inputs_of(task.prepare(rows))
    return [np.resize(np.asarray(x), (batch, *np.shape(x)[1:])) for x in inputs]


def _memory(experiment: Experiment, model: PureModel, packed: PyTree, batch: int) -> int:
    """Return the bytes of stored variables and of XLA's program that uses them."""

    def call(packed: PyTree, *inputs: jax.Array) -> PyTree:
        return model.apply(unpack(packed), *inputs)

    inputs = [jnp.asarray(x) for x in _example(experiment, batch)]
    compiled = jax.jit(call).lower(packed, *inputs).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        raise CompressError("this device does not tell how much memory a program needs")
    stored = sum(nbytes(x) for x in flatten(packed)[0].values())
    given = sum(x.nbytes for x in inputs)
    return stored + given + memory.temp_size_in_bytes + memory.output_size_in_bytes


def _seconds(
    experiment: Experiment,
    model: PureModel,
    packed: PyTree,
    folder: Path,
    requirement: Requirement,
) -> float:
    """Return the median time of a call."""
    inputs = _example(experiment, requirement.batch)
    if requirement.runtime == "xla":
        run = jax.jit(functools.partial(_unpacked, model))
        arrays = [jnp.asarray(x) for x in inputs]
        return statistics.median(_times(lambda: run(packed, *arrays)))
    # Imported here: converters are extras.
    from compress_jax.export import to_litert, to_onnx
    from compress_jax.export._verify.verify import runner

    file = folder / f"timed{SUFFIX[requirement.runtime]}"
    example = inputs[0] if len(inputs) == 1 else tuple(inputs)

    def fn(variables: Variables, *x: PyTree) -> PyTree:
        return model.apply(variables, *x)

    if requirement.runtime == "onnx":
        # Of exactly this size, as networks that were made smaller know no other way.
        to_onnx(fn, packed, example, file, batch="example")
    else:
        to_litert(fn, packed, example, file)
    call = runner(file)
    return statistics.median(_times(lambda: call(*inputs)))


def _unpacked(model: PureModel, packed: PyTree, *inputs: jax.Array) -> PyTree:
    return model.apply(unpack(packed), *inputs)


def _times(call: Callable[[], PyTree]) -> list[float]:
    """Return the seconds of calls, the first of which is not counted."""
    seconds = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return seconds[1:]
