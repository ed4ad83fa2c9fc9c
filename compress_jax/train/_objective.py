"""Weighted means as sums and counts, which are added over microbatches and devices first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError, ConfigError, ShapeError
from compress_jax.core.types import Batch, PyTree, Scalar, Step
from compress_jax.distill import Total, masked_total

Objective: TypeAlias = Sequence[tuple[Scalar, Total]]
"""``sum_k weight_k * sum_k / count_k`` as pairs ``(weight_k, Total)``; counts have no gradient."""

LossMetrics: TypeAlias = Mapping[str, jax.Array | Total]
"""What a loss reports of a batch: numbers, and totals, of which a step reports the means."""

Aux: TypeAlias = tuple[PyTree, PyTree, LossMetrics]
"""What a loss returns beside its value: ``(model_state, memory, metrics)``."""

T = TypeVar("T")

MASK = "mask"


def total(values: jax.Array, counts: jax.Array | None) -> Total:
    """Return the total of the values that count, or of all if counts is None.

    Example:
      >>> values = jnp.array([1.0, 5.0])
      >>> total(values, None).mean.tolist(), total(values, jnp.array([1, 0])).mean.tolist()
      (3.0, 1.0)
    """
    return everything(values) if counts is None else masked_total(values, counts)


def everything(loss: jax.Array | Total) -> Total:
    """Return the total of a loss without a mask; a `Total` stays as it is.

    Example:
      >>> everything(jnp.ones((2, 3))).count.tolist()
      6.0
    """
    if isinstance(loss, Total):
        return loss
    return Total(loss.sum(), jnp.asarray(loss.size, loss.dtype))


def value(objective: Objective, counts: Sequence[jax.Array] | None = None) -> jax.Array:
    """Return the weighted sum of means; with given counts, this batch's share of it.

    Example:
      >>> value([(2.0, Total(jnp.float32(6.0), jnp.float32(3.0)))]).tolist()
      4.0
    """
    own = [each.count for _, each in objective] if counts is None else counts
    # A count may depend on params; its gradient would train what counts, not the loss.
    means = [
        Total(each.sum, jax.lax.stop_gradient(n)).mean
        for (_, each), n in zip(objective, own, strict=True)
    ]
    weighted = (
        jnp.asarray(weight, mean.dtype) * mean
        for (weight, _), mean in zip(objective, means, strict=True)
    )
    return sum(weighted, jnp.zeros((), jnp.float32))


def means(metrics: Mapping[str, T | Total]) -> dict[str, T | jax.Array]:
    """Return metrics with the mean of each that is a `Total`.

    Example:
      >>> means({"loss": Total(jnp.float32(6.0), jnp.float32(3.0))})["loss"].tolist()
      2.0
    """
    return {name: each.mean if isinstance(each, Total) else each for name, each in metrics.items()}


def averaged(totals: "General") -> Callable[..., tuple[jax.Array, Aux]]:
    """Return ``totals`` with a scalar in place of its `Objective`, and with means as metrics."""

    def loss(*args: PyTree, **options: bool) -> tuple[jax.Array, Aux]:
        objective, (model_state, memory, metrics) = totals(*args, **options)
        return value(objective), (model_state, memory, means(metrics))

    return loss


def chosen(batch: Batch, name: str, who: str = "the loss") -> jax.Array | None:
    """Return a batch's mask, or None without one; a mask with a name of its own must be there.

    Example:
      >>> chosen({"image": jnp.ones(2)}, "mask") is None
      True
    """
    if name in batch:
        return batch[name]
    # Batches without a mask are usual; a mask that somebody has named must be there.
    if name != MASK or who != "the loss":
        raise ConfigError(
            f"{who} looks for what counts in the batch's entry {name!r}, and the batch has only "
            f"{[*batch]}"
        )
    return None


# The gradient of one step from all its microbatches and devices.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Divided(Total):
    """The total of a scalar loss, a mean over an unknown number of entries: its count is 1."""


def counted(loss: jax.Array | Total) -> Total:
    """Return what a loss returned as a total.

    Example:
      >>> counted(jnp.float32(3.0)).count.tolist()
      1.0
    """
    return loss if isinstance(loss, Total) else Divided(loss, jnp.ones((), jnp.result_type(loss)))


General: TypeAlias = Callable[..., tuple[Objective, Aux]]
"""As `StatefulLoss.totals`: it returns ``(objective, (model_state, memory, metrics))``."""


class Shares(NamedTuple):
    """One share of a number; the number is the sum over microbatches and devices."""

    value: jax.Array


Trained: TypeAlias = tuple[PyTree, PyTree]
"""``(params, parts)``, or their gradients."""

Carried: TypeAlias = tuple[PyTree, PyTree]
"""``(model_state, memory)``."""

PartialMetrics: TypeAlias = Mapping[str, jax.Array | Total | Shares]
"""Metrics of one microbatch on one device."""

_Run: TypeAlias = Callable[[Trained, Carried, Batch, jax.Array], tuple[Objective, Aux]]
_Grad: TypeAlias = Callable[
    [Carried, Batch, jax.Array, Sequence[jax.Array] | None],
    tuple[Trained, tuple[PyTree, PyTree, PartialMetrics]],
]


class Gathered(NamedTuple):
    """What a step computes from its batch.

    Attributes:
      grads: gradients of the loss to params and to parts.
      model_state: the state after the batch.
      memory: the memory after the batch.
      metrics: means over the batch, ``loss`` among them.
    """

    grads: Trained
    model_state: PyTree
    memory: PyTree
    metrics: dict[str, jax.Array]


def gather(
    general: General,
    trained: Trained,
    carried: Carried,
    batch: Batch,
    key: jax.Array,
    rest: tuple[PyTree, Step],
    microbatches: int,
    axis_name: str | None,
) -> Gathered:
    """Return gradients and metrics of a batch, as if it were one microbatch on one device.

    Every mean of the loss is divided by its count in the whole step, over microbatches and the
    devices of a mapped axis. With several microbatches the counts come from a pass before; the
    compiler removes all of it but the computation of masks.

    Args:
      general: the loss.
      trained: params, viewed by the compression, and parts.
      carried: model state and memory, passed from one microbatch to the next.
      batch: the device's batch.
      key: key of the step and the device.
      rest: teacher and step number.
      microbatches: number of microbatches.
      axis_name: name of a mapped axis, or None.

    Returns:
      Gradients, new state and metrics.

    Raises:
      ShapeError: if the batch cannot be cut.
    """
    several = microbatches > 1 or axis_name is not None

    def run(
        trained: Trained, carried: Carried, microbatch: Batch, key: jax.Array
    ) -> tuple[Objective, Aux]:
        objective, aux = general(*trained, *carried, microbatch, key, *rest)
        if several:
            _require_counts(objective, microbatch)
        return objective, aux

    def grad(
        carried: Carried, microbatch: Batch, key: jax.Array, counts: Sequence[jax.Array] | None
    ) -> tuple[Trained, tuple[PyTree, PyTree, PartialMetrics]]:
        # The loss of this part of the batch, divided by the counts of all parts: gradients of the
        # shares add up to that of the whole batch.
        def share(trained: Trained) -> tuple[jax.Array, tuple[PyTree, PyTree, PartialMetrics]]:
            objective, (model_state, memory, metrics) = run(trained, carried, microbatch, key)
            own = counts
            if own is None:
                own = _over_devices(objective, axis_name)
            loss = value(objective, own)
            return loss, (model_state, memory, {"loss": Shares(loss), **metrics})

        (_, aux), grads = jax.value_and_grad(share, has_aux=True)(trained)
        return grads, aux

    if microbatches == 1:
        grads, (model_state, memory, metrics) = grad(carried, batch, key, None)
    else:
        grads, (model_state, memory), metrics = _over_microbatches(
            run, grad, trained, carried, batch, key, microbatches, axis_name
        )
    if axis_name is not None:
        grads = jax.lax.psum(grads, axis_name)
    return Gathered(
        grads=grads,
        model_state=mean(model_state, axis_name),
        memory=mean(memory, axis_name),
        metrics=_finished(metrics, axis_name),
    )


def mean(tree: PyTree, axis_name: str | None) -> PyTree:
    """Return a tree with its floating leaves averaged over a mapped axis, if there is one."""
    if axis_name is None:
        return tree

    # Integers and keys (counters, hashes) are equal on all devices.
    def one(leaf: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
        return jax.lax.pmean(leaf, axis_name) if floating else leaf

    return jax.tree.map(one, tree)


def _over_microbatches(
    run: _Run,
    grad: _Grad,
    trained: Trained,
    carried: Carried,
    batch: Batch,
    key: jax.Array,
    number: int,
    axis_name: str | None,
) -> tuple[Trained, Carried, PartialMetrics]:
    """Return gradients, model state and memory, and metrics summed over microbatches."""
    cut = jax.tree.map(lambda leaf: _cut(leaf, number), batch)  # [microbatches, rows, ...]
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(number))  # [microbatches]

    # First pass: the counts of the whole step. Same keys and state as in the second, as masks may
    # depend on them.
    def count(
        carried: Carried, microbatch: tuple[Batch, jax.Array]
    ) -> tuple[Carried, list[jax.Array]]:
        objective, (model_state, memory, _) = run(trained, carried, *microbatch)
        return (model_state, memory), [each.count for _, each in objective]

    _, counts = jax.lax.scan(count, carried, (cut, keys))  # each [microbatches]
    counts = [each.sum() for each in counts]
    if axis_name is not None:
        counts = jax.lax.psum(counts, axis_name)

    # Second pass: add up the gradients of the shares.
    def add(
        carry: tuple[Trained, Carried], microbatch: tuple[Batch, jax.Array]
    ) -> tuple[tuple[Trained, Carried], PartialMetrics]:
        total, carried = carry
        grads, (model_state, memory, metrics) = grad(carried, *microbatch, counts)
        return (jax.tree.map(jnp.add, total, grads), (model_state, memory)), metrics

    start = jax.tree.map(jnp.zeros_like, trained)
    (grads, carried), metrics = jax.lax.scan(add, (start, carried), (cut, keys))
    return grads, carried, _added(metrics)


def _cut(leaf: jax.Array, number: int) -> jax.Array:
    """Return ``[microbatches, rows, ...]``; each has every n-th row, so some of every device's."""
    shape = jnp.shape(leaf)
    if not shape or shape[0] % number:
        raise ShapeError(
            f"a batch with an entry of shape {shape} cannot be cut evenly into {number} "
            "microbatches"
        )
    rows = jnp.reshape(leaf, (shape[0] // number, number, *shape[1:]))
    return rows.swapaxes(0, 1)  # [microbatches, rows, ...]


def _added(metrics: PartialMetrics) -> PartialMetrics:
    """Return metrics over microbatches: sums are added, other numbers averaged."""
    return {
        name: jax.tree.map(lambda x: x.sum(axis=0), each)
        if isinstance(each, (Total, Shares))
        else each.mean(axis=0)
        for name, each in metrics.items()
    }


def _over_devices(objective: Objective, axis_name: str | None) -> list[jax.Array]:
    counts = [jax.lax.stop_gradient(each.count) for _, each in objective]
    return counts if axis_name is None else jax.lax.psum(counts, axis_name)


def _finished(metrics: PartialMetrics, axis_name: str | None) -> dict[str, jax.Array]:
    def over(each: jax.Array | Total | Shares) -> jax.Array | Total | Shares:
        if axis_name is None:
            return each
        return (
            jax.lax.psum(each, axis_name)
            if isinstance(each, (Total, Shares))
            else mean(each, axis_name)
        )

    done = means({name: over(each) for name, each in metrics.items()})
    return {name: each.value if isinstance(each, Shares) else each for name, each in done.items()}


def _require_counts(objective: Objective, batch: Batch) -> None:
    """Refuse a scalar loss of a masked batch: counts may differ over devices or microbatches."""
    if (
        isinstance(batch, dict)
        and MASK in batch
        and any(isinstance(each, Divided) for _, each in objective)
    ):
        raise ArgumentError(
            "the loss returns a mean of a batch with a mask, and the mean of such means over "
            "devices or microbatches is another number: return distill.Total(sum, count) instead, "
            "as masked_total does; or, if its mean is of equally many in each, Total(mean, 1)"
        )
