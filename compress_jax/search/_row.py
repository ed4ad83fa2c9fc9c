"""The row of a proposal beside its artifact, so that another budget measures nothing twice."""

from dataclasses import asdict
from pathlib import Path

from compress_jax.core.errors import ConfigError
from compress_jax.core.record import ANYTHING, TEXT, Kind, mapping, read_record, sealed
from compress_jax.core.types import JsonObject
from compress_jax.export import write_atomically
from compress_jax.search._judge import Assessment

ROW = "row.json"
FORM = {
    "version": Kind("1, the version that is read here", lambda value: value == 1),
    "made_of": mapping(TEXT),
    "row": mapping(ANYTHING),
}


def read_row(folder: Path, made_of: dict[str, str]) -> JsonObject | None:
    """Return what was measured of a proposal, if it was made of the same and its file is there.

    Args:
      folder: of the proposal.
      made_of: from `ingredients`.

    Returns:
      The fields of its `Assessment`, not judged yet; None if it must be measured.

    Raises:
      ConfigError: if the record is damaged.

    Example:
      >>> read_row(Path("/nowhere"), {}) is None
      True
    """
    file = folder / ROW
    if not file.is_file():
        return None
    record = read_record(file, FORM, f"delete {file} to measure anew", ConfigError)
    if record["made_of"] != made_of:
        return None
    artifact = folder / "artifact.safetensors"
    whole = artifact.is_file() and artifact.stat().st_size == record["row"].get("nbytes")
    return record["row"] if whole else None


def write_row(folder: Path, made_of: dict[str, str], row: Assessment) -> None:
    """Keep what was measured of a proposal.

    Args:
      folder: of the proposal.
      made_of: from `ingredients`.
      row: not judged yet.
    """
    record = {"version": 1, "made_of": made_of, "row": asdict(row)}
    write_atomically(folder / ROW, sealed(record))
