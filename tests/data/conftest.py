import os
from pathlib import Path

import pytest

from compress_jax.data._builders import idx


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A data_dir that no test but the first has to prepare the digits in."""
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture
def offline(monkeypatch):
    """No network and no data files, whatever machine the tests run on."""

    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.delenv("COMPRESS_JAX_DATA", raising=False)


@pytest.fixture(scope="session")
def fashion_files():
    """The folder of the real Fashion-MNIST files."""
    folder = Path(os.environ.get("COMPRESS_JAX_DATA", "/nowhere")) / "fashion_mnist"
    if idx.missing(folder):
        pytest.skip(f"needs {', '.join(idx.FILES)} in $COMPRESS_JAX_DATA/fashion_mnist")
    return folder
