"""Networks that a mesh divides, after their training: in host memory, and divided to be measured.

No device holds such a network whole: it is packed in host memory, and its metrics are computed over
the mesh, as its training was. (Solvers and rewrites that calibrate still run on one device.)
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from compress_jax.core.packed import unpack
from compress_jax.core.types import Array, ModelFn
from compress_jax.export import load
from compress_jax.search._candidate import Candidate
from compress_jax.search._experiment import Experiment
from compress_jax.search._network import Network, Variables
from compress_jax.tasks import Measured, measure, outputs
from compress_jax.train._parallel import Rules, batch_axes, fitting, shardings_like
from compress_jax.train._processes import spread


def rules_of(experiment: Experiment, candidate: Candidate) -> Rules:
    """Return the rules of the network that a candidate's method makes.

    Args:
      experiment: that the candidate is of.
      candidate: whose method may begin with a network of its own.

    Returns:
      Rules; some may fit the params no more, see `fitting`.
    """
    first = candidate.items[0]
    return first.rules if isinstance(first, Network) else experiment.student.rules


def beside(
    experiment: Experiment, variables: Variables, rules: Rules
) -> contextlib.AbstractContextManager[object]:
    """Return a context in which what is computed of a divided network stays in host memory.

    Args:
      experiment: for the mesh.
      variables: of the network.
      rules: how it is divided; where they divide nothing, the context changes nothing.

    Returns:
      The context. Where JAX was told to use no CPU it changes nothing.
    """
    if _where(experiment, variables, rules) is None:
        return contextlib.nullcontext()
    return _on_host()


def from_file(experiment: Experiment, file: Path, rules: Rules) -> Variables:
    """Return an artifact's variables, unpacked in host memory, and divided if the rules do so."""
    if rules:
        with _on_host():
            packed = load(file)[0]
            where = _where(experiment, jax.eval_shape(unpack, packed), rules)
            if where is not None:
                return spread(unpack(packed), where)
    return unpack(load(file)[0])


def divided(experiment: Experiment, variables: Variables, rules: Rules) -> Variables:
    """Return a network's variables over the mesh; as they are where the rules divide nothing."""
    where = _where(experiment, variables, rules)
    return variables if where is None else spread(variables, where)


def measured(
    experiment: Experiment, apply: ModelFn, variables: Variables, split: Mapping[str, Array]
) -> Measured:
    """Return the metrics of a network on a split, over the mesh if its variables are divided.

    Args:
      experiment: for the task and the mesh.
      apply: ``(variables, *inputs) -> outputs``.
      variables: from `divided` or `from_file`.
      split: arrays by name.

    Returns:
      The values and a digest of all outputs.
    """
    own = _of_batches(experiment, variables)
    return measure(experiment.task, apply, variables, split, sharding=own)


def asked(
    experiment: Experiment, apply: ModelFn, variables: Variables, split: Mapping[str, Array]
) -> np.ndarray:
    """Return a network's outputs on a split, likewise."""
    own = _of_batches(experiment, variables)
    return outputs(experiment.task, apply, variables, split, sharding=own)


def _where(experiment: Experiment, variables: Variables, rules: Rules) -> Variables | None:
    """Return where each array lives, or None if the rules divide none."""
    params = variables["params"]
    kept = fitting(params, experiment.devices, rules)
    where = shardings_like(variables, params, experiment.devices, kept)
    whole = all(each.is_fully_replicated for each in jax.tree.leaves(where))
    return None if whole else where


def _of_batches(experiment: Experiment, variables: Variables) -> NamedSharding | None:
    """Return where batches live beside some variables; None for wherever JAX puts them."""
    leaves = [leaf for leaf in jax.tree.leaves(variables) if isinstance(leaf, jax.Array)]
    if all(leaf.is_fully_replicated for leaf in leaves):
        return None
    mesh = experiment.devices
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def _on_host() -> contextlib.AbstractContextManager[object]:
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS names others only
        return contextlib.nullcontext()
