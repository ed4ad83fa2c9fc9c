"""25 mistakes in a config, the sentence that each gets, and the seconds until it comes.

    python experiments/faults/mistakes.py

Every mistake is given to `search.compress`, as `compress-jax run` does; nothing is trained. Exits
with 1 if one is not refused by a sentence of ours, or takes longer than five seconds.
"""

import tempfile
import textwrap
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import compress_jax as cj
from compress_jax.core import CompressError
from compress_jax.search import (
    Candidate,
    Experiment,
    Network,
    Requirement,
    Training,
    compress,
    rewrite,
    shrink,
)

LIMIT = 5.0  # seconds
RNG = np.random.default_rng(0)
X = RNG.normal(size=(600, 8)).astype(np.float32)
Y = X[:, :3].argmax(-1)
ARRAYS = {"x": X, "y": Y}
TASK = cj.tasks.classification("x", "y")


class NNX(nnx.Module):
    """A module that is given where an instance belongs."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Make the layer."""
        self.layer = nnx.Linear(8, 3, rngs=rngs)


def net(outputs: int = 3) -> nn.Module:
    """Return a small network."""
    return nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(outputs)])


def training(**changes: Any) -> Training:
    """Return a short training."""
    return Training(**{"optimizer": optax.adam(1e-3), "steps": 10, "batch_size": 64, **changes})


def kernels(compression: cj.Compression) -> cj.Compression:
    """Return a compression of the kernels alone."""
    return cj.at("**/kernel", compression)


def experiment(arrays: dict[str, Any] = ARRAYS, **changes: Any) -> Experiment:
    """Return an experiment that works, but for what is changed."""
    usual = {
        "data": cj.data.Data.from_arrays(arrays),
        "student": Network(net(), training()),
        "candidates": (Candidate("int4", kernels(cj.quantize.uniform(4)), training()),),
        "task": TASK,
    }
    return Experiment("mistake", **{**usual, **changes})


def candidate(*method: Any) -> Callable[[], Experiment]:
    """Return an experiment whose candidate does something else."""
    return lambda: experiment(candidates=(Candidate("mine", method, training()),))


def teacher(**changes: Any) -> Experiment:
    """Return an experiment with a teacher."""
    usual = {"teacher": Network(net(), training()), "loss": TASK.distillation(0.5, 2.0)}
    return experiment(**{**usual, **changes})


HINT = cj.distill.on_features(cj.distill.hint, "layers_7", "layers_0")
MISTAKES: dict[str, Callable[[], Any]] = {
    "a glob that matches nothing": candidate(cj.at("**/kernels", cj.quantize.uniform(4))),
    "a group size that does not divide": candidate(kernels(cj.quantize.uniform(4, granularity=7))),
    "9 bits": lambda: candidate(kernels(cj.quantize.uniform(9)))(),
    "sparsity in percent": lambda: candidate(kernels(cj.prune.magnitude(90)))(),
    "max_drop=1 for one point": lambda: experiment(requirement=Requirement(max_drop=1)),
    "reference='techer'": lambda: Requirement(reference="techer"),  # pyright: ignore
    "prune.shrink as a candidate": lambda: Candidate("mine", cj.prune.shrink),  # pyright: ignore
    "a solver that is not wrapped": lambda: Candidate("mine", cj.quantize.gptq),  # pyright: ignore
    "a solver without a grid": lambda: rewrite(cj.quantize.gptq),
    "shrink(ration=0.5)": lambda: shrink(ration=0.5),
    "steps=-5": lambda: training(steps=-5),
    "optax.adam without a rate": lambda: training(optimizer=optax.adam),
    "a batch larger than the data": lambda: experiment(
        student=Network(net(), training(batch_size=4096))
    ),
    "a dict where data belong": lambda: experiment(data={"train": ARRAYS}),
    "an entry that is not there": lambda: experiment(task=cj.tasks.classification()),
    "labels of 10 classes, 3 outputs": lambda: experiment({"x": X, "y": np.arange(600) % 10}),
    "labels that are floats": lambda: experiment({"x": X, "y": Y.astype(np.float32)}),
    "labels from -1": lambda: experiment({"x": X, "y": Y - 1}),
    "arrays of two lengths": lambda: experiment({"x": X, "y": Y[1:]}),
    "a NaN in the inputs": lambda: experiment({"x": np.where(X > 2.5, np.nan, X), "y": Y}),
    "texts where numbers belong": lambda: experiment({"x": np.array(["a"] * 600), "y": Y}),
    "a module that was not made": lambda: Network(NNX, training()),
    "a teacher of other classes": lambda: teacher(teacher=Network(net(5), training())),
    "a feature that is not there": lambda: teacher(loss=(HINT,)),
    "regression on classes": lambda: experiment(task=cj.tasks.regression("x", "y")),
}


def attempt(make: Callable[[], Any]) -> tuple[str, float]:
    """Return what a mistake is answered by, and after how many seconds; "" if by nothing."""
    begun = time.perf_counter()
    answer = ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = make()
            if isinstance(made, Experiment):
                compress(made, folder, log_fn=lambda line: None)
        except CompressError as error:
            answer = str(error)
    return answer, time.perf_counter() - begun


def main() -> None:
    """Print the table."""
    failed = 0
    for number, (name, make) in enumerate(MISTAKES.items(), 1):
        answer, seconds = attempt(make)
        failed += not answer or seconds > LIMIT
        print(f"{number:2}  {name}  ({seconds:.1f} s)")
        print(textwrap.indent(textwrap.fill(answer or "NOT REFUSED", 96), "      "))
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
