"""Schedules in compressions: the first step, and the last update, which no thinning may skip.

An `update` that follows schedules is a `Scheduled`; combinators that thin or freeze updates ask it
when they end.
"""

import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression, CompressionState, Scheduled
from compress_jax.core.types import Params, Schedule, Step

FAR = 2**30  # a step that no training reaches; the next one still fits in int32


def schedules_of(*compressions: Compression) -> tuple[Schedule, ...]:
    """Return the schedules that the updates of some compressions follow."""
    return tuple(
        s for c in compressions if isinstance(c.update, Scheduled) for s in c.update.schedules
    )


def at_once(compression: Compression) -> Callable[..., CompressionState]:
    """Return the update of a compression that acts at whatever step it is given."""
    update = compression.update
    return (update.at_once or update) if isinstance(update, Scheduled) else update


def awake(compression: Compression) -> Compression:
    """Return the compression with its `at_once` as update."""
    return compression._replace(update=at_once(compression))


def arrival(schedules: Sequence[Schedule], step: Step) -> tuple[jax.Array, jax.Array]:
    """Decide whether a schedule ends at this step or the next, and which step to update with.

    The state that an update makes is what the model uses at the step after it. So the update one
    step before the last value is made with that value: a training that ends there has arrived too.

    Args:
      schedules: functions of the step.
      step: the step, an integer or an int32 scalar.

    Returns:
      ``(arriving, step or step + 1)``.

    Example:
      >>> ramp = lambda step: jnp.minimum(step, 4) / 4
      >>> [(bool(now), int(at)) for now, at in (arrival([ramp], step) for step in range(6))]
      [(False, 0), (False, 1), (False, 2), (True, 4), (True, 4), (False, 5)]
    """
    step = jnp.asarray(step)
    soon = jnp.zeros((), bool)
    now = jnp.zeros((), bool)
    for schedule in schedules:
        # Whether the schedule has its last value at the step before, at this one, at the next.
        last = schedule(jnp.full_like(step, FAR))
        before, here, after = (schedule(step + d) == last for d in (-1, 0, 1))
        soon |= after & jnp.logical_not(here)
        # Also at that step itself, as no update need have been made at the step before.
        now |= here & jnp.logical_not(before)
    return soon | now, step + soon.astype(step.dtype)


def begin(compression: Compression, params: Params, step: Step = 0) -> CompressionState:
    """Return the state of a compression that begins at a step.

    Args:
      compression: any; an ``init(params)`` without ``step`` will do.
      params: the params of that moment.
      step: the step.

    Returns:
      The state.
    """
    init: Callable[..., CompressionState] = compression.init
    takes = "step" in inspect.signature(init).parameters
    return init(params, step=step) if takes else init(params)


def due(every: int, schedules: Sequence[Schedule], step: Step) -> tuple[jax.Array, jax.Array]:
    """Return whether a thinned update acts at this step, and which step to update with.

    Args:
      every: it acts at steps divisible by this, and where a schedule arrives.
      schedules: functions of the step.
      step: the step.

    Returns:
      ``(acts, step to update with)``.
    """
    arriving, at = arrival(schedules, step)
    return (jnp.asarray(step) % every == 0) | arriving, at
