import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import compress_jax as cj
from compress_jax.data import clean, normalize, scale_to_unit, statistics


def _split(images, labels=None):
    images = np.asarray(images, np.float32)
    return {
        "image": images,
        "label": np.arange(len(images), dtype=np.int32) if labels is None else np.asarray(labels),
    }


def test_non_finite_examples_are_dropped_and_counted():
    split = _split([[0, 1], [np.nan, 1], [2, np.inf], [-np.inf, 0], [3, 4]])
    kept, dropped = clean(split)
    assert kept["label"].tolist() == [0, 4] and dropped == {"non_finite": 3, "duplicate": 0}
    assert len(split["label"]) == 5


def test_repeats_are_dropped_only_if_asked_and_the_first_stays():
    split = _split([[1], [2], [1], [1]], labels=[7, 7, 7, 8])
    assert clean(split)[1]["duplicate"] == 0
    kept, dropped = clean(split, drop_duplicates=True)
    assert kept["image"].ravel().tolist() == [1, 2, 1] and kept["label"].tolist() == [7, 7, 8]
    assert dropped == {"non_finite": 0, "duplicate": 1}


@given(
    hnp.arrays(
        np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(0, 2)
    )
)
def test_cleaning_twice_changes_nothing_and_keeps_the_set_of_examples(images):
    kept, dropped = clean({"image": images}, drop_duplicates=True)
    again, none = clean(kept, drop_duplicates=True)
    assert none["duplicate"] == 0 and len(again["image"]) == len(images) - dropped["duplicate"]
    np.testing.assert_array_equal(np.unique(images, axis=0), np.unique(kept["image"], axis=0))
    assert len(np.unique(kept["image"], axis=0)) == len(kept["image"])


def test_statistics_agree_with_float64_where_float32_sums_would_not():
    rng = np.random.default_rng(0)
    images = (1000 + rng.normal(size=(5000, 3, 3, 2)) * [0.5, 2]).astype(np.float32)
    mean, std = statistics({"image": images})
    reference = images.astype(np.float64)
    np.testing.assert_allclose(mean, reference.mean((0, 1, 2)), rtol=1e-7)
    np.testing.assert_allclose(std, reference.std((0, 1, 2)), rtol=1e-6)


def test_a_constant_channel_becomes_zero_not_nan():
    split = _split(np.full((4, 2, 2, 1), 0.25))
    out = normalize(split, *statistics(split))
    np.testing.assert_array_equal(out["image"], 0)


def test_statistics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="empty"):
        statistics(_split(np.zeros((0, 2, 2, 1))))


def test_scaling_float_images_leaves_the_input_alone():
    images = np.full((1, 1, 1), 8, np.float32)
    assert (
        scale_to_unit({"image": images}, maximum=16)["image"].item() == 0.5 and images.item() == 8
    )


def test_the_functions_are_pure():
    split = {"image": np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1), "label": np.arange(2)}
    before = split["image"].copy()
    unit = scale_to_unit(split, maximum=8)
    assert unit["image"].dtype == np.float32 and unit["label"] is split["label"]
    kept = unit["image"].copy()
    normalize(unit, *statistics(unit))
    np.testing.assert_array_equal(split["image"], before)
    np.testing.assert_array_equal(unit["image"], kept)


def test_the_old_name_of_normalize_works_and_warns():
    with pytest.warns(DeprecationWarning, match="normalize"):
        assert cj.data.normalise is cj.data.normalize
