"""Checkpoints that are verified when they are read, so that a resumed run is the same run."""

import contextlib
import dataclasses
import gc
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import future

from compress_jax.core.errors import CheckpointError, OtherProcessError
from compress_jax.core.stamp import calls
from compress_jax.core.types import Array, DType, JsonObject, Leaf, PyTree, Shape
from compress_jax.train._processes import is_loss, settle

_log = logging.getLogger(__name__)


FEW = 2**16  # entries; the checksum of fewer is computed by NumPy, which has nothing to compile

SEEDS = (0, 0x7F4A7C15)


class _LeafRecord(TypedDict):
    """What a checkpoint's record says of one leaf; earlier versions wrote sha256, for some."""

    shape: list[int]
    dtype: str
    checksum: NotRequired[str]
    sha256: NotRequired[str | None]


class _RecordHandler(ocp.JsonCheckpointHandler):
    """Writes the record in the background, so that no step waits for the checksums."""

    async def async_save(self, directory: Path, args: "_SaveRecord") -> list[future.Future]:
        """Begin to write the record into the directory."""
        written = self._write(directory, args)
        return [future.CommitFutureAwaitingContractedSignals(written, name="record")]

    async def _write(self, directory: Path, args: "_SaveRecord") -> None:
        if jax.process_index() > 0:
            return
        leaves = {name: _entry(x, _ended(args.sums[name])) for name, x in args.shapes.items()}
        meta = {**args.meta, "leaves": leaves, "sha256": _digest_of_record(leaves)}
        (directory / "metadata").write_text(json.dumps(meta))


@ocp.args.register_with_handler(_RecordHandler, for_save=True)
@dataclasses.dataclass
class _SaveRecord(ocp.args.CheckpointArgs):
    """What the record is made of: shapes, and of each leaf what `_begun` returns."""

    meta: JsonObject
    shapes: dict[str, jax.ShapeDtypeStruct]
    sums: dict[str, Array]


@ocp.args.register_with_handler(_RecordHandler, for_restore=True)
@dataclasses.dataclass
class _RestoreRecord(ocp.args.CheckpointArgs):
    """Asks for the record."""


class Checkpoints:
    """A directory of checkpoints, of which the newest few are kept.

    Each holds the tree's arrays and a JSON record of shape, dtype and checksum of every leaf.
    Writing is asynchronous and atomic, and the next step may donate the arrays. What one mesh saved
    may be restored onto another, of other devices or processes. A checkpoint whose content is not
    what was saved is never returned: `restore_latest` warns and takes the one before.

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
        except (CheckpointError, OtherProcessError):
            raise
        except Exception as error:  # orbax wraps what the file system says in errors of many kinds
            if is_loss(error):
                raise OtherProcessError(
                    "another process was lost; run the same command to continue"
                ) from error
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
          CheckpointError: if a later step is saved already, or a leaf has no values.
        """
        latest = max(self.steps(), default=-1)
        if step in self.steps():
            return
        if step < latest:
            raise CheckpointError(
                f"cannot save step {step} in {self.directory}, which already holds step {latest}"
            )
        arrays = {name: _concrete(name, leaf) for name, leaf in _named(tree).items()}
        # The next step may donate the arrays. Orbax has them on the host before it returns.
        sums = {name: _begun(array) for name, array in arrays.items()}
        settle(sums)
        stored = {
            name: array for name, array in arrays.items() if array.size
        }  # orbax refuses size zero
        # int4 and int3 have states of the same shapes; only the calls tell them apart.
        meta = {"step": step, "made_by": calls(tree)}
        shapes = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays.items()}
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(stored), meta=_SaveRecord(meta, shapes, sums)
        )
        with self._told():
            self._manager.save(step, args=arguments)

    def restore_latest(self, target: PyTree) -> tuple[int, PyTree] | None:
        """Return the newest undamaged checkpoint; the damaged ones after it are removed.

        Args:
          target: a tree of arrays, or of `jax.ShapeDtypeStruct`, with the structure, shapes, dtypes
            and shardings wanted; these may be other ones than those that were saved.

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
            # `save` writes no step twice and none before the newest: damaged ones would block it.
            for bad in damaged:
                self._manager.delete(bad)
            return step, tree
        if damaged:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged ({damaged}); remove the "
                "directory to start again"
            )
        return None

    def _restore(self, step: int, target: PyTree) -> PyTree:
        named = _named(target)
        plain = {name: _plain(leaf) for name, leaf in named.items()}
        record, made_by = self._record(step)
        # Another model is no damage, so it is told before the arrays are read.
        self._check_same_model(step, record, plain)
        self._check_same_compression(step, made_by, calls(target))
        stored = {name: array for name, array in plain.items() if array.size}
        alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # where no sharding is wanted
        wanted = {
            n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or alone)
            for n, a in stored.items()
        }
        try:
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
            found = self._manager.restore(step, args=arguments)["state"] if wanted else {}
        except Exception as error:  # a damaged file can raise anything
            raise _DamagedError(f"its arrays cannot be read ({type(error).__name__})") from error
        empty = {n: jnp.zeros(a.shape, a.dtype) for n, a in plain.items() if n not in stored}
        arrays = {**empty, **found}
        wrong = [name for name, array in arrays.items() if not _is_whole(array, record[name])]
        if wrong:
            raise _DamagedError(f"{', '.join(wrong)} differ from what was saved")
        unknown = [name for name, array in arrays.items() if not _is_known(array, record[name])]
        if unknown:
            _log.warning(
                "checkpoint %d in %s is of an earlier version, without checksums of %s",
                step,
                self.directory,
                ", ".join(unknown),
            )
        leaves = [_like(arrays[name], leaf) for name, leaf in named.items()]
        return jax.tree.unflatten(jax.tree.structure(target), leaves)

    def _record(self, step: int) -> tuple[dict[str, _LeafRecord], list[str]]:
        try:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=_RestoreRecord()))[
                "meta"
            ]
            record = meta["leaves"]
            whole = meta["sha256"] == _digest_of_record(record)
        except Exception as error:  # a damaged file can raise anything
            raise _DamagedError(f"its record cannot be read ({type(error).__name__})") from error
        if not whole:
            raise _DamagedError("its record differs from what was saved")
        # Checkpoints of earlier versions do not say what made them.
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
        self,
        step: int,
        record: dict[str, _LeafRecord],
        plain: dict[str, jax.Array | jax.ShapeDtypeStruct],
    ) -> None:
        def brief(shape: Shape | list[int], dtype: DType) -> str:
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
    before = sys.unraisablehook
    problem = None
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
    # The error of the file system says most, and is wrapped several times.
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


def _named(tree: PyTree) -> dict[str, Leaf]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def _concrete(name: str, leaf: PyTree) -> jax.Array:
    """Return a leaf to save as an array of numbers."""
    array = _plain(leaf)
    if isinstance(array, jax.ShapeDtypeStruct):
        raise CheckpointError(f"{name} is a shape without values; only arrays can be saved")
    return array


def _plain(leaf: PyTree) -> jax.Array | jax.ShapeDtypeStruct:
    """Return a leaf as an array of numbers, or the shape of one: a typed key as its words."""
    array = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)
    if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, array)
    return jax.random.key_data(array)  # uint32 [..., words]


def _like(array: jax.Array, leaf: PyTree) -> jax.Array:
    """Undo `_plain`, with the leaf of the target telling which key type it was."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.asarray(leaf).dtype
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return array
    return jax.random.wrap_key_data(array, impl=_key_impl(leaf))


def _key_impl(leaf: PyTree) -> str:
    found = []  # filled while it is traced: a shape alone cannot be asked
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def _entry(array: jax.Array | jax.ShapeDtypeStruct, sums: Array) -> _LeafRecord:
    first, second = np.asarray(sums).tolist()
    checksum = f"{first:08x}{second:08x}"
    return {"shape": list(array.shape), "dtype": str(array.dtype), "checksum": checksum}


def _is_known(array: jax.Array, entry: _LeafRecord) -> bool:
    """Tell whether the record has something that this process can compare an array with.

    Earlier versions hashed whole arrays, and so none of which other processes held a part.
    """
    return "checksum" in entry or bool(entry.get("sha256") and array.is_fully_addressable)


def _is_whole(array: jax.Array, entry: _LeafRecord) -> bool:
    """Tell whether an array is what was saved, as far as the record knows."""
    if "checksum" in entry:
        return _entry(array, _checksum(array)) == entry
    if not _is_known(array, entry):
        return True
    content = np.ascontiguousarray(np.asarray(array)).tobytes()
    return entry.get("sha256") == hashlib.sha256(content).hexdigest()


def _checksum(array: jax.Array) -> Array:
    """Return two sums of an array's bits, uint32 ``[2]``, the same in any sharding.

    Each word is mixed with its place in the array, so that exchanged entries change the sums, and
    the sums are modulo 2**32, so that their order does not matter: every device adds up its own.
    """
    if array.is_fully_addressable and array.size < FEW:
        return _sums(np.asarray(array))
    return _sums_on_devices(array)


def _begun(array: jax.Array) -> Array:
    """Return the checksum of an array, not waited for, or the array to compute it of later.

    CPUs compute before a call returns. There a view, which keeps the memory from being donated, is
    summed up in the background. What processes share they must add up in one order, so now.
    """
    alone = len(array.devices()) == 1 and array.is_fully_addressable
    if array.size >= FEW and alone and jax.default_backend() == "cpu":
        return np.asarray(array)
    return _checksum(array)


def _ended(begun: Array) -> Array:
    """Return the checksum that `_begun` began."""
    later = isinstance(begun, np.ndarray) and begun.size >= FEW
    return _sums_on_devices(jnp.asarray(begun)) if later else begun


@jax.jit
def _sums_on_devices(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    words = array.astype(_whole_bytes(array.dtype))
    bits = jnp.dtype(f"uint{8 * min(words.dtype.itemsize, 4)}")
    words = jax.lax.bitcast_convert_type(words, bits).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)  # where each word is, in C order
    for axis, size in enumerate(words.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.stack([_mixed(words, place, seed).sum(dtype=jnp.uint32) for seed in SEEDS])


def _sums(array: np.ndarray) -> np.ndarray:
    """Return what `_sums_on_devices` does, by NumPy."""
    words = np.ravel(array.astype(_whole_bytes(array.dtype)))
    words = words.view(f"uint{8 * min(words.dtype.itemsize, 4)}").astype(np.uint32)
    place = np.arange(len(words), dtype=np.uint32)
    return np.stack([_mixed(words, place, seed).sum(dtype=np.uint32) for seed in SEEDS])


def _whole_bytes(dtype: DType) -> DType:
    """Return a dtype of whole bytes that holds the values of another; mostly itself."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return jnp.dtype(jnp.uint8)
    if jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8:
        return jnp.dtype(jnp.int8)
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 8:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(dtype)


def _mixed(words: Array, place: Array, seed: int) -> Array:
    """Mix words with their places; another word at a place always gives another result."""
    x = words ^ (place * np.uint32(0x9E3779B1) + np.uint32(seed))
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _digest_of_record(record: dict[str, _LeafRecord]) -> str:
    # Sorted: a record that was read back need not have the order in which it was written.
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
