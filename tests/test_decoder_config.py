"""The decoder's config, a thousandth as large, divided over eight devices."""

from pathlib import Path

import jax
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.cli.config import build, load_config
from compress_jax.core.paths import flatten

CONFIG = Path(__file__).parents[1] / "configs" / "decoder.py"
SMALL = {"vocabulary": 64, "width": 32, "depth": 2, "teacher_width": 64, "teacher_depth": 2,
         "length": 16, "batch_size": 8, "steps": 4, "fsdp": 4}  # fmt: skip


@pytest.mark.slow
def test_it_runs_sharded(tmp_path):
    experiment = build(load_config(CONFIG), SMALL)
    # A teacher in bfloat16 whose logits are float32 mixes dtypes, as it does for users.
    with jax.numpy_dtype_promotion("standard"):
        result = cj.search.compress(experiment, tmp_path, log_fn=lambda line: None)
    packed = cj.load(result.artifact)[0]
    kernels = {
        path: np.asarray(leaf)
        for path, leaf in flatten(cj.unpack(packed)["params"])[0].items()
        if path.endswith("kernel")
    }
    assert kernels
    for kernel in kernels.values():
        # [layers, in, out]: each layer is half zeros, and uses at most 16 values a channel.
        assert all(0.45 <= (layer == 0).mean() for layer in kernel)
        assert all(len(np.unique(layer[:, 0])) <= 16 for layer in kernel)
