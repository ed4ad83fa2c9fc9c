"""The logit cache: what is read is what the teacher said of that very view, or an error."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compress_jax as cj
from compress_jax import distill as d
from compress_jax.core.errors import ConfigError, DataError, StateError
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
        d.write_cache(tmp_path, teacher, SPLIT, **WHO, k=3, views=4, augment=VIEW, batch_size=8, dtype=dtype,
                      process_index=process, process_count=2)  # fmt: skip
    index, view = np.array([20, 0, 7, 7]), np.array([0, 3, 1, 2])
    top = d.open_cache(tmp_path, **WHO)(index, view)
    expected = seen(index, view)
    np.testing.assert_array_equal(top.ids, np.argsort(-expected, axis=-1)[:, :3])
    largest = np.take_along_axis(expected, top.ids, axis=-1)
    np.testing.assert_allclose(top.log_probs.astype(np.float64), largest, rtol=error, atol=error * 1e-2)
    np.testing.assert_allclose(top.tail, 1 - np.exp(largest).sum(-1), atol=1e-5)
    assert not list(tmp_path.glob("*.new")) and (top.log_probs[2] != top.log_probs[3]).any()


def test_a_cache_that_was_cut_off_goes_on_and_lacks_what_it_lacks(tmp_path):
    write(tmp_path)
    tail = np.lib.format.open_memmap(tmp_path / "tail-00000-of-00001.npy", "r+")
    ids = np.lib.format.open_memmap(tmp_path / "ids-00000-of-00001.npy", "r+")
    tail[5:9] = np.nan
    ids[5:9], ids[0] = 0, 6  # the second must survive: it was there
    tail.flush(), ids.flush()
    cache = d.open_cache(tmp_path, **WHO)
    with pytest.raises(DataError, match="lacks example 8, view 0: go on with write_cache"):
        cache([1, 8], [0, 0])
    again = write(tmp_path)([0, 8], [0, 0])
    assert (again.ids[0] == 6).all() and sorted(again.ids[1].tolist()) == list(range(CLASSES))


def test_what_does_not_belong_is_refused(tmp_path):
    cache = write(tmp_path)
    with pytest.raises(StateError, match="another teacher: teacher_sha256 aaaaaaaaaaaaaaaa, now cccccccccccccccc"):
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


@pytest.mark.parametrize("dtype, error", [("float32", 1e-5), ("bfloat16", 5e-3)])
def test_training_from_the_cache_is_training_online(tmp_path, dtype, error):
    """The same views, the same losses: to rounding from float32, to half a percent of the weights from bfloat16."""
    cache = write(tmp_path, views=2, augment=VIEW, dtype=dtype, temperature=2.0)
    model, optimizer = LeNet300100(classes=CLASSES, hidden=(8,)), optax.sgd(0.05)
    feed = batches(SPLIT, 7, seed=0)
    cached = d.CachedFeed(feed, cache, feed.steps_per_epoch)
    frozen = d.Teacher(lambda v, x: x @ v["kernel"], {"kernel": KERNEL})
    variables, key = model.init(jax.random.key(0), SPLIT["image"]), jax.random.key(1)
    trained = []
    for term, online in ((d.on_logits(d.kl, temperature=2.0), True), (d.on_logits(d.top_k_kl), False)):
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
    assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (trained[0], variables["params"])), strict=True))
