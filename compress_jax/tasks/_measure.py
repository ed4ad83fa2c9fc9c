"""Measure a model on a split: every metric of the task, in one pass."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.core.types import Array, Batch, ModelFn, PyTree, Variables
from compress_jax.data import Column, eval_batches
from compress_jax.distill._masks import fitted
from compress_jax.tasks._task import Task

OWN = "of the split"  # the split's own mask; "mask" is that of the rows that pad the last batch
ENTRIES = 2**26  # of the outputs of one batch, at most: 256 MB
BATCH = 500


T = TypeVar("T")


class Measured(NamedTuple):
    """What was measured of a model on a split.

    Attributes:
      values: each metric's value by name.
      digest: a number that differs if any bit of any output does (but for one chance in 2^32).

    Example:
      >>> import compress_jax as cj
      >>> cj.tasks.Measured({"accuracy": 0.5}, 0).values["accuracy"]
      0.5
    """

    values: dict[str, float]
    digest: int


def measure(
    task: Task,
    apply: ModelFn,
    variables: Variables,
    split: Mapping[str, Array],
    *,
    batch_size: int | None = None,
    sharding: NamedSharding | None = None,
) -> Measured:
    """Return the metrics of a model on a split.

    Args:
      task: names inputs, labels, mask and metrics.
      apply: ``(variables, *inputs) -> outputs`` in eval mode, such as ``pure(model).apply``.
        Compiled once a function: pass the same one again rather than a new lambda.
      variables: of apply.
      split: arrays by name, all of the same leading length.
      batch_size: examples at once; by default 500, fewer where outputs are large.
      sharding: where batches live, their rows divided over devices, if the variables are over a
        mesh; ``batch_size`` is rounded up to a multiple of its devices.

    Returns:
      The values and a digest of all outputs.

    Raises:
      ArgumentError: if the split is empty, lacks an entry, or its arrays differ in length.
      ShapeError: if the mask does not fit the labels.

    Example:
      >>> import compress_jax as cj
      >>> split = {"x": np.eye(3, dtype=np.float32), "y": np.array([0, 1, 0])}
      >>> task = cj.tasks.classification("x", "y")
      >>> round(cj.tasks.measure(task, lambda w, x: x * w, 1.0, split).values["accuracy"], 4)
      0.6667
    """
    require_entries(task, split)
    size = batch_size or examples_at_once(task, apply, variables, split)
    sums: list[Array | float] = [0.0] * len(task.metrics)
    digest = 0
    for i, batch in enumerate(_batches(split, size, sharding)):
        out, labels, counts, found, bits = _run(task, apply, sharding, variables, batch)
        # An odd factor a batch: batches that trade places change the sum.
        digest = (digest + (2 * i + 1) * int(bits)) % 2**32
        for k, metric in enumerate(task.metrics):
            own = found[k]
            if metric.on_host:
                own = metric.sums(np.asarray(out), np.asarray(labels), np.asarray(counts))
            # float64: float32 sums of many batches would lose single examples.
            sums[k] = sums[k] + np.asarray(own, np.float64)
    return Measured(_values(task, sums), digest)


def outputs(
    task: Task,
    apply: ModelFn,
    variables: Variables,
    split: Mapping[str, Array],
    *,
    batch_size: int = BATCH,
    sharding: NamedSharding | None = None,
) -> np.ndarray:
    """Return a model's outputs on a whole split.

    Args:
      task: names the inputs.
      apply: see `measure`.
      variables: of apply.
      split: arrays by name.
      batch_size: examples at once.
      sharding: see `measure`.

    Returns:
      float32 ``[n, ...]``.

    Example:
      >>> import compress_jax as cj
      >>> task, split = cj.tasks.regression(), {"x": np.ones((5, 2), np.float32)}
      >>> cj.tasks.outputs(task, lambda w, x: x @ w, jnp.ones((2, 3)), split).shape
      (5, 3)
    """
    rows = []
    for batch in _batches(split, batch_size, sharding):
        own = {name: each for name, each in batch.items() if name != "mask"}
        out, mask = _outputs(task, apply, sharding, variables, own, batch["mask"])
        rows.append(np.asarray(out)[np.asarray(mask)])
    return np.concatenate(rows)


def scored(task: Task, out: Array, split: Mapping[str, Array]) -> dict[str, float]:
    """Return the metrics of outputs that are there already, such as those of another runtime.

    Args:
      task: names labels, mask and metrics.
      out: ``[n, ...]``, the outputs for all examples of the split.
      split: arrays by name.

    Returns:
      Each metric's value by name.

    Example:
      >>> import compress_jax as cj
      >>> task = cj.tasks.classification("x", "y")
      >>> scored(task, np.eye(2), {"x": np.ones((2, 1)), "y": np.array([0, 0])})
      {'accuracy': 0.5}
    """
    sums: list[Array | float] = [0.0] * len(task.metrics)
    rows = {**split, "given": np.asarray(out, np.float32)}
    for batch in _batches(rows, BATCH):
        own = _own(task, batch)
        given = jnp.asarray(own["given"])
        counts = _counts(task, own, given, batch["mask"])
        for k, metric in enumerate(task.metrics):
            values = (given, jnp.asarray(own[task.label_entry]), counts)
            found = metric.sums(*map(np.asarray, values) if metric.on_host else values)
            sums[k] = sums[k] + np.asarray(found, np.float64)
    return _values(task, sums)


def _values(task: Task, sums: list[Array | float]) -> dict[str, float]:
    """Return each metric's value from its sums over a whole split."""
    return {m.name: m.value(np.asarray(s)) for m, s in zip(task.metrics, sums, strict=True)}


def require_entries(task: Task, split: Mapping[str, Array]) -> None:
    """Raise an ArgumentError unless a split has every entry that the task names."""
    # One example is enough to see which entries `prepare` reads and makes.
    one = {name: np.asarray(each[:1]) for name, each in split.items()}
    try:
        prepared = task.prepare(one)
    except KeyError as error:
        missing = [error.args[0]]
    else:
        wanted = (*task.inputs, *((task.labels,) if task.labels else ()))
        missing = [name for name in wanted if name not in prepared]
    if missing:
        raise ArgumentError(
            f"the task {task.name!r} needs {missing[0]!r}, and there are only {[*split]}; say "
            "which entries are meant: tasks.classification(inputs=..., labels=...)"
        )


def _batches(
    split: Mapping[str, Array], size: int, sharding: NamedSharding | None = None
) -> Iterator[Batch]:
    """Cut a split into batches of one size; ``mask`` is false for rows that fill up the last."""
    sizes = {name: len(each) for name, each in split.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ArgumentError(f"the arrays of a split must have one length, and not 0; got {sizes}")
    # The rows of padding take the name "mask", which may be that of an entry, or an input.
    held = {name: x if isinstance(x, Column) else np.asarray(x) for name, x in split.items()}
    renamed: dict[str, Any] = {OWN if name == "mask" else name: x for name, x in held.items()}
    if sharding is None:
        return eval_batches(renamed, size)
    devices = sharding.num_devices
    return (
        _spread(batch, sharding) for batch in eval_batches(renamed, -(-size // devices) * devices)
    )


def _spread(batch: Batch, sharding: NamedSharding) -> Batch:
    """Return a batch over the devices of all processes, each of which holds the whole."""
    return {
        name: jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index])
        for name, x in batch.items()
    }


def examples_at_once(
    task: Task, apply: ModelFn, variables: Variables, split: Mapping[str, Array]
) -> int:
    """Return how many examples a call of a model may take, at most 500.

    Logits of a large vocabulary for 500 sequences would not fit into memory.
    """
    one = {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in split.items()}
    out = jax.eval_shape(lambda v, b: apply(v, *task.inputs_of(task.prepare(b))), variables, one)
    entries = max((math.prod(x.shape) for x in jax.tree.leaves(out)), default=1)
    return max(1, min(BATCH, ENTRIES // max(entries, 1)))


def _own(task: Task, batch: Batch) -> Batch:
    """Return a batch as the task knows it: its own mask in place of that of padding rows."""
    own = {name: each for name, each in batch.items() if name != "mask"}
    if OWN in own:
        own["mask"] = own.pop(OWN)
    return task.prepare(own)


class _Outcome(NamedTuple):
    """What is computed of one batch; the first three are 0 where no metric needs the host."""

    out: Array | int
    labels: Array | int
    counts: Array | int
    sums: list[Array | None]
    bits: jax.Array


# Functions are static arguments, compared by value: `apply` is a new object at every mention of a
# method, and jit would compile each anew.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    task: Task,
    apply: ModelFn,
    sharding: NamedSharding | None,
    variables: Variables,
    batch: Batch,
) -> _Outcome:
    """Return the sums of each metric and the bits of the outputs."""
    own = _own(task, batch)
    out = _first(apply(variables, *task.inputs_of(own))).astype(jnp.float32)
    labels = own[task.label_entry]
    counts = _counts(task, own, out, batch["mask"])
    found = [None if m.on_host else m.sums(out, labels, counts) for m in task.metrics]
    hosted = any(metric.on_host for metric in task.metrics)
    # Outputs leave the device only where a metric is computed on the host.
    kept = (out, labels, counts) if hosted else (0, 0, 0)
    return _everywhere(_Outcome(*kept, found, _digest(out, batch["mask"])), sharding)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _outputs(
    task: Task,
    apply: ModelFn,
    sharding: NamedSharding | None,
    variables: Variables,
    batch: Batch,
    mask: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    out = _first(apply(variables, *task.inputs_of(_own(task, batch)))).astype(jnp.float32)
    return _everywhere((out, mask), sharding)


def _everywhere(results: T, sharding: NamedSharding | None) -> T:
    """Return results that each process can read whole."""
    if sharding is None:
        return results
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(results, whole)


def _first(out: PyTree) -> jax.Array:
    if not hasattr(out, "shape"):
        raise ShapeError(
            f"the model must return one array, and returns a {type(out).__name__}; give a pair "
            "(init, apply) whose apply returns what is to be measured"
        )
    return out


def trace_metrics(task: Task, batch: Batch, out: PyTree) -> None:
    """Trace a task's metrics on shapes, to find those that outputs and labels do not fit.

    Args:
      task: whose metrics are traced; those that run on the host are not.
      batch: shapes of some examples, prepared.
      out: shapes of the model's outputs for them.
    """

    def sums(batch: Batch, out: jax.Array) -> list[Array]:
        labels = out if task.labels is None else batch[task.labels]
        counts = _counts(task, batch, out, jnp.ones(len(out)))
        given = out.astype(jnp.float32)
        return [m.sums(given, labels, counts) for m in task.metrics if not m.on_host]

    jax.eval_shape(sums, batch, out)


def _counts(task: Task, batch: Batch, out: jax.Array, rows: jax.Array) -> jax.Array:
    """Return which examples count, ``[batch]``, or tokens, ``[batch, sequence]``, as weights."""
    leading = out.shape[:-1] if task.per_token else out.shape[:1]
    # Rows that pad the last batch, and what the split itself leaves out.
    counts = fitted(rows, leading, "the outputs")
    if task.mask in batch:
        counts = counts * fitted(batch[task.mask], leading, "the outputs", examples=True)
    return counts


def _digest(out: jax.Array, rows: jax.Array) -> jax.Array:
    """Return a sum of the outputs' bits, each times an odd number of its own, modulo 2^32."""
    bits = jax.lax.bitcast_convert_type(out, jnp.uint32).reshape(len(out), -1)  # [rows, entries]
    # The place of each entry within the batch, counted from 0.
    number = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, 0) * jnp.uint32(bits.shape[1])
    number += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, 1)
    # Multiples of an odd constant, made odd: no two places within 2^31 have the same factor.
    mixed = bits * (number * jnp.uint32(0x9E3779B2) + jnp.uint32(1))
    return jnp.where(rows[:, None], mixed, jnp.uint32(0)).sum(dtype=jnp.uint32)
