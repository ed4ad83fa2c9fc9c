"""Checkpoints that are verified when they are read, so that a resumed run is the same run."""

import contextlib
import dataclasses
import gc
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from compress_jax.core.arguments import patterns, refused
from compress_jax.core.errors import CheckpointError, OtherProcessError
from compress_jax.core.paths import Patterns, match
from compress_jax.core.stamp import Stamped, calls
from compress_jax.core.types import DType, JsonObject, Leaf, PyTree, Shape
from compress_jax.train._best import Best
from compress_jax.train._checkpoint_record import (
    FILE,
    DamagedError,
    LeafRecord,
    SaveRecord,
    is_known,
    is_whole,
    read,
)
from compress_jax.train._checksums import begun
from compress_jax.train._processes import is_loss, once, settle

_log = logging.getLogger(__name__)

_Plain = dict[str, jax.Array | jax.ShapeDtypeStruct]


class Checkpoints:
    """A directory of checkpoints, of which the newest few are kept, and the best.

    Each holds the tree's arrays and a JSON record of shape, dtype and checksum of every leaf, and
    of what was measured. Writing is asynchronous and atomic, and the next step may donate the
    arrays. What one mesh saved may be restored onto another, of other devices or processes. A
    checkpoint whose content is not what was saved is never returned: `restore_latest` warns and
    takes the one before.

    Which step is the best follows from the records of the checkpoints that are there, so a kill at
    any moment loses neither the best nor the newest; the one that was best before is removed once
    a better one is on disk.

    Typed PRNG keys, bfloat16, empty dicts and arrays of size zero are kept exactly.

    Args:
      directory: where they are; made if missing.
      keep: how many of the newest to keep.
      best: the metric whose best checkpoint is kept besides; None for the one that the newest
        checkpoint with metrics was saved under, if any.

    Example:
      >>> import tempfile
      >>> import compress_jax as cj
      >>> best = cj.train.Best("accuracy", higher_is_better=True)
      >>> with Checkpoints(tempfile.mkdtemp(), keep=1, best=best) as checkpoints:
      ...     for step, accuracy in ((1, 0.7), (2, 0.9), (3, 0.8)):
      ...         tree = {"w": jnp.full(2, float(step)), "key": jax.random.key(0)}
      ...         checkpoints.save(step, tree, {"accuracy": accuracy})
      ...     step, newest = checkpoints.restore_latest(tree)
      ...     best_step, w = checkpoints.restore_best({"w": jnp.zeros(2)}, only="w")
      >>> step, newest["w"].tolist(), best_step, w["w"].tolist()
      (3, [3.0, 3.0], 2, [2.0, 2.0])
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2, best: Best | None = None):
        """Open the directory, removing what a killed process left half written."""
        if best is not None and not isinstance(best, Best):
            refused("best", best, "a Best, such as Best('accuracy', higher_is_better=True)")
        self.directory = Path(directory).absolute()
        self.best = best
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep), _Kept(self._not_to_be_lost)]
            ),
            create=True,
            cleanup_tmp_directories=True,
        )
        with self._told():
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        # By step; None where the record is damaged. The first process reads, so that all agree.
        found = once(lambda: [(step, self._evaluation(step)) for step in self.steps()])
        self._evaluations: dict[int, JsonObject | None] = dict(found)

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

    def save(self, step: int, tree: PyTree, metrics: Mapping[str, float] | None = None) -> None:
        """Save a tree of arrays, in the background; does nothing if the step is saved already.

        Args:
          step: its number, larger than those saved before.
          tree: arrays, typed PRNG keys among them.
          metrics: what was measured of the tree, if it was; the same in all processes.

        Raises:
          CheckpointError: if a later step is saved already, or a leaf has no values.
          ArgumentError: if the metrics lack the one that decides.
        """
        evaluation = self._evaluated(metrics)
        latest = max(self.steps(), default=-1)
        if step in self.steps():
            return
        if step < latest:
            raise CheckpointError(
                f"cannot save step {step} in {self.directory}, which already holds step {latest}"
            )
        arrays = {name: _concrete(name, leaf) for name, leaf in _named(tree).items()}
        # The next step may donate the arrays. Orbax has them on the host before it returns.
        sums = {name: begun(array) for name, array in arrays.items()}
        settle(sums)
        stored = {
            name: array for name, array in arrays.items() if array.size
        }  # orbax refuses size zero
        # int4 and int3 have states of the same shapes; only the calls tell them apart.
        meta = {"step": step, "made_by": calls(tree), **evaluation}
        shapes = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays.items()}
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(stored), meta=SaveRecord(meta, shapes, sums)
        )
        self._evaluations[step] = evaluation
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
        found, damaged = self._newest(target)
        if found is None:
            return None
        # `save` writes no step twice and none before the newest: damaged ones would block it.
        for bad in damaged:
            self._manager.delete(bad)
        return found

    def restore(
        self, target: PyTree, step: int | None = None, *, only: Patterns | None = None
    ) -> tuple[int, PyTree]:
        """Return a checkpoint, or some leaves of it; the directory stays as it is.

        With ``only``, nothing else is read or compared: params of one run come into another with
        another optimizer or compression. Make the state of a new compression of the params that
        were restored, by its ``init``.

        Args:
          target: as for `restore_latest`; with ``only``, a tree with the leaves that are read.
          step: which checkpoint; None for the newest that is undamaged.
          only: a glob of names of leaves such as ``"params/**"``, or a tuple of globs; the other
            leaves are returned as the target has them. None for all.

        Returns:
          ``(step, tree)``.

        Raises:
          CheckpointError: if there is no such checkpoint, if it is damaged, or if leaves that are
            read have other shapes, dtypes or compressions than the target's.
          NoMatchError: if a glob matches no leaf.

        Example:
          >>> import tempfile
          >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
          ...     checkpoints.save(3, {"params": {"w": jnp.arange(2.0)}, "adam": jnp.ones(4)})
          ...     target = {"params": {"w": jnp.zeros(2)}, "sgd": "as it is"}
          ...     step, tree = checkpoints.restore(target, only="params/**")
          >>> tree["params"]["w"].tolist(), tree["sgd"]
          ([0.0, 1.0], 'as it is')
        """
        if step is None:
            found, _ = self._newest(target, only)
            if found is None:
                raise CheckpointError(f"there is no checkpoint in {self.directory}")
            return found
        if step not in self.steps():
            raise CheckpointError(
                f"there is no checkpoint of step {step} in {self.directory}, which has "
                f"{', '.join(map(str, self.steps())) or 'none at all'}"
            )
        try:
            with _told_once():
                return step, self._restore(step, target, only)
        except DamagedError as problem:
            others = ", ".join(str(each) for each in self.steps() if each != step)
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} is damaged: {problem}; the others there "
                f"are {others or 'none'}"
            ) from problem

    def best_step(self) -> int | None:
        """Return the step of the best checkpoint, the earliest of equal ones.

        Returns:
          The step; None if no checkpoint has a finite value of the metric.

        Raises:
          CheckpointError: if the record of a checkpoint is damaged, so that nobody knows.
        """
        if lost := self._unknown():
            raise CheckpointError(
                f"which checkpoint in {self.directory} is the best is not known, as the record "
                f"of step {lost[0]} is damaged; remove {self.directory / str(lost[0])} to take the "
                "best of the others"
            )
        return self._best_known()

    def restore_best(self, target: PyTree, *, only: Patterns | None = None) -> tuple[int, PyTree]:
        """Return the best checkpoint, see `best_step`; no other one stands in for it.

        Args:
          target: as for `restore`.
          only: as for `restore`.

        Returns:
          ``(step, tree)``.

        Raises:
          CheckpointError: as `restore` and `best_step` do, or if no checkpoint has the metric.
        """
        step = self.best_step()
        if step is None:
            rule = self._rule()
            what = f"a finite {rule.metric!r}" if rule else "metrics"
            raise CheckpointError(
                f"no checkpoint in {self.directory} has {what}, so none is the best; train with "
                "fit(..., best=...), or save with metrics"
            )
        return self.restore(target, step, only=only)

    def is_better(self, metrics: Mapping[str, float]) -> bool:
        """Tell whether an evaluation is better than those of all checkpoints there are.

        Raises:
          ArgumentError: if it lacks the metric that decides.
        """
        if self.best is None:
            return False
        self.best.require(metrics)
        before = self._measured()
        after = max(self.steps(), default=-1) + 1
        # The earliest of equal ones: an equal value is not better.
        return self.best.step_of({**before, after: metrics}) == after

    def _newest(
        self, target: PyTree, only: Patterns | None = None
    ) -> tuple[tuple[int, PyTree] | None, list[int]]:
        """Return the newest undamaged checkpoint, and the steps of the damaged ones after it."""
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                with _told_once():
                    return (step, self._restore(step, target, only)), list(damaged)
            except DamagedError as problem:
                damaged[step] = str(problem)
                _log.warning("checkpoint %d in %s is damaged: %s", step, self.directory, problem)
        if damaged:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged ({damaged}); remove the "
                "directory to start again"
            )
        return None, []

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _evaluation(self, step: int) -> JsonObject | None:
        """Return what the record of a checkpoint says of its evaluation, None if it is damaged."""
        if not (self._folder(step) / FILE).exists():
            # A removal that was killed leaves the rest of a folder, which was not the best.
            _log.warning("%s has no record, so it counts as removed", self._folder(step))
            return {}
        try:
            record = read(self._folder(step))
        except DamagedError:
            return None  # told when it is restored, or when the best is asked for
        return {name: record[name] for name in ("metrics", "best") if record.get(name)}

    def _evaluated(self, metrics: Mapping[str, float] | None) -> JsonObject:
        """Return the entries of a record that tell of an evaluation; none if there was none."""
        if not metrics:
            return {}
        if self.best is not None:
            self.best.require(metrics)
        rule = self._rule()
        numbers = {name: float(value) for name, value in metrics.items()}
        return {"metrics": numbers, **({"best": dataclasses.asdict(rule)} if rule else {})}

    def _rule(self) -> Best | None:
        """Return the metric that decides: the one given, or the one on disk."""
        if self.best is not None:
            return self.best
        for step in reversed(self.steps()):
            if recorded := (self._evaluations.get(step) or {}).get("best"):
                return Best(recorded["metric"], recorded["higher_is_better"])
        return None

    def _measured(self) -> dict[int, dict[str, float]]:
        """Return the metrics of each checkpoint that has some."""
        known = {step: self._evaluations.get(step) or {} for step in self.steps()}
        return {step: each["metrics"] for step, each in known.items() if "metrics" in each}

    def _best_known(self) -> int | None:
        rule = self._rule()
        return rule.step_of(self._measured()) if rule else None

    def _unknown(self) -> list[int]:
        return [step for step in self.steps() if self._evaluations.get(step, {}) is None]

    def _not_to_be_lost(self) -> list[int]:
        """Return the best step, and those of which nobody knows whether they are better."""
        best = self._best_known()
        return self._unknown() + ([] if best is None else [best])

    def _restore(self, step: int, target: PyTree, only: Patterns | None = None) -> PyTree:
        named = _named(target)
        self.wait()
        record = read(self._folder(step))
        saved: dict[str, LeafRecord] = record["leaves"]
        names = _chosen(only, [*saved, *(name for name in named if name not in saved)])
        saved = {name: each for name, each in saved.items() if name in names}
        plain = {name: _plain(leaf) for name, leaf in named.items() if name in names}
        # Another model is no damage, so it is told before the arrays are read.
        self._check_same_model(step, saved, plain)
        # Checkpoints of earlier versions do not say what made them.
        made_by = record.get("made_by") or []
        if only is None:
            self._check_same_compression(step, made_by, calls(target))
        else:
            self._check_known_compressions(step, made_by, _calls_of(target, names))
        arrays = self._read(step, plain)
        self._verify(step, arrays, saved)
        leaves = [
            _like(arrays[name], leaf) if name in arrays else leaf for name, leaf in named.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(target), leaves)

    def _read(self, step: int, plain: _Plain) -> dict[str, jax.Array]:
        """Return arrays of a checkpoint, where the shapes want them; no others are read."""
        stored = {name: array for name, array in plain.items() if array.size}
        alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # where no sharding is wanted
        wanted = {
            n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or alone)
            for n, a in stored.items()
        }
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        arguments = ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                folder = self._folder(step) / "state"
                found = reader.restore(folder, args=arguments) if wanted else {}
        except Exception as error:  # a damaged file can raise anything
            raise DamagedError(f"its arrays cannot be read ({type(error).__name__})") from error
        # Orbax returns what was asked for where there is nothing.
        if lost := [name for name, array in found.items() if not isinstance(array, jax.Array)]:
            raise DamagedError(f"{', '.join(lost)} are not there")
        empty = {n: jnp.zeros(a.shape, a.dtype) for n, a in plain.items() if n not in stored}
        return {**empty, **found}

    def _verify(
        self, step: int, arrays: dict[str, jax.Array], saved: dict[str, LeafRecord]
    ) -> None:
        wrong = [name for name, array in arrays.items() if not is_whole(array, saved[name])]
        if wrong:
            raise DamagedError(f"{', '.join(wrong)} differ from what was saved")
        unknown = [name for name, array in arrays.items() if not is_known(array, saved[name])]
        if unknown:
            _log.warning(
                "checkpoint %d in %s is of an earlier version, without checksums of %s",
                step,
                self.directory,
                ", ".join(unknown),
            )

    def _check_known_compressions(self, step: int, saved: list[str], wanted: list[str]) -> None:
        """Refuse to read a part of the state of a compression that the checkpoint has none of."""
        for call in wanted:
            if saved and call not in saved:
                self._check_same_compression(step, saved, [call])

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
        record: dict[str, LeafRecord],
        plain: _Plain,
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
    except DamagedError as error:
        problem = str(error)
    finally:
        if problem is not None:
            gc.collect()  # the coroutines, while nobody listens
        sys.unraisablehook = before
    if problem is not None:
        raise DamagedError(problem)


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


@dataclasses.dataclass
class _Kept(policies.PreservationPolicy):
    """Tells orbax to keep the steps that a function returns."""

    steps: Callable[[], list[int]]

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: policies.PreservationContext,
    ) -> list[bool]:
        """Return of each checkpoint whether it is kept."""
        kept = self.steps()
        return [each.step in kept for each in checkpoints]


def _chosen(only: Patterns | None, names: list[str]) -> set[str]:
    """Return the names that any of some globs matches; each must match one."""
    if only is None:
        return set(names)
    globs = patterns("only", only)
    each = (globs,) if isinstance(globs, str) else globs
    return {name for glob in each for name in match(glob, names)}


def _calls_of(tree: PyTree, names: Collection[str]) -> list[str]:
    """Return the compressions of the states that some leaves belong to.

    The stamp is on ``fixed``; the arrays that are learned are in ``learned`` beside it.
    """
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, Stamped))
    found = []
    for path, node in pairs:
        if not isinstance(node, Stamped) or node.stamp is None:
            continue
        learned = (*path[:-1], jax.tree_util.GetAttrKey("learned"))
        starts = tuple(f"{_name(each)}/" for each in (path, learned) if each)
        if not path or any(name.startswith(starts) for name in names):
            found.append(node.stamp.call)
    return found


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _named(tree: PyTree) -> dict[str, Leaf]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in pairs}


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
