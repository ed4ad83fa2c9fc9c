"""Batches that a choice is judged by, and not made from."""

import math
from collections.abc import Iterable

from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.core.types import Batch, PyTree

Arguments = tuple[PyTree, ...]
"""A batch as the arguments of a function after its params."""


def held_out(batches: Iterable[Batch], share: float) -> tuple[list[Arguments], list[Arguments]]:
    """Divide batches into those that choices are made from, and those that they are judged by.

    Args:
      batches: each the argument of a function after params; a tuple is several arguments.
      share: of the batches that is held out, the last ones, rounded up; at least 0 and below 1.

    Returns:
      ``(made from, judged by)``; with a share of 0 none is held out.

    Raises:
      ArgumentError: if the share is out of range.
      DataError: if no batch is left to make choices from.

    Example:
      >>> held_out([1, 2, 3, (4, 5)], 0.25)
      ([(1,), (2,), (3,)], [(4, 5)])
    """
    if not 0 <= share < 1:
        raise ArgumentError(f"hold_out must be at least 0 and below 1, got {share}")
    given = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    judged = math.ceil(share * len(given))
    if len(given) <= judged:
        raise DataError(f"there are {len(given)} batches, and {judged} of them are held out")
    last = len(given) - judged
    return given[:last], given[last:]
