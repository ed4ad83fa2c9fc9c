"""What a run is made with beside its config: commits, machine, and the time it takes."""

import datetime
import json
import os
import platform
import subprocess
import time
from pathlib import Path

from compress_jax.core.types import JsonObject
from compress_jax.report._extra import SESSIONS

PATIENCE = 10  # seconds for git


def code_and_machine(config: Path) -> JsonObject:
    """Return the commits of this package and of a config, and what the machine is.

    Args:
      config: the config file.

    Returns:
      ``{"git": {...}, "hardware": {...}}``, all of it text; what cannot be found out is left out.
    """
    files = {"compress_jax": Path(__file__), "config": config}
    commits = {of: commit(file.absolute()) for of, file in files.items()}
    hardware = {
        "devices": devices(),
        "processor": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
    }
    return {"git": {of: each for of, each in commits.items() if each}, "hardware": hardware}


def devices() -> str:
    """Return JAX's devices as text, such as ``8 x cpu``."""
    import jax

    found = jax.devices()
    return f"{len(found)} x {found[0].device_kind}"


def commit(file: Path) -> str | None:
    """Return the commit of a file, and whether its folder was changed since.

    Args:
      file: absolute.

    Returns:
      The digest, in words where there are changes; None where no repository has the file: an
      installed package may lie in somebody else's.
    """
    if not _git(file.parent, "ls-files", file.name):
        return None
    found = _git(file.parent, "rev-parse", "HEAD")
    changed = _git(file.parent, "status", "--porcelain", "--untracked-files=no", ".")
    return f"{found}, with changes that are in no commit" if changed else found


def _git(folder: Path, *words: str) -> str | None:
    """Return what git prints, or None if there is no git or no repository."""
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


class Session:
    """The time of one command; its line goes to ``sessions.jsonl`` when its end is told."""

    def __init__(self, workdir: Path):
        """Begin now.

        Args:
          workdir: the folder of the run.
        """
        self.file = workdir / SESSIONS
        now = datetime.datetime.now(datetime.UTC)
        self.started = now.strftime("%Y-%m-%d %H:%M:%S")
        self.began = time.monotonic()

    def end(self, how: str) -> None:
        """Write the line.

        Args:
          how: such as ``finished``.
        """
        seconds = round(time.monotonic() - self.began, 1)
        line = {"started": self.started, "seconds": seconds, "ended": how, "devices": devices()}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")
