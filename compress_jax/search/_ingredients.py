"""What a stage of a run is made of, by name: values, and the code of the functions that are one's own.

The walk starts at real objects (a compression, an optimizer, a model, a loss) and follows what they
hold: closures, defaults, fields, globals that code mentions. Code that is installed counts by its
name and its package's version; code of one's own (a config, modules beside it) by what it does, so
that comments and line numbers do not matter.
"""

import collections
import contextlib
import dataclasses
import dis
import enum
import functools
import hashlib
import importlib.metadata
import os
import site
import sys
import sysconfig
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

MOST = 100_000  # entries; what has more is no setting
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_OPAQUE = (
    jax.sharding.Mesh,
    jax.sharding.Sharding,
    jax.Device,
)  # where a run happens, not what it is
_CHANGES = {
    "append",
    "extend",
    "insert",
    "add",
    "update",
    "setdefault",
    "pop",
    "popitem",
    "remove",
    "discard",
    "clear",
}
_DYNAMIC = {"getattr", "vars", "globals", "eval", "exec", "__dict__", "import_module", "__import__"}


def ingredients(**named: Any) -> dict[str, str]:
    """Return what some objects are made of.

    Args:
      **named: any objects.

    Returns:
      ``{path: text}``; equal exactly if the objects hold equal values and do the same, in this
      process or another.

    Example:
      >>> from compress_jax.quantize import uniform
      >>> one, other = (ingredients(c=uniform(bits)) for bits in (4, 8))
      >>> one == ingredients(c=uniform(4)), one == other
      (True, False)
    """
    walk = _Walk()
    for name, value in named.items():
        walk.visit(name, value)
    return walk.found | walk.versions()


class _Walk:
    """The entries found so far, and the objects visited.

    The objects are referenced, so that no other object takes their ids.
    """

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self.seen: dict[int, tuple[str, Any]] = {}
        self.packages = {"jax", "jaxlib", "flax", "optax", "numpy", "compress_jax"}

    def versions(self) -> dict[str, str]:
        """Return the versions of Python and of the packages met."""
        own = {
            f"version of {name}": text for name in sorted(self.packages) if (text := _version(name))
        }
        return {"version of python": ".".join(map(str, sys.version_info[:2])), **own}

    def visit(self, path: str, value: Any) -> None:
        if len(self.found) >= MOST:
            return
        if isinstance(value, _PLAIN):
            self.found[path] = _short(repr(value))
        elif id(value) in self.seen:
            self.found[path] = f"as {self.seen[id(value)][0]}"
        else:
            self.seen[id(value)] = path, value
            self._visit(path, value)

    def _each(self, pairs: Iterable[tuple[str, Any]]) -> None:
        for path, value in pairs:
            self.visit(path, value)

    def _visit(self, path: str, value: Any) -> None:
        """Dispatch on the kind of an object that was not seen yet."""
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            self._array(path, value)
        elif isinstance(value, type):
            self._class(path, value)
        elif isinstance(value, types.FunctionType):
            self._function(path, value)
        elif isinstance(value, types.ModuleType):
            self.found[path] = f"module {self._named(value.__name__)}"
        elif isinstance(value, dict):
            self._container(
                path,
                value,
                [(f"{path}[{_short(repr(k), 60)}]", value[k]) for k in sorted(value, key=repr)],
            )
        elif isinstance(value, list | tuple):
            names = getattr(value, "_fields", None)
            number = "[{}]" if isinstance(value, list) else "({})"
            ends = (
                [f".{name}" for name in names]
                if names
                else [number.format(i) for i in range(len(value))]
            )
            self._container(
                path, value, [(path + end, each) for end, each in zip(ends, value, strict=True)]
            )
        elif isinstance(value, set | frozenset):
            self._container(
                path,
                value,
                [(f"{path}{{{i}}}", each) for i, each in enumerate(sorted(value, key=repr))],
            )
        else:
            self._object(path, value)

    def _container(self, path: str, value: Any, pairs: list[tuple[str, Any]]) -> None:
        if not pairs or type(value) not in (dict, list, tuple):
            self.found[path] = f"{type(value).__name__} of {len(pairs)}"
        self._each(pairs)

    def _array(self, path: str, value: Any) -> None:
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        if array.dtype == object:
            return self._container(
                path, value, [(f"{path}[{i}]", each) for i, each in enumerate(array.ravel())]
            )
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        short = f" {array.item()!r}" if array.size == 1 else ""
        self.found[path] = f"{array.dtype}{list(array.shape)}{short} {digest[:16]}"

    def _object(self, path: str, value: Any) -> None:
        """Visit anything else: what it wraps, its fields, or its name."""
        if isinstance(value, os.PathLike | enum.Enum | np.dtype):
            self.found[path] = str(value)
        elif isinstance(value, types.MethodType):
            self._each([(f"{path}.self", value.__self__), (path + "()", value.__func__)])
        elif isinstance(value, functools.partial):
            self._each(
                [
                    (path + "()", value.func),
                    (f"{path}.args", value.args),
                    (f"{path}.keywords", value.keywords),
                ]
            )
        elif hasattr(value, "__wrapped__"):  # jit, custom_jvp, lru_cache
            self.found[path] = type(value).__name__
            self.visit(path + "()", value.__wrapped__)
        elif isinstance(value, _OPAQUE) or isinstance(value, types.BuiltinFunctionType | np.ufunc):
            self.found[path] = str(getattr(value, "__name__", type(value).__name__))
        else:
            self.visit(f"{path}: type", type(value))
            self._each((f"{path}.{name}", each) for name, each in _fields(value))

    def _class(self, path: str, value: type) -> None:
        self.found[path] = f"{self._named(value.__module__)}.{value.__qualname__}"
        if _installed(sys.modules.get(value.__module__)):
            return
        self._each((f"{path}: base", base) for base in value.__bases__ if base is not object)
        for name, own in sorted(vars(value).items()):
            own = getattr(own, "__func__", own)  # of a classmethod or staticmethod
            if isinstance(own, property):
                self._each([(f"{path}.{name}", own.fget)])
            elif isinstance(own, types.FunctionType):
                if not own.__code__.co_filename.startswith("<"):  # else made by dataclass
                    self.visit(f"{path}.{name}", own)
            elif not name.startswith("_") and isinstance(
                own, (*_PLAIN, list, tuple, dict, set, np.ndarray)
            ):
                self.visit(f"{path}.{name}", own)

    def _function(self, path: str, value: types.FunctionType) -> None:
        code, module = value.__code__, value.__globals__.get("__name__", "")
        cells = zip(code.co_freevars, value.__closure__ or (), strict=True)
        changed = _changed(code)
        library = _is_library(code.co_filename, module)
        if library:
            self.found[path] = f"{self._named(module)}.{value.__qualname__}"
        else:
            digest = hashlib.sha256(repr(_meaning(code, value.__doc__)).encode()).hexdigest()
            self.found[path] = f"{value.__qualname__}, code {digest[:16]}"
            defaults = {"defaults": value.__defaults__, "keyword defaults": value.__kwdefaults__}
            self._each((f"{path}: {name}", held) for name, held in defaults.items() if held)
        self._each((f"{path}.{name}", each) for name, each in _kept(_cells(cells), changed).items())
        if not library:
            names = _names(code)
            loaded = {
                name: sys.modules[name] for name in names & set(sys.modules)
            }  # imported inside the function
            self._globals(path, names, {**loaded, **_kept(value.__globals__, changed)})

    def _globals(self, path: str, names: set[str], space: dict[str, Any]) -> None:
        """Visit the globals of user code; of user modules, the attributes it mentions."""
        for name in sorted(names & set(space)):
            value = space[name]
            self.visit(f"{path} > {name}", value)
            if isinstance(value, types.ModuleType) and not _installed(value):
                wanted = set(vars(value)) if names & _DYNAMIC else names
                own = {key: each for key, each in vars(value).items() if not key.startswith("__")}
                self._each(
                    (f"{path} > {name}.{key}", own[key]) for key in sorted(wanted & set(own))
                )

    def _named(self, module: str) -> str:
        self.packages.add(module.split(".")[0])
        return module if _installed(sys.modules.get(module)) else "own"


def _fields(value: Any) -> list[tuple[str, Any]]:
    """Return an object's fields by name, without a Linen module's parent and name."""
    if isinstance(value, np.random.Generator):
        return [("state", value.bit_generator.state)]
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        skip = ("parent", "name") if isinstance(value, nn.Module) else ()
        return [(name, getattr(value, name, None)) for name in fields if name not in skip]
    slots = [
        name for base in type(value).__mro__ for name in _as_tuple(getattr(base, "__slots__", ()))
    ]
    held = {
        name: getattr(value, name) for name in slots if name[:2] != "__" and hasattr(value, name)
    }
    return sorted({**held, **getattr(value, "__dict__", {})}.items())


def _as_tuple(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _meaning(code: types.CodeType, doc: str | None = None) -> tuple[Any, ...]:
    """Return what a piece of code does, without where it stands and what its docstring says."""
    consts = [
        _meaning(c) if isinstance(c, types.CodeType) else _constant(c)
        for c in code.co_consts
        if c != doc or c is None
    ]
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    return (
        code.co_code,
        consts,
        code.co_names,
        code.co_varnames,
        code.co_freevars,
        code.co_cellvars,
        counts,
    )


def _constant(value: Any) -> str:
    return f"frozenset {sorted(map(repr, value))}" if isinstance(value, frozenset) else repr(value)


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*inner)


def _cells(cells: Iterable[tuple[str, types.CellType]]) -> dict[str, Any]:
    """Return what a function holds by name; a cell that is not filled yet holds nothing."""
    found: dict[str, Any] = {}
    for name, cell in cells:
        with contextlib.suppress(ValueError):
            found[name] = cell.cell_contents
    return found


def _kept(held: dict[str, Any], changed: dict[str, bool]) -> dict[str, Any]:
    """Return the variables that are settings.

    Not among them: those a function assigns, and the lists, dicts and sets it changes.
    """
    keeps = (list, dict, set, bytearray, collections.deque, np.ndarray)
    return {
        n: x
        for n, x in held.items()
        if n not in changed or not (changed[n] or isinstance(x, keeps))
    }


def _changed(code: types.CodeType) -> dict[str, bool]:
    """Return the outer variables that a function may change.

    True if it assigns them, False if it changes their content.
    """
    found: dict[str, bool] = {}
    steps = list(dis.get_instructions(code))
    for i, step in enumerate(steps):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in _CHANGES:
            found |= _loaded(steps[i - 1])
        if step.opname in (
            "STORE_SUBSCR",
            "DELETE_SUBSCR",
        ):  # container, key; the value is below them
            found |= _loaded(steps[i - 2])
    stored = [step.argval for step in steps if step.opname in ("STORE_GLOBAL", "STORE_DEREF")]
    found |= {
        name: True for name in stored if name in code.co_freevars or name not in code.co_cellvars
    }
    for inner in (each for each in code.co_consts if isinstance(each, types.CodeType)):
        found |= {
            name: assigned
            for name, assigned in _changed(inner).items()
            if name not in code.co_cellvars
        }
    return found


def _loaded(step: dis.Instruction) -> dict[str, bool]:
    return {step.argval: False} if step.opname in ("LOAD_DEREF", "LOAD_GLOBAL", "LOAD_NAME") else {}


@functools.cache
def _library_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders |= {
        *site.getsitepackages(),
        site.getusersitepackages(),
        str(Path(__file__).resolve().parent.parent),
    }
    return tuple(f"{Path(folder).resolve()}{os.sep}" for folder in folders)


@functools.cache
def _is_library(file: str, module: str) -> bool:
    """Return whether code is installed, by its file, or by its module if it has no file."""
    if file.startswith("<"):
        return file.startswith("<frozen") or _installed(sys.modules.get(module))
    return str(Path(file).resolve()).startswith(_library_folders())


def _installed(module: types.ModuleType | None) -> bool:
    if module is None:
        return False
    file = getattr(module, "__file__", None)
    if file is None:  # built in, or a namespace
        return (
            module.__name__.split(".")[0] in sys.stdlib_module_names
            and module.__name__ != "__main__"
        )
    return _is_library(file, module.__name__)


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except (
        importlib.metadata.PackageNotFoundError
    ):  # of the standard library, or run from the source tree
        return None


def _short(text: str, most: int = 200) -> str:
    return (
        text
        if len(text) <= most
        else f"{text[:40]}... {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    )
