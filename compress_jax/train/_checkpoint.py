"""Checkpoints that are verified when they are read, so that a resumed run is the same run."""

import contextlib
import gc
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from compress_jax.core.errors import CheckpointError
from compress_jax.core.stamp import calls
from compress_jax.core.types import DType, PyTree

_log = logging.getLogger(__name__)


class Checkpoints:
    """A directory of checkpoints, of which the newest few are kept.

    Each holds the tree's arrays and a JSON record of shape, dtype and SHA-256 of every leaf.
    Writing is asynchronous and atomic; the arrays are copied first, so the next step may donate
    them. A checkpoint whose content is not what was saved is never returned: `restore_latest` warns
    and takes the one before.

    Typed PRNG keys, bfloat16, empty dicts and arrays of size zero are kept exactly.

    Args:
      directory: where they are; made if missing.
      keep: how many to keep.

    Example:
      >>> import tempfile
      >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
      ...     checkpoints.save(3, {"w": jnp.arange(2.0), "key": jax.random.key(0)})
      ...     step, tree = checkpoints.restore_latest({"w": jnp.zeros(2), "key": jax.random.key(1)})
      >>> step, tree["w"].tolist()
      (3, [0.0, 1.0])
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2):
        """Open the directory, removing what a killed process left half written."""
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=True
        )
        with self._told():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> "Checkpoints":
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Wait for what is being written, then release the directory."""
        with self._told():
            self._manager.wait_until_finished()
        self._manager.close()

    def wait(self) -> None:
        """Wait until what was saved is on disk."""
        with self._told():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Raise errors of writing as one sentence; they come late, from the background."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # orbax wraps what the file system says in errors of many kinds
            raise CheckpointError(
                f"cannot write checkpoints in {self.directory}: {_why(error)}; those saved before "
                "are kept, so see that the "
                "disk is writable and not full, and run it again"
            ) from error

    def steps(self) -> list[int]:
        """Return the steps there are checkpoints of, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, tree: PyTree) -> None:
        """Save a tree of arrays, in the background; does nothing if the step is saved already.

        Args:
          step: its number, larger than those saved before.
          tree: arrays, typed PRNG keys among them.

        Raises:
          CheckpointError: if a later step is saved already.
        """
        latest = max(self.steps(), default=-1)
        if step in self.steps():
            return
        if step < latest:
            raise CheckpointError(
                f"cannot save step {step} in {self.directory}, which already holds step {latest}"
            )
        arrays = {name: jnp.array(_plain(leaf), copy=True) for name, leaf in _named(tree).items()}
        record = {name: _describe(array) for name, array in arrays.items()}
        stored = {
            name: array for name, array in arrays.items() if array.size
        }  # orbax refuses size zero
        made_by = calls(tree)
        meta = {
            "step": step,
            "leaves": record,
            "sha256": _digest_of_record(record),
            "made_by": made_by,
        }
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(stored), meta=ocp.args.JsonSave(meta)
        )
        with self._told():
            self._manager.save(step, args=arguments)

    def restore_latest(self, target: Any) -> tuple[int, Any] | None:
        """Return the newest undamaged checkpoint; the damaged ones after it are removed.

        Args:
          target: a tree of arrays with the structure, shapes, dtypes and shardings wanted; its
            values are not used.

        Returns:
          ``(step, tree)``, or None if there is no checkpoint.

        Raises:
          CheckpointError: if the checkpoint is of another model, or if every checkpoint is damaged.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                with _told_once():
                    tree = self._restore(step, target)
            except _DamagedError as problem:
                damaged[step] = str(problem)
                _log.warning("checkpoint %d in %s is damaged: %s", step, self.directory, problem)
                continue
            for bad in damaged:
                self._manager.delete(bad)
            return step, tree
        if damaged:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged ({damaged}); remove the "
                "directory to start again"
            )
        return None

    def _restore(self, step: int, target: Any) -> Any:
        named = _named(target)
        plain = {name: _plain(leaf) for name, leaf in named.items()}
        record, made_by = self._record(step)
        self._check_same_model(step, record, plain)
        self._check_same_compression(step, made_by, calls(target))
        stored = {name: array for name, array in plain.items() if array.size}
        wanted = {
            n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
            for n, a in stored.items()
        }
        try:
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
            found = self._manager.restore(step, args=arguments)["state"] if wanted else {}
        except Exception as error:  # a damaged file can raise anything
            raise _DamagedError(f"its arrays cannot be read ({type(error).__name__})") from error
        arrays = {**plain, **found}
        wrong = [name for name, array in arrays.items() if _describe(array) != record[name]]
        if wrong:
            raise _DamagedError(f"{', '.join(wrong)} differ from what was saved")
        leaves = [_like(arrays[name], leaf) for name, leaf in named.items()]
        return jax.tree.unflatten(jax.tree.structure(target), leaves)

    def _record(self, step: int) -> tuple[dict[str, dict[str, Any]], list[str]]:
        try:
            meta = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )["meta"]
            record = meta["leaves"]
            whole = meta["sha256"] == _digest_of_record(record)
        except Exception as error:  # a damaged file can raise anything
            raise _DamagedError(f"its record cannot be read ({type(error).__name__})") from error
        if not whole:
            raise _DamagedError("its record differs from what was saved")
        return record, meta.get("made_by", [])

    def _check_same_compression(self, step: int, saved: list[str], wanted: list[str]) -> None:
        """Compare the compressions that made the states, which shapes alone do not tell apart."""
        if saved and saved != wanted:
            lines = [
                f"  saved:  {was}\n  wanted: {now}"
                for was, now in zip(saved, wanted, strict=False)
                if was != now
            ]
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} holds the state of another compression; "
                "use another directory, or "
                "the config it was made with.\n"
                + "\n".join(lines or [f"  {len(saved)} saved, {len(wanted)} wanted"])
            )

    def _check_same_model(
        self, step: int, record: dict[str, Any], plain: dict[str, jax.Array]
    ) -> None:
        def brief(shape: Any, dtype: DType) -> str:
            return f"{dtype}{list(shape)}"

        saved = {name: brief(entry["shape"], entry["dtype"]) for name, entry in record.items()}
        wanted = {name: brief(array.shape, array.dtype) for name, array in plain.items()}
        names = sorted(saved.keys() | wanted.keys())
        lines = [
            f"  {name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
            for name in names
            if saved.get(name) != wanted.get(name)
        ]
        if lines:
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} is of another model, optimizer or "
                "compression; use another "
                "directory, or the config it was made with. It differs in\n" + "\n".join(lines[:10])
            )


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """Hide the errors of orbax's abandoned coroutines; the first error is raised already."""
    before, problem = sys.unraisablehook, None
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    except _DamagedError as error:
        problem = str(error)
    finally:
        if problem is not None:
            gc.collect()  # the coroutines, while nobody listens
        sys.unraisablehook = before
    if problem is not None:
        raise _DamagedError(problem)


class _DamagedError(Exception):
    """What is on disk is not what was saved."""


def _why(error: BaseException) -> str:
    """Return the reason that the file system gave, wherever in a chain of errors it is."""
    lines = str(error).strip().splitlines() or ["no reason is given"]
    text = f"{type(error).__name__}: {lines[0]}"
    found: BaseException | None = error
    while found is not None:
        if (
            "No space left" in str(found)
            or "RESOURCE_EXHAUSTED" in str(found)
            or "Disk quota" in str(found)
        ):
            return "the disk is full"
        if isinstance(found, OSError) and found.strerror:
            text = found.strerror
        found = found.__cause__ or found.__context__
    return text


def _named(tree: PyTree) -> dict[str, Any]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def _plain(leaf: PyTree) -> jax.Array:
    """Return a leaf as an array of numbers: a typed key as its words."""
    array = jnp.asarray(leaf)
    return jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array


def _like(array: jax.Array, leaf: PyTree) -> jax.Array:
    """Undo `_plain`, with the leaf of the target telling which key type it was."""
    if not jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key):
        return array
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))


def _describe(array: jax.Array) -> dict[str, Any]:
    """Return shape, dtype and content hash (None if other processes hold a part of the array)."""
    content = None
    if array.is_fully_addressable:
        content = hashlib.sha256(np.ascontiguousarray(np.asarray(array)).tobytes()).hexdigest()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": content}


def _digest_of_record(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
