"""Check the type and range of arguments; errors name argument, value and what is accepted."""

import operator
from collections.abc import Collection
from typing import NoReturn, SupportsIndex, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from compress_jax.core.errors import ArgumentError

T = TypeVar("T")


def refused(name: str, value: object, accepted: str) -> NoReturn:
    """Raise that an argument is not what is accepted.

    Args:
      name: of the argument.
      value: what was given.
      accepted: what is accepted, after "must be".

    Raises:
      ArgumentError: always.
    """
    raise ArgumentError(f"{name} must be {accepted}, got {value!r}")


def whole(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """Return a whole number in a range: an int or a NumPy integer; neither a bool nor a float.

    Args:
      name: of the argument.
      value: what was given.
      low: the least number accepted; None for any.
      high: the largest number accepted; None for any.

    Returns:
      The number, an int.

    Raises:
      ArgumentError: if it is anything else.

    Example:
      >>> whole("bits", np.int64(4), 2, 8)
      4
    """
    found = operator.index(value) if is_whole(value) else None
    if found is None or (low is not None and found < low) or (high is not None and found > high):
        refused(name, value, f"a whole number{_range(low, high)}")
    return found


def number(
    name: str,
    value: object,
    low: float | None = None,
    high: float | None = None,
    *,
    above: bool = False,
    below: bool = False,
) -> float:
    """Return a finite number in a range: an int, a float or a NumPy number; not a bool.

    Args:
      name: of the argument.
      value: what was given.
      low: the least number accepted; None for any.
      high: the largest number accepted; None for any.
      above: whether ``low`` itself is refused.
      below: whether ``high`` itself is refused.

    Returns:
      The number, a float.

    Raises:
      ArgumentError: if it is anything else.

    Example:
      >>> number("decay", 1, 0, 1)
      1.0
    """
    found = float(value) if _is_number(value) else None
    if found is None or not np.isfinite(found) or not _inside(found, low, high, above, below):
        refused(name, value, f"a number{_range(low, high, above, below)}")
    return found


def flag(name: str, value: object) -> bool:
    """Return True or False; anything else, 0 and 1 among it, is refused.

    Raises:
      ArgumentError: if it is neither.
    """
    if not isinstance(value, (bool, np.bool_)):
        refused(name, value, "True or False")
    return bool(value)


def one_of(name: str, value: object, options: Collection[str]) -> str:
    """Return one of some names.

    Raises:
      ArgumentError: if it is none of them; the message lists them.
    """
    if not isinstance(value, str) or value not in options:
        *others, last = map(repr, options)
        refused(name, value, f"{', '.join(others)} or {last}" if others else last)
    return value


def function(name: str, value: T, accepted: str) -> T:
    """Return a function; what it is called with is in the message.

    Raises:
      ArgumentError: if it cannot be called.
    """
    if not callable(value):
        refused(name, value, accepted)
    return value


def axes(name: str, value: object) -> int | tuple[int, ...]:
    """Return an axis, or a tuple of axes.

    Raises:
      ArgumentError: if it is neither.
    """
    accepted = "a whole number or a tuple of whole numbers"
    if isinstance(value, (tuple, list)):
        # No axis at all is a mistake: the default, None, stands for those that a trace tells.
        if not value or not all(is_whole(each) for each in value):
            refused(name, value, accepted)
        return tuple(operator.index(each) for each in value)
    if not is_whole(value):
        refused(name, value, accepted)
    return operator.index(value)


def sharing(
    granularity: object, axis: object, pad: object
) -> tuple[str | int, int | tuple[int, ...] | None, bool]:
    """Return which entries share a scale, as quantizers take it, all three checked.

    Args:
      granularity: ``"tensor"``, ``"channel"`` or a group size.
      axis: the axis or axes of output channels; None for those a trace or the convention tells.
      pad: whether a last group may be padded.

    Returns:
      ``(granularity, axis, pad)``.

    Raises:
      ArgumentError: if one of them is something else.
    """
    shared: str | int
    if isinstance(granularity, str) and granularity in ("tensor", "channel"):
        shared = granularity
    elif is_whole(granularity) and operator.index(granularity) >= 1:
        shared = operator.index(granularity)
    else:
        refused("granularity", granularity, "'tensor', 'channel' or a group size of at least 1")
    return shared, None if axis is None else axes("axis", axis), flag("pad", pad)


def compression(name: str, value: T) -> T:
    """Return a Compression, or anything with its four functions.

    Raises:
      ArgumentError: if it has not.
    """
    # Its functions are asked for, not its class: a user's own class with these four will do.
    if not all(callable(getattr(value, each, None)) for each in ("init", "view", "update", "pack")):
        refused(name, value, "a Compression, such as prune.magnitude(0.5)")
    return value


def patterns(name: str, value: object) -> str | tuple[str, ...]:
    """Return a glob, or a tuple of globs.

    Raises:
      ArgumentError: if it is neither, or the tuple is empty.
    """
    if isinstance(value, str):
        return value
    accepted = "a glob such as '**/kernel', or a tuple of globs"
    if not isinstance(value, (tuple, list)) or len(value) == 0:
        refused(name, value, accepted)
    if not all(isinstance(each, str) for each in value):
        refused(name, value, accepted)
    return tuple(value)


def random_key(name: str, value: jax.Array) -> jax.Array:
    """Return a typed PRNG key.

    Raises:
      ArgumentError: if it is none; old-style keys, which are plain integers, are among what is
        refused.
    """
    # `jax.random.PRNGKey` returns plain uint32, which any array of integers could be taken for.
    if not (
        hasattr(value, "dtype")
        and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        and value.shape == ()
    ):
        refused(name, value, "one typed PRNG key, such as jax.random.key(0)")
    return value


def is_whole(value: object) -> TypeGuard[int]:
    """Tell whether it is a whole number, as `whole` takes it."""
    # True counts as 1 in Python; as a number of bits or steps it is a mistake.
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, SupportsIndex):
        return False
    try:
        operator.index(value)
    except TypeError:  # arrays have the method, but only known integers of rank 0 an index
        return False
    return True


def _is_number(value: object) -> TypeGuard[float]:
    """Tell whether it is a number as `number` takes it, a known array of rank 0 among them."""
    if isinstance(value, (bool, np.bool_)):
        return False
    if isinstance(value, (int, float, np.integer, np.floating)):
        return True
    if not isinstance(value, (np.ndarray, jax.Array)) or value.shape != ():
        return False
    # The value of a tracer is not known while the function is traced.
    if isinstance(value, Tracer):
        return False
    return jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)


def _inside(x: float, low: float | None, high: float | None, above: bool, below: bool) -> bool:
    under = low is not None and (x < low or (above and x == low))
    over = high is not None and (x > high or (below and x == high))
    return not under and not over


def _range(low: float | None, high: float | None, above: bool = False, below: bool = False) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f" above {low}" if above else f" of at least {low}"
    start = f" above {low}" if above else f" from {low}"
    return start + (f" to below {high}" if below else f" to {high}")
