"""Stages that several runs share: trained by one of them, copied by the others.

Two stages are the same if their records (see `_ingredients`) are. The first run to begin one keeps
the others out of it by a lock, which the operating system releases if the run is killed.
"""

import contextlib
import contextvars
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from compress_jax.core.errors import ConfigError
from compress_jax.core.record import TEXT, read_record, sealed
from compress_jax.export import write_atomically
from compress_jax.search._ingredients import require_same
from compress_jax.train._processes import once

ORIGIN = "origin.json"  # in a stage that was copied: whose it is
CHECKPOINTS = "checkpoints"
WAIT = 0.2  # seconds between two looks at a stage that another run trains


class _Shared(NamedTuple):
    """Where finished stages are kept, and what is told of them."""

    folder: Path
    log_fn: Callable[[str], None]


_shared: contextvars.ContextVar[_Shared | None] = contextvars.ContextVar("shared", default=None)


@contextlib.contextmanager
def sharing(folder: str | Path, log_fn: Callable[[str], None] = print) -> Iterator[None]:
    """Share finished stages with other runs, within the ``with`` block.

    A stage (teacher, float32 student, candidate) that another run has finished, made of exactly the
    same, is copied from the folder in place of being trained; one that another run is training is
    waited for. What is copied has a file ``origin.json`` that names the run it is from.

    Args:
      folder: where finished stages are kept; made if missing, and the same for all runs. Files are
        linked where the file system can do so, and take no space of their own.
      log_fn: called with one line for each stage that is copied or waited for.

    Raises:
      ConfigError: when a stage begins, if the folder cannot be written.

    Example:
      >>> import compress_jax as cj
      >>> with cj.search.sharing("runs/stages"):
      ...     pass  # cj.search.compress(experiment, folder)
    """
    token = _shared.set(_Shared(Path(folder).absolute(), log_fn))
    try:
        yield
    finally:
        _shared.reset(token)


@contextlib.contextmanager
def shared_stage(directory: Path, made_of: dict[str, str], name: str) -> Iterator[None]:
    """Copy a stage that another run has finished, or keep what is finished in the block for others.

    Does nothing outside of `sharing`.

    Args:
      directory: of the stage.
      made_of: its record, from `ingredients`.
      name: of the stage.
    """
    shared = _shared.get()
    if shared is None:
        yield
        return
    text = json.dumps(made_of, sort_keys=True)
    kept = shared.folder / hashlib.sha256(text.encode()).hexdigest()[:32]
    with contextlib.ExitStack() as stack:
        # The first process alone looks and copies; the others wait, and find what it left.
        once(lambda: _wait(stack, kept, name, shared.log_fn))
        once(lambda: _take(kept, directory, made_of, name, shared.log_fn))
        yield
        once(lambda: _keep(kept, directory))


def _wait(
    stack: contextlib.ExitStack, kept: Path, name: str, log_fn: Callable[[str], None]
) -> None:
    """Wait until a stage is finished, or is this run's to train until the stack is closed."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(kept.with_suffix(".lock").open("w"))
    except OSError as error:
        raise ConfigError(
            f"cannot share stages in {kept.parent}: {error.strerror}; choose another folder"
        ) from error
    told = False
    while not (kept.is_dir() or _is_locked(file)):
        if not told:
            log_fn(f"{name}: another run trains the same, and is waited for")
        told = True
        time.sleep(WAIT)


def _is_locked(file: IO[str]) -> bool:
    """Lock an open file, unless another process holds it; return whether it is ours."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _take(
    kept: Path,
    directory: Path,
    made_of: dict[str, str],
    name: str,
    log_fn: Callable[[str], None],
) -> None:
    """Copy a stage that is finished, unless it has begun here, where it ends with the same."""
    if not kept.is_dir() or (directory / CHECKPOINTS).is_dir():
        return
    require_same(kept, made_of)
    _copy(kept, directory)
    log_fn(f"{name}: made of the same as {origin(directory)}, and copied from there")


def _keep(kept: Path, directory: Path) -> None:
    """Keep a finished stage for other runs."""
    if kept.is_dir() or not (directory / CHECKPOINTS).is_dir():
        return
    source = origin(directory) or str(directory)
    _copy(directory, kept, sealed({"stage": source}))


def origin(directory: Path) -> str | None:
    """Return the directory of the run that trained a stage, or None if it was trained here.

    Raises:
      ConfigError: if the record of it is damaged.
    """
    file = directory / ORIGIN
    if not file.is_file():
        return None
    return read_record(file, {"stage": TEXT}, f"remove {file}", ConfigError)["stage"]


def _copy(source: Path, target: Path, origin: bytes | None = None) -> None:
    """Copy a stage's directory in one move: the target is there as a whole, or not at all."""
    half = target.with_name(f".{target.name}.copied")
    shutil.rmtree(half, ignore_errors=True)  # of a killed process
    half.parent.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns("profile", "*.tmp")
    shutil.copytree(source, half, copy_function=_link, ignore=ignored)
    if origin is not None:
        write_atomically(half / ORIGIN, origin)
    shutil.rmtree(target, ignore_errors=True)  # a record without checkpoints
    half.rename(target)


def _link(source: str, target: str) -> None:
    """Link a file of a checkpoint, which is never changed in place; copy any other."""
    if f"{os.sep}{CHECKPOINTS}{os.sep}" in source:
        # File systems without links, and links across two of them.
        with contextlib.suppress(OSError):
            return os.link(source, target)
    shutil.copy2(source, target)
