"""Run the networks of a finished run once more, for what a report shows of their behavior."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core import unpack
from compress_jax.core.errors import CompressError
from compress_jax.core.types import Array, JsonObject, ModelFn, Variables
from compress_jax.data._disk.stored import some
from compress_jax.export import load, write_atomically
from compress_jax.report._extra import MEASURED, digest
from compress_jax.search import Network
from compress_jax.tasks import outputs
from compress_jax.trace import Site, observe

if TYPE_CHECKING:
    from compress_jax.search import Experiment
    from compress_jax.tasks import PureModel

TESTED = 10_000  # test examples, at most
SEEN = 64  # training examples whose activations are counted
FINE = 2048  # bins while running, each network's own
BINS = 61  # bins that both networks share
Histograms = dict[str, tuple[np.ndarray, np.ndarray]]  # counts [FINE] and edges [FINE + 1]
Fn = tuple[ModelFn, Variables]


def measure_run(workdir: Path) -> Path:
    """Write what the networks of a finished run answer, and what is inside them.

    The config that the run stored is executed.

    Args:
      workdir: the folder of the run.

    Returns:
      ``report/measured.json``.

    Raises:
      ConfigError: as `rebuilt` does.
      ArtifactError: likewise.
    """
    from compress_jax.cli._commands import rebuilt

    experiment, model, packed, _ = rebuilt(workdir)
    own = (model.apply, unpack(packed))
    student = _stored(experiment.student.pure, workdir / "student.safetensors")
    reference, name = student, "student"
    if isinstance(experiment.teacher, Network):
        reference = _stored(experiment.teacher.pure, workdir / "teacher.safetensors")
        name = "teacher"
    notes: list[str] = []
    record = {
        "artifact_sha256": digest(workdir / "artifact.safetensors"),
        "reference": name,
        **_answers(experiment, reference, own, name),
        "activation_examples": min(SEEN, len(next(iter(experiment.data.train.values())))),
        "activations": _activations(experiment, student, own, notes),
        "notes": notes,
    }
    file = workdir / "report" / MEASURED
    write_atomically(file, f"{json.dumps(record)}\n".encode())
    return file


def _stored(model: "PureModel", file: Path) -> Fn:
    return model.apply, unpack(load(file)[0])


def _answers(experiment: "Experiment", reference: Fn, own: Fn, name: str) -> JsonObject:
    """Return the confusion and who is right, where the task has classes."""
    task = experiment.task
    split = {key: each[:TESTED] for key, each in some(experiment.data.test).items()}
    first = outputs(task, *reference, split)
    examples = len(first)
    # A class for each token, a number or a caption is no single answer.
    if not task.logits or first.ndim != 2 or first.shape[1] < 2:
        return {"examples": examples}
    said = first.argmax(-1)
    second = outputs(task, *own, split).argmax(-1)
    counts = np.zeros((first.shape[1], first.shape[1]), np.int64)
    np.add.at(counts, (said, second), 1)
    found: JsonObject = {"examples": examples, "confusion": counts.tolist()}
    labels = np.asarray(split[task.labels]) if task.labels in split else np.zeros(0)
    if labels.shape == said.shape:
        found["right"] = _right(said == labels, second == labels, name)
    return found


def _right(first: Array, second: Array, name: str) -> dict[str, int]:
    """Count the examples by who is right."""
    return {
        "both": int((first & second).sum()),
        f"only the {name}": int((first & ~second).sum()),
        "only the artifact": int((~first & second).sum()),
        "neither": int((~first & ~second).sum()),
    }


def _activations(
    experiment: "Experiment", before: Fn, after: Fn, notes: list[str]
) -> dict[str, dict[str, JsonObject]]:
    """Return histograms of what enters each site that both networks have; notes say what is not."""
    task = experiment.task
    split = some(experiment.data.train, SEEN)
    inputs = task.inputs_of(task.prepare({key: each[:SEEN] for key, each in split.items()}))
    try:
        student = _histograms(*before, *inputs)
        artifact = _histograms(*after, *inputs)
    except CompressError as error:
        notes.append(f"activations could not be observed: {error}")
        return {}
    shared = [site for site in student if site in artifact]
    if lost := len(student) - len(shared):
        notes.append(f"{lost} sites of the student are not in the artifact's network")
    return {site: _shared(student[site], artifact[site]) for site in shared}


def _histograms(apply: ModelFn, variables: Variables, *inputs: Array) -> Histograms:
    """Return counts and edges by site; of a site in a loop, those of each iteration."""
    _, found = jax.jit(observe(apply, _counted))(variables, *inputs)
    by_site: Histograms = {}
    for site, (counts, edges) in found.items():
        counts = np.asarray(counts).reshape(-1, FINE)
        edges = np.asarray(edges).reshape(-1, FINE + 1)
        for i in range(len(counts)):
            name = site.removeprefix("params/") + (f" [{i}]" if len(counts) > 1 else "")
            if np.isfinite(edges[i]).all():
                by_site[name] = counts[i], edges[i]
    return by_site


def _counted(site: Site, lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    operand = (lhs, rhs)[next(iter(site.inputs.values()))]
    return jnp.histogram(jnp.real(operand).astype(jnp.float32).ravel(), FINE)


def _shared(before: tuple[Array, Array], after: tuple[Array, Array]) -> dict[str, JsonObject]:
    """Return both histograms over the same bins, as shares."""
    low = float(min(before[1][0], after[1][0]))
    high = float(max(before[1][-1], after[1][-1]))
    edges = np.linspace(low, high, BINS + 1)
    named: Mapping[str, tuple[Array, Array]] = {"student in float32": before, "artifact": after}
    found = {}
    for name, (counts, own) in named.items():
        # The share below each edge, between the fine edges by a line.
        below = np.concatenate([[0.0], np.cumsum(counts) / max(np.sum(counts), 1)])
        shares = np.diff(np.interp(edges, own, below))
        found[name] = {"low": low, "high": high, "shares": shares.round(6).tolist()}
    return found
