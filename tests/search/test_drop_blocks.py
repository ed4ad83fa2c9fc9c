"""Fewer blocks are a candidate like any other: trained, stored, and built anew from the file."""

import numpy as np
import optax
import pytest
from flax import linen as nn

import compress_jax as cj
from compress_jax.core.errors import ArgumentError, ConfigError
from compress_jax.search import Candidate, Experiment, Network, Requirement, Training
from compress_jax.search._method import rebuilt_model

TASK = cj.tasks.classification("x", "y")
T = Training(optax.adam(0.02), 20, batch_size=48)
INT8 = cj.at("**/kernel", cj.quantize.uniform(8, granularity="channel"))


class Residual(nn.Module):
    """Four blocks of a residual stream; the third does nothing at the start."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="stem")(x)
        for i in range(4):
            small = nn.initializers.normal(1e-3) if i == 2 else nn.initializers.lecun_normal()
            y = nn.relu(nn.Dense(24, name=f"block_{i}_up")(x))
            x = x + nn.Dense(16, kernel_init=small, name=f"block_{i}_down")(y)
        return nn.Dense(3, name="head")(x)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6)).astype(np.float32)
    data = cj.data.Data.from_arrays({"x": x, "y": (x @ rng.normal(size=(6, 3))).argmax(-1)})
    globs = [f"block_{i}_*/*" for i in range(4)]
    drop = cj.search.drop_blocks(count=1, patterns=[f"params/{each}" for each in globs])
    narrow = cj.search.shrink(ratio={"**_up/**": 0.5})
    candidates = (
        Candidate("shallow", (drop, T, INT8)),
        Candidate("narrow and shallow", (narrow, drop, T, INT8)),
    )
    whole = Experiment(
        "own", data, Network(Residual(), T), candidates, Requirement(max_drop=0.9), task=TASK,
        order="all", longer_student=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("run")
    return whole, folder, cj.search.compress(whole, folder, log_fn=lambda line: None)


def test_the_artifact_is_that_of_fewer_blocks(run):
    whole, folder, result = run
    rows = {row.name: row for row in result.rows}
    student = rows["student"].parameters
    # A block has 16 * 24 + 24 + 24 * 16 + 16 parameters, half as many hidden units 396.
    assert rows["shallow"].parameters == student - 808
    assert rows["narrow and shallow"].parameters < student - 4 * 400
    for name in ("shallow", "narrow and shallow"):
        file = folder / "candidates" / name / "artifact.safetensors"
        model = rebuilt_model(whole, file, name)
        variables = cj.unpack(cj.load(file)[0])
        found = cj.tasks.measure(TASK, model.apply, variables, whole.data.validation)
        assert found.values["accuracy"] == rows[name].validation > 0.6


def test_wrong_requests_are_refused():
    with pytest.raises(ArgumentError, match="drop_blocks takes no share="):
        cj.search.drop_blocks(share=0.5)
    with pytest.raises((ArgumentError, ConfigError), match="examples"):
        cj.search.drop_blocks(examples=0)
