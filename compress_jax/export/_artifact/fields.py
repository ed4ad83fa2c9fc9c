"""Static fields of packed nodes in JSON: their valid values, and how they are decoded."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ArgumentError, ArtifactError
from compress_jax.core.layout import Layout
from compress_jax.core.levels import Float, Levels, Table

LARGEST = 2**48  # entries of an array, more than any machine holds
RANK = 32  # axes of an array; NumPy 1 takes no more
KEY = "key:"  # before the implementation of a typed random key
KEY_WORDS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}  # uint32 words of a key of each
# Dtypes that safetensors has for NumPy; any other (bfloat16, int4, fp8) is stored as its bytes.
NATIVE = frozenset(
    "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 float32 float64".split()
)


def refuse(where: str, problem: str) -> ArtifactError:
    """Return the error that says what is wrong with which entry of a file.

    Example:
      >>> str(refuse("dense/kernel", "bits is 17"))
      "entry 'dense/kernel': bits is 17"
    """
    return ArtifactError(f"entry {where!r}: {problem}")


def static(field: str, value: object, where: str) -> object:
    """Return the value of a static field.

    Args:
      field: its name.
      value: from JSON.
      where: the entry, for errors.

    Returns:
      What the node's class takes.

    Raises:
      ArtifactError: if it can be no such field.

    Example:
      >>> static("layout", [[4, 2], [1], None], "kernel").scale_shape
      (1, 2)
    """
    # All that a wrong value can raise; ArgumentError is a ValueError.
    try:
        return FIELDS[field](value)
    except (ValueError, TypeError, OverflowError) as error:
        raise refuse(where, f"the field {field!r} is {_short(value)}: {error}") from error


def extents(value: object) -> tuple[int, ...]:
    """Return a shape; ValueError if it is none.

    Example:
      >>> extents([2, 3])
      (2, 3)
    """
    shape = _sequence(value)
    if len(shape) > RANK:
        raise ArgumentError(f"a shape has at most {RANK} axes")
    # Zeros are left out of the product: NumPy refuses (0, 2**62, 4) although it holds nothing.
    if not all(_whole(n) and n >= 0 for n in shape) or math.prod(n for n in shape if n) > LARGEST:
        raise ArgumentError("a shape is a list of whole numbers from 0 on, below 2**63 in all")
    return shape


def dtype_named(name: object) -> np.dtype:
    """Return the dtype of a name; ValueError unless it is the proper name of a dtype of numbers.

    Example:
      >>> dtype_named("bfloat16").itemsize
      2
    """
    if not isinstance(name, str) or not hasattr(jnp, name):
        raise ArgumentError("there is no such dtype")
    try:
        found = jnp.dtype(name)
    except TypeError as error:
        raise ArgumentError("there is no such dtype") from error
    # NumPy takes other names too ("single", "double"); a file has one for each dtype.
    if found.name != name:
        raise ArgumentError(f"the dtype is called {found.name!r}")
    return found


def _whole(value: object) -> TypeGuard[int]:
    # JSON's true would otherwise be the integer 1.
    return isinstance(value, int) and not isinstance(value, bool)


def _sequence(value: object) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ArgumentError("it must be a list")
    return tuple(value)


def _bits(value: object) -> int:
    if not _whole(value) or not 1 <= value <= 16:
        raise ArgumentError("it must be a whole number from 1 to 16")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArgumentError("it must be a finite number")
    return value


def _floating(value: object) -> np.dtype:
    found = dtype_named(value)
    if not jnp.issubdtype(found, jnp.floating):
        raise ArgumentError("what is unpacked must be floating point")
    return found


def _layout(value: object) -> Layout:
    """Return a layout whose axes exist and have one purpose each.

    Fields with defaults may be missing at the end.
    """
    # Files that are older than stacks of layers have three fields.
    given = _sequence(value)
    missing = len(Layout._fields) - len(given)
    if not 0 <= missing <= len(Layout._field_defaults):
        raise ArgumentError(f"it must be a list of {', '.join(Layout._fields)}")
    found = dict(zip(Layout._fields, given, strict=False))
    shape = extents(found.pop("shape"))
    group_size = found.pop("group_size", None)
    if group_size is not None and not (_whole(group_size) and 1 <= group_size <= LARGEST):
        raise ArgumentError("group_size must be null or a whole number from 1 on")
    axes = {name: _axes(name, each, len(shape)) for name, each in found.items()}
    # An axis is of channels or of stacked layers, never both, and is named once.
    if len(set(sum(axes.values(), ()))) < sum(map(len, axes.values())):
        raise ArgumentError(f"an axis is named twice in {axes}")
    return Layout(shape=shape, group_size=group_size, **axes)


def _places(value: object) -> tuple[int, ...]:
    """Return axes of a shape that is checked with them."""
    axes = _sequence(value)
    if not all(_whole(a) and -RANK <= a < RANK for a in axes):
        raise ArgumentError("it must be a list of axes")
    return axes


def _axes(name: str, value: object, rank: int) -> tuple[int, ...]:
    axes = _sequence(value)
    if not all(_whole(a) and 0 <= a < rank for a in axes):
        raise ArgumentError(f"{name} must be axes of the shape, 0 to {rank - 1}")
    return axes


def _levels(value: object) -> Levels:
    # A table is one list of numbers, a float format two or three numbers.
    given = _sequence(value)
    if len(given) == 1:
        return Table(_ascending(_sequence(given[0])))
    if not 2 <= len(given) <= 3 or not all(map(_whole, given)):
        raise ArgumentError(
            "it must be a list of exponent_bits, mantissa_bits and reserved, or one list of numbers"
        )
    found = Float(*given)
    widths = 1 <= found.exponent_bits <= 7 and 0 <= found.mantissa_bits <= 8
    if not widths or not 0 <= found.reserved < 2 ** (found.bits - 1):
        raise ArgumentError(
            "exponents have 1 to 7 bits, mantissas 0 to 8, and fewer are reserved than there are"
        )
    return found


def _ascending(given: Sequence[object]) -> tuple[float, ...]:
    # Codes are looked up in float32, so a number that float32 rounds would be another one there.
    values = tuple(map(_number, given))
    with np.errstate(over="ignore"):
        rounded = np.array(values, np.float64).astype(np.float32)
    exact = len(values) <= 2**16 and (rounded == values).all()
    if not values or not exact or not (np.diff(rounded) > 0).all():
        raise ArgumentError("a table is 1 to 65,536 ascending float32 numbers")
    return values


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


FIELDS: dict[str, Callable[[object], object]] = {
    "bits": _bits,
    "shape": extents,
    "fill": _number,
    "dtype": _floating,
    "layout": _layout,
    "levels": _levels,
    "stack": _places,
    "columns": _places,
}
