"""The ingredients of a stage of a run, by name: values, and the code of the user's functions.

Every stage directory has a record of them, ``made_of.json``: all that decides how the stage ends. A
directory whose record differs is refused.

The walk starts at real objects (a compression, an optimizer, a model, a loss) and follows what they
hold: closures, defaults, fields, globals that code mentions. Installed code counts by its name and
its package's version; user code (a config, modules beside it) by what it does, so that comments and
line numbers do not matter.
"""

import collections
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
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from compress_jax.core.describe import closure_of, code_content
from compress_jax.core.errors import ConfigError
from compress_jax.core.record import TEXT, Kind, mapping, read_record, sealed
from compress_jax.core.table import printable
from compress_jax.core.types import Array, Model
from compress_jax.data import Column
from compress_jax.export import write_atomically
from compress_jax.train._processes import is_first

MOST = 100_000  # entries; an object with more is no setting
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
# Where a run happens does not decide how it ends.
_OPAQUE = (jax.sharding.Mesh, jax.sharding.Sharding, jax.Device)
# Methods that change a list, a dict or a set.
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
# Attributes of a class of these types are its settings.
_SETTINGS = (*_PLAIN, list, tuple, dict, set, np.ndarray)
# Names by which code may reach any attribute of a module.
_DYNAMIC = {"getattr", "vars", "globals", "eval", "exec", "__dict__", "import_module", "__import__"}

_Container: TypeAlias = dict | list | tuple | set | frozenset


def ingredients(**named: object) -> dict[str, str]:
    """Return the values and the code that some objects are made of.

    Args:
      **named: any objects.

    Returns:
      ``{path: text}``; equal exactly if the objects hold equal values and do the same, in this
      process or another.

    Example:
      >>> import compress_jax as cj
      >>> four, eight = (ingredients(c=cj.quantize.uniform(bits)) for bits in (4, 8))
      >>> four == ingredients(c=cj.quantize.uniform(4)), four == eight
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
        self.visited: dict[int, tuple[str, object]] = {}
        self.packages = {"jax", "jaxlib", "flax", "optax", "numpy", "compress_jax"}

    def versions(self) -> dict[str, str]:
        """Return the versions of Python and of the packages of the objects."""
        versions = {"version of python": ".".join(map(str, sys.version_info[:2]))}
        for name in sorted(self.packages):
            if version := _version(name):
                versions[f"version of {name}"] = version
        return versions

    def visit(self, path: str, value: object) -> None:
        if len(self.found) >= MOST:
            return
        # By value: whether equal plain values are one object differs between processes.
        if isinstance(value, _PLAIN):
            self.found[path] = _short(repr(value))
        elif id(value) in self.visited:
            # Also what ends a cycle.
            self.found[path] = f"as {self.visited[id(value)][0]}"
        else:
            self.visited[id(value)] = path, value
            self._visit(path, value)

    def _each(self, pairs: Iterable[tuple[str, object]]) -> None:
        for path, value in pairs:
            self.visit(path, value)

    def _visit(self, path: str, value: object) -> None:
        """Dispatch on the type of an object that is visited for the first time."""
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            self._array(path, value)
        elif isinstance(value, Column):
            self._column(path, value)
        elif isinstance(value, type):
            self._class(path, value)
        elif isinstance(value, types.FunctionType):
            self._function(path, value)
        elif isinstance(value, types.ModuleType):
            self.found[path] = f"module {self._named(value.__name__)}"
        elif isinstance(value, dict | list | tuple | set | frozenset):
            self._container(path, value)
        else:
            self._object(path, value)

    def _container(self, path: str, value: _Container) -> None:
        if isinstance(value, dict):
            # Sorted, as equal dicts may differ in the order of insertion.
            keys = sorted(value, key=repr)
            pairs = [(f"{path}[{_short(repr(key), 60)}]", value[key]) for key in keys]
        elif isinstance(value, set | frozenset):
            ordered = sorted(value, key=repr)
            pairs = [(f"{path}{{{i}}}", each) for i, each in enumerate(ordered)]
        elif isinstance(value, list):
            pairs = [(f"{path}[{i}]", each) for i, each in enumerate(value)]
        elif names := getattr(value, "_fields", None):
            pairs = [(f"{path}.{name}", each) for name, each in zip(names, value, strict=True)]
        else:
            pairs = [(f"{path}({i})", each) for i, each in enumerate(value)]
        self._entries(path, value, pairs)

    def _entries(self, path: str, value: object, pairs: list[tuple[str, object]]) -> None:
        if not pairs or type(value) not in (dict, list, tuple):
            self.found[path] = f"{type(value).__name__} of {len(pairs)}"
        self._each(pairs)

    def _array(self, path: str, value: Array | np.generic) -> None:
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        # The bytes of an array of objects are addresses.
        if array.dtype == object:
            pairs = [(f"{path}[{i}]", each) for i, each in enumerate(array.ravel())]
            return self._entries(path, value, pairs)
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        short = f" {array.item()!r}" if array.size == 1 else ""
        self.found[path] = f"{array.dtype}{list(array.shape)}{short} {digest[:16]}"

    def _column(self, path: str, value: Column) -> None:
        """Visit an entry that stays on disk: some of its examples, and what makes them."""
        self.found[path] = f"{value.dtype}{list(value.shape)} {value.records.fingerprint[:16]}"
        self.visit(f"{path}: example", value.records.example)
        self.visit(f"{path}: augment", value.records.augment)

    def _object(self, path: str, value: Any) -> None:
        """Visit anything else: what it wraps, its fields, or its name."""
        if isinstance(value, os.PathLike | enum.Enum | np.dtype):
            self.found[path] = str(value)
        elif isinstance(value, types.MethodType):
            self._each([(f"{path}.self", value.__self__), (path + "()", value.__func__)])
        elif isinstance(value, functools.partial):
            self.visit(path + "()", value.func)
            self.visit(f"{path}.args", value.args)
            self.visit(f"{path}.keywords", value.keywords)
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
        # An installed class is known by its name and its package's version.
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
            elif isinstance(own, _SETTINGS) and not name.startswith("_"):
                self.visit(f"{path}.{name}", own)

    def _function(self, path: str, value: types.FunctionType) -> None:
        code = value.__code__
        module = value.__globals__.get("__name__", "")
        changed = _changed(code)
        library = _is_library(code.co_filename, module)
        if library:
            self.found[path] = f"{self._named(module)}.{value.__qualname__}"
        else:
            digest = hashlib.sha256(repr(code_content(code, value.__doc__)).encode()).hexdigest()
            self.found[path] = f"{value.__qualname__}, code {digest[:16]}"
            defaults = {"defaults": value.__defaults__, "keyword defaults": value.__kwdefaults__}
            self._each((f"{path}: {name}", held) for name, held in defaults.items() if held)
        # What a library's function closes over are options given by the user: bits, schedules.
        closure = _settings(closure_of(value), changed)
        self._each((f"{path}.{name}", each) for name, each in closure.items())
        if not library:
            # `import a.b` inside a function binds no global, but names the module.
            names = _names(code)
            imported = {name: sys.modules[name] for name in names & set(sys.modules)}
            self._globals(path, names, {**imported, **_settings(value.__globals__, changed)})

    def _globals(self, path: str, names: set[str], space: dict[str, object]) -> None:
        """Visit the globals of user code; of user modules, the attributes it mentions."""
        for name in sorted(names & set(space)):
            value = space[name]
            self.visit(f"{path} > {name}", value)
            if isinstance(value, types.ModuleType) and not _installed(value):
                # Code that may reach any attribute counts as if it reached all.
                wanted = set(vars(value)) if names & _DYNAMIC else names
                own = {key: each for key, each in vars(value).items() if not key.startswith("__")}
                for key in sorted(wanted & set(own)):
                    self.visit(f"{path} > {name}.{key}", own[key])

    def _named(self, module: str) -> str:
        self.packages.add(module.split(".")[0])
        return module if _installed(sys.modules.get(module)) else "own"


def _fields(value: object) -> list[tuple[str, object]]:
    """Return an object's fields by name, without a Linen module's parent and name."""
    if isinstance(value, np.random.Generator):
        return [("state", value.bit_generator.state)]
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        skip = ("parent", "name") if isinstance(value, nn.Module) else ()
        return [(name, getattr(value, name, None)) for name in fields if name not in skip]
    by_name: dict[str, object] = {}
    for base in type(value).__mro__:
        slots = getattr(base, "__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not name.startswith("__") and hasattr(value, name):
                by_name[name] = getattr(value, name)
    return sorted({**by_name, **getattr(value, "__dict__", {})}.items())


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*inner)


def _settings(variables: dict[str, object], changed: dict[str, bool]) -> dict[str, object]:
    """Return the variables that are settings.

    Not among them: those a function assigns, and the lists, dicts and sets it changes.
    """
    mutable = (list, dict, set, bytearray, collections.deque, np.ndarray)
    settings: dict[str, object] = {}
    for name, value in variables.items():
        assigned = changed.get(name, False)
        mutated = name in changed and isinstance(value, mutable)
        if not assigned and not mutated:
            settings[name] = value
    return settings


def _changed(code: types.CodeType) -> dict[str, bool]:
    """Return the outer variables that a function may change.

    True if it assigns them, False if it changes their content.
    """
    found: dict[str, bool] = {}
    assigned: list[str] = []
    # x.append(...) loads x right before the attribute; x[key] = ... pushes value, x, key.
    steps = list(dis.get_instructions(code))
    for i, step in enumerate(steps):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in _CHANGES:
            found |= _loaded(steps[i - 1])
        if step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            found |= _loaded(steps[i - 2])  # pushed before the key
        if step.opname in ("STORE_GLOBAL", "STORE_DEREF"):
            if step.argval in code.co_freevars or step.argval not in code.co_cellvars:
                assigned.append(step.argval)
    found |= dict.fromkeys(assigned, True)
    for inner in code.co_consts:
        # Functions inside change outer variables too, unless these are the function's own.
        if isinstance(inner, types.CodeType):
            of_inner = _changed(inner)
            found |= {name: of_inner[name] for name in of_inner if name not in code.co_cellvars}
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
        package = module.__name__.split(".")[0]
        return package in sys.stdlib_module_names and module.__name__ != "__main__"
    return _is_library(file, module.__name__)


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # of the standard library, or run from the source tree


def _short(text: str, max_length: int = 200) -> str:
    if len(text) <= max_length:
        return text
    return f"{text[:40]}... {hashlib.sha256(text.encode()).hexdigest()[:16]}"


# The record of a stage: what its directory was made of.

MADE_OF = "made_of.json"
_FORM = {
    "version": Kind("1, the version that is read here", lambda value: value == 1),
    "made_of": mapping(TEXT),
}


def require_same(directory: Path, made_of: dict[str, str]) -> None:
    """Check that a stage's directory was made of the same; in a new directory, write the record.

    Args:
      directory: of the stage.
      made_of: from `ingredients`.

    Raises:
      ConfigError: if it was made of something else; the message names what differs.
    """
    recorded = _read_made_of(directory)
    checkpoints = directory / "checkpoints"
    if recorded is not None:
        _compare(directory, recorded, made_of, f"delete {directory} to train it again")
    # A directory without checkpoints is new, or its run stopped before the first one.
    elif checkpoints.is_dir() and any(checkpoints.iterdir()):
        raise ConfigError(
            f"{directory} has checkpoints, but no {MADE_OF} that says what they were made of; they "
            "are of an earlier version or of another program. Choose another --workdir, or delete "
            f"{directory} to train it again"
        )
    elif is_first():
        write_atomically(directory / MADE_OF, sealed({"version": 1, "made_of": made_of}))


def require_same_model(directory: Path, model: Model) -> None:
    """Check that a stage trained the same model, if its directory has a record.

    Raises:
      ConfigError: if the model's fields or its code differ.
    """
    recorded = _read_made_of(directory)
    if recorded is not None:
        old = _of_model(recorded)
        new = _of_model(ingredients(model=model))
        _compare(directory, old, new, "its artifact is of the model as it was then")


def _of_model(made_of: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in made_of.items() if name.startswith("model")}


def _read_made_of(directory: Path) -> dict[str, str] | None:
    """Return the record of a stage, or None if its directory has none.

    Raises:
      ConfigError: if the record is damaged.
    """
    file = directory / MADE_OF
    if not os.path.lexists(file):
        return None
    advice = f"delete {directory} to train it again"
    return read_record(file, _FORM, advice, ConfigError)["made_of"]


def _compare(directory: Path, old: dict[str, str], new: dict[str, str], advice: str) -> None:
    """Raise a ConfigError with the first three entries that differ, if any do."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if not names:
        return
    missing = "not there"
    changes = [
        f"{name} was {old.get(name, missing)}, and now is {new.get(name, missing)}"
        for name in names[:3]
    ]
    more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
    text = f"{directory} was made of something else: {'; '.join(changes)}{more}. "
    raise ConfigError(printable(f"{text}Choose another --workdir, or {advice}"))
