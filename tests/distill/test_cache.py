"""The logit cache: what is read is what the teacher said of that very view, or an error."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compress_jax as cj
from compress_jax import distill as d
from compress_jax.core.errors import (
    ArgumentError,
    ConfigError,
    DataError,
    NonFiniteError,
    StateError,
)
from compress_jax.core.record import sealed
from compress_jax.data import batches
from compress_jax.models import LeNet300100
from compress_jax.train import create, distillation, make_step

N, CLASSES = 21, 7
SPLIT = {
    "image": np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32),
    "label": np.arange(N) % CLASSES,
    "index": np.arange(N, dtype=np.int32),
}
KERNEL = jax.random.normal(jax.random.key(1), (5, CLASSES))
WHO = {"teacher_sha256": "a" * 64, "data_sha256": "b" * 64}
VIEW = d.by_example(lambda key, x: x * jax.random.uniform(key, x.shape), seed=3)


def teacher(x):
    return x @ KERNEL


def write(folder, **options):
    d.write_cache(folder, teacher, SPLIT, **{**WHO, "k": CLASSES, "batch_size": 8, **options})
    return d.open_cache(folder, **WHO)


def seen(index, view):
    """Return the teacher's log-probabilities, in float64, of each example in its view."""
    batch = {"image": SPLIT["image"][index], "index": jnp.asarray(index), "view": jnp.asarray(view)}
    z = np.asarray(VIEW(None, batch)["image"], np.float64) @ np.asarray(KERNEL, np.float64)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("dtype, error", [("float32", 1e-5), ("bfloat16", 2**-8)])
def test_each_view_of_each_example_has_its_own_logits(tmp_path, dtype, error):
    for process in range(2):  # one after the other, as two would side by side
        d.write_cache(tmp_path, teacher, SPLIT, **WHO, k=3, views=4, augment=VIEW, batch_size=8, dtype=dtype,  # noqa: E501
                      process_index=process, process_count=2)  # fmt: skip
    index, view = np.array([20, 0, 7, 7]), np.array([0, 3, 1, 2])
    top = d.open_cache(tmp_path, **WHO)(index, view)
    expected = seen(index, view)
    np.testing.assert_array_equal(top.ids, np.argsort(-expected, axis=-1)[:, :3])
    largest = np.take_along_axis(expected, top.ids, axis=-1)
    np.testing.assert_allclose(
        top.log_probs.astype(np.float64), largest, rtol=error, atol=error * 1e-2
    )
    np.testing.assert_allclose(top.tail, 1 - np.exp(largest).sum(-1), atol=1e-5)
    assert not list(tmp_path.glob("*.new")) and (top.log_probs[2] != top.log_probs[3]).any()


class Stopped(Exception):
    pass


def test_a_cache_that_was_cut_off_goes_on_and_lacks_what_it_lacks(tmp_path, monkeypatch):
    """Nothing is given out of a block that is not whole; what is whole is not asked for again."""
    monkeypatch.setattr("compress_jax.distill._teachers.cache.block_rows", lambda k, dtype: 4)
    asked = []

    def stopping(x, after):
        def count(rows):
            asked.append(len(rows))
            if len(asked) > after:
                raise Stopped
            return rows

        return jax.pure_callback(count, jax.ShapeDtypeStruct(x.shape, x.dtype), x) @ KERNEL

    options = {**WHO, "k": CLASSES, "batch_size": 6}
    with pytest.raises(Exception, match="Stopped"):
        d.write_cache(tmp_path, lambda x: stopping(x, 2), SPLIT, **options)
    cache = d.open_cache(tmp_path, **WHO)  # 12 rows were written: 3 blocks
    whole = cache(np.arange(12), np.zeros(12, int))
    with pytest.raises(DataError, match="lacks example 12, view 0: go on with write_cache"):
        cache([1, 12], [0, 0])
    asked.clear()
    d.write_cache(tmp_path, lambda x: stopping(x, 99), SPLIT, **options)
    assert len(asked) == 2  # the 9 rows that were missing, by 6
    again = d.open_cache(tmp_path, **WHO)(np.arange(N), np.zeros(N, int))
    assert (again.ids[:12] == whole.ids).all() and sorted(again.ids[20].tolist()) == list(
        range(CLASSES)
    )


def contents(cache):
    index = np.tile(np.arange(N), 2)
    top = cache(index, np.repeat([0, 1], N))
    return [np.asarray(x).tobytes() for x in (top.ids, top.log_probs, top.tail)]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


DAMAGE = {
    "empty": lambda data, rng: b"",
    "cut": lambda data, rng: data[: rng.integers(len(data))],
    "longer": lambda data, rng: data + b"\0" * 64,
    "garbage": lambda data, rng: rng.bytes(len(data)),
    "zeros": lambda data, rng: bytes(len(data)),
    "flipped": lambda data, rng: flipped(data, rng.integers(len(data))),
    "flipped at the end": lambda data, rng: flipped(data, len(data) - 1),
}


@pytest.mark.wide(1)
@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_told_and_written_again_never_given_out(tmp_path, how, caplog, monkeypatch):
    """Damage to any file is an error to the reader; write_cache repairs it and logs that."""
    monkeypatch.setattr("compress_jax.distill._teachers.cache.block_rows", lambda k, dtype: 4)
    right = contents(write(tmp_path / "right", views=2, augment=VIEW))
    rng = np.random.default_rng(0)
    for name in sorted(
        file.name for file in (tmp_path / "right").iterdir() if file.suffix in (".json", ".npy")
    ):
        folder = shutil.copytree(tmp_path / "right", tmp_path / f"{how}-{name}")
        file = folder / name
        file.write_bytes(DAMAGE[how](file.read_bytes(), rng))
        with pytest.raises(DataError) as error:
            contents(d.open_cache(folder, **WHO))
        assert "damaged" in str(error.value) or "lacks example" in str(error.value)
        if name == "cache.json":
            with pytest.raises(DataError, match="remove the directory"):
                write(folder, views=2, augment=VIEW)
            continue
        caplog.clear()
        assert contents(write(folder, views=2, augment=VIEW)) == right
        assert "written again" in caplog.text or how == "zeros" and "digests" in name


def test_a_file_of_another_cache_or_place_is_none_of_this_one(tmp_path):
    """A digest belongs to one block of one view of one cache, and matches no other."""
    right = contents(write(tmp_path / "mine", views=2, augment=VIEW))
    write(tmp_path / "other", views=2, augment=VIEW, temperature=2.0)
    for kind in ("ids", "log_probs", "tail", "digests"):
        name = f"{kind}-00000-of-00001.npy"
        shutil.copy(tmp_path / "other" / name, tmp_path / "mine" / name)
    with pytest.raises(DataError, match="differs from what was written"):
        contents(d.open_cache(tmp_path / "mine", **WHO))
    assert contents(write(tmp_path / "mine", views=2, augment=VIEW)) == right


CHANGES = [
    {"version": 1},
    {"version": 3},
    {"processes": 0},
    {"processes": 2},
    {"k": -1},
    {"dtype": "x"},
]
CHANGES += [{"temperature": "hot"}, {"views": 1.5}, {"examples": 10**30}]


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_cache_says_of_itself_is_checked_digest_or_not(tmp_path, change):
    write(tmp_path)
    about = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_bytes(sealed({**about, **change}))
    for use in (lambda: contents(d.open_cache(tmp_path, **WHO)), lambda: write(tmp_path)):
        with pytest.raises((DataError, StateError)):
            use()


def test_one_process_at_a_time_writes_a_part(tmp_path):
    reached = []

    def second(x):
        if not reached:  # while this one holds the lock
            reached.append(True)
            with pytest.raises(StateError, match="another process is writing part 0 of 1"):
                write(tmp_path)
        return x @ KERNEL

    d.write_cache(tmp_path, second, SPLIT, **WHO, k=2)
    assert reached and len(d.open_cache(tmp_path, **WHO)(np.arange(N), np.zeros(N, int)).ids) == N


@pytest.mark.parametrize("options", [{"k": 0}, {"views": 0}, {"batch_size": 0}, {"batch_size": 2.0},
                                     {"process_index": 2, "process_count": 2}, {"process_count": 0}])  # fmt: skip # noqa: E501
def test_numbers_out_of_range_are_refused_by_name(tmp_path, options):
    with pytest.raises(ArgumentError, match=list(options)[0]):
        write(tmp_path, **options)


@pytest.mark.parametrize("k", [1, CLASSES])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused_by_example(tmp_path, value, k):
    def one_bad(x):  # only one of its logits, and whatever the augmentation
        return (x @ KERNEL).at[:, 4].add(jnp.where(x[:, 0] == 99, value, 0))

    bad = {**SPLIT, "image": SPLIT["image"].copy()}
    bad["image"][13, 0] = 99
    with pytest.raises(NonFiniteError, match="example 13, view 0"):
        d.write_cache(tmp_path, one_bad, bad, **WHO, k=k, batch_size=4)


def test_what_does_not_belong_is_refused(tmp_path):
    cache = write(tmp_path)
    with pytest.raises(
        StateError, match="another teacher: teacher_sha256 aaaaaaaaaaaaaaaa, now cccccccccccccccc"
    ):
        d.open_cache(tmp_path, teacher_sha256="c" * 64, data_sha256="b" * 64)
    with pytest.raises(StateError, match="another data"):
        d.open_cache(tmp_path, teacher_sha256="a" * 64, data_sha256="c" * 64)
    with pytest.raises(StateError, match="another cache .*k: 7 there, 3 now"):
        write(tmp_path, k=3)
    with pytest.raises(ConfigError, match="'float16'"):
        write(tmp_path / "new", dtype="float16")
    with pytest.raises(DataError, match="holds index 0 to 20, and was asked for 3 to 21"):
        cache([3, 21], [0, 0])
    with pytest.raises(DataError, match="holds view 0 to 0"):
        cache([3], [1])
    (tmp_path / "ids-00000-of-00001.npy").unlink()
    with pytest.raises(DataError, match="process 0 of 1 has not written"):
        d.open_cache(tmp_path, **WHO)
    about = json.loads((tmp_path / "cache.json").read_text())
    assert about["teacher_sha256"] == WHO["teacher_sha256"] and about["dtype"] == "bfloat16"


@pytest.mark.wide(1)
@pytest.mark.parametrize("dtype, error", [("float32", 1e-5), ("bfloat16", 5e-3)])
@pytest.mark.slow
def test_training_from_the_cache_is_training_online(tmp_path, dtype, error):
    """Weights agree to rounding from a float32 cache, to half a percent from bfloat16."""
    cache = write(tmp_path, views=2, augment=VIEW, dtype=dtype, temperature=2.0)
    model, optimizer = LeNet300100(classes=CLASSES, hidden=(8,)), optax.sgd(0.05)
    feed = batches(SPLIT, 7, seed=0)
    cached = d.CachedFeed(feed, cache, feed.steps_per_epoch)
    frozen = d.Teacher(lambda v, x: x @ v["kernel"], {"kernel": KERNEL})
    variables, key = model.init(jax.random.key(0), SPLIT["image"]), jax.random.key(1)
    trained = []
    for term, online in (
        (d.on_logits(d.kl, temperature=2.0), True),
        (d.on_logits(d.top_k_kl), False),
    ):
        loss = distillation(model, [term], augment=VIEW)
        step = jax.jit(make_step(loss, optimizer, cj.identity()))
        state = create(variables, cj.identity(), optimizer, key)
        for i in range(8):  # over both views
            batch = cached[i]
            if online:
                batch.pop("teacher")
            state, metrics = step(state, batch, teacher=frozen if online else None)
        trained.append(state.params)
        assert "teacher_accuracy" in metrics
    for a, b in zip(*map(jax.tree.leaves, trained), strict=True):
        assert jnp.linalg.norm(a - b) <= error * jnp.linalg.norm(a)
    assert any(
        (x != y).any()
        for x, y in zip(*map(jax.tree.leaves, (trained[0], variables["params"])), strict=True)
    )
