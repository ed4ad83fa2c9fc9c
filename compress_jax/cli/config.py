"""Import a config file and call its function; errors name the line of the file."""

import contextlib
import inspect
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import cloudpickle

from compress_jax.core.errors import CompressError, ConfigError

if TYPE_CHECKING:  # imports the whole library, which showing a help text should not wait for
    from compress_jax.search import Experiment


def load_config(path: Path) -> Callable[..., object]:
    """Import a config file and return its ``config`` function.

    Args:
      path: a Python file with ``def config(bits: int = 4, ...) -> Experiment``.

    Returns:
      The function.

    Raises:
      ConfigError: if there is no such file, it cannot be imported, or it has no such function.
    """
    if not path.is_file():
        raise ConfigError(
            f"there is no config file {path}; give a Python file with a function 'config', as in "
            "configs/"
        )
    config = getattr(_import(path), "config", None)
    if not inspect.isfunction(config):
        raise ConfigError(
            f"{path} has no function 'config'; write 'def config(bits: int = 4) -> Experiment: "
            "...' in it"
        )
    # Types decide how the words of the command line are read.
    untyped = [
        name for name, p in inspect.signature(config).parameters.items() if p.annotation is p.empty
    ]
    if untyped:
        raise ConfigError(
            f"{path}: config's argument {untyped[0]!r} has no type; write it as '{untyped[0]}: "
            "int = ...'"
        )
    return config


def build(config: Callable[..., object], arguments: dict[str, object]) -> "Experiment":
    """Call a config function.

    Args:
      config: from `load_config`.
      arguments: its parameters by name.

    Returns:
      The Experiment it returns.

    Raises:
      ConfigError: if it fails, or returns something else.
      CompressError: as the pieces it calls do.
    """
    from compress_jax.search import Experiment

    path = Path(inspect.getfile(config))
    with _explained(path):
        experiment = config(**arguments)
    if not isinstance(experiment, Experiment):
        raise ConfigError(
            f"{path}: config returned a {type(experiment).__name__}, and should return an "
            "Experiment"
        )
    return experiment


def _import(path: Path) -> ModuleType:
    """Run a file as a module with a name of its own, and leave no cache.

    So a config file called jax.py does not shadow a package.
    """
    module = ModuleType(f"_compress_jax_config_{zlib.crc32(str(path.absolute()).encode()):08x}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and type hints of the file look it up
    # Other processes cannot import it: what they are given of it travels as code.
    cloudpickle.register_pickle_by_value(module)
    with _explained(path):
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    return module


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn any error in a user's file into one line that names the line of the file."""
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        # The last line of the user's file: what it called may have failed deep inside a library.
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename) == path]
        line = lines[-1] if lines else None
        # The file was never run, so no frame is of it.
        if isinstance(error, SyntaxError):
            line = error.lineno
        where = f"{path}, line {line}" if line else str(path)
        raise ConfigError(
            f"{where}: {type(error).__name__}: {error} (--debug shows the whole trace)"
        ) from error
