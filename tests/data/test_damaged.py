"""Damaged prepared data: they are loaded unchanged, or the error says what to do."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from compress_jax.core import DataError
from compress_jax.data import load


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


HOW = {
    "empty": lambda data, rng: b"",
    "half": lambda data, rng: data[: len(data) // 2],
    "garbage": lambda data, rng: rng.bytes(300),
    "list": lambda data, rng: b"[]",
    "flipped": lambda data, rng: flipped(data, len(data) * 5 // 7),
    "gone": None,
    "folder": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("data")
    return folder, load("digits", data_dir=folder, normalized=False)


@pytest.mark.wide(2)
@pytest.mark.parametrize("how", HOW)
def test_damage_is_told_or_makes_no_difference(how: str, prepared, tmp_path: Path):
    base, right = prepared
    for i, name in enumerate(
        sorted(str(f.relative_to(base)) for f in base.rglob("*") if f.is_file())
    ):
        folder = shutil.copytree(base, tmp_path / str(i))
        file = folder / name
        data = file.read_bytes()
        file.unlink()
        if how == "folder":
            file.mkdir()
        elif how != "gone":
            file.write_bytes(HOW[how](data, np.random.default_rng(0)))
        try:
            found = load("digits", data_dir=folder, normalized=False)
        except DataError as error:
            assert "delete it or choose another data_dir" in str(error), name
        else:
            assert found.fingerprint == right.fingerprint and found.maximum == right.maximum, name
            assert (
                found.train["image"] == right.train["image"]
            ).all() and found.classes == right.classes
