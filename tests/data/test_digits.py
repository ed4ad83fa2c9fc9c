import numpy as np
import pytest
from sklearn.datasets import load_digits

from compress_jax.data import load
from compress_jax.data._builders.digits import is_test


@pytest.fixture(scope="module")
def raw(digits_dir):
    return load("digits", data_dir=digits_dir, normalized=False)


def _rows(images, labels):
    """Each example as a row of numbers, rows sorted: equal for equal multisets of examples."""
    table = np.column_stack([labels, images.reshape(len(images), -1)]).astype(np.float64)
    return table[np.lexsort(table.T)]


def test_the_three_splits_together_are_exactly_scikit_learns_arrays(raw):
    source = load_digits()
    parts = raw.train, raw.validation, raw.test
    images = np.concatenate([p["image"] for p in parts]) * np.float32(
        16
    )  # k / 16 is exact in binary
    labels = np.concatenate([p["label"] for p in parts])
    np.testing.assert_array_equal(_rows(images, labels), _rows(source.images, source.target))


def test_splits_share_no_example(raw):
    # The source has no two equal images, so equal rows in two splits would be one example in both.
    source = load_digits()
    assert len(np.unique(source.data, axis=0)) == len(source.data)
    seen = [{row.tobytes() for row in p["image"]} for p in (raw.train, raw.validation, raw.test)]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 1797


def test_the_test_split_is_the_documented_one(raw):
    source = load_digits()
    chosen = is_test(source.target)
    expected = _rows(source.images[chosen], source.target[chosen])
    np.testing.assert_array_equal(_rows(raw.test["image"] * 16, raw.test["label"]), expected)
    for label in range(10):
        assert np.sum(chosen[source.target == label]) == np.sum(source.target == label) // 5


def test_types_and_shapes(raw):
    for part in (raw.train, raw.validation, raw.test):
        assert part["image"].dtype == np.float32 and part["image"].shape[1:] == (8, 8, 1)
        assert part["label"].dtype == np.int32
    assert raw.classes == 10 and raw.names == tuple("0123456789") and raw.maximum == 16


def test_two_preparations_give_the_same_arrays_in_the_same_order(raw, tmp_path):
    again = load("digits", data_dir=tmp_path, normalized=False)
    assert again.fingerprint == raw.fingerprint
    np.testing.assert_array_equal(again.train["image"], raw.train["image"])


def test_preparing_writes_nothing_to_the_terminal(tmp_path, capfd):
    load("digits", data_dir=tmp_path)
    assert capfd.readouterr() == ("", "")
