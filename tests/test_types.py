"""A type checker that is not ours reads the types from an installed package."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

import pytest

PROGRAM = """
import jax.numpy as jnp
import compress_jax as cj

compression = cj.chain(cj.prune.magnitude(0.5), cj.quantize.uniform(bits=4))
reveal_type(compression)
reveal_type(compression.init({"w": jnp.ones(2)}))
reveal_type(cj.coverage(compression, {"w": jnp.ones(2)}).nbytes)
cj.quantize.uniform(bits="four")
"""


def installed() -> bool:
    try:
        files = distribution("compress_jax").files or []
    except PackageNotFoundError:
        return False
    return any(file.name == "py.typed" for file in files)


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason="needs compress_jax installed: pip install '.[test]'")
@pytest.mark.skipif(find_spec("mypy") is None, reason="needs mypy")
def test_mypy_sees_the_types_of_the_installed_package(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "program.py"]
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": ""}, "text": True}
    done = subprocess.run(command, capture_output=True, **options)
    assert "fallback=compress_jax.core.compression.Compression]" in done.stdout
    assert "fallback=compress_jax.core.compression.CompressionState]" in done.stdout
    assert re.search(r'Revealed type is "(builtins\.)?int"', done.stdout), done.stdout
    assert 'incompatible type "str"' in done.stdout, done.stdout
