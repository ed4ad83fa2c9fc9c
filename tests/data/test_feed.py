import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.core.errors import ConfigError
from compress_jax.data import batches, eval_batches


def _split(n):
    return {
        "image": np.arange(n, dtype=np.float32)[:, None] * 2,
        "label": np.arange(n, dtype=np.int32),
    }


def _labels(feed, steps):
    return [feed[s]["label"].tolist() for s in steps]


def test_a_batch_is_a_function_of_seed_and_step():
    a, b = batches(_split(50), 8, seed=3), batches(_split(50), 8, seed=3)
    forwards = _labels(a, range(20))
    assert (
        _labels(b, reversed(range(20))) == forwards[::-1]
    )  # a run resumed at any step sees what it would have seen
    assert _labels(batches(_split(50), 8, seed=4), range(20)) != forwards


def test_rows_of_all_arrays_stay_together():
    batch = batches(_split(50), 8, seed=0)[11]
    np.testing.assert_array_equal(batch["image"][:, 0], 2 * batch["label"])


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 60), size=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
@pytest.mark.slow
def test_no_example_occurs_twice_in_an_epoch_and_as_few_as_possible_wait(n, size, seed):
    if size > n:
        return
    feed = batches(_split(n), size, seed=seed)
    assert feed.steps_per_epoch == n // size
    for epoch in range(2):
        steps = range(epoch * feed.steps_per_epoch, (epoch + 1) * feed.steps_per_epoch)
        seen = sum(_labels(feed, steps), [])
        assert len(seen) == len(set(seen)) == n // size * size


def test_epochs_are_shuffled_differently():
    feed = batches(_split(40), 40, seed=0)
    orders = _labels(feed, range(5))
    assert len({tuple(o) for o in orders}) == 5 and list(range(40)) not in orders


def test_all_examples_come_equally_often_in_each_place():
    # 200 epochs of 10 examples: each should come first about 20 times; 5 standard deviations are
    # 21.
    feed = batches(_split(10), 1, seed=0)
    first = [feed[e * 10]["label"].item() for e in range(200)]
    counts = np.bincount(first, minlength=10)
    assert counts.min() > 0 and counts.max() < 42


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_processes_share_the_global_batch(count):
    whole = batches(_split(50), 16, seed=1)
    shards = [
        batches(_split(50), 16, seed=1, process_index=p, process_count=count) for p in range(count)
    ]
    for step in (0, 2, 3, 10):
        joined = np.concatenate([s[step]["label"] for s in shards])
        np.testing.assert_array_equal(joined, whole[step]["label"])


def test_impossible_batches_are_refused():
    with pytest.raises(ConfigError, match="split has 5 examples"):
        batches(_split(5), 6, seed=0)
    with pytest.raises(ConfigError, match="multiple of 4"):
        batches(_split(50), 6, seed=0, process_index=0, process_count=4)
    with pytest.raises(IndexError):
        batches(_split(5), 2, seed=0)[-1]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 40), size=st.integers(1, 50), count=st.sampled_from([1, 2, 3]))
def test_eval_batches_count_every_example_once(n, size, count):
    size *= count
    parts = [
        list(eval_batches(_split(n), size, process_index=p, process_count=count))
        for p in range(count)
    ]
    assert {len(p) for p in parts} == {-(-n // size)}
    seen = []
    for batch in sum(parts, []):
        assert {key: array.shape[0] for key, array in batch.items()} == dict.fromkeys(
            batch, size // count
        )
        assert batch["mask"].dtype == bool and not batch["image"][~batch["mask"]].any()
        seen += batch["label"][batch["mask"]].tolist()
    assert sorted(seen) == list(range(n))
