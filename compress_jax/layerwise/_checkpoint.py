"""The blocks of a network that are solved, on disk: a run that was stopped goes on after them."""

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import CheckpointError
from compress_jax.core.files import write_atomically
from compress_jax.core.record import COUNT, NUMBER, TEXT, mapping, optional, read_record, sealed
from compress_jax.core.types import Array, JsonObject, Leaf, PyTree
from compress_jax.layerwise._result import Measured

VERSION = 1
MADE_OF = "made_of.json"
ADVICE = "remove the folder to start anew, or give another one"
ARRAY = {"shape": [COUNT], "dtype": TEXT, "sha256": TEXT}
MEASURED = {
    "method": TEXT,
    "error": NUMBER,
    "errors": mapping(NUMBER),
    "tokens": [COUNT],
    "inputs": COUNT,
    "dead": COUNT,
    "damping": optional(NUMBER),
}
RECORD = {
    "arrays": mapping(ARRAY),
    "changed": mapping([TEXT]),
    "skipped": mapping(TEXT),
    "notes": mapping(TEXT),
    "measured": mapping(MEASURED),
}


class Solved(NamedTuple):
    """What one block adds to the result.

    Attributes:
      leaves: new ones, by path.
      state: arrays of the compression's state that changed with them, by number in tree order.
      changed: see `Rewritten`.
      skipped: likewise.
      notes: likewise.
      measured: likewise.
    """

    leaves: dict[str, Leaf]
    state: dict[int, Array]
    changed: dict[str, tuple[str, ...]]
    skipped: dict[str, str]
    notes: dict[str, str]
    measured: dict[str, Measured]

    def add(self, other: "Solved") -> None:
        """Take up what another block adds."""
        self.leaves.update(other.leaves)
        self.state.update(other.state)
        self.changed.update(other.changed)
        self.skipped.update(other.skipped)
        self.notes.update(other.notes)
        self.measured.update(other.measured)


class Checkpoint:
    """A folder with one file a block, each written whole or not at all.

    Args:
      folder: it is made if there is none.
      made_of: texts that say what the result depends on. A folder made of other things is refused,
        and they are named.

    Raises:
      CheckpointError: if the folder belongs to another run, or is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], made_of: Mapping[str, str]) -> None:
        """Open or begin."""
        self.folder = Path(folder)
        file = self.folder / MADE_OF
        if not file.exists():
            if any(self.folder.glob("block_*.json")):
                raise CheckpointError(f"{self.folder} has blocks and no {MADE_OF}; {ADVICE}")
            write_atomically(file, sealed({"version": VERSION, "made_of": dict(made_of)}))
            return
        schema = {"version": COUNT, "made_of": mapping(TEXT)}
        known = read_record(file, schema, ADVICE, CheckpointError)["made_of"]
        other = [name for name in {**known, **made_of} if known.get(name) != made_of.get(name)]
        if other:
            raise CheckpointError(
                f"{self.folder} holds blocks that were solved with other {', '.join(other)}; "
                f"{ADVICE}"
            )

    def load(self, number: int) -> Solved | None:
        """Return a block that is there; None if there is none.

        Raises:
          CheckpointError: if it is damaged.
        """
        record = self.folder / f"block_{number}.json"
        if not record.exists():
            return None
        content = read_record(record, RECORD, ADVICE, CheckpointError)
        arrays = self._arrays(self.folder / f"block_{number}.npz", content["arrays"])
        return Solved(
            {path: jnp.asarray(x) for path, x in arrays["leaves"].items()},
            {int(i): jnp.asarray(x) for i, x in arrays["state"].items()},
            {path: tuple(others) for path, others in content["changed"].items()},
            content["skipped"],
            content["notes"],
            {path: _measured(each) for path, each in content["measured"].items()},
        )

    def save(self, number: int, solved: Solved) -> None:
        """Write a block; it counts from the moment that its record is there."""
        named = {f"leaves:{path}": np.asarray(x) for path, x in solved.leaves.items()}
        named |= {f"state:{i}": np.asarray(x) for i, x in solved.state.items()}
        file = io.BytesIO()
        # As bytes: NumPy's own files know no bfloat16.
        np.savez(file, *map(_bytes, named.values()))
        write_atomically(self.folder / f"block_{number}.npz", file.getvalue())
        content: JsonObject = {
            "arrays": {name: _described(x) for name, x in named.items()},
            "changed": {path: list(others) for path, others in solved.changed.items()},
            "skipped": solved.skipped,
            "notes": solved.notes,
            "measured": {path: each._asdict() for path, each in solved.measured.items()},
        }
        write_atomically(self.folder / f"block_{number}.json", sealed(content))

    def _arrays(self, file: Path, known: JsonObject) -> dict[str, dict[str, np.ndarray]]:
        """Return the arrays of a block, by what they are and by name."""
        found: dict[str, dict[str, np.ndarray]] = {"leaves": {}, "state": {}}
        try:
            with np.load(file, allow_pickle=False) as stored:
                data = [stored[f"arr_{i}"].tobytes() for i in range(len(known))]
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            raise CheckpointError(f"cannot read {file}: {error}; {ADVICE}") from error
        for content, (name, about) in zip(data, known.items(), strict=True):
            if hashlib.sha256(content).hexdigest() != about["sha256"]:
                raise CheckpointError(f"{file} is damaged: {name} has other bytes; {ADVICE}")
            kind, _, own = name.partition(":")
            values = np.frombuffer(content, jnp.dtype(about["dtype"]))
            found[kind][own] = values.reshape(about["shape"])
        return found


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)


def _described(x: np.ndarray) -> JsonObject:
    digest = hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()
    return {"shape": list(x.shape), "dtype": str(x.dtype), "sha256": digest}


def _measured(known: JsonObject) -> Measured:
    least, most = known["tokens"]
    return Measured(**{**known, "tokens": (least, most)})


def digest(tree: PyTree) -> str:
    """Return the digest of the arrays of a tree, their shapes and dtypes.

    Example:
      >>> digest({"a": np.ones(2)}) == digest({"a": np.ones(2)}), digest([1.0]) == digest([2.0])
      (True, False)
    """
    total = hashlib.sha256()
    for x in jax.tree.leaves(tree):
        if jnp.issubdtype(jax.typeof(x).dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        about = _described(np.asarray(x))
        total.update(f"{about}".encode())
    return total.hexdigest()
