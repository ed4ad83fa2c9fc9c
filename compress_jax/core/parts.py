"""The state of several compressions as one: theirs under ``"0"``, ``"1"``, ..."""

from collections.abc import Mapping, Sequence

from compress_jax.core.compression import CompressionState
from compress_jax.core.errors import StateError


def joined(states: Sequence[CompressionState]) -> CompressionState:
    """Return the states of several compressions as one."""
    return CompressionState(
        learned={str(i): s.learned for i, s in enumerate(states)}, fixed={str(i): s.fixed for i, s in enumerate(states)}
    )


def parts_of(state: CompressionState, n: int) -> list[CompressionState]:
    """Return the states that `joined` put together; one of another making is refused."""
    keys = [str(i) for i in range(n)]
    learned, fixed = state
    if not (isinstance(fixed, Mapping) and set(fixed) == set(keys) == set(learned)):
        raise StateError(f"this state is not that of a chain or rules of {n} compressions; it has parts {list(fixed)}")
    return [CompressionState(learned[k], fixed[k]) for k in keys]
