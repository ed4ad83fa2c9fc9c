"""What is restored is what was saved, or nothing is."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import compress_jax as cj
from compress_jax.core import CheckpointError, identity
from compress_jax.train import Checkpoints, _checkpoint_record, _checksums, create


def tree(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    return {
        "float": jax.random.normal(keys[0], (64, 8)),
        "scalar": jnp.int32(seed),
        "bfloat16": jax.random.normal(keys[1], (3,)).astype(jnp.bfloat16),
        "fp8": jax.random.normal(keys[1], (3,)).astype(ml_dtypes.float8_e4m3fn),
        "mask": jax.random.bernoulli(keys[2], 0.5, (7,)),
        "key": keys[3],
        "rbg": jax.random.key(seed, impl="rbg"),
        "no entries": jnp.zeros((0, 3)),
        "no leaves": {},
        "nothing": None,
        "tuple/with slash": (jnp.arange(3, dtype=jnp.uint8), [jnp.ones(1)]),
        "optax": optax.adam(0.1).init({"w": jnp.ones(2)}),
    }


def assert_same(actual, wanted):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def write(directory, *steps):
    with Checkpoints(directory, keep=5) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree(step))


def restore(directory, target=None):
    with Checkpoints(directory, keep=5) as checkpoints:
        return checkpoints.restore_latest(
            tree(99) if target is None else target
        ), checkpoints.steps()


@pytest.mark.slow
def test_every_kind_of_leaf_comes_back_exactly(tmp_path):
    write(tmp_path, 3, 7)
    (step, found), steps = restore(tmp_path)
    assert step == 7 and steps == [3, 7]
    assert_same(found, tree(7))


def test_an_empty_directory_has_none(tmp_path):
    assert restore(tmp_path / "new") == (None, [])


def test_only_the_newest_are_kept_and_a_saved_step_is_not_saved_again(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(step, tree(step))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]


def test_what_is_being_saved_may_be_donated(tmp_path):
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(1_000_000)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x})
        for _ in range(5):
            x = add(x)
        found = checkpoints.restore_latest({"x": jnp.ones(1_000_000)})
    assert found is not None and not found[1]["x"].any()


def flip_a_byte(checkpoint: Path):
    largest = max(
        (p for p in checkpoint.rglob("*") if p.is_file() and "/d/" in str(p)),
        key=lambda p: p.stat().st_size,
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def truncate(checkpoint: Path):
    for path in (p for p in checkpoint.rglob("*") if p.is_file() and "/d/" in str(p)):
        path.write_bytes(path.read_bytes()[:-20])


def empty(checkpoint: Path):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def spoil_the_record(checkpoint: Path):
    path = checkpoint / "meta" / "metadata"
    path.write_text(path.read_text()[:-30])


def alter_the_record(checkpoint: Path):
    path = checkpoint / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["leaves"]["float"]["shape"] = [8, 64]
    path.write_text(json.dumps(meta))


# tensorstore reads arrays in threads; those that fail after the first find their event loop gone,
# and say so.
loud = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
DAMAGES = [flip_a_byte, truncate, empty, spoil_the_record, alter_the_record]


@pytest.mark.slow
@loud
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_can_be_saved_anew(
    damage, tmp_path, caplog
):
    write(tmp_path, 3, 7)
    damage(tmp_path / "7")
    with caplog.at_level(logging.WARNING):
        (step, found), steps = restore(tmp_path)
    assert step == 3 and steps == [3]
    assert_same(found, tree(3))
    assert any(
        "checkpoint 7" in record.message and "damaged" in record.message
        for record in caplog.records
    )
    write(tmp_path, 7)
    assert restore(tmp_path)[0][0] == 7


@pytest.mark.slow
@loud
def test_if_all_are_damaged_that_is_an_error_and_nothing_is_removed(tmp_path):
    write(tmp_path, 3, 7)
    flip_a_byte(tmp_path / "3")
    empty(tmp_path / "7")
    with pytest.raises(
        CheckpointError, match="every checkpoint in .* is damaged.*remove the directory"
    ):
        restore(tmp_path)
    assert (tmp_path / "3").exists() and (tmp_path / "7").exists()


def test_a_checkpoint_of_another_model_is_an_error_that_names_the_leaves(tmp_path):
    write(tmp_path, 3)
    other = {**tree(), "float": jnp.zeros((8, 8)), "mask": jnp.zeros(7), "more": jnp.zeros(1)}
    with pytest.raises(CheckpointError, match="another model") as error:
        restore(tmp_path, other)
    for line in (
        "float: saved float32[64, 8], wanted float32[8, 8]",
        "mask: saved bool[7], wanted float32[7]",
    ):
        assert line in str(error.value)
    assert "more: saved nothing, wanted float32[1]" in str(error.value)
    assert restore(tmp_path)[0][0] == 3


def test_what_a_killed_process_left_half_written_is_no_checkpoint_and_is_cleared_away(tmp_path):
    write(tmp_path, 3)
    half = shutil.copytree(tmp_path / "3", tmp_path / "7.orbax-checkpoint-tmp")
    (half / "commit_success.txt").unlink()
    (step, _), steps = restore(tmp_path)
    assert step == 3 and steps == [3]
    write(tmp_path, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "7"]


def test_a_step_before_one_that_is_saved_cannot_be_saved(tmp_path):
    write(tmp_path, 7)
    with pytest.raises(CheckpointError, match="step 3 .* already holds step 7"):
        write(tmp_path, 3)


def test_restoring_onto_another_mesh(tmp_path):
    write(tmp_path, 3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    target = {
        **tree(99),
        "float": jax.device_put(jnp.zeros((64, 8)), NamedSharding(mesh, P("data"))),
    }
    (_, found), _ = restore(tmp_path, target)
    assert found["float"].sharding == target["float"].sharding
    assert_same(found, tree(3))


def test_a_train_state_survives(tmp_path):
    state = create(
        {"params": {"w": jnp.ones(3)}, "batch_stats": {}},
        identity(),
        optax.adamw(0.1),
        jax.random.key(4),
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        found = checkpoints.restore_latest(jax.tree.map(jnp.copy, state))
    assert found is not None
    assert_same(found[1], state)


def test_the_state_of_another_compression_is_refused_with_the_difference(tmp_path):
    params = {"w": jnp.arange(8.0).reshape(2, 4)}
    pruned, more = cj.prune.magnitude(0.5), cj.prune.magnitude(0.75)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": params, "state": pruned.init(params)})
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=r"(?s)another compression.*0\.5.*0\.75"):
            checkpoints.restore_latest({"params": params, "state": more.init(params)})
        assert checkpoints.restore_latest({"params": params, "state": pruned.init(params)})[0] == 1


DTYPES = [
    "float32",
    "bfloat16",
    "float16",
    "int8",
    "uint32",
    "bool",
    "int4",
    "float8_e4m3fn",
    "complex64",
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checksum_is_the_same_on_any_mesh_and_tells_any_change(dtype):
    words = np.random.default_rng(0).integers(0, 2, (16, 24))
    array = jnp.asarray(words).astype(dtype)
    wanted = _checksums._sums(np.asarray(array)).tolist()
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for spec in (P(), P("a", "b"), P(None, "a")):
        placed = jax.device_put(array, NamedSharding(mesh, spec))
        assert _checksums._sums_on_devices(placed).tolist() == wanted
    exchanged = array.at[3].set(array[4]).at[4].set(array[3])
    flipped = array.at[5, 7].set((1 - words[5, 7]).astype(array.dtype))
    for changed in (exchanged, flipped, array.T):
        found = _checksums._sums(np.asarray(changed)).tolist()
        assert found[0] != wanted[0] and found[1] != wanted[1]


def test_abstract_targets_are_filled(tmp_path):
    write(tmp_path, 3)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree(99))
    (_, found), _ = restore(tmp_path, shapes)
    assert_same(found, tree(3))


@pytest.mark.slow
def test_checkpoints_of_earlier_versions_are_verified(tmp_path, monkeypatch):
    def content(array):
        return hashlib.sha256(np.ascontiguousarray(np.asarray(array)).tobytes()).hexdigest()

    def before(array, sums):
        return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": sums}

    monkeypatch.setattr(_checksums, "checksum", content)
    monkeypatch.setattr(_checkpoint_record, "entry", before)
    write(tmp_path, 3)
    monkeypatch.undo()
    assert_same(restore(tmp_path)[0][1], tree(3))
    monkeypatch.setattr(_checksums, "checksum", lambda array: "0" * 64)
    monkeypatch.setattr(_checkpoint_record, "entry", before)
    write(tmp_path / "bad", 3)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="damaged"):
        restore(tmp_path / "bad")


def test_what_earlier_versions_could_not_hash_is_restored_and_told(tmp_path, monkeypatch, caplog):
    def before(array, sums):
        return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": None}

    monkeypatch.setattr(_checkpoint_record, "entry", before)
    write(tmp_path, 3)
    monkeypatch.undo()
    assert_same(restore(tmp_path)[0][1], tree(3))
    assert "without checksums of" in caplog.text and "bfloat16" in caplog.text


def test_a_tree_of_shapes_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        shapes = jax.eval_shape(lambda: {"w": jnp.ones(3)})
        with pytest.raises(CheckpointError, match="w is a shape without values"):
            checkpoints.save(1, shapes)


def test_the_next_step_may_donate_what_is_being_saved(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {f"w{i}": jnp.full((256, 256), float(i)) for i in range(8)}
    with Checkpoints(tmp_path, keep=6) as checkpoints:
        for number in range(6):
            checkpoints.save(number, tree)
            for _ in range(3):
                tree = step(tree)
    like = jax.eval_shape(lambda: {f"w{i}": jnp.ones((256, 256)) for i in range(8)})
    for number in reversed(range(6)):
        with Checkpoints(tmp_path, keep=6) as checkpoints:
            found, restored = checkpoints.restore_latest(like)
            checkpoints._manager.delete(number)
        assert found == number
        for i in range(8):
            np.testing.assert_array_equal(restored[f"w{i}"], np.float32(i + 3 * number))
