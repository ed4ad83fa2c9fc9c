"""The fields of what a config builds, checked where they are given: wrong types and values are refused by name."""

import math
import numbers
from typing import Any

from compress_jax.core.errors import ConfigError


def require(holds: bool, owner: str, name: str, wanted: str, value: Any) -> None:
    """Refuse a value unless a condition holds.

    Args:
      holds: the condition.
      owner: what has the field, such as ``"Training"``.
      name: of the field.
      wanted: what it must be, as the end of "... must be".
      value: what was given.

    Raises:
      ConfigError: if it does not hold.

    Example:
      >>> require(False, "Training", "steps", "a whole number, 0 or more", "many")
      Traceback (most recent call last):
      compress_jax.core.errors.ConfigError: Training: steps must be a whole number, 0 or more, got 'many'
    """
    if not holds:
        raise ConfigError(f"{owner}: {name} must be {wanted}, got {told(value)}")


def told(value: Any) -> str:
    """Return what a value is, in a few words: itself if it is plain and short, else its type."""
    if isinstance(value, str | int | float | tuple | type(None)) and len(repr(value)) <= 60:
        return repr(value)
    name = getattr(value, "__qualname__", None)
    return f"the {type(value).__name__} {name}" if name else f"a {type(value).__name__}"


def whole(owner: str, name: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number of a range; ``True`` is none."""
    upper = "" if most is None else f" and at most {most}"
    fits = isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least
    require(fits and (most is None or int(value) <= most), owner, name, f"a whole number, {least} or more{upper}", value)


def is_number(value: Any) -> bool:
    """Tell whether a value is a real number, infinity included."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def one_of(owner: str, name: str, value: Any, *words: str) -> None:
    """Refuse what is none of some words."""
    listed = f"{', '.join(map(repr, words[:-1]))} or {words[-1]!r}"
    require(isinstance(value, str) and value in words, owner, name, listed, value)
