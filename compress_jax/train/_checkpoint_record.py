"""The record of a checkpoint: shape, dtype and checksum of every leaf, and what was measured."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import NotRequired, TypedDict

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import future

from compress_jax.core.record import ANYTHING, COUNT, FLAG, TEXT, Kind, deviation, mapping, optional
from compress_jax.core.types import Array, JsonObject
from compress_jax.train._checksums import checksum, ended

FILE = Path("meta") / "metadata"  # in the folder of a step

_FLOAT = Kind("a number", lambda value: isinstance(value, float))  # NaN among them
_NAME = Kind("a name", lambda value: isinstance(value, str) and value != "")
_FORM = {
    "leaves": mapping({"shape": [COUNT], "dtype": TEXT, "checksum": optional(TEXT)}),
    "made_by": optional([TEXT]),
    "metrics": optional(mapping(_FLOAT)),
    "best": optional({"metric": _NAME, "higher_is_better": FLAG}),
    "sha256": ANYTHING,
}


class DamagedError(Exception):
    """What is on disk is not what was saved."""


class LeafRecord(TypedDict):
    """What a checkpoint's record says of one leaf; earlier versions wrote sha256, for some."""

    shape: list[int]
    dtype: str
    checksum: NotRequired[str]
    sha256: NotRequired[str | None]


class RecordHandler(ocp.JsonCheckpointHandler):
    """Writes the record in the background, so that no step waits for the checksums."""

    async def async_save(self, directory: Path, args: "SaveRecord") -> list[future.Future]:
        """Begin to write the record into the directory."""
        written = self._write(directory, args)
        return [future.CommitFutureAwaitingContractedSignals(written, name="record")]

    async def _write(self, directory: Path, args: "SaveRecord") -> None:
        if jax.process_index() > 0:
            return
        leaves = {name: entry(x, ended(args.sums[name])) for name, x in args.shapes.items()}
        meta = {**args.meta, "leaves": leaves}
        (directory / FILE.name).write_text(json.dumps({**meta, "sha256": _digest(meta)}))


@ocp.args.register_with_handler(RecordHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class SaveRecord(ocp.args.CheckpointArgs):
    """What the record is made of: shapes, and of each leaf what `begun` returns."""

    meta: JsonObject
    shapes: dict[str, jax.ShapeDtypeStruct]
    sums: dict[str, Array]


def entry(array: jax.Array | jax.ShapeDtypeStruct, sums: Array) -> LeafRecord:
    """Return what is recorded of a leaf."""
    first, second = np.asarray(sums).tolist()
    text = f"{first:08x}{second:08x}"
    return {"shape": list(array.shape), "dtype": str(array.dtype), "checksum": text}


def verified(meta: JsonObject) -> JsonObject:
    """Return a record that was read, if it is what was written.

    Raises:
      DamagedError: if it is not.
    """
    # The form first: what has another one may have no digest either.
    if wrong := deviation(meta, _FORM):
        raise DamagedError(f"its record is not what was saved: {wrong}")
    if meta.get("sha256") != _digest(meta):
        raise DamagedError("its record differs from what was saved")
    return meta


def read(folder: Path) -> JsonObject:
    """Return the record in the folder of a step.

    Raises:
      DamagedError: if it cannot be read, or is not what was written.
    """
    try:
        return verified(json.loads((folder / FILE).read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"its record cannot be read ({type(error).__name__})") from error


def _digest(meta: JsonObject) -> str:
    """Return the digest of what a record says of leaves and evaluation."""
    content = {name: meta[name] for name in ("leaves", "metrics", "best") if name in meta}
    # A record without an evaluation has the digest that earlier versions wrote.
    covered = content["leaves"] if len(content) == 1 else content
    # Sorted: a record that was read back need not have the order in which it was written.
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def is_known(array: jax.Array, entry: LeafRecord) -> bool:
    """Tell whether the record has something that this process can compare an array with.

    Earlier versions hashed whole arrays, and so none of which other processes held a part.
    """
    return "checksum" in entry or bool(entry.get("sha256") and array.is_fully_addressable)


def is_whole(array: jax.Array, recorded: LeafRecord) -> bool:
    """Tell whether an array is what was saved, as far as the record knows."""
    if "checksum" in recorded:
        return entry(array, checksum(array)) == recorded
    if not is_known(array, recorded):
        return True
    content = np.ascontiguousarray(np.asarray(array)).tobytes()
    return recorded.get("sha256") == hashlib.sha256(content).hexdigest()
