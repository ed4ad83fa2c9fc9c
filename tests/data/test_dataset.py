import subprocess
import sys

import numpy as np
import pytest

from compress_jax.core.errors import ConfigError
from compress_jax.data import fingerprint, load


def test_statistics_come_from_what_is_trained_on_only(digits_dir):
    raw = load("digits", data_dir=digits_dir, normalized=False)
    data = load("digits", data_dir=digits_dir)
    pixels = raw.train["image"].astype(np.float64)
    np.testing.assert_allclose(data.mean, [pixels.mean()], rtol=1e-6)
    np.testing.assert_allclose(data.std, [pixels.std()], rtol=1e-6)
    everything = np.concatenate(
        [raw.train["image"], raw.validation["image"], raw.test["image"]]
    ).astype(np.float64)
    assert (
        abs(everything.mean() - pixels.mean()) > 1e-4
    )  # so the comparison above tells the two apart
    for part in ("train", "validation", "test"):
        expected = (getattr(raw, part)["image"] - data.mean) / data.std
        np.testing.assert_array_equal(getattr(data, part)["image"], expected)


def test_normalised_train_has_zero_mean_and_unit_deviation(digits_dir):
    images = load("digits", data_dir=digits_dir).train["image"].astype(np.float64)
    assert abs(images.mean()) < 1e-6 and abs(images.std() - 1) < 1e-6


def test_validation_is_the_end_of_train(digits_dir):
    whole = load("digits", data_dir=digits_dir, validation=0.0, normalized=False)
    tenth = load("digits", data_dir=digits_dir, validation=0.1, normalized=False)
    assert len(whole.validation["label"]) == 0
    for key in ("image", "label"):
        joined = np.concatenate([tenth.train[key], tenth.validation[key]])
        np.testing.assert_array_equal(joined, whole.train[key])
        np.testing.assert_array_equal(tenth.test[key], whole.test[key])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_an_impossible_fraction_is_refused(digits_dir, fraction):
    with pytest.raises(ConfigError, match="fraction of train"):
        load("digits", data_dir=digits_dir, validation=fraction)


def test_fingerprint_sees_values_dtypes_shapes_and_split_names():
    a = {"train": {"image": np.arange(6, dtype=np.uint8)}}
    others = [
        {"train": {"image": np.arange(6, dtype=np.uint8)[::-1]}},
        {"train": {"image": np.arange(6, dtype=np.uint8).reshape(2, 3)}},
        {"train": {"image": np.arange(6, dtype=np.uint8).view(np.int8)}},
        {"test": {"image": np.arange(6, dtype=np.uint8)}},
    ]
    marks = {fingerprint(x) for x in [a, *others]}
    assert len(marks) == 5
    assert fingerprint({"train": {"image": np.arange(6, dtype=np.uint8)}}) == fingerprint(a)


def test_fingerprint_does_not_depend_on_byte_order_or_strides():
    x = np.arange(12, dtype=np.int32)
    assert fingerprint({"a": {"x": x.astype(">i4")}}) == fingerprint({"a": {"x": x}})
    assert fingerprint({"a": {"x": np.repeat(x, 2)[::2]}}) == fingerprint({"a": {"x": x}})


@pytest.mark.slow
def test_tensorflow_is_never_imported(digits_dir):
    code = (
        "import sys; from compress_jax.data import load, batches\n"
        f"batches(load('digits', data_dir={str(digits_dir)!r}).train, 8, seed=0)[0]\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-W", "error", "-c", code]).returncode == 0
