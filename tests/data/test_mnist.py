import gzip
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from compress_jax.data import load
from compress_jax.data._builders import MNIST, FashionMNIST, idx
from compress_jax.data._dataset import read


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """IDX files of random images, 30 to train and 7 to test, and the arrays in them."""
    folder, rng, arrays = tmp_path_factory.mktemp("idx"), np.random.default_rng(0), {}
    for part, n in (("train", 30), ("t10k", 7)):
        images, labels = (
            rng.integers(0, 256, (n, 28, 28), np.uint8),
            rng.integers(0, 10, n, np.uint8),
        )
        for kind, array in (("images", images), ("labels", labels)):
            header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (folder / idx.file_name(part, kind)).write_bytes(
                gzip.compress(header + array.tobytes())
            )
        arrays[part] = images, labels
    return folder, arrays


@pytest.mark.parametrize("stock", [MNIST, FashionMNIST])
def test_round_trip_of_small_files(stock, tiny, tmp_path):
    class Unchecked(stock, skip_registration=True):
        name = stock.name
        SHA256 = {}

    folder, arrays = tiny
    builder = Unchecked(data_dir=tmp_path, file_format="array_record", folder=folder)
    builder.download_and_prepare()
    for split, part in (("train", "train"), ("test", "t10k")):
        out = read(builder, split)
        got = sorted(
            (image.tobytes(), int(label))
            for image, label in zip(out["image"], out["label"], strict=True)
        )
        assert got == sorted(
            (image.tobytes(), int(label)) for image, label in zip(*arrays[part], strict=True)
        )


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_ours_describe_the_data_as_the_stock_builders_do(name, tmp_path):
    ours = {"mnist": MNIST, "fashion_mnist": FashionMNIST}[name](data_dir=tmp_path)
    stock = tfds.builder(name, data_dir=tmp_path)
    assert ours.name == stock.name and ours.version == stock.version and ours.URL == stock.URL
    assert json.dumps(ours.info.features.to_json()) == json.dumps(stock.info.features.to_json())
    assert ours.info.features["label"].names == stock.info.features["label"].names


@pytest.mark.slow
def test_the_real_fashion_mnist(fashion_files, tmp_path):
    data = load("fashion_mnist", data_dir=tmp_path, manual_dir=fashion_files, normalized=False)
    assert [len(p["label"]) for p in (data.train, data.validation, data.test)] == [
        54000,
        6000,
        10000,
    ]
    source = idx.read(fashion_files / "t10k-images-idx3-ubyte.gz")
    labels = idx.read(fashion_files / "t10k-labels-idx1-ubyte.gz")
    pixels = np.rint(data.test["image"] * 255).astype(np.uint8)
    got = sorted(zip((i.tobytes() for i in pixels), data.test["label"].tolist(), strict=True))
    assert got == sorted(zip((i.tobytes() for i in source), labels.tolist(), strict=True))
    # The stock builder reads what ours prepared.
    stock = tfds.data_source("fashion_mnist", split="test", data_dir=tmp_path, download=False)
    np.testing.assert_array_equal(stock[5]["image"], pixels[5])
