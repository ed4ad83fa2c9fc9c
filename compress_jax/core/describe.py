"""Describe a function as text: its name and the values it closes over, equal for equal options."""

import dataclasses
import functools
import types
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

OURS = __name__.partition(".")[0] + "."
DEPTH = 8  # of functions within functions; deeper ones count by name alone


def describe(value: Any, depth: int = DEPTH) -> str:
    """Return a value as text: arrays by a digest, functions by name and closure.

    Two values that would make a compression behave differently get different texts; the text is the
    same in every process.

    Args:
      value: an option of a method: a number, a schedule, a key, another compression, ...
      depth: how far to look into functions that hold functions.

    Returns:
      The text.

    Example:
      >>> import functools, math
      >>> describe(0.5), describe({"a": (1, None)}), describe(functools.partial(math.pow, 2.0))
      ('0.5', "{'a': (1, None)}", 'math.pow(2.0)')
    """
    if isinstance(value, np.generic):
        return repr(value.item())
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, (jax.Array, np.ndarray)):
        return _array(value)
    if call := getattr(
        value, "call", None
    ):  # a Compression, or a quantizer of activations, knows its own call
        return str(call)
    if isinstance(value, (Mapping, tuple, list, set, frozenset)):
        return _container(value, depth)
    if isinstance(value, (type, np.dtype)):
        return getattr(value, "__name__", str(value))
    if dataclasses.is_dataclass(value):
        return _container(value, depth)
    if callable(value):
        return call_of("", value, depth=depth - 1)
    return type(value).__name__


def call_of(
    name: str, *functions: Callable[..., Any] | None, depth: int = DEPTH, **options: Any
) -> str:
    """Return the call that made some functions: ``name(option=value, ...)``.

    Args:
      name: of the call; empty for that of the function in which the first one was defined.
      functions: what the call returned.
      depth: how far to look into functions that hold functions.
      **options: further values that belong to the call.

    Returns:
      The text.

    Example:
      >>> def scaled(factor):
      ...     return lambda x: factor * x
      >>> call_of("", scaled(3)) == call_of("", scaled(3))
      True
      >>> call_of("", scaled(3)) == call_of("", scaled(4))
      False
    """
    found = {key: describe(value, depth) for key, value in options.items() if value is not None}
    names = []
    for fn in functions:
        if fn is not None and depth > 0:
            names.append(_gather(fn, found, depth))
    names += [""] if not names else []
    inside = ", ".join(
        f"{key}={value}" if key.isidentifier() else value for key, value in sorted(found.items())
    )
    return f"{name or names[0]}({inside})" if inside else (name or names[0])


def _gather(fn: Any, found: dict[str, str], depth: int) -> str:
    """Add the closure of a function to ``found``, local helpers included; return its name."""
    fn = _unwrapped(fn)
    if isinstance(fn, functools.partial):
        for i, value in enumerate(fn.args):
            found[f"{i}."] = describe(value, depth)  # no identifier: printed without its key
        found.update({key: describe(value, depth) for key, value in fn.keywords.items()})
        return _gather(fn.func, found, depth)
    if isinstance(fn, types.MethodType):
        _put(found, "of", describe(fn.__self__, depth))
        return fn.__func__.__qualname__
    if not isinstance(fn, types.FunctionType):
        module = getattr(fn, "__module__", None)
        own = getattr(fn, "__qualname__", type(fn).__name__)
        return f"{module}.{own}" if module else own
    maker = fn.__qualname__.partition(".<locals>")[0]
    if "<locals>" in fn.__qualname__ and not fn.__module__.startswith(
        OURS
    ):  # two functions of a user may share a name
        _put(found, f"{fn.__code__.co_name}.", f"#{_digest(fn.__code__):08x}")
    for i, default in enumerate(fn.__defaults__ or ()):
        _put(found, f"default{i}", describe(default, depth))
    cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
    for key, cell in cells:
        try:
            value = cell.cell_contents
        except ValueError:  # not yet assigned: a function that refers to itself
            continue
        inner = _unwrapped(value)
        same = (
            isinstance(inner, types.FunctionType)
            and inner.__qualname__.partition(".<locals>")[0] == maker
        )
        if same and inner is not fn and depth > 1 and "<locals>" in inner.__qualname__:
            _gather(inner, found, depth - 1)
        elif inner is not fn:
            _put(found, key, describe(value, depth - 1))
    return maker


def _put(found: dict[str, str], key: str, text: str) -> None:
    """Keep both of two different values of one name."""
    while found.get(key, text) != text:
        key += "_"
    found[key] = text


def _unwrapped(fn: Any) -> Any:
    """Return the Python function inside `jit`, custom derivatives and the like."""
    while not isinstance(fn, (types.FunctionType, types.MethodType, functools.partial)):
        inner = getattr(fn, "__wrapped__", None) or getattr(fn, "fun", None)
        if inner is None or inner is fn:
            return fn
        fn = inner
    return fn


def _digest(code: types.CodeType) -> int:
    """Return a checksum of compiled code and its constants, names of files and lines left out."""
    digest = zlib.crc32(code.co_code)
    for constant in code.co_consts:
        text = str(_digest(constant)) if isinstance(constant, types.CodeType) else repr(constant)
        digest = zlib.crc32(text.encode(), digest)
    return zlib.crc32(" ".join(code.co_names).encode(), digest)


def _array(x: Any) -> str:
    if isinstance(x, Tracer):
        return f"traced {x.dtype}{list(x.shape)}"
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        return f"key({', '.join(map(str, np.ravel(jax.random.key_data(x)).tolist()))})"
    values = np.asarray(x)
    if values.size == 1:
        return f"{values.dtype}({values.reshape(()).item()!r})"
    return f"{values.dtype}{list(values.shape)}#{zlib.crc32(values.tobytes()):08x}"


def _container(value: Any, depth: int) -> str:
    if depth <= 0:
        return type(value).__name__
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{describe(k, depth)}: {describe(v, depth - 1)}" for k, v in value.items())
            + "}"
        )
    names: list[str] = list(getattr(value, "_fields", ()))
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    if names:
        inside = [f"{name}={describe(getattr(value, name), depth - 1)}" for name in names]
        return f"{type(value).__name__}({', '.join(inside)})"
    return _sequence(value, depth)


def _sequence(value: Any, depth: int) -> str:
    texts = [describe(each, depth - 1) for each in value]
    texts = sorted(texts) if isinstance(value, (set, frozenset)) else texts
    comma = "," if isinstance(value, tuple) and len(texts) == 1 else ""
    return f"({', '.join(texts)}{comma})" if isinstance(value, tuple) else f"[{', '.join(texts)}]"
