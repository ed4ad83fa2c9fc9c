"""The folder of a run: its name, its record of the command, and its lock."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from compress_jax.core.errors import ArtifactError, ConfigError
from compress_jax.core.record import read_record, sealed
from compress_jax.core.table import printable
from compress_jax.core.types import JsonObject
from compress_jax.export import write_atomically
from compress_jax.report._read import RUN_FORM, RUN_VERSION

CONFIG = "config.py"
RUN = "run.json"
LOG = "log.txt"
LOCK = ".lock"
LONGEST = 200  # letters of a folder's name; file systems allow 255 bytes
PACKAGES = ("compress_jax", "jax", "jaxlib", "flax", "optax", "numpy")


def default_workdir(
    config: Path, arguments: dict[str, object], defaults: dict[str, object]
) -> Path:
    """Name the folder of a run after its config and the arguments that differ from their defaults.

    Args:
      config: the config file.
      arguments: by name.
      defaults: those there are, by name.

    Returns:
      A path below ``runs``, relative.

    Example:
      >>> defaults = {"bits": 4, "seed": 0}
      >>> default_workdir(Path("configs/digits.py"), {"bits": 3, "seed": 0}, defaults).as_posix()
      'runs/digits-bits=3'
    """
    parts = [config.stem]
    for name, value in arguments.items():
        if name not in defaults or value != defaults[name]:
            parts.append(in_a_name(name, value))
    return Path("runs") / "-".join(parts)[:LONGEST]


def in_a_name(name: str, value: object) -> str:
    """Return an argument as a part of a folder's name.

    Example:
      >>> in_a_name("path", "/data/x y")
      'path=_data_x_y'
    """
    return f"{name}={re.sub(r'[^A-Za-z0-9._+-]+', '_', str(value))}"


def describe(
    config: Path, source: bytes, arguments: dict[str, object], flags: list[str]
) -> JsonObject:
    """Return the content of ``run.json`` for a command.

    Infinity and NaN become text, as JSON has neither.
    """
    # What JSON has no form for, such as a Path, is stored as text.
    known = _finite(json.loads(json.dumps(arguments, default=str)))
    versions = {name: package_version(name) for name in PACKAGES} | {
        "python": platform.python_version()
    }
    digest = hashlib.sha256(source).hexdigest()
    return {
        "version": RUN_VERSION,
        "config": config.as_posix(),
        "config_sha256": digest,
        "arguments": known,
        "flags": flags,
        "versions": versions,
    }


def check_same(workdir: Path, source: bytes, described: JsonObject, reuse: bool = False) -> None:
    """Check that a folder is new or empty, or holds a run of the same config and arguments.

    Args:
      workdir: the folder.
      source: of the config file.
      described: from `describe`.
      reuse: whether it may hold a run of other arguments or of another version of the config.

    Raises:
      ConfigError: if it holds another run, saying what differs, or files that are no run's.
    """
    if not os.path.lexists(workdir / RUN):
        return _require_empty(workdir)
    old = read_run(workdir)
    new = described
    # Nothing was made by the run before: it is replaced.
    if reuse or not _begun(workdir):
        return
    # Arguments first: they say more than a digest does.
    for name in {**old["arguments"], **new["arguments"]}:
        was = _given(old, name)
        now = _given(new, name)
        if was != now:
            raise ConfigError(
                f"{workdir} holds a run with {name} = {was}, and now it is {now}; "
                f"{_advice(workdir)}"
            )
    if _kept_digest(workdir, old) != new["config_sha256"]:
        change = _first_change(workdir, source)
        raise ConfigError(
            f"{workdir} holds a run of another version of {new['config']}: {change}; "
            f"{_advice(workdir)}"
        )


def remember(workdir: Path, source: bytes, described: JsonObject, reuse: bool = False) -> None:
    """Write ``run.json`` and the config's source, unless the folder has begun with them."""
    if reuse or not _begun(workdir) or not (workdir / RUN).exists():
        write_atomically(workdir / RUN, sealed(described))
    if not (workdir / CONFIG).is_file() or (workdir / CONFIG).read_bytes() != source:
        write_atomically(workdir / CONFIG, source)


def read_run(workdir: Path) -> JsonObject:
    """Return what ``run.json`` of a folder holds.

    Raises:
      ConfigError: if the folder is not one of a run, or the file is damaged.
    """
    if not os.path.lexists(workdir / RUN):
        raise ConfigError(
            f"{workdir} is not the folder of a run (it has no {RUN}); compress-jax run makes one"
        )
    advice = f"copy it from where it is whole, or {_advice(workdir)}"
    return read_record(workdir / RUN, RUN_FORM, advice, ConfigError)


def kept_config(workdir: Path) -> Path:
    """Return the file of the config's source in a folder, which is about to be executed.

    Its digest must be that of the config the run was made with.

    Raises:
      ConfigError: if it is missing or was changed.
    """
    file = workdir / CONFIG
    digest = _kept_digest(workdir, read_run(workdir))
    advice = "compress-jax run with the same config and arguments puts it back"
    try:
        source = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}; {advice}") from error
    if hashlib.sha256(source).hexdigest() != digest:
        raise ConfigError(
            f"{file} is not the config that this run was made of, so it is not executed; {advice}"
        )
    return file


def _others(workdir: Path, *ours: str) -> list[str]:
    """Return the files of a folder besides some, and besides their half-written copies."""
    if not workdir.is_dir():
        return []
    half_written = tuple(f".{own}." for own in ours)  # as `write_atomically` names them
    names = [entry.name for entry in workdir.iterdir()]
    return sorted(n for n in names if n not in ours and not n.startswith(half_written))


def _begun(workdir: Path) -> bool:
    """Return whether a run has made anything yet.

    Before that, a corrected config replaces a wrong one.
    """
    return bool(_others(workdir, RUN, CONFIG, LOG, LOCK))


def _require_empty(workdir: Path) -> None:
    """Refuse a folder with files of somebody else."""
    if strange := _others(workdir, RUN, LOCK):
        named = ", ".join(map(printable, strange[:3])) + (", ..." if len(strange) > 3 else "")
        raise ConfigError(
            f"{workdir} is not the folder of a run (it has no {RUN}), and it is not empty "
            f"({named}), so nothing is written there; choose another --workdir"
        )


def _kept_digest(workdir: Path, described: JsonObject) -> str:
    """Return the digest of the config of a run.

    A run of an earlier version recorded none; then it is that of the stored config file.
    """
    if described.get("config_sha256"):
        return described["config_sha256"]
    file = workdir / CONFIG
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _given(described: JsonObject, name: str) -> str:
    return repr(described["arguments"][name]) if name in described["arguments"] else "not there"


def _first_change(workdir: Path, source: bytes) -> str:
    """Return a sentence on the first line in which the config differs from the stored one."""
    try:
        stored = (workdir / CONFIG).read_bytes().decode(errors="replace").splitlines()
    except OSError:
        return "the one it was made of is not there any more"
    lines = source.decode(errors="replace").splitlines()
    for number, (old, new) in enumerate(itertools.zip_longest(stored, lines), 1):
        if old != new:
            was = "nothing" if old is None else repr(old.strip())
            now = "nothing" if new is None else repr(new.strip())
            return f"line {number} was {was}, and now is {now}"
    return "they differ in bytes that are no text"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def logging_to(workdir: Path, show: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Show lines and write them to ``log.txt``, from its beginning.

    A resumed run logs all its decisions again.

    Args:
      workdir: the folder.
      show: receives each line too.

    Yields:
      ``log_fn(line)``.
    """
    try:
        file = (workdir / LOG).open("w", encoding="utf-8", buffering=1)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {workdir / LOG}: {error.strerror}; remove it, or free the disk"
        ) from error
    with file:

        def log_fn(line: str) -> None:
            line = printable(line)
            file.write(f"{line}\n")  # line-buffered, so that a kill loses none
            show(line)

        yield log_fn


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keep a second process out of a folder while the ``with`` block runs.

    The operating system releases the lock of a killed process.

    Args:
      workdir: the folder; made if missing.

    Raises:
      ConfigError: if another process works in it.
      ArtifactError: if it cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # The lock is of the open file, not of its name: the file itself stays.
        file = (workdir / LOCK).open("w")
    except OSError as error:
        raise ArtifactError(
            f"cannot write into {workdir}: {error.strerror}; choose another --workdir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process runs in {workdir}; wait for it, or choose another --workdir"
            ) from error
        yield


def package_version(package: str) -> str:
    """Return the version of an installed package, or ``"not installed"``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from the source tree
        return "not installed"


def _advice(workdir: Path) -> str:
    return (
        f"choose another --workdir, or delete {workdir} to begin anew (run --reuse keeps what the "
        "change does not touch)"
    )
