"""Some leaves of a checkpoint come into another tree, and nothing else is read."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import compress_jax as cj
from compress_jax.core import CheckpointError, NoMatchError
from compress_jax.train import Checkpoints, create

PRUNED = cj.prune.magnitude(0.5)
MORE = cj.prune.magnitude(0.75)


def begun(compression, optimizer, seed):
    kernel = jax.random.normal(jax.random.key(seed), (16, 8))
    variables = {"params": {"dense": {"kernel": kernel, "bias": jnp.ones(8)}}}
    return create(variables, compression, optimizer, jax.random.key(seed))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoint of a run with Adam, and its state."""
    folder = tmp_path_factory.mktemp("saved")
    state = begun(PRUNED, optax.adam(0.1), 1)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(5, state)
    return folder, state


def restore(folder, target, **options):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(target, **options)


def test_params_come_into_a_run_of_another_optimizer_and_compression(saved):
    folder, state = saved
    other = begun(MORE, optax.sgd(0.1, momentum=0.9), 2)
    step, found = restore(folder, other, only="params/**")
    assert step == 5
    np.testing.assert_array_equal(found.params["dense"]["kernel"], state.params["dense"]["kernel"])
    assert jax.tree.structure(found) == jax.tree.structure(other)
    kept = [name for name in other._fields if name != "params"]
    for name in kept:
        for ours, theirs in zip(
            jax.tree.leaves(getattr(found, name)),
            jax.tree.leaves(getattr(other, name)),
            strict=True,
        ):
            assert ours is theirs


def test_a_part_is_restored_onto_a_mesh_of_eight(saved):
    folder, state = saved
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("a", "b"))
    target = {
        "params": {"dense": {"kernel": jax.ShapeDtypeStruct((16, 8), "float32", sharding=sharding)}}
    }
    _, found = restore(folder, target, only="params/*/kernel")
    kernel = found["params"]["dense"]["kernel"]
    assert kernel.sharding == sharding and len(kernel.addressable_shards) == 8
    np.testing.assert_array_equal(kernel, state.params["dense"]["kernel"])


def test_a_typed_key_is_restored_alone(saved):
    _, found = restore(saved[0], {"key": jax.random.key(0), "rest": "untouched"}, only="key")
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(saved[1].key)).all()
    assert found["rest"] == "untouched"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_else_is_read_and_what_is_read_is_verified(tmp_path):
    values = np.random.default_rng(0).normal(size=300_000).astype(np.float32)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"large": jnp.asarray(values), "small": jnp.arange(5.0)})
    shutil.copytree(tmp_path / "1", tmp_path / "kept")
    # The large leaf has a file of its own.
    file = max((tmp_path / "1").rglob("d/*"), key=lambda path: path.stat().st_size)
    assert file.stat().st_size > values.nbytes / 2
    file.unlink()
    target = {"large": jnp.zeros(300_000), "small": jnp.zeros(5)}
    step, found = restore(tmp_path, target, only="small")
    assert found["large"] is target["large"] and found["small"].tolist() == [0, 1, 2, 3, 4]
    for only in ("large", ("small", "large"), None):
        with pytest.raises(CheckpointError, match="checkpoint 1 in .* is damaged"):
            restore(tmp_path, target, step=1, only=only)
    assert (tmp_path / "1").is_dir(), "reading removes nothing"


def test_a_leaf_that_is_read_has_its_checksum_compared(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(3), "b": jnp.ones(3)})
    compared = []
    whole = cj.train._checkpoint.is_whole

    def spy(array, entry):
        compared.append(array.shape)
        return whole(array + 1, entry)

    monkeypatch.setattr("compress_jax.train._checkpoint.is_whole", spy)
    with pytest.raises(CheckpointError, match="damaged.*: a differ"):
        restore(tmp_path, {"a": jnp.zeros(3)}, step=1, only="a")
    assert compared == [(3,)]


def test_globs_that_match_nothing_and_leaves_that_differ_are_named(saved):
    folder, _ = saved
    target = {"params": {"dense": {"kernel": jnp.zeros((16, 4)), "bias": jnp.zeros(8)}}}
    with pytest.raises(NoMatchError, match=r"(?s)'parms/\*\*' matches no leaf.*dense/kernel"):
        restore(folder, target, only=("params/**", "parms/**"))
    with pytest.raises(
        CheckpointError, match=r"dense/kernel: saved float32\[16, 8\], wanted float32\[16, 4\]"
    ) as error:
        restore(folder, target, only="params/**")
    assert "bias" not in str(error.value) and "opt_state" not in str(error.value)
    less = {"params": {"dense": {"bias": jnp.zeros(8)}}}
    with pytest.raises(CheckpointError, match="dense/kernel: saved .*, wanted nothing"):
        restore(folder, less, only="params/**")
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4 in .*, which has 5"):
        restore(folder, less, step=4)


def test_there_must_be_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        restore(tmp_path, {"w": jnp.zeros(1)})


@pytest.mark.parametrize("part", ["learned", "fixed"])
def test_the_state_of_another_compression_is_refused_where_it_is_read(part, tmp_path):
    codes = {4: cj.quantize.lsq(4), 3: cj.quantize.lsq(3)}
    both = {bits: cj.chain(cj.prune.magnitude(0.5), codes[bits]) for bits in codes}
    states = {bits: begun(both[bits], optax.sgd(0.1), 1) for bits in both}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, states[4])
    assert jax.tree.leaves(getattr(states[4], part)), "there is something to read"
    restore(tmp_path, states[4], only=f"{part}/**")
    restore(tmp_path, states[3], only="params/**")
    with pytest.raises(CheckpointError, match="another compression"):
        restore(tmp_path, states[3], only=f"{part}/**")
