"""What happens around every command: parsing, signals, errors as one line, exit codes."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from rich.markup import escape

from compress_jax.cli._eval import evaluate
from compress_jax.cli._export import export
from compress_jax.cli._inspect import inspect
from compress_jax.cli._report import report
from compress_jax.cli._run import run
from compress_jax.cli.console import stderr
from compress_jax.cli.parse import parse, summary
from compress_jax.cli.signals import Stopped, stopped_by_signals
from compress_jax.core.errors import CompressError

COMMANDS: dict[str, Callable[..., int]] = {
    "run": run,
    "eval": evaluate,
    "export": export,
    "inspect": inspect,
    "report": report,
}

HELP = """\
usage: compress-jax COMMAND ...

Make a Flax model smaller, and prove that it still works.

{commands}

A first run, of about two minutes:

  compress-jax run configs/digits.py
  compress-jax inspect runs/digits/artifact.safetensors

compress-jax COMMAND --help explains a command, and compress-jax run CONFIG --help the arguments of a config.
Exit codes: 0 done, 1 an error (one line; --debug shows where it came from), 2 wrong usage, 3 the requirement is not met,
4 an exported file fails its checks, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: the arguments; by default those of the process.

    Returns:
      The exit code: 0 done, 1 an error, 2 wrong usage, 3 requirement not met, 4 export fails, 130 or 143 stopped.

    Example:
      >>> main(["inspect", "--help"])  # doctest: +ELLIPSIS
      usage: compress-jax inspect ...
      0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or os.environ.get("COMPRESS_JAX_DEBUG", "0") != "0"
    words = [word for word in words if word != "--debug"]
    if not words or words[0] not in COMMANDS:
        return _no_command(words)
    with stopped_by_signals() as stop:
        try:
            code = _call(words)
        except BaseException as error:
            stopped = error if isinstance(error, Stopped) else stop.stopped  # a library may turn a stop into its own error
            if stopped is None and not isinstance(error, CompressError):
                raise
            if debug:
                traceback.print_exception(error)
            return _failed(error) if stopped is None else _stopped(words[0], stopped)
        return code if stop.stopped is None else _stopped(words[0], stop.stopped)


def _call(words: list[str]) -> int:
    """Parse and make the call; the parser leaves by SystemExit after showing the help or explaining what is wrong."""
    try:
        return parse(words[0], COMMANDS[words[0]], words[1:])()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1


def _failed(error: BaseException) -> int:
    """Say in one red line what was wrong, and return the exit code."""
    stderr().print(f"[bold red]error:[/] {escape(str(error))}")
    return 1


def _stopped(command: str, stopped: Stopped) -> int:
    """Say in one line that a signal stopped the command, and return the exit code."""
    advice = "; run the same command to continue" if command == "run" else ""
    stderr().print(f"{escape(str(stopped))}{advice}")
    return stopped.exit_code


def _no_command(words: list[str]) -> int:
    commands = "\n".join(f"  {name:<9}{summary(function)}" for name, function in COMMANDS.items())
    if words and words[0] in ("-h", "--help"):
        print(HELP.format(commands=commands), end="")
        return 0
    wrong = f"there is no command {words[0]!r}" if words else "which command?"
    print(f"compress-jax: {wrong}\n\n{commands}\n\nsee compress-jax --help", file=sys.stderr)
    return 2
