"""What each stage of a run was made of, kept beside its checkpoints, so that another's are never gone on with."""

import os
from pathlib import Path

import jax

from compress_jax.core.errors import ConfigError
from compress_jax.core.record import TEXT, Kind, mapping, read_record, sealed
from compress_jax.core.table import printable
from compress_jax.export import write_atomically

MADE_OF = "made_of.json"
_FORM = {
    "version": Kind("1, the version that is read here", lambda value: value == 1),
    "made_of": mapping(TEXT),
}


def read_made_of(directory: Path) -> dict[str, str] | None:
    """Return what a stage was made of, or None if its directory says nothing of it.

    Raises:
      ConfigError: if the record is damaged.
    """
    file = directory / MADE_OF
    if not os.path.lexists(file):
        return None
    return read_record(file, _FORM, f"delete {directory} to train it again", ConfigError)["made_of"]


def require_same(directory: Path, made_of: dict[str, str]) -> None:
    """See that a stage's directory is new, or was made of the same; say so in a new one.

    Args:
      directory: of the stage.
      made_of: from `ingredients`.

    Raises:
      ConfigError: if it was made of something else; it names what differs.
    """
    found = read_made_of(directory)
    if found is not None:
        _compare(directory, found, made_of, f"delete {directory} to train it again")
    elif (directory / "checkpoints").is_dir() and any((directory / "checkpoints").iterdir()):
        raise ConfigError(
            f"{directory} has checkpoints, but no {MADE_OF} that says what they were made of; "
            "they are of an earlier "
            f"version or of another program. Choose another --workdir, or delete {directory} to "
            "train it again"
        )
    elif jax.process_index() == 0:
        write_atomically(directory / MADE_OF, sealed({"version": 1, "made_of": made_of}))


def require_same_model(directory: Path, made_of: dict[str, str]) -> None:
    """See that a stage was of the same model, if its directory says what it was made of.

    Raises:
      ConfigError: if the model's fields or its code differ.
    """
    found = read_made_of(directory)
    if found is not None:
        old, new = (
            {name: text for name, text in each.items() if name.startswith("model")}
            for each in (found, made_of)
        )
        _compare(directory, old, new, "its artifact is of the model as it was then")


def _compare(directory: Path, old: dict[str, str], new: dict[str, str], advice: str) -> None:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if not names:
        return
    changes = [
        f"{name} was {_brief(old.get(name))}, and now is {_brief(new.get(name))}"
        for name in names[:3]
    ]
    more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
    raise ConfigError(
        printable(
            f"{directory} was made of something else: {'; '.join(changes)}{more}. Choose another "
            f"--workdir, or {advice}"
        )
    )


def _brief(text: str | None) -> str:
    return "not there" if text is None else text
