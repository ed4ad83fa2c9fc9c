"""The folder of a run: its name, what it remembers of the command, and the check that the same command continues it."""

import contextlib
import fcntl
import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from compress_jax.core.errors import ArtifactError, ConfigError
from compress_jax.export import write_atomically

CONFIG, RUN, LOG, LOCK = "config.py", "run.json", "log.txt", ".lock"
PACKAGES = ("compress_jax", "jax", "jaxlib", "flax", "optax", "numpy")


def default_workdir(config: Path, arguments: dict[str, Any], defaults: dict[str, Any]) -> Path:
    """Name the folder of a run after its config and the arguments that differ from their defaults.

    Args:
      config: the config file.
      arguments: by name.
      defaults: those there are, by name.

    Returns:
      A path below ``runs``, relative.

    Example:
      >>> default_workdir(Path("configs/digits.py"), {"bits": 3, "seed": 0}, {"bits": 4, "seed": 0}).as_posix()
      'runs/digits-bits=3'
    """
    given = {name: value for name, value in arguments.items() if name not in defaults or value != defaults[name]}
    parts = [config.stem, *(f"{name}={re.sub(r'[^A-Za-z0-9._+-]+', '_', str(value))}" for name, value in given.items())]
    return Path("runs") / "-".join(parts)[:200]


def describe(config: Path, arguments: dict[str, Any], flags: list[str]) -> dict[str, Any]:
    """Return what ``run.json`` keeps of a command, as JSON takes it."""
    known = json.loads(json.dumps(arguments, default=str))
    versions = {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}
    return {"config": config.as_posix(), "arguments": known, "flags": flags, "versions": versions}


def check_same(workdir: Path, source: bytes, described: dict[str, Any]) -> None:
    """See that a folder is new, or holds a run of the same config and arguments.

    Args:
      workdir: the folder.
      source: of the config file.
      described: from `describe`.

    Raises:
      ConfigError: if it holds another run, saying what differs.
    """
    if not (workdir / RUN).exists():
        return
    old, new = read_run(workdir)["arguments"], described["arguments"]
    for name in [name for name in {**old, **new} if (name in old, old.get(name)) != (name in new, new.get(name))]:
        was, now = (repr(a[name]) if name in a else "not there" for a in (old, new))
        raise ConfigError(f"{workdir} holds a run with {name} = {was}, and now it is {now}; {_advice(workdir)}")
    if not (workdir / CONFIG).exists() or (workdir / CONFIG).read_bytes() != source:
        raise ConfigError(f"{workdir} holds a run of another version of {described['config']}; {_advice(workdir)}")


def remember(workdir: Path, source: bytes, described: dict[str, Any]) -> None:
    """Write the config's source and ``run.json`` into a new folder; leave an old one as it is."""
    if not (workdir / RUN).exists():
        write_atomically(workdir / CONFIG, source)
        write_atomically(workdir / RUN, f"{json.dumps(described, indent=1)}\n".encode())


def read_run(workdir: Path) -> dict[str, Any]:
    """Return what ``run.json`` of a folder holds.

    Raises:
      ConfigError: if the folder is not one of a run.
    """
    try:
        return json.loads((workdir / RUN).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{workdir} is not the folder of a run (its {RUN} cannot be read); compress-jax run makes one"
        ) from error


@contextlib.contextmanager
def logging_to(workdir: Path, show: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Show lines and write them to ``log.txt``, from its beginning: a resumed run says all its decisions again.

    Args:
      workdir: the folder.
      show: receives each line too.

    Yields:
      ``say(line)``.
    """
    with (workdir / LOG).open("w", encoding="utf-8", buffering=1) as file:

        def say(line: str) -> None:
            file.write(f"{line}\n")
            show(line)

        yield say


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keep a second process out of a folder while the ``with`` block runs; the lock of a killed process is gone with it.

    Args:
      workdir: the folder; made if missing.

    Raises:
      ConfigError: if another process works in it.
      ArtifactError: if it cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("w")
    except OSError as error:
        raise ArtifactError(f"cannot write into {workdir}: {error.strerror}; choose another --workdir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another process runs in {workdir}; wait for it, or choose another --workdir") from error
        yield


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from the source tree
        return "not installed"


def _advice(workdir: Path) -> str:
    return f"choose another --workdir, or delete {workdir} to begin anew"
