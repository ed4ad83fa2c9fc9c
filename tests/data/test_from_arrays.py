"""Arrays of one's own become data: split, normalized, fingerprinted, and it is said."""

import numpy as np
import pytest

from compress_jax.core import CompressError, DataError
from compress_jax.data import Data

RNG = np.random.default_rng(0)
X = RNG.normal(3, 5, size=(200, 4))
Y = np.arange(200) % 3


def test_missing_splits_are_drawn_and_nothing_is_lost_or_twice():
    data = Data.from_arrays({"x": np.arange(200), "y": Y})
    rows = [data.train["x"], data.validation["x"], data.test["x"]]
    assert [len(each) for each in rows] == [160, 20, 20]
    assert sorted(np.concatenate(rows)) == list(range(200))
    assert all((split["y"] == split["x"] % 3).all() for split in (data.train, data.test))
    assert any("validation: 20 of the 200 examples" in note for note in data.notes)


def test_the_draw_is_that_of_the_seed():
    one, same, other = (Data.from_arrays({"x": X}, seed=seed) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert len(one.fingerprint) == 64


def test_splits_that_are_given_stay():
    data = Data.from_arrays({"x": X[:100]}, {"x": X[100:150]}, {"x": X[150:]})
    np.testing.assert_array_equal(data.test["x"], X[150:].astype(np.float32))
    assert data.notes == ("x: float64 is stored as float32",)


def test_images_of_bytes_are_scaled_and_normalized_by_train():
    images = RNG.integers(0, 256, (50, 3, 3, 2), dtype=np.uint8)
    data = Data.from_arrays({"image": images, "label": Y[:50]})
    assert data.maximum == 255.0 and data.mean.shape == (2,)
    train = data.train["image"]
    np.testing.assert_allclose(train.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(train.std((0, 1, 2)), 1, atol=1e-5)
    back = (data.test["image"] * data.std + data.mean) * 255
    assert {int(v) for v in np.rint(back).ravel()} <= {int(v) for v in images.ravel()}


def test_numbers_are_normalized_where_it_is_asked_for():
    plain = Data.from_arrays({"x": X, "y": Y})
    asked = Data.from_arrays({"x": X, "y": Y}, normalized="x")
    assert abs(plain.train["x"].mean() - 3) < 1 and abs(asked.train["x"].mean()) < 1e-6
    assert plain.fingerprint == asked.fingerprint, "of the examples before normalization"


WRONG = {
    "lengths": ({"x": X, "y": Y[1:]}, {}, "one length"),
    "nothing": ({"x": X[:0]}, {}, "not 0"),
    "no dict": (X, {}, "must be a dict of arrays"),
    "text": ({"x": np.array(["a", "b"])}, {}, "turn text into tokens"),
    "objects": ({"x": [[1], [1, 2]]}, {}, "no array"),
    "one number": ({"x": np.float32(1)}, {}, "one row an example"),
    "other entries": ({"x": X}, {"validation": {"z": X}}, "validation has .'z'., and train has"),
    "another shape": ({"x": X}, {"test": {"x": X[:, :2]}}, r"x of test is float32\[2\]"),
    "another dtype": ({"x": X}, {"test": {"x": Y}}, "int32"),
    "too few": ({"x": X[:2]}, {}, "too few"),
    "a large number": ({"x": np.array([2**40, 1])}, {}, "beyond 32 bits"),
    "no such entry": ({"x": X}, {"normalized": "image"}, "is no entry"),
    "half": ({"x": X}, {"fraction": 0.5}, "fraction must be"),
}


@pytest.mark.parametrize("which", WRONG)
def test_arrays_that_do_not_fit_together_are_refused(which):
    train, options, said = WRONG[which]
    with pytest.raises(CompressError, match=said):
        Data.from_arrays(train, **options)


def test_four_arguments_are_enough():
    split = {"x": X.astype(np.float32), "y": Y.astype(np.int32)}
    data = Data("own", split, split, split)
    assert len(data.fingerprint) == 64 and data.classes is None
    with pytest.raises(DataError, match="one length"):
        Data.from_arrays({"x": X, "y": Y[:3]})
