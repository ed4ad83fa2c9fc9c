import gzip

import numpy as np
import pytest

from compress_jax.core.errors import DataError
from compress_jax.data import load
from compress_jax.data._builders import idx


def _write(folder, n=2):
    """Four small IDX files, well formed but not Fashion-MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        images = b"\0\0\x08\x03" + np.array([n, 28, 28], ">i4").tobytes() + bytes(n * 784)
        labels = b"\0\0\x08\x01" + np.array([n], ">i4").tobytes() + bytes(n)
        for kind, content in (("images", images), ("labels", labels)):
            (folder / idx.file_name(part, kind)).write_bytes(gzip.compress(content))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_without_files_and_network_the_error_names_every_folder_and_what_to_do(
    name, offline, tmp_path, monkeypatch
):
    monkeypatch.setenv("COMPRESS_JAX_DATA", str(tmp_path / "mine"))
    with pytest.raises(DataError) as caught:
        load(name, data_dir=tmp_path / "home")
    text = str(caught.value)
    for expected in (
        tmp_path / "mine" / name,
        tmp_path / "home" / "downloads" / "manual",
        tmp_path / "home" / name,
    ):
        assert str(expected) in text
    for expected in ("COMPRESS_JAX_DATA", "manual_dir", 'load("digits")', "http", *idx.FILES):
        assert expected in text


def test_the_error_names_the_file_that_lacks(offline, tmp_path):
    _write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=f"{tmp_path}: lacks t10k-labels-idx1-ubyte.gz"):
        load("fashion_mnist", data_dir=tmp_path / "home", manual_dir=tmp_path)


def test_files_with_another_content_are_refused_and_nothing_is_left_prepared(offline, tmp_path):
    _write(tmp_path / "manual")
    for _ in range(2):
        with pytest.raises(DataError, match="belongs to another data set"):
            load("fashion_mnist", data_dir=tmp_path / "home", manual_dir=tmp_path / "manual")


def test_a_file_cut_short_is_refused(offline, tmp_path):
    _write(tmp_path / "manual")
    path = tmp_path / "manual" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz cannot be read as gzip"):
        load("fashion_mnist", data_dir=tmp_path / "home", manual_dir=tmp_path / "manual")


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08", b"\0\0\x08\x01\0\0\0\x05ab", b"\0\0\x0d\x01\0\0\0\x01a", b"hello"]
)
def test_what_is_not_idx_is_refused(tmp_path, content):
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match="not an IDX file"):
        idx.read(path)


def test_a_file_that_is_not_gzip_is_refused(tmp_path):
    path = tmp_path / "file.gz"
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(DataError, match="cannot be read as gzip"):
        idx.read(path)


def test_a_stock_set_without_network_is_refused_at_once(offline, tmp_path):
    with pytest.raises(DataError, match="(?s)cifar10 is not prepared.*no connection to.*load"):
        load("cifar10", data_dir=tmp_path)


def test_an_unknown_name_lists_the_embedded_ones(tmp_path):
    with pytest.raises(DataError, match="digits, fashion_mnist and mnist"):
        load("no_such_data", data_dir=tmp_path)


def test_data_that_are_not_images_are_refused_before_any_download(offline, tmp_path):
    with pytest.raises(DataError, match="does not hold labeled images; it has text, label"):
        load("imdb_reviews", data_dir=tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"cannot be written to {tmp_path}/file"):
        load("digits", data_dir=tmp_path / "file")


def test_damaged_prepared_data_are_named(tmp_path):
    load("digits", data_dir=tmp_path)
    (shard,) = (tmp_path / "digits" / "1.0.0").glob("digits-test.array_record*")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(DataError, match="digits/1.0.0.* cannot be read"):
        load("digits", data_dir=tmp_path)
