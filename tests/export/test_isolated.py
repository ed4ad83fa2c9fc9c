"""Damaged or malicious files raise an ExportError and do not end the caller."""

import os
import re
import signal
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.core import ExportError
from compress_jax.export import to_stablehlo, verify
from compress_jax.export._artifact.seal import DIGITS, MARK, sealed, unsealed
from compress_jax.export._verify.verify import _answer, runner

X = np.ones((3, 4), np.float32)


def apply(weights: jax.Array, x: jax.Array) -> jax.Array:
    return x @ weights


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    pytest.importorskip("flatbuffers", reason="needs pip install 'compress_jax[stablehlo]'")
    file = tmp_path_factory.mktemp("programs") / "model.stablehlo"
    to_stablehlo(apply, jnp.eye(4, 2), jnp.ones((2, 4)), file)
    return file


def refused(file: Path, said: str, **limits: float) -> None:
    with pytest.raises(ExportError, match=rf"{re.escape(str(file))}.*{said}"):
        verify(file, lambda x: apply(jnp.eye(4, 2), x), X, batch_sizes=(), **limits)


def test_the_digest_is_that_of_the_bytes_before_it_and_jax_passes_over_it(program):
    data = program.read_bytes()
    assert unsealed(data) == data[: -len(MARK) - DIGITS] and sealed(unsealed(data)) == data
    for content in (data, unsealed(data)):
        assert jax.export.deserialize(bytearray(content)).call(X).shape == (3, 2)
    for at in np.random.default_rng(0).integers(0, len(data) - len(MARK) - DIGITS, 99):
        with pytest.raises(ExportError, match="checksum"):
            unsealed(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:200] + b"\xff" + data[201:], "checksum"),
        (lambda data: unsealed(data)[:-900], "cannot be loaded"),
        (lambda data: sealed(bytes(len(data))), "cannot be loaded"),
        (lambda data: b"", "cannot be loaded"),
    ],
    ids=["a flipped byte", "truncated, no digest", "zeros, digest right", "empty"],
)
def test_a_damaged_program_is_an_error_that_names_it(change, said, program, tmp_path):
    file = tmp_path / "bad.stablehlo"
    file.write_bytes(change(program.read_bytes()))
    with pytest.raises(
        ExportError, match=rf"{re.escape(str(file))}.*{said}"
    ):  # these do not crash: no child is needed
        runner(file)


@pytest.mark.slow
def test_a_program_that_is_none_is_an_error_of_verify(tmp_path):
    pytest.importorskip("flatbuffers")
    file = tmp_path / "bad.stablehlo"
    file.write_bytes(os.urandom(500))
    refused(file, "cannot be loaded|crashed")


def test_a_missing_file_and_a_foreign_suffix_are_errors_at_once(tmp_path):
    refused(tmp_path / "none.stablehlo", "is no file")
    refused(tmp_path / "none.onnx", "is no file")
    refused(tmp_path / "model.pdf", "suffixes")


def test_a_program_for_other_inputs_is_an_error(program):
    with pytest.raises(ExportError, match="cannot be run on these inputs"):
        runner(program)(np.ones((3, 5), np.float32))


@pytest.mark.slow
def test_a_program_that_never_ends_is_ended(tmp_path):
    def forever(_: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda y: y[0, 0] < 2, lambda y: y * 0.5, x)

    pytest.importorskip("flatbuffers")
    file = tmp_path / "forever.stablehlo"
    exported = jax.export.export(jax.jit(lambda x: forever(x, x)))(
        jax.ShapeDtypeStruct((64, 4), jnp.float32)
    )
    file.write_bytes(sealed(exported.serialize()))
    refused(file, "has not answered after 15 seconds", timeout=15)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit is one of Linux")
@pytest.mark.slow
def test_a_program_that_wants_more_memory_than_allowed_is_an_error(tmp_path):
    pytest.importorskip("flatbuffers")
    file = tmp_path / "large.stablehlo"
    large = lambda x: jnp.sort(x[0, 0] + jnp.arange(2.0**28))[-1:][None] * x  # noqa: E731
    exported = jax.export.export(jax.jit(large))(jax.ShapeDtypeStruct((64, 1), jnp.float32))
    file.write_bytes(exported.serialize())
    with pytest.raises(ExportError, match=re.escape(str(file))):
        verify(file, lambda x: x, np.ones((3, 1), np.float32), batch_sizes=(), max_bytes=2**28)


@pytest.mark.parametrize("end", [signal.SIGSEGV, signal.SIGABRT, 3])
def test_a_child_that_crashes_is_an_error_that_says_how(end, program, tmp_path):
    """What runtimes do to their process: a true signal."""
    line = (
        f"import os; os.kill(os.getpid(), {int(end)})"
        if isinstance(end, signal.Signals)
        else f"raise SystemExit({end})"
    )
    done = subprocess.run(["python", "-c", line], capture_output=True, check=False)
    said = end.name if isinstance(end, signal.Signals) else "failed"
    with pytest.raises(ExportError, match=f"{program}.*{said}"):
        _answer(program, tmp_path, done)


@pytest.mark.parametrize("suffix", [".onnx", ".tflite"])
@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 500, os.urandom(500)], ids=["empty", "zeros", "noise"]
)
def test_other_runtimes_files_that_are_none_are_errors(suffix, content, tmp_path):
    package = {".onnx": "onnxruntime", ".tflite": "ai_edge_litert"}[suffix]
    pytest.importorskip(package, reason="needs pip install 'compress_jax[onnx,litert]'")
    file = tmp_path / f"bad{suffix}"
    file.write_bytes(content)
    refused(file, "")
