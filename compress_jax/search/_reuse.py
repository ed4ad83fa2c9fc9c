"""Run again with other settings: keep what they do not change, put aside what they do."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from pathlib import Path

from compress_jax.core.errors import ConfigError
from compress_jax.search._ingredients import require_same
from compress_jax.train._processes import once

Tell = Callable[[str], None]

_reusing: contextvars.ContextVar[Tell | None] = contextvars.ContextVar("reusing", default=None)


@contextlib.contextmanager
def reusing(log_fn: Tell = print) -> Iterator[None]:
    """Let `compress` use a folder of an experiment with other settings, within the ``with`` block.

    A stage that is made of the same is not trained again. Another one that has its folder is put
    aside, as ``FOLDER~1``, and trained anew: the two are never mixed. Without this it is refused.

    Args:
      log_fn: called with one line for each stage that is put aside.

    Example:
      >>> import compress_jax as cj
      >>> with cj.search.reusing():
      ...     pass  # cj.search.compress(experiment, folder)
    """
    token = _reusing.set(log_fn)
    try:
        yield
    finally:
        _reusing.reset(token)


def is_reusing() -> bool:
    """Return whether this is within a block of `reusing`."""
    return _reusing.get() is not None


def begin_stage(directory: Path, made_of: dict[str, str]) -> None:
    """Check that a stage's folder was made of the same, as `require_same` does, or put it aside.

    Args:
      directory: of the stage.
      made_of: from `ingredients`.

    Raises:
      ConfigError: if it was made of something else, outside of `reusing`.
    """
    log_fn = _reusing.get()
    try:
        require_same(directory, made_of)
    except ConfigError as error:
        if log_fn is None:
            raise
        aside = once(lambda: _put_aside(directory))
        log_fn(f"{directory} is put aside as {Path(aside).name}, and made anew: {error}")
        require_same(directory, made_of)


def _put_aside(directory: Path) -> str:
    """Rename a folder, and return its new name."""
    number = 1
    while (aside := directory.with_name(f"{directory.name}~{number}")).exists():
        number += 1
    directory.rename(aside)
    return str(aside)
