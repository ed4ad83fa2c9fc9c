"""The combinations of a config's arguments, where flags have several values or ranges."""

import itertools
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from compress_jax.cli.parse import parse_config
from compress_jax.cli.workdir import LONGEST, in_a_name
from compress_jax.core.errors import ConfigError
from compress_jax.core.types import JsonObject

RANGE = re.compile(r"(-?\d+):(-?\d+)(?::(-?\d+))?")
MANY = (tuple, list, set, frozenset, dict)  # types of arguments that take several words themselves
DEFAULTS = "defaults"  # the name of a combination without arguments


class Combination(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: of its folder, such as ``bits=2,seed=0``.
      flags: the words of its arguments.
      arguments: of the config, all of them, by name.
    """

    name: str
    flags: list[str]
    arguments: JsonObject


def combinations(
    config: Callable[..., object], words: Sequence[str], file: Path
) -> list[Combination]:
    """Return the product of the values of all flags; those of the last flag change fastest.

    Args:
      config: the config function; its types say which flags take several words themselves.
      words: flags, such as ``--bits 2 3 4 --seed 0:5``. A range ``0:10:2`` of whole numbers has
        its end left out, as in Python.
      file: of the config, for messages.

    Returns:
      The combinations, without those that are there twice.

    Raises:
      SystemExit: with code 2 after explaining a wrong flag or value.
      ConfigError: if a range has no numbers, or names cannot tell combinations apart.

    Example:
      >>> def config(bits: int = 4, seed: int = 0) -> None: ...
      >>> words = ["--bits", "2", "3", "--seed", "0:2"]
      >>> [each.name for each in combinations(config, words, Path("digits.py"))]
      ['bits=2,seed=0', 'bits=2,seed=1', 'bits=3,seed=0', 'bits=3,seed=1']
    """
    types_of = typing.get_type_hints(config)
    choices = [_choices(flag, types_of) for flag in _flags(words)]
    given = [name for flag in _flags(words) if (name := _argument(flag[0], types_of))]
    found: dict[str, Combination] = {}
    for chosen in itertools.product(*choices):
        flags = [word for choice in chosen for word in choice]
        arguments, _ = parse_config(config, flags, f"compress-jax sweep {file}")
        parts = [in_a_name(name, arguments[name]) for name in dict.fromkeys(given)]
        name = ",".join(parts)[:LONGEST] or DEFAULTS
        if name in found and found[name].arguments != arguments:
            raise ConfigError(
                f"two combinations would both be called {name}; sweep over fewer arguments, or "
                "over shorter values"
            )
        found.setdefault(name, Combination(name, flags, arguments))
    return list(found.values())


def _flags(words: Sequence[str]) -> list[list[str]]:
    """Return each flag with its values; ``--bits=2`` is one with a value."""
    flags: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            flags.append(word.split("=", 1))
        elif flags:
            flags[-1].append(word)
        else:
            flags.append([word])  # no flag: the parser says so
    return flags


def _argument(flag: str, types_of: Mapping[str, object]) -> str | None:
    """Return the name of a flag's argument, or None if there is none."""
    name = flag.removeprefix("--").replace("-", "_")
    for each in (name, name.removeprefix("no_")):
        if each in types_of:
            return each
    return None


def _choices(flag: list[str], types_of: Mapping[str, object]) -> list[list[str]]:
    """Return the words of a flag for each of its values."""
    name, *values = flag
    kinds = _kinds(types_of.get(_argument(name, types_of) or ""))
    if not values or any(kind in MANY for kind in kinds):
        return [flag]
    if int in kinds:
        values = [each for value in values for each in _range(name, value)]
    if kinds == {bool}:
        return [_as_flag(name, value) for value in values]
    return [[name, value] for value in values]


def _kinds(annotation: object) -> set[object]:
    """Return the types that an annotation allows: ``tuple`` for ``tuple[int, ...] | None``."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(_kinds, typing.get_args(annotation)))
    return {origin or annotation}


def _range(flag: str, value: str) -> list[str]:
    """Return the numbers of a range as words, or the value if it is none."""
    match = RANGE.fullmatch(value)
    if match is None:
        return [value]
    begin, end, step = (int(number or 1) for number in match.groups())
    numbers = range(begin, end, step) if step else range(0)
    if not numbers:
        raise ConfigError(
            f"{flag} {value}: the range has no numbers; 0:5 is 0 1 2 3 4, and 0:10:2 is 0 2 4 6 8"
        )
    return list(map(str, numbers))


def _as_flag(name: str, value: str) -> list[str]:
    """Return ``--fast`` or ``--no-fast`` for true and false, which the parser reads alone."""
    if value.lower() not in ("true", "false"):
        return [name, value]  # wrong: the parser says so
    return [name if value.lower() == "true" else f"--no-{name.removeprefix('--')}"]
