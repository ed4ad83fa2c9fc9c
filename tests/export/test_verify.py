"""The gate: what it must let through and what it must stop, on StableHLO and on ONNX."""

import importlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.core import ExportError
from compress_jax.export import to_stablehlo, verify
from compress_jax.export._verify.verify import (
    Timing,
    Verification,
    interleaved,
    measured,
    runner,
)


@pytest.fixture(scope="module", autouse=True)
def one_child_for_equal_calls():
    """Run each file on each input once, in its child: tests that ask for the same share it."""
    answers = {}

    def shared(path, arrays, job, **limits):
        key = str(path), json.dumps(job), *(x.tobytes() for x in arrays)
        if key not in answers:
            answers[key] = measured(path, arrays, job, **limits)
        return answers[key]

    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("compress_jax.export._verify.verify")
        patch.setattr(module, "measured", shared)
        yield


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """Two files of a linear classifier, its weights, and inputs with its answers as labels."""
    pytest.importorskip("flatbuffers", reason="needs pip install 'compress_jax[stablehlo]'")
    folder = tmp_path_factory.mktemp("files")
    weights = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)}
    x = np.random.default_rng(1).normal(size=(70, 5)).astype(np.float32)
    fn = lambda p, x: x @ p["kernel"]  # noqa: E731
    to_stablehlo(fn, weights, x[:2], folder / "m.stablehlo")
    to_stablehlo(fn, {"kernel": -weights["kernel"]}, x[:2], folder / "wrong.stablehlo")
    return folder, (lambda x: fn(weights, x)), x, np.asarray(fn(weights, x)).argmax(-1)


def timed(folder):
    return {"baseline": folder / "m.stablehlo", "batch_sizes": (1, 8), "rounds": 3}


@pytest.mark.slow
def test_a_faithful_file_passes_and_its_numbers_are_those_of_numpy(linear):
    folder, reference, x, labels = linear
    done = verify(folder / "m.stablehlo", reference, x, labels, batch_sizes=())
    assert done.passed and (done.agreement, done.accuracy, done.reference, done.examples) == (
        1.0,
        1.0,
        1.0,
        70,
    )
    assert done.nbytes == (folder / "m.stablehlo").stat().st_size and done.difference < 1e-6


@pytest.mark.slow
def test_a_file_that_answers_otherwise_fails_and_says_why(linear):
    folder, reference, x, labels = linear
    done = verify(folder / "wrong.stablehlo", reference, x, labels, **timed(folder))
    scores = np.asarray(reference(x))
    share = (scores.argmax(-1) == (-scores).argmax(-1)).mean()
    assert (
        not done.passed
        and math.isclose(done.agreement, share)
        and math.isclose(done.difference, 2.0, rel_tol=1e-5)
    )
    assert any("agreement" in each for each in done.failures) and any(
        "points below" in each for each in done.failures
    )
    assert "FAILED" in str(done) and json.loads(json.dumps(done.record()))["passed"] is False


def test_without_labels_only_agreement_counts(linear):
    folder, reference, x, _ = linear
    done = verify(folder / "m.stablehlo", reference, x, batch_sizes=())
    assert done.passed and math.isnan(done.accuracy) and "accuracy" not in str(done)


def test_times_are_taken_beside_the_baseline(linear):
    folder, reference, x, _ = linear
    done = verify(folder / "wrong.stablehlo", reference, x, **timed(folder))
    assert [each.batch for each in done.timings] == [1, 8] and all(
        each.seconds > 0 for each in done.timings
    )
    assert (
        all(each.low <= each.speedup <= each.high for each in done.timings)
        and done.baseline_bytes > 0
    )


def test_a_slowdown_is_called_one():
    assert "2.00x faster" in str(Timing(1, 1, 0.1, 0.2, 2.0, 1.9, 2.1))
    assert "50 % slower (0.40 to 0.60)" in str(Timing(1, 1, 0.2, 0.1, 0.5, 0.4, 0.6))


@pytest.mark.parametrize("nbytes, text", [(50, "2.00x smaller"), (200, "2.00x larger")])
def test_a_file_that_is_larger_than_the_float_one_is_called_so(nbytes, text):
    found = Verification("m.onnx", 10, 1.0, 0.0, math.nan, math.nan, nbytes, 100, (), ())
    assert f"{nbytes} bytes, {text} than the float export's 100" in str(found)


def test_files_take_turns():
    calls = []
    found = interleaved(
        {name: lambda x, name=name: calls.append(name) for name in "ab"}, [np.ones(1)], 3
    )
    assert "".join(calls) == "abbaabba" and {name: len(times) for name, times in found.items()} == {
        "a": 3,
        "b": 3,
    }


def test_what_cannot_be_run_is_an_error(linear, tmp_path):
    folder, reference, x, _ = linear
    with pytest.raises(ExportError, match="suffixes"):
        runner(tmp_path / "model.pdf")
    with pytest.raises(ExportError, match="returns"):
        verify(folder / "m.stablehlo", lambda x: reference(x)[:, :2], x, batch_sizes=())


def test_onnx_goes_through_the_same_gate(linear, tmp_path):
    for package in ("onnxruntime", "jax2onnx"):
        pytest.importorskip(package, reason="needs pip install 'compress_jax[onnx]'")
    from compress_jax.export import to_onnx

    _, _, x, _ = linear
    fn, weights = lambda p, x: jax.nn.relu(x @ p["kernel"]), {"kernel": jnp.eye(5)}  # noqa: E731
    to_onnx(fn, weights, x[:2], tmp_path / "m.onnx")
    done = verify(
        tmp_path / "m.onnx", lambda x: fn(weights, x), x, threads=(1,), batch_sizes=(1,), rounds=2
    )
    assert done.passed and done.timings[0].threads == 1
