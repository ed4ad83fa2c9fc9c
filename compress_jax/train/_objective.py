"""What a step minimises: weighted means, kept as sums and counts until all devices and microbatches are in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError, ConfigError, ShapeError
from compress_jax.core.types import Batch, PyTree
from compress_jax.distill import Total, masked_total

Objective: TypeAlias = Sequence[tuple[Any, Total]]
"""``sum_k weight_k * sum_k / count_k``: pairs of a weight and a `Total`, counts having no gradient."""

MASK = "mask"


def total(values: jax.Array, counts: Any) -> Total:
    """Return the sum and the number of some values, of those that count; None is all.

    Example:
      >>> total(jnp.array([1.0, 5.0]), None).mean.tolist(), total(jnp.array([1.0, 5.0]), jnp.array([1, 0])).mean.tolist()
      (3.0, 1.0)
    """
    return everything(values) if counts is None else masked_total(values, counts)


def everything(loss: jax.Array | Total) -> Total:
    """Return the total of a loss without a mask; what is one already stays.

    Example:
      >>> everything(jnp.ones((2, 3))).count.tolist()
      6.0
    """
    return (
        loss if isinstance(loss, Total) else Total(loss.sum(), jnp.asarray(loss.size, loss.dtype))
    )


def value(objective: Objective, counts: Sequence[jax.Array] | None = None) -> jax.Array:
    """Return the weighted sum of means, or of shares of means whose counts are those of more than this batch.

    Example:
      >>> value([(2.0, Total(jnp.float32(6.0), jnp.float32(3.0)))]).tolist()
      4.0
    """
    own = [each.count for _, each in objective] if counts is None else counts
    means = [
        Total(each.sum, jax.lax.stop_gradient(n)).mean
        for (_, each), n in zip(objective, own, strict=True)
    ]
    weighted = (
        jnp.asarray(weight, mean.dtype) * mean
        for (weight, _), mean in zip(objective, means, strict=True)
    )
    return sum(weighted, jnp.zeros((), jnp.float32))


def means(metrics: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return metrics with the mean of each that is a `Total`.

    Example:
      >>> means({"loss": Total(jnp.float32(6.0), jnp.float32(3.0))})["loss"].tolist()
      2.0
    """
    return {name: each.mean if isinstance(each, Total) else each for name, each in metrics.items()}


def averaged(totals: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``(...) -> (scalar, (..., metrics))`` of a function that returns an `Objective` and metrics with totals."""

    def loss(*args: Any, **options: Any) -> Any:
        objective, (*kept, metrics) = totals(*args, **options)
        return value(objective), (*kept, means(metrics))

    return loss


def chosen(batch: Batch, name: str, who: str = "the loss") -> Any:
    """Return a batch's mask, or None if it has none; one that was asked for by a name of its own must be there.

    Example:
      >>> chosen({"image": jnp.ones(2)}, "mask") is None
      True
    """
    if name in batch:
        return batch[name]
    if name != MASK or who != "the loss":
        raise ConfigError(
            f"{who} looks for what counts in the batch's entry {name!r}, and the batch has only "
            f"{[*batch]}"
        )
    return None


# The gradient of one step, from all its microbatches and devices: sums and counts are added up, the
# division comes last.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Divided(Total):
    """The total of a scalar that a loss returned, of which nobody knows how many it is the mean of: it counts as one."""


def counted(loss: jax.Array | Total) -> Total:
    """Return what a loss returned as a total.

    Example:
      >>> counted(jnp.float32(3.0)).count.tolist()
      1.0
    """
    return loss if isinstance(loss, Total) else Divided(loss, jnp.ones((), jnp.result_type(loss)))


General = Callable[..., tuple[Objective, tuple[Any, Any, dict[str, Any]]]]
"""``(params, parts, model_state, memory, batch, key, teacher, step) -> (objective, (model_state, memory, metrics))``."""


class Gathered(NamedTuple):
    """What a step needs of its batch.

    Attributes:
      slopes: gradients of the loss to params and to parts.
      model_state: after the batch.
      memory: likewise.
      metrics: means over the batch, ``loss`` among them.
    """

    slopes: Any
    model_state: PyTree
    memory: PyTree
    metrics: dict[str, jax.Array]


def gather(
    general: General,
    seen: tuple[Any, Any],
    kept: tuple[Any, Any],
    batch: Batch,
    key: jax.Array,
    rest: tuple[Any, Any],
    microbatches: int,
    axis_name: str | None,
) -> Gathered:
    """Return gradients and metrics of a batch, as if it were seen at once.

    Every mean of the loss is divided by its number in the whole step, over microbatches and the
    devices of a mapped axis. With several microbatches these numbers come from a pass before, of
    which the compiler leaves only what they depend on: masks.

    Args:
      general: the loss.
      seen: params and parts.
      kept: model state and memory, handed from one microbatch to the next.
      batch: the device's.
      key: of the step, and the device.
      rest: teacher and step number.
      microbatches: into how many the batch is cut.
      axis_name: of a mapped axis, or None.

    Returns:
      What was gathered.

    Raises:
      ShapeError: if the batch cannot be cut.
    """
    several = microbatches > 1 or axis_name is not None

    def run(seen: Any, kept: Any, part: Any, key: jax.Array) -> Any:
        objective, aux = general(*seen, *kept, part, key, *rest)
        if several:
            _require_counts(objective, part)
        return objective, aux

    def slope(kept: Any, part: Any, key: jax.Array, counts: Any) -> Any:
        def weighed(seen: Any) -> Any:
            objective, (model_state, memory, metrics) = run(seen, kept, part, key)
            own = value(
                objective, _over_devices(objective, axis_name) if counts is None else counts
            )
            return own, (model_state, memory, {"loss": Shares(own), **metrics})

        (_, aux), slopes = jax.value_and_grad(weighed, has_aux=True)(seen)
        return slopes, aux

    if microbatches == 1:
        slopes, (model_state, memory, metrics) = slope(kept, batch, key, None)
    else:
        slopes, (model_state, memory), metrics = _in_parts(
            run, slope, seen, kept, batch, key, microbatches, axis_name
        )
    if axis_name is not None:
        slopes = jax.lax.psum(slopes, axis_name)
    return Gathered(
        slopes, mean(model_state, axis_name), mean(memory, axis_name), _finished(metrics, axis_name)
    )


class Shares(NamedTuple):
    """A part of a number that is the sum over microbatches and devices."""

    value: jax.Array


def mean(tree: PyTree, axis_name: str | None) -> Any:
    """Return a tree with the mean of its floating leaves over a mapped axis; as it is where there is none."""
    if axis_name is None:
        return tree

    def one(leaf: jax.Array) -> jax.Array:
        return (
            jax.lax.pmean(leaf, axis_name)
            if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
            else leaf
        )

    return jax.tree.map(one, tree)


def _in_parts(
    run: Any,
    slope: Any,
    seen: Any,
    kept: Any,
    batch: Batch,
    key: jax.Array,
    parts: int,
    axis_name: str | None,
) -> tuple[Any, Any, Any]:
    """Return gradients, model state and memory, and metrics of a batch that is seen in parts."""
    cut = jax.tree.map(lambda leaf: _cut(leaf, parts), batch)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(parts))

    def count(kept: Any, part: Any) -> Any:
        objective, (model_state, memory, _) = run(seen, kept, *part)
        return (model_state, memory), [each.count for _, each in objective]

    _, counts = jax.lax.scan(count, kept, (cut, keys))
    counts = [each.sum() for each in counts]
    counts = counts if axis_name is None else jax.lax.psum(counts, axis_name)

    def add(carry: Any, part: Any) -> Any:
        total, kept = carry
        slopes, (model_state, memory, metrics) = slope(kept, *part, counts)
        return (jax.tree.map(jnp.add, total, slopes), (model_state, memory)), metrics

    start = jax.tree.map(jnp.zeros_like, seen)
    (slopes, kept), metrics = jax.lax.scan(add, (start, kept), (cut, keys))
    return slopes, kept, _added(metrics)


def _cut(leaf: PyTree, parts: int) -> jax.Array:
    """Return ``[parts, rows of a part, ...]``; a part has every so-many-th row, so some of every device's."""
    shape = jnp.shape(leaf)
    if not shape or shape[0] % parts:
        raise ShapeError(
            f"a batch with an entry of shape {shape} cannot be cut evenly into {parts} microbatches"
        )
    return jnp.reshape(leaf, (shape[0] // parts, parts, *shape[1:])).swapaxes(0, 1)


def _added(metrics: Any) -> Any:
    """Return metrics stacked over microbatches as those of all: sums added, other numbers averaged."""
    return {
        name: jax.tree.map(lambda x: x.sum(axis=0), each)
        if isinstance(each, (Total, Shares))
        else each.mean(axis=0)
        for name, each in metrics.items()
    }


def _over_devices(objective: Objective, axis_name: str | None) -> list[jax.Array]:
    counts = [jax.lax.stop_gradient(each.count) for _, each in objective]
    return counts if axis_name is None else jax.lax.psum(counts, axis_name)


def _finished(metrics: Any, axis_name: str | None) -> dict[str, jax.Array]:
    def over(each: Any) -> Any:
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
    """Refuse a loss that has divided already where devices or microbatches may count differently."""
    if (
        isinstance(batch, dict)
        and MASK in batch
        and any(isinstance(each, Divided) for _, each in objective)
    ):
        raise ArgumentError(
            "the loss returns a mean of a batch with a mask, and the mean of such means over "
            "devices or microbatches is "
            "another number: return distill.Total(sum, count) instead, as masked_total does; or, "
            "if its mean is of equally "
            "many in each, Total(mean, 1)"
        )
