"""Metrics on disk, as JSON lines and for TensorBoard, behind one small interface."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from tensorboardX import SummaryWriter


class Recorder(Protocol):
    """A destination of metrics.

    Example:
      >>> class Screen:
      ...     def write(self, step, values):
      ...         print(step, dict(values))
      ...     def close(self):
      ...         pass
      >>> import compress_jax as cj
      >>> recorder: cj.train.Recorder = Screen()
      >>> recorder.write(10, {"train/loss": 0.5})
      10 {'train/loss': 0.5}
    """

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of one step."""
        ...

    def close(self) -> None:
        """Finish; nothing may be written afterwards."""
        ...


class JsonLines:
    r"""A file of JSON lines such as ``{"step": 10, "train/loss": 0.5}``; NaN and inf become null.

    Each line goes to the operating system at once, in a single append, so that a killed process
    loses none. Nothing but the values is written (no time), so a resumed run leaves the very file
    an uninterrupted one does.

    Args:
      path: the file; its directory is made.
      resume_step: the step the run continues from. Lines of later steps, which will come again, and
        a line cut short by a kill are dropped.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> writer = JsonLines(path)
      >>> writer.write(10, {"train/loss": 0.5})
      >>> writer.close()
      >>> path.read_text()
      '{"step": 10, "train/loss": 0.5}\n'
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int = 0):
        """Open the file for appending, after dropping what will come again."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_after(path, resume_step)
        # Unbuffered: a line that was written is with the operating system, and survives a kill.
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        numbers = {name: float(value) for name, value in values.items()}
        # JSON has no NaN and no infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write((json.dumps({"step": step, **finite}) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """TensorBoard event files in a directory; a resumed run hides later steps of the old one.

    Args:
      directory: where the event files go.
      resume_step: the step the run continues from.

    Example:
      >>> import tempfile
      >>> directory = Path(tempfile.mkdtemp())
      >>> writer = TensorBoard(directory)
      >>> writer.write(10, {"train/loss": 0.5})
      >>> writer.close()
      >>> len(list(directory.glob("events.out.tfevents.*")))
      1
    """

    def __init__(self, directory: str | os.PathLike[str], resume_step: int = 0):
        """Start a new event file."""
        # TensorBoard hides the steps from this one on in files that are there already.
        purge = resume_step + 1 if resume_step else None
        self._writer = SummaryWriter(str(directory), purge_step=purge)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, np.float32(value), step)

    def close(self) -> None:
        """Write out what is buffered and close the file."""
        self._writer.close()


def _drop_after(path: Path, step: int) -> None:
    """Drop lines of later steps and cut lines; the file is replaced in one move, if at all."""
    if not path.exists():
        return
    old = path.read_bytes()
    kept = b"".join(line for line in old.splitlines(keepends=True) if _keep(line, step))
    if kept != old:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(kept)
        os.replace(temporary, path)


def _keep(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
