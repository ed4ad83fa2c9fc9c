"""Public names of an earlier day still mean something: the same, or a new name with a warning."""

import importlib
import warnings
from pathlib import Path

import pytest

from compress_jax.core import ArgumentError
from compress_jax.core.deprecated import renamed_arguments

BEFORE = (Path(__file__).parent / "names/public_names_2026_11_28.txt").read_text().split()


def found(name: str) -> object:
    """Return what a public name means; renamed ones warn."""
    folder, _, last = f"compress_jax.{name}".rpartition(".")
    return getattr(importlib.import_module(folder), last)


def listed(name: str) -> bool:
    """Return whether a name is in the table of contents of its package."""
    folder, _, last = f"compress_jax.{name}".rpartition(".")
    module = importlib.import_module(folder)
    return last in getattr(module, "__all__", vars(module))


@pytest.mark.parametrize("name", BEFORE)
def test_an_old_name_still_works_and_warns_if_there_is_a_new_one(name):
    if listed(name):
        assert found(name) is not None
        return
    with pytest.warns(DeprecationWarning, match="is now"):
        assert found(name) is not None


def test_most_names_stayed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        renamed = [name for name in BEFORE if not listed(name)]
    assert len(renamed) < len(BEFORE) / 10, renamed


def test_an_argument_by_both_its_names_is_refused():
    with pytest.raises(ArgumentError, match="give new= alone"):
        renamed_arguments(old="new")(lambda new: new)(old=1, new=2)
