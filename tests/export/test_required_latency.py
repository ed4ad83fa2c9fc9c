"""A requirement of latency is measured in the runtime it names."""

import numpy as np
import optax
import pytest

import compress_jax as cj
from compress_jax.search import Experiment, Network, Requirement, Search, Training

NEEDS = {"onnx": "onnxruntime", "litert": "ai_edge_litert"}


@pytest.mark.slow
@pytest.mark.parametrize("runtime", NEEDS)
def test_onnx_and_litert_files_are_timed(runtime, tmp_path):
    pytest.importorskip(NEEDS[runtime], reason=f"needs pip install '.[{runtime}]'")
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(200, 8)).astype(np.float32), "y": np.arange(200) % 3}
    training = Training(optax.adam(1e-2), 5, 32)
    # Networks that were cut are timed too.
    int8 = {"int8": cj.quantize.uniform(8)}
    search = Search(int8, width_ratios=(0.5,), proposals=1, examples=32)
    wanted = Requirement(max_drop=0.9, max_latency_ms=1e4, runtime=runtime, batch=4)
    experiment = Experiment(
        "timed",
        cj.data.Data.from_arrays(arrays),
        Network(cj.models.LeNet300100(3, (16, 8)), training),
        requirement=wanted,
        task=cj.tasks.classification("x", "y"),
        search=search,
    )
    result = cj.search.compress(experiment, tmp_path, log_fn=lambda line: None)
    assert result.met and result.chosen.costs["latency_ms"] > 0
    assert result.chosen.name.startswith("cut-")
    assert "milliseconds" in result.chosen.reason
    suffix = {"onnx": "onnx", "litert": "tflite"}[runtime]
    assert (tmp_path / "candidates" / result.chosen.name / f"timed.{suffix}").is_file()
