"""Old names that still work for one version, with a warning that says the new one."""

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from compress_jax.core.errors import ArgumentError

P = ParamSpec("P")
R = TypeVar("R")


def renamed(names: Mapping[str, str], module: str) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` under which old names mean new ones.

    Args:
      names: ``{old name: new name}``, both of this module.
      module: its ``__name__``.

    Returns:
      The function; it warns with a DeprecationWarning and returns what the new name is.

    Example:
      >>> get = renamed({"old": "renamed"}, "compress_jax.core.deprecated")
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("ignore")
      ...     get("old") is renamed
      True
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = names[name]
        text = f"{module}.{name} is now {module}.{new}; the old name goes in the next version"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], new)

    return __getattr__


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take keyword arguments by their old names too.

    Args:
      names: ``old="new"`` for each.

    Returns:
      A decorator; the function it makes warns with a DeprecationWarning where an old name is used,
      and raises an ArgumentError where both names are.

    Example:
      >>> @renamed_arguments(rate="learning_rate")
      ... def train(learning_rate): return learning_rate
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("ignore")
      ...     train(rate=0.1)
      0.1
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise ArgumentError(f"{function.__name__}: give {new}= alone, not {old}= too")
                text = f"{function.__name__}: {old}= is now {new}=; it goes in the next version"
                warnings.warn(text, DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def positional_arguments(*names: str, after: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let keyword-only arguments be given by position too, where they once stood before inputs.

    Args:
      names: of the arguments, in the order in which they were given.
      after: how many positional arguments come before them.

    Returns:
      A decorator. Names that are given as keywords are not looked for among the positions.

    Example:
      >>> @positional_arguments("scale", after=1)
      ... def run(fn, *inputs, scale): return fn(*inputs) * scale
      >>> run(abs, -2, scale=10), run(abs, 10, -2)
      (20, 20)
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            # The positions after the first ``after`` belong, in order, to the names not yet given;
            # what follows them are inputs.
            missing = [name for name in names if name not in kwargs]
            values = args[after : after + len(missing)]
            given: Any = dict(zip(missing, values, strict=False))
            rest: Any = (*args[:after], *args[after + len(values) :])
            return function(*rest, **kwargs, **given)

        return call

    return decorate
