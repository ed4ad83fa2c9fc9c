"""What a step minimises: weighted means, kept as sums and counts until all devices and microbatches are in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ConfigError
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
    return loss if isinstance(loss, Total) else Total(loss.sum(), jnp.asarray(loss.size, loss.dtype))


def value(objective: Objective, counts: Sequence[jax.Array] | None = None) -> jax.Array:
    """Return the weighted sum of means, or of shares of means whose counts are those of more than this batch.

    Example:
      >>> value([(2.0, Total(jnp.float32(6.0), jnp.float32(3.0)))]).tolist()
      4.0
    """
    own = [each.count for _, each in objective] if counts is None else counts
    means = [Total(each.sum, jax.lax.stop_gradient(n)).mean for (_, each), n in zip(objective, own, strict=True)]
    weighted = (jnp.asarray(weight, mean.dtype) * mean for (weight, _), mean in zip(objective, means, strict=True))
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


@dataclass(frozen=True)
class PlainLoss:
    """A `Loss` that also knows its sums and counts.

    Attributes:
      totals: as the loss, but it returns an `Objective`, and metrics may be totals.
    """

    totals: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Return the loss as a scalar, and the model state and metrics beside it."""
        return averaged(self.totals)(*args, **options)


def chosen(batch: Any, name: str, who: str = "the loss") -> Any:
    """Return a batch's mask, or None if it has none; one that was asked for by a name of its own must be there.

    Example:
      >>> chosen({"image": jnp.ones(2)}, "mask") is None
      True
    """
    if name in batch:
        return batch[name]
    if name != MASK or who != "the loss":
        raise ConfigError(f"{who} looks for what counts in the batch's entry {name!r}, and the batch has only {[*batch]}")
    return None
