"""Describe how a function was made: its name and the values it closes over, as text.

Equal options give equal texts, in every process. `closure_of` and `code_content` also serve
`search`, which records what a stage of a run was made of.
"""

import contextlib
import dataclasses
import functools
import types
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from compress_jax.core.types import Array

OURS = __name__.partition(".")[0] + "."
DEPTH = 8  # of functions within functions; deeper ones count by name alone


def describe(value: object, depth: int = DEPTH) -> str:
    """Return a value as text: numbers as they are, arrays by digest, functions by closure.

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
    # A Compression, or a quantizer of activations, has its own call.
    if call := getattr(value, "call", None):
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
    name: str, *functions: Callable[..., object] | None, depth: int = DEPTH, **options: object
) -> str:
    """Return the call that made some functions, ``name(option=value, ...)``, with their closures.

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
      >>> calls = [call_of("", scaled(factor)) for factor in (3, 3, 4)]
      >>> calls[0] == calls[1], calls[0] == calls[2]
      (True, False)
    """
    found = {key: describe(value, depth) for key, value in options.items() if value is not None}
    names = []
    for fn in functions:
        if fn is not None and depth > 0:
            names.append(_gather(fn, found, depth))
    name = name or (names[0] if names else "")
    parts = [f"{k}={text}" if k.isidentifier() else text for k, text in sorted(found.items())]
    return f"{name}({', '.join(parts)})" if parts else name


def _gather(fn: object, found: dict[str, str], depth: int) -> str:
    """Add to ``found`` what a function holds; return the function's name.

    Helper functions of the same maker are included.
    """
    fn = _unwrapped(fn)
    if isinstance(fn, functools.partial):
        for i, value in enumerate(fn.args):
            # The key is no identifier, so `call_of` prints the value alone, as it was given.
            found[f"{i}."] = describe(value, depth)
        found.update({key: describe(value, depth) for key, value in fn.keywords.items()})
        return _gather(fn.func, found, depth)
    if isinstance(fn, types.MethodType):
        # A method of a NamedTuple of options: the options are all it holds.
        _put(found, "of", describe(fn.__self__, depth))
        return fn.__func__.__qualname__
    if not isinstance(fn, types.FunctionType):
        module = getattr(fn, "__module__", None)
        own = getattr(fn, "__qualname__", type(fn).__name__)
        return f"{module}.{own}" if module else own
    maker = fn.__qualname__.partition(".<locals>")[0]
    # Two functions of a user may share a name; their code tells them apart.
    if "<locals>" in fn.__qualname__ and not fn.__module__.startswith(OURS):
        content = repr(code_content(fn.__code__, fn.__doc__)).encode()
        _put(found, f"{fn.__code__.co_name}.", f"#{zlib.crc32(content):08x}")
    for i, default in enumerate(fn.__defaults__ or ()):
        _put(found, f"default{i}", describe(default, depth))
    for key, value in closure_of(fn).items():
        inner = _unwrapped(value)
        own = inner.__qualname__ if isinstance(inner, types.FunctionType) else ""
        # Helpers with the same maker close over its options too: they belong to the same call.
        same = own.partition(".<locals>")[0] == maker
        if same and inner is not fn and depth > 1 and "<locals>" in own:
            _gather(inner, found, depth - 1)
        elif inner is not fn:
            _put(found, key, describe(value, depth - 1))
    return maker


def _put(found: dict[str, str], key: str, text: str) -> None:
    """Keep both of two different values of one name."""
    while found.get(key, text) != text:
        key += "_"
    found[key] = text


def _unwrapped(fn: object) -> object:
    """Return the Python function inside `jit`, custom derivatives and the like."""
    while not isinstance(fn, (types.FunctionType, types.MethodType, functools.partial)):
        inner = getattr(fn, "__wrapped__", None) or getattr(fn, "fun", None)
        if inner is None or inner is fn:
            return fn
        fn = inner
    return fn


def closure_of(fn: types.FunctionType) -> dict[str, object]:
    """Return the variables that a function closes over, by name; unassigned ones are left out.

    Example:
      >>> def scaled(factor):
      ...     return lambda x: factor * x
      >>> closure_of(scaled(3))
      {'factor': 3}
    """
    found: dict[str, object] = {}
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a function that refers to itself, not yet assigned
            found[name] = cell.cell_contents
    return found


def code_content(code: types.CodeType, doc: str | None = None) -> tuple[object, ...]:
    """Return what compiled code does, without files, line numbers and its docstring.

    Args:
      code: of a function.
      doc: the function's docstring, which is one of the code's constants.

    Returns:
      A nested tuple whose ``repr`` is the same in every process.

    Example:
      >>> def documented(x):
      ...     '''Return twice x.'''
      ...     return 2 * x
      >>> "twice" in repr(code_content(documented.__code__, documented.__doc__))
      False
    """
    constants = [_constant(each) for each in code.co_consts if each != doc or each is None]
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    # Instructions name constants and variables by their place in these tuples.
    return (
        code.co_code,
        constants,
        code.co_names,
        code.co_varnames,
        code.co_freevars,
        code.co_cellvars,
        counts,
    )


def _constant(value: object) -> object:
    if isinstance(value, types.CodeType):
        return code_content(value)
    if isinstance(value, frozenset):  # its order differs between processes
        return f"frozenset {sorted(map(repr, value))}"
    return repr(value)


def _array(x: Array) -> str:
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
        pairs = [f"{describe(k, depth)}: {describe(v, depth - 1)}" for k, v in value.items()]
        return f"{{{', '.join(pairs)}}}"
    names: list[str] = list(getattr(value, "_fields", ()))
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    if names or dataclasses.is_dataclass(value):
        inside = [f"{name}={describe(getattr(value, name), depth - 1)}" for name in names]
        return f"{type(value).__name__}({', '.join(inside)})"
    return _sequence(value, depth)


def _sequence(value: Any, depth: int) -> str:
    texts = [describe(each, depth - 1) for each in value]
    # Sets of texts have another order in every process.
    texts = sorted(texts) if isinstance(value, (set, frozenset)) else texts
    comma = "," if isinstance(value, tuple) and len(texts) == 1 else ""
    return f"({', '.join(texts)}{comma})" if isinstance(value, tuple) else f"[{', '.join(texts)}]"
