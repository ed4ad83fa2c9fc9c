"""Check the type and range of arguments; errors name argument, value and what is accepted."""

import operator
from collections.abc import Callable, Collection
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from compress_jax.core.errors import ArgumentError


def refused(name: str, value: Any, accepted: str) -> NoReturn:
    """Raise that an argument is not what is accepted.

    Args:
      name: of the argument.
      value: what was given.
      accepted: what is accepted, after "must be".

    Raises:
      ArgumentError: always.
    """
    raise ArgumentError(f"{name} must be {accepted}, got {value!r}")


def whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
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
    try:
        found = operator.index(value) if not isinstance(value, (bool, np.bool_)) else None
    except TypeError:
        found = None
    if found is None or (low is not None and found < low) or (high is not None and found > high):
        refused(name, value, f"a whole number{_range(low, high)}")
    return found


def number(
    name: str,
    value: Any,
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
    scalar = isinstance(value, (int, float, np.integer, np.floating)) or _is_number_array(value)
    found = float(value) if scalar and not isinstance(value, (bool, np.bool_)) else None
    if found is None or not np.isfinite(found) or not _inside(found, low, high, above, below):
        refused(name, value, f"a number{_range(low, high, above, below)}")
    return found


def flag(name: str, value: Any) -> bool:
    """Return True or False; anything else, 0 and 1 among it, is refused.

    Raises:
      ArgumentError: if it is neither.
    """
    if not isinstance(value, (bool, np.bool_)):
        refused(name, value, "True or False")
    return bool(value)


def one_of(name: str, value: Any, options: Collection[str]) -> str:
    """Return one of some names.

    Raises:
      ArgumentError: if it is none of them; the message lists them.
    """
    if not isinstance(value, str) or value not in options:
        refused(
            name,
            value,
            " or ".join(
                filter(None, (", ".join(map(repr, list(options)[:-1])), repr(list(options)[-1])))
            ),
        )
    return value


def function(name: str, value: Any, accepted: str) -> Callable[..., Any]:
    """Return a function; what it is called with is in the message.

    Raises:
      ArgumentError: if it cannot be called.
    """
    if not callable(value):
        refused(name, value, accepted)
    return value


def axes(name: str, value: Any) -> int | tuple[int, ...]:
    """Return an axis, or a tuple of axes.

    Raises:
      ArgumentError: if it is neither.
    """
    accepted = "a whole number or a tuple of whole numbers"
    if isinstance(value, (tuple, list)):
        if not value or not all(is_whole(each) for each in value):
            refused(name, value, accepted)
        return tuple(operator.index(each) for each in value)
    if not is_whole(value):
        refused(name, value, accepted)
    return operator.index(value)


def sharing(
    granularity: Any, axis: Any, pad: Any
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
    if not (isinstance(granularity, str) and granularity in ("tensor", "channel")):
        size: Any = granularity
        if not is_whole(size) or operator.index(size) < 1:
            refused("granularity", granularity, "'tensor', 'channel' or a group size of at least 1")
        granularity = operator.index(size)
    return granularity, None if axis is None else axes("axis", axis), flag("pad", pad)


def compression(name: str, value: Any) -> Any:
    """Return a Compression, or anything with its four functions.

    Raises:
      ArgumentError: if it has not.
    """
    if not all(callable(getattr(value, each, None)) for each in ("init", "view", "update", "pack")):
        refused(name, value, "a Compression, such as prune.magnitude(0.5)")
    return value


def patterns(name: str, value: Any) -> str | tuple[str, ...]:
    """Return a glob, or a tuple of globs.

    Raises:
      ArgumentError: if it is neither, or the tuple is empty.
    """
    several = (value,) if isinstance(value, str) else value
    listed = isinstance(several, (tuple, list)) and len(several) > 0
    if not listed or not all(isinstance(each, str) for each in several):
        refused(name, value, "a glob such as '**/kernel', or a tuple of globs")
    return value if isinstance(value, str) else tuple(several)


def random_key(name: str, value: Any) -> jax.Array:
    """Return a typed PRNG key.

    Raises:
      ArgumentError: if it is none; old-style keys, which are plain integers, are among what is
        refused.
    """
    if not (
        hasattr(value, "dtype")
        and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        and value.shape == ()
    ):
        refused(name, value, "one typed PRNG key, such as jax.random.key(0)")
    return value


def is_whole(value: Any) -> bool:
    """Tell whether it is a whole number, as `whole` takes it."""
    try:
        return not isinstance(value, (bool, np.bool_)) and operator.index(value) is not None
    except TypeError:
        return False


def _is_number_array(value: Any) -> bool:
    """Tell whether it is a known array of rank 0 that holds a number."""
    if (
        not isinstance(value, (np.ndarray, jax.Array))
        or isinstance(value, Tracer)
        or value.shape != ()
    ):
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
