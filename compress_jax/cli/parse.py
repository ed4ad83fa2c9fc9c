"""Parse arguments into a deferred call, through tyro; the docstrings are the help texts."""

import contextlib
import functools
import inspect
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from compress_jax.cli.config import load_config
from compress_jax.cli.console import fitted
from compress_jax.cli.processes import FLAGS
from compress_jax.core.errors import ConfigError
from compress_jax.core.types import JsonObject

T = TypeVar("T")
OWN_FLAGS = {"plan": ("--mesh", "--chip"), "sweep": ("--jobs", "--workdir")}
"""Flags of commands that take a config's flags too."""
LISTED = re.compile(r"\s|[*-] ")  # how a line of a list or a command begins

Workdir = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="DIR",
        help_behavior_hint="(default: runs/CONFIG-ARGUMENTS, such as runs/digits-bits=3)",
    ),
]


def parse(name: str, command: Callable[..., int], words: Sequence[str]) -> Callable[[], int]:
    """Parse the arguments of a command into a deferred call.

    Args:
      name: of the command.
      command: its function; the parameters are the flags.
      words: the arguments after the name.

    Returns:
      The call, not made yet: the parser treats some exceptions as wrong usage, and must not catch
      the command's own.

    Raises:
      SystemExit: with code 2 after explaining wrong usage, with code 0 after showing the help.
      ConfigError: if ``run`` is given a config that cannot be used.
    """
    if name == "run" and words and not words[0].startswith("-"):
        # The flags after a config are its own, so it is loaded before they can be parsed.
        config = Path(words[0])
        flags = list(words[1:])
        chosen, workdir = parse_config(load_config(config), flags, f"compress-jax run {config}")
        return functools.partial(command, config, workdir, chosen=chosen, flags=flags)
    known: JsonObject = {}
    if name in OWN_FLAGS and words and not words[0].startswith("-") and not _asks_help(words):
        own, flags = _own_flags(words[1:], OWN_FLAGS[name])
        # A sweep reads the config's flags itself, as each may have several values.
        known["flags"] = flags
        if name == "plan":
            config = Path(words[0])
            chosen, _ = parse_config(load_config(config), flags, f"compress-jax plan {config}")
            known = {"chosen": chosen}
        words = [words[0], *own]
    call = _cli(_deferred(command), f"compress-jax {name}", help_text(command), words)
    # Here, as the parser gives the parameters that it does not show their defaults.
    return functools.partial(call, **known)


def _own_flags(words: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate flags of a command, each with one value, from those of its config."""
    own: list[str] = []
    rest = list(words)
    for flag in names:
        if flag in rest[:-1]:
            place = rest.index(flag)
            own += rest[place : place + 2]
            del rest[place : place + 2]
    return own, rest


def _asks_help(words: Sequence[str]) -> bool:
    return bool({"-h", "--help"} & set(words))


def parse_config(
    config: Callable[..., object], flags: Sequence[str], prog: str
) -> tuple[JsonObject, Path | None]:
    """Read a config's arguments from the command line.

    Args:
      config: the config function; parameters, defaults and docstring become flags.
      flags: the words after the config's name.
      prog: shown in the help.

    Returns:
      ``(arguments, workdir)``: every parameter of the config by name, and ``--workdir`` if it was
        given.

    Raises:
      SystemExit: as `parse` does.
      ConfigError: if a parameter is named as a flag of ``run``, or the folder has no name.
    """
    taken = {"workdir", "debug", *FLAGS} & set(inspect.signature(config).parameters)
    if taken:
        raise ConfigError(
            f"{sorted(taken)[0]!r} is a flag of compress-jax run itself; rename the config's "
            "argument"
        )

    # Looks like the config to tyro, and returns the arguments in place of calling it.
    @functools.wraps(config)
    def arguments(**chosen: object) -> JsonObject:
        return chosen

    def both(chosen: JsonObject, workdir: Workdir = None) -> tuple[JsonObject, str | None]:
        """Return both.

        Args:
          chosen: of the config.
          workdir: folder of the run.
        """  # noqa: D417, D407
        return chosen, workdir

    # The name "" keeps the flags as they are: --bits, not --chosen.bits.
    both.__annotations__["chosen"] = Annotated[
        JsonObject, tyro.conf.arg(name="", constructor=arguments)
    ]
    found, workdir = _cli(both, prog, _description(config), flags)
    if workdir is not None and not workdir.strip():
        raise ConfigError(f"--workdir is empty ({workdir!r}); name a folder, or leave the flag out")
    return found, None if workdir is None else Path(workdir)


def summary(function: Callable[..., object]) -> str:
    """Return the first sentence of a docstring, for a list of commands."""
    return (inspect.getdoc(function) or "").split("\n")[0]


def help_text(function: Callable[..., object]) -> str:
    """Return a docstring without its sections on arguments and result.

    Args:
      function: any function.

    Returns:
      Its text; tyro shows the arguments beside their flags.

    Example:
      >>> help_text(summary)
      'Return the first sentence of a docstring, for a list of commands.'
    """
    lines = (inspect.getdoc(function) or "").split("\n")
    ends = [i for i, line in enumerate(lines) if line.strip() in ("Args:", "Returns:", "Raises:")]
    return "\n".join(lines[: ends[0] if ends else None]).strip()


def _cli(function: Callable[..., T], prog: str, description: str, words: Sequence[str]) -> T:
    """Call tyro, and wrap its help again.

    tyro breaks words where a paragraph is wider than the terminal.
    """
    if not _asks_help(words):
        return tyro.cli(function, prog=prog, description=description, args=words)
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            return tyro.cli(function, prog=prog, description=_joined(description), args=words)
    finally:  # tyro ends by SystemExit after it has printed the help
        print(re.sub(r"\n{3,}", "\n\n", fitted(text.getvalue())), end="")


def _joined(text: str) -> str:
    """Join the lines of each paragraph, but not those of lists and commands.

    tyro keeps some line ends, which are not where the terminal's are.
    """
    paragraphs = [part.split("\n") for part in text.split("\n\n")]
    return "\n\n".join(
        "\n".join(lines) if any(LISTED.match(line) for line in lines) else " ".join(lines)
        for lines in paragraphs
    )


def _description(config: Callable[..., object]) -> str:
    """Return the help text of a config: its function's docstring, then that of its file."""
    module = inspect.cleandoc(config.__globals__.get("__doc__") or "")
    return "\n\n".join(text for text in (help_text(config), module) if text)


def _deferred(command: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """Return a function that tyro parses like the command, and that returns the deferred call."""

    @functools.wraps(command)
    def defer(*args: Any, **kwargs: Any) -> Callable[[], int]:
        return functools.partial(command, *args, **kwargs)

    return defer
