"""The cubic sparsity schedule."""

import optax

from compress_jax.core.arguments import number, whole
from compress_jax.core.errors import ArgumentError


def cubic(final: float, begin: int, end: int, initial: float = 0.0) -> optax.Schedule:
    """Return the schedule of gradual pruning: fast while many weights are redundant, slow towards the end.

    ``s(step) = final + (initial - final) * (1 - t)**3`` with ``t = (step - begin) / (end - begin)`` clipped to [0, 1].

    Args:
      final: sparsity from step ``end`` on, 0 to 1.
      begin: step until which the sparsity is ``initial``, at least 0.
      end: step at which ``final`` is reached, after ``begin``.
      initial: sparsity up to step ``begin``, 0 to 1.

    Returns:
      An optax schedule, ``step -> float32`` sparsity.

    Raises:
      ArgumentError: if a sparsity is outside [0, 1], or the steps are not ``0 <= begin < end``.

    Example:
      >>> schedule = cubic(0.8, begin=100, end=200)
      >>> [round(float(schedule(step)), 3) for step in (0, 100, 150, 200, 300)]
      [0.0, 0.0, 0.7, 0.8, 0.8]

    References:
      Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017, equation 1.
    """
    final, initial = number("final", final), number("initial", initial)
    begin, end = whole("begin", begin), whole("end", end)
    if not (0 <= initial <= 1 and 0 <= final <= 1):
        raise ArgumentError(f"sparsities lie between 0 and 1, got initial={initial}, final={final}")
    if not 0 <= begin < end:
        raise ArgumentError(f"cubic needs 0 <= begin < end, got begin={begin}, end={end}")
    return optax.polynomial_schedule(initial, final, power=3, transition_steps=end - begin, transition_begin=begin)
