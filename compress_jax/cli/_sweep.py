"""The command that runs a config for all combinations of its arguments."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from compress_jax.cli.config import load_config
from compress_jax.cli.console import shown, stderr, stdout
from compress_jax.cli.processes import FLAGS, PARENT, flag_words, handed_on, split_flags
from compress_jax.core.errors import CompressError, ConfigError
from compress_jax.core.types import JsonObject

if TYPE_CHECKING:
    from compress_jax.cli._grid import Combination

STAGES = "stages"  # folder of the stages that runs share
ELSEWHERE = ("distributed", "coordinator", "process")  # flags of runs over several machines
GOOD = (0, 3)  # exit codes of a run that has finished; 3 is without a candidate that is accepted


def sweep(
    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")],
    workdir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    jobs: int = 1,
    *,
    flags: Annotated[list[str] | None, tyro.conf.Suppress] = None,
) -> int:
    """Run a config for every combination of several values of its arguments.

    CONFIG is that of compress-jax run, with its flags. Each may have several values, and flags of
    whole numbers ranges: 0:5 is 0 1 2 3 4, and 0:10:2 is 0 2 4 6 8.

      compress-jax sweep configs/digits.py --bits 2 3 4 --seed 0:5
        --jobs 2

    Each combination is a run in a folder of its own, such as runs/digits-sweep/bits=2,seed=0. Runs
    that have finished are not started again, so the same command continues a sweep that was
    stopped, and a longer list adds to it. A stage that is made of exactly the same in several runs,
    such as their teacher, is trained by one of them and copied by the others. A run that fails is
    listed, and the rest goes on; what it said is kept beside its folder. Other flags of
    compress-jax run, such as --devices, go to each run.

    Exit codes: 0 every run has finished, 1 a run failed, 130 or 143 stopped: the runs have saved
    what they have.

    Args:
      config: a Python file with a function 'config'; it comes before its flags.
      workdir: where the runs are kept; by default runs/CONFIG-sweep.
      jobs: runs at once.
      flags: of the config, and of compress-jax run.

    Returns:
      The exit code.
    """
    from compress_jax.cli._grid import combinations
    from compress_jax.cli.workdir import locked

    if jobs < 1:
        raise ConfigError(f"--jobs must be a whole number from 1; got {jobs}")
    passed_on, words = _passed_on(flags or [])
    runs = combinations(load_config(config), words, config)
    workdir = workdir or Path("runs") / f"{config.stem}-sweep"
    if (workdir / "run.json").exists():
        raise ConfigError(f"{workdir} is the folder of a run; choose another --workdir")
    with locked(workdir):
        todo = [run for run in runs if not _is_finished(config, workdir, run)]
        console = stdout()
        console.print(shown(f"{len(runs)} runs in {workdir}"))
        if len(todo) < len(runs):
            console.print(f"{len(runs) - len(todo)} of them had finished before")
        return _Sweep(config, workdir, passed_on, jobs, len(runs), console).carry_out(todo)


def _passed_on(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the flags of ``run`` itself, which every run is given, from those of the config."""
    own, words = split_flags(flags)
    if own.distributed or own.coordinator:
        raise ConfigError(
            "a sweep starts its runs on this machine; --distributed and --coordinator are for "
            "compress-jax run"
        )
    return flag_words(own, *(name for name in FLAGS if name not in ELSEWHERE)), words


def _is_finished(config: Path, workdir: Path, run: "Combination") -> bool:
    """Return whether a run's folder holds its results, made of the same config and arguments."""
    from compress_jax.cli.workdir import describe, read_run
    from compress_jax.report import read_results

    folder = workdir / run.name
    wanted = describe(config, config.read_bytes(), run.arguments, run.flags)
    try:
        read_results(folder)
        kept = read_run(folder)
    except CompressError:  # a damaged one is run again, which says what is wrong
        return False
    return all(kept.get(name) == wanted[name] for name in ("arguments", "config_sha256"))


class _Running(NamedTuple):
    """A run that was started."""

    run: "Combination"
    process: "subprocess.Popen[bytes]"


class _Sweep:
    """The runs of a sweep, some at once."""

    def __init__(
        self,
        config: Path,
        workdir: Path,
        passed_on: Sequence[str],
        jobs: int,
        total: int,
        console: Console,
    ):
        self.config = config
        self.workdir = workdir
        self.passed_on = passed_on
        self.jobs = jobs
        self.total = total
        self.console = console
        self.waiting: deque[Combination] = deque()
        self.running: list[_Running] = []
        self.processes: list[subprocess.Popen[bytes]] = []  # of runs that have ended too
        self.failed: list[str] = []
        self.begun = time.monotonic()

    def carry_out(self, todo: Sequence["Combination"]) -> int:
        """Start the runs, wait for them, and return the exit code."""
        self.waiting.extend(todo)
        with self._bar(len(todo)) as (bar, task), _ended(self.processes):
            with handed_on(self.processes) as signals:
                while (self.waiting and not signals) or self.running:
                    self._start_some(signals)
                    time.sleep(0.1)
                    for ended in self._collected():
                        if self._tell(ended, stopped=bool(signals)):
                            left = len(self.waiting) + len(self.running)
                            text = self._time_left(len(todo) - left, left)
                            bar.update(task, advance=1, left=text)
        if signals:
            name = signal.Signals(signals[0]).name
            stderr().print(f"stopped by {name}; run the same command to continue")
            return 128 + signals[0]
        return self._conclude()

    @contextlib.contextmanager
    def _bar(self, runs: int) -> Iterator[tuple[Progress, TaskID]]:
        """Show a bar on a terminal, and nothing elsewhere."""
        columns = (MofNCompleteColumn(), BarColumn(30), TextColumn("{task.fields[left]}"))
        bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        with bar:
            yield bar, bar.add_task("", total=self.total, completed=self.total - runs, left="")

    def _start_some(self, signals: Sequence[int]) -> None:
        """Start as many runs as there is room for."""
        while self.waiting and len(self.running) < self.jobs and not signals:
            self.running.append(self._start(self.waiting.popleft()))
            self.processes.append(self.running[-1].process)
            if signals:  # one that came while it was started was not handed on to it
                self.processes[-1].send_signal(signals[0])

    def _collected(self) -> list[_Running]:
        """Return the runs that have ended since the last look."""
        ended = [each for each in self.running if each.process.poll() is not None]
        self.running = [each for each in self.running if each not in ended]
        return ended

    def _start(self, run: "Combination") -> _Running:
        """Start a run; what it says goes to a file beside its folder."""
        folder = self.workdir / run.name
        share = [] if "--share" in self.passed_on else ["--share", str(self.workdir / STAGES)]
        command = [sys.executable, "-m", "compress_jax.cli", "run", str(self.config), *run.flags]
        environment = {**os.environ, PARENT: str(os.getpid())}
        if self.jobs > 1:  # else the first of them takes most of an accelerator's memory
            environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        with self._said(run).open("wb") as said:
            process = subprocess.Popen(
                [*command, *self.passed_on, *share, "--workdir", str(folder)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                # A terminal sends Ctrl-C to its whole group: these would then get it twice.
                start_new_session=True,
            )
        return _Running(run, process)

    def _said(self, run: "Combination") -> Path:
        return self.workdir / f"{run.name}.stderr.txt"

    def _tell(self, ended: _Running, *, stopped: bool) -> bool:
        """Print how a run ended; return whether it did, and was not stopped."""
        code = ended.process.returncode
        file = self._said(ended.run)
        name = ended.run.name
        if code not in GOOD and not stopped:
            self.failed.append(f"{name}: failed, {_exit(code)}: {_last_line(file)}")
            self._print(self.failed[-1])
            return True
        file.unlink(missing_ok=True)
        if code not in GOOD:
            self._print(f"{name}: stopped")
            return False
        self._print(f"{name}: {_result(self.workdir / name)}")
        for line in _copied(self.workdir / name):
            self._print(f"  {line}")
        return True

    def _print(self, text: str) -> None:
        self.console.print(shown(text))

    def _time_left(self, ended: int, left: int) -> str:
        """Return about how long the other runs take, by those that have ended.

        On a terminal the bar shows it; elsewhere it is printed.
        """
        if not left:
            return ""
        seconds = (time.monotonic() - self.begun) / ended * left
        text = f"about {duration(seconds)} left"
        if not self.console.is_terminal:
            self._print(f"{self.total - left} of {self.total} runs, {text}")
        return text

    def _conclude(self) -> int:
        done = self.total - len(self.failed)
        self._print(f"{done} of {self.total} runs finished")
        if not self.failed:
            self._print(f"compare them: compress-jax compare {self.workdir}")
            return 0
        console = stderr()
        console.print(f"[bold red]{len(self.failed)} failed[/]; the same command tries them again:")
        for line in self.failed:
            console.print(shown(f"  {line}"))
        return 1


@contextlib.contextmanager
def _ended(processes: "Sequence[subprocess.Popen[bytes]]") -> Iterator[None]:
    """Leave no process behind, should the block end by an error; each saves what it has."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait()


def duration(seconds: float) -> str:
    """Return a time in its largest unit.

    Example:
      >>> duration(41.2), duration(600), duration(9000)
      ('41 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _result(folder: Path) -> str:
    """Return what a run chose and how good it is."""
    from compress_jax.report import read_results
    from compress_jax.report._rows import ACCURACY, value_text

    results = read_results(folder)
    metric: JsonObject = results.get("metric") or ACCURACY
    row = next(row for row in results["rows"] if row["name"] == results["chosen"])
    unmet = "" if results["met"] else "; no candidate met the requirement"
    measured = value_text(row["test"], metric)
    return f"{row['name']}, test {metric['name']} {measured}, {row['nbytes']:,} bytes{unmet}"


def _copied(folder: Path) -> list[str]:
    """Return a sentence for each stage of a run that another one trained."""
    from compress_jax.search._shared import ORIGIN, origin

    lines = []
    for file in sorted(folder.rglob(ORIGIN)):
        source = Path(origin(file.parent) or "")
        near = os.path.relpath(source, folder.absolute().parent)
        lines.append(f"{file.parent.relative_to(folder)}: copied from {near}")
    return lines


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _last_line(file: Path) -> str:
    lines = file.read_bytes().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
