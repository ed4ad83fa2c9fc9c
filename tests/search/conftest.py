"""A problem that a tiny network learns in a few steps: Gaussian blobs, one a class."""

from collections.abc import Callable

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

import compress_jax as cj
from compress_jax.data import Data
from compress_jax.models import LeNet300100
from compress_jax.search import Candidate, Experiment, Network, Training


def split(seed: int, n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n).astype(np.int32)
    image = rng.normal(0, 0.5, (n, 4, 4, 1)).astype(np.float32)
    image[np.arange(n), label, label, 0] += 3
    return {"image": image, "label": label}


@pytest.fixture(scope="session")
def blobs() -> Data:
    splits = split(0, 256), split(1, 60), split(2, 70)
    return Data(
        "blobs",
        *splits,
        3,
        "0" * 64,
        ("a", "b", "c"),
        np.zeros(1, np.float32),
        np.ones(1, np.float32),
        1.0,
        {},
    )


@pytest.fixture(scope="session")
def model() -> LeNet300100:
    return LeNet300100(3, (24, 16))


@pytest.fixture(scope="session")
def mesh() -> Callable[[int], Mesh]:
    return lambda n: jax.make_mesh(
        (n,), ("data",), devices=jax.devices()[:n], axis_types=(AxisType.Auto,)
    )


@pytest.fixture(scope="session")
def training() -> Callable[[int], Training]:
    return lambda steps: Training(optax.adam(0.01), steps, batch_size=32)


@pytest.fixture(scope="session")
def quantized(training) -> Callable[..., Candidate]:
    """A candidate that keeps the accuracy, called ``int{bits}``."""
    return lambda bits, steps=1: Candidate(
        f"int{bits}", cj.at("**/kernel", cj.quantize.uniform(bits)), training(steps)
    )


@pytest.fixture(scope="session")
def nothing(training) -> Candidate:
    """A candidate with no weight left, hence no accuracy."""
    return Candidate("nothing", cj.at("**/kernel", cj.prune.magnitude(1.0)), training(1))


@pytest.fixture(scope="session")
def experiment(blobs, model, mesh, training, quantized) -> Callable[..., Experiment]:
    """An experiment on one device, without a teacher; keyword arguments change it."""
    usual = {
        "data": blobs,
        "student": Network(model, training(30)),
        "candidates": (quantized(8),),
        "mesh": mesh(1),
        "longer_student": False,
    }
    return lambda **changes: Experiment("blobs", **{**usual, **changes})
