"""The entry of the command line: ``run``, and the signals, errors and exit codes of all."""

import argparse
import contextlib
import dataclasses
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import tyro

from compress_jax.cli._commands import evaluate, export, inspect, report
from compress_jax.cli._compare import compare
from compress_jax.cli._language import print_comparison
from compress_jax.cli._plan import plan
from compress_jax.cli._sweep import sweep
from compress_jax.cli.config import build, load_config
from compress_jax.cli.console import fitted, shown, stderr, stdout
from compress_jax.cli.parse import parse, summary
from compress_jax.cli.processes import (
    LOST,
    emulate,
    end_with_parent,
    flag_words,
    join,
    launch,
    require_devices,
    split_flags,
)
from compress_jax.core.errors import CompressError, OtherProcessError
from compress_jax.core.table import printable
from compress_jax.core.types import JsonObject

if TYPE_CHECKING:
    from compress_jax.search import Experiment, Requirement, Result


# Stop on Ctrl-C and SIGTERM: one line and the exit code the shell expects, no traceback.


class Stopped(BaseException):
    """A signal asked the command to stop.

    It is not an Exception, so no ``except Exception`` on the way mistakes it for an error.

    Attributes:
      exit_code: what the process should end with, ``128 + signum``: 130 for Ctrl-C, 143 for
        SIGTERM.
    """

    def __init__(self, signum: int, sentence: str = ""):
        """Say which signal came."""
        self.exit_code = 128 + signum
        super().__init__(sentence or f"stopped by {signal.Signals(signum).name}")


@dataclass
class Stop:
    """Whether a signal came.

    Attributes:
      stopped: what was raised; it is stored here because code that runs outside Python may hide an
        exception.
    """

    stopped: Stopped | None = None


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """Raise `Stopped` inside the ``with`` block on SIGINT or SIGTERM.

    A second signal ends the process at once.

    While a network trains, `compress_jax.train.watch_signals` takes over, to finish the step and
    save it first. Outside the main thread, where Python allows no handlers, nothing is caught.

    Yields:
      The `Stop`, which remembers the signal.

    Example:
      >>> with stopped_by_signals() as stop:
      ...     try:
      ...         signal.raise_signal(signal.SIGTERM)
      ...     except Stopped as error:
      ...         print(error, stop.stopped is error)
      stopped by SIGTERM True
    """
    stop = Stop()
    signals: tuple[signal.Signals, ...] = ()
    if threading.current_thread() is threading.main_thread():
        signals = (signal.SIGINT, signal.SIGTERM)

    def handle(signum: int, frame: FrameType | None) -> None:
        stop.stopped = Stopped(signum)
        # A second signal ends the process, should the first be caught on its way.
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        raise stop.stopped

    previous = {signum: signal.signal(signum, handle) for signum in signals}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)


UNMET = 3  # exit code of a run without a candidate that meets the requirement
CLOSED = 141  # exit code if the pipe that the command prints into was closed


def run(
    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")],
    workdir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    *,
    chosen: Annotated[JsonObject | None, tyro.conf.Suppress] = None,
    flags: Annotated[list[str] | None, tyro.conf.Suppress] = None,
) -> int:
    """Train, compress and verify what a config describes.

    CONFIG is a Python file with a function 'config'; its arguments are flags. The first of these
    explains them, with the time the run takes and the numbers to expect:

      compress-jax run configs/digits.py --help
      compress-jax run configs/digits.py --bits 3

    The second leaves artifact.safetensors, results.json, log.txt, report.html, metrics and
    checkpoints in the folder runs/digits-bits=3.

    Several processes share a run and its folder. The first of these starts two here, of four
    emulated devices each; the second joins those of SLURM, GKE, TPU pods or Open MPI; the third is
    one of 64 anywhere:

      compress-jax run CONFIG --processes 2 --devices 4
      srun compress-jax run CONFIG --distributed
      compress-jax run CONFIG --processes 64 --process 3
        --coordinator HOST:PORT

    --profile 5 records five steps of each training with JAX's profiler, for TensorBoard and
    Perfetto, in profile/ beside its metrics. --peak-tflops 459 says what one device can do, where
    it is none that is known: utilization is a share of it. --share DIR keeps finished stages in
    DIR, and takes from there those made of exactly the same, so that runs with one teacher train it
    once.

    --reuse runs again in a folder with other arguments or another version of the config: what they
    do not change is not trained again, and what they change is put aside, never mixed in.

    A run that was stopped in any way continues where it was when the same command is given again,
    with any number of processes and devices.
    Exit code 3 means that no candidate met the requirement; the artifact is then the best there
    was.

    Args:
      config: a Python file with a function 'config'; it comes before its flags.
      workdir: where the run is kept.
      chosen: the config's arguments, all of them.
      flags: the words they were read from.

    Returns:
      The exit code.
    """
    from compress_jax.cli._machine import code_and_machine
    from compress_jax.cli.workdir import default_workdir, describe, remember
    from compress_jax.search._reuse import is_reusing
    from compress_jax.train._processes import in_order, once

    function = load_config(config)
    arguments = chosen or {}
    workdir = workdir or default_workdir(config, arguments, _defaults(function))
    source = config.read_bytes()
    described = describe(config, source, arguments, flags or [])
    with contextlib.ExitStack() as stack:
        once(lambda: _enter(stack, workdir, source, described))
        _quiet()
        # Remembered only when the config has built: one with an error can be corrected.
        experiment = in_order(lambda: build(function, arguments))
        kept = described | {"requirement": _as_json(experiment.requirement)}
        kept |= once(lambda: code_and_machine(config))
        once(lambda: remember(workdir, source, kept, is_reusing()))
        metadata = {name: described[name] for name in ("config", "arguments")}
        return _compress(experiment, workdir, metadata)


def _enter(
    stack: contextlib.ExitStack, workdir: Path, source: bytes, described: JsonObject
) -> None:
    """Keep a run's folder for this process, unless it holds another run."""
    from compress_jax.cli.workdir import check_same, locked
    from compress_jax.search._reuse import is_reusing

    reuse = is_reusing()
    check_same(workdir, source, described, reuse)  # before anything is written there
    stack.enter_context(locked(workdir))
    # Again, as another process may have begun a run there before the lock was held.
    check_same(workdir, source, described, reuse)


def _compress(experiment: "Experiment", workdir: Path, metadata: JsonObject) -> int:
    """Run the loop, print its results and write the report."""
    from compress_jax import search
    from compress_jax.cli._machine import Session
    from compress_jax.cli.workdir import logging_to
    from compress_jax.train import Interrupted
    from compress_jax.train._processes import is_first

    console = stdout()
    logging = logging_to(workdir, lambda line: console.print(shown(line)))
    session = Session(workdir)
    # The first process alone writes and prints.
    with logging if is_first() else contextlib.nullcontext(_say_nothing) as log_fn:
        try:
            result = search.compress(experiment, workdir, metadata=metadata, log_fn=log_fn)
        except Interrupted as stop:  # in the middle of training, whose state is saved by now
            if is_first():
                session.end("stopped")
            raise Stopped(stop.signum, str(stop)) from stop
    if not is_first():
        return 0
    session.end("finished")
    _show(workdir, result)
    return 0 if result.met else UNMET


def _say_nothing(line: str) -> None:
    """Log nothing."""


def _show(workdir: Path, result: "Result") -> None:
    """Print the results of a run and write its report."""
    from compress_jax import report

    console = stdout()
    results = report.read_results(workdir)
    table = report.results_table(results["rows"], results["chosen"], results.get("metric"))
    console.print(report.rich_table(table))
    if result.comparison is not None:
        sizes = {row.name: row.nbytes for row in result.rows}
        print_comparison(result.comparison, sizes, "Side by side")
    page = report.write(workdir, log_fn=lambda note: console.print(f"note: {shown(note)}"))
    console.print(f"artifact: {shown(workdir / result.artifact.name)}")
    console.print(f"report:   {shown(page)}")
    if not result.met:
        best = f"{shown(result.chosen.name)} is the best there was: {shown(result.chosen.reason)}"
        console.print(f"No candidate met the requirement; {best}.")


def _defaults(function: Callable[..., object]) -> dict[str, object]:
    parameters = signature(function).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def _as_json(requirement: "Requirement") -> JsonObject:
    """Return what is required; JSON has no infinity, so no limit on the bytes is null."""
    always = ("max_drop", "min_ratio", "max_bytes", "reference")
    found: JsonObject = {}
    for each in dataclasses.fields(requirement):
        value = getattr(requirement, each.name)
        plain = value in (each.default, {})
        if each.name in always or not plain:
            found[each.name] = None if value == math.inf else value
    return found


def _quiet() -> None:
    """Silence orbax, JAX and TFDS below warnings; errors are raised and printed once."""
    import logging

    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)  # orbax logs whole traces of what it then raises
    for name in ("orbax", "jax", "tensorflow_datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)


COMMANDS: dict[str, Callable[..., int]] = {
    "run": run,
    "eval": evaluate,
    "export": export,
    "inspect": inspect,
    "report": report,
    "plan": plan,
    "sweep": sweep,
    "compare": compare,
}

HELP = """\
usage: compress-jax COMMAND ...

Make a Flax model smaller, and prove that it still works.

{commands}

A first run, of about two minutes:

  compress-jax run configs/digits.py
  compress-jax inspect runs/digits/artifact.safetensors

compress-jax COMMAND --help explains a command, compress-jax run CONFIG --help the arguments of a \
config. compress-jax --version prints the versions of what a run depends on.

Exit codes:
  0    done
  1    an error, printed as one line (--debug shows the trace); of eval, also: the numbers differ;
       of sweep: a run failed
  2    wrong usage
  3    no candidate met the requirement; the artifact is the best there was
  4    an exported file fails its checks
  75   another process of the run failed or was lost
  130  stopped by Ctrl-C
  141  the pipe it prints into was closed, as by head
  143  stopped by SIGTERM
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: the arguments; by default those of the process.

    Returns:
      The exit code: 0 done, 1 an error, 2 wrong usage, 3 requirement not met, 4 export fails, 130
      or 143 stopped, 141 the pipe was closed.

    Example:
      >>> main(["inspect", "--help"])  # doctest: +ELLIPSIS
      usage: compress-jax inspect ...
      0
    """
    _open_what_is_closed()
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, where a closed pipe is caught
    except BrokenPipeError:  # the reader has closed the pipe; the files of a run stay
        # Python flushes stdout when it exits, and would report the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    return code


def _open_what_is_closed() -> None:
    """Let output that the shell has closed (``>&-``) go nowhere; Python has None for it then."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def _main(words: list[str]) -> int:
    debug = "--debug" in words or os.environ.get("COMPRESS_JAX_DEBUG", "0") != "0"
    words = [word for word in words if word != "--debug"]  # a flag of every command
    if not words or words[0] not in COMMANDS:
        return _no_command(words)
    with stopped_by_signals() as stop:
        try:
            code = _over_processes(words) if words[0] in ("run", "plan") else _call(words)
        except BrokenPipeError:
            raise
        except BaseException as error:
            # A library may have turned the signal into an error of its own.
            stopped = error if isinstance(error, Stopped) else stop.stopped
            if stopped is None and not isinstance(error, CompressError | OSError):
                if not _is_loss(error):
                    raise
                text = "another process was lost; run the same command to continue"
                error = OtherProcessError(text)
            if debug:
                traceback.print_exception(error)
            if stopped is not None:
                return _stopped(words[0], stopped)
            code = _failed(error)
            if _is_one_of_several():
                # An orderly end would wait for the others, and these wait for this one.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            return code
        # Code outside Python may have hidden the exception and returned as if all were done.
        return code if stop.stopped is None else _stopped(words[0], stop.stopped)


def _over_processes(words: list[str]) -> int:
    """Run a config in this process, with others of a cluster, or in several that are started."""
    command, *rest = words
    try:
        flags, rest = split_flags(rest)
    except SystemExit:  # wrong usage, which the parser has explained
        return 2
    if {"-h", "--help"} & set(rest):
        return _call([command, *rest])
    end_with_parent()
    # All this before the config is read, as it may ask for devices.
    if flags.devices:
        emulate(flags.devices)
    if flags.coordinator or flags.distributed:
        join(flags)
    elif flags.processes:
        words = flag_words(flags, "profile", "peak_tflops", "share", "reuse")
        return launch([*rest, *words], flags.processes)
    if flags.devices:
        require_devices(flags.devices)
    with contextlib.ExitStack() as stack:
        _enter_options(stack, flags)
        return _call([command, *rest])


def _enter_options(stack: contextlib.ExitStack, flags: argparse.Namespace) -> None:
    """Enter what the flags of a run ask for, until the stack is closed."""

    def tell(line: str) -> None:
        stdout().print(shown(line))

    if flags.profile is not None:
        from compress_jax.train import profiling

        stack.enter_context(profiling(flags.profile))
    if flags.peak_tflops is not None:
        from compress_jax.train import peak_flops

        stack.enter_context(peak_flops(1e12 * flags.peak_tflops))
    if flags.share is not None:
        from compress_jax.search import sharing

        stack.enter_context(sharing(flags.share, tell))
    if flags.reuse:
        from compress_jax.search import reusing

        stack.enter_context(reusing(tell))


def _call(words: list[str]) -> int:
    """Parse the arguments and make the call.

    The parser raises SystemExit after it shows the help or explains what is wrong.
    """
    try:
        return parse(words[0], COMMANDS[words[0]], words[1:])()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1


def _failed(error: BaseException) -> int:
    """Print in one line what was wrong, and return the exit code."""
    text: object = error
    if isinstance(error, OSError):  # the disk, mostly
        where = f"{error.filename}: " if error.filename else ""
        advice = "see that the disk is writable and not full, and run the command again"
        text = f"{where}{error.strerror or error}; {advice}"
    stderr().print(f"[bold red]error:[/] {shown(text)}")
    return LOST if isinstance(error, OtherProcessError) else 1


def _is_one_of_several() -> bool:
    """Return whether this process has joined others; where JAX is not there yet, it has not."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _is_loss(error: BaseException) -> bool:
    """Return whether an error means that another process of the run is gone."""
    if not _is_one_of_several():
        return False
    from compress_jax.train._processes import is_loss

    return is_loss(error)


def _stopped(command: str, stopped: Stopped) -> int:
    """Print in one line that a signal stopped the command, and return the exit code."""
    advice = "; run the same command to continue" if command in ("run", "sweep") else ""
    stderr().print(f"{shown(stopped)}{advice}")
    return stopped.exit_code


def _no_command(words: list[str]) -> int:
    commands = "\n".join(f"  {name:<9}{summary(function)}" for name, function in COMMANDS.items())
    if words and words[0] in ("-h", "--help"):
        print(fitted(HELP.format(commands=commands)), end="")
        return 0
    if words and words[0] == "--version":
        from compress_jax.cli._version import versions

        print("\n".join(versions()))
        return 0
    wrong = f"there is no command {words[0]!r}" if words else "which command?"
    text = f"compress-jax: {wrong}\n\n{commands}\n\nsee compress-jax --help"
    print(fitted(printable(text, lines=True)), file=sys.stderr)
    return 2
