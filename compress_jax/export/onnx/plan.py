"""Which graph is written: the way of conversion that leaves most sites in integers, and what cannot be and why."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from compress_jax.core.errors import ExportError
from compress_jax.core.packed import to_dense, unpack
from compress_jax.core.paths import flatten
from compress_jax.export.agreement import agree
from compress_jax.export.onnx import check, qdq
from compress_jax.export.onnx.convert import WAYS, Way, baked, convert
from compress_jax.export.onnx.places import Placed, place, why_not
from compress_jax.export.onnx.runtime import extremes, optimised, run
from compress_jax.export.onnx.weights import Weight, settle
from compress_jax.export.simulate import Simulation, simulation
from compress_jax.export.structure import is_key

FLOAT = 1e-3  # the difference between a float graph and the function that is allowed


@dataclass(frozen=True)
class Asked:
    """What is asked of an export.

    Attributes:
      how: the static quantizer, pairs, or None.
      ranges: of the activations, or None to calibrate.
      batches: to calibrate with.
      where: which sites.
      dynamic: whether a batch may have any size.
      unsigned: whether weights are written as uint8.
    """

    how: Any
    ranges: Mapping[str, Any] | None
    batches: Sequence[tuple[np.ndarray, ...]]
    where: Any
    dynamic: bool
    unsigned: bool


@dataclass(frozen=True)
class Plan:
    """A graph and what is known about it.

    Attributes:
      model: the graph, its quantized sites in integers.
      weights: by the names of constants.
      places: of the sites that one node computes.
      simulated: what it must compute.
      floating: what the function itself returns for the example.
      notes: what was done otherwise than asked for.
    """

    model: Any
    weights: dict[str, Weight]
    places: dict[str, Placed]
    simulated: Simulation
    floating: Any
    notes: tuple[str, ...]


def plan(fn: Callable[..., Any], params: Any, inputs: Sequence[np.ndarray], asked: Asked) -> Plan:
    """Convert a function in each way until one computes every site that is asked for in integers.

    Args:
      fn: the function.
      params: packed or not.
      inputs: an example.
      asked: the options.

    Returns:
      The plan with most sites in integers.

    Raises:
      ExportError: if no way succeeds, or none has a site in integers although ``how`` is given.
    """
    best, failures = None, []
    for way in WAYS:
        try:
            made = _planned(fn, params, inputs, asked, way)
        except ExportError as error:
            failures.append(str(error))
            continue
        if best is None or len(made.simulated.grids) > len(best.simulated.grids):
            best = made
        if asked.how is None or not _lost(best):
            break
    if best is None:
        raise ExportError("; operation by operation: ".join(dict.fromkeys(failures)))
    if asked.how is not None and not best.simulated.grids:
        reasons = [f"{name!r}: {reason}" for name, reason in best.simulated.left.items()]
        raise ExportError(f"no site can be computed in integers: {'; '.join(reasons) or '`how` names none'}")
    if failures:
        best = replace(best, notes=(f"converted operation by operation, as layers could not be: {failures[0]}", *best.notes))
    return best


def _lost(made: Plan) -> bool:
    """Tell whether another graph might compute more sites in integers."""
    return any(name not in made.places or reason.startswith("ONNX Runtime") for name, reason in made.simulated.left.items())


def _planned(fn: Callable[..., Any], params: Any, inputs: Sequence[np.ndarray], asked: Asked, way: Way) -> Plan:
    """Convert in one way; leave out site after site until the runtime computes the others in integers."""
    leaves, rebuild = flatten(params)
    keys = {path: x for path, x in leaves.items() if is_key(x)}
    arrays = {path: np.asarray(to_dense(x)) for path, x in leaves.items() if path not in keys}
    converted = convert(fn, arrays, lambda arrays: rebuild({**arrays, **keys}), inputs, asked.dynamic, way)
    floating = jax.jit(fn)(unpack(params), *inputs)
    agree(floating, run(converted, inputs), FLOAT, "the float graph in ONNX Runtime against the function in JAX")
    left, ranges = {}, asked.ranges
    while True:
        simulated = simulation(fn, params, inputs, asked.how, ranges, asked.batches, asked.where, left)
        left, ranges = dict(simulated.left), simulated.ranges
        model, weights = _settled(converted, simulated.packed)
        places = place(model, weights, simulated.sites)
        sites = {site.name: site for site in simulated.sites}
        lost = {name: why_not(sites[name], places.get(name)) for name in simulated.grids}
        lost = {name: reason for name, reason in lost.items() if reason}
        notes: tuple[str, ...] = ()
        if not lost and simulated.grids:
            notes = _integers(model, places, simulated, asked)
            lost = check.unfused(model, simulated.grids)
        if not lost:
            return Plan(model, weights, places, simulated, floating, notes)
        left |= lost


def _settled(converted: Any, packed: Any) -> tuple[Any, dict[str, Weight]]:
    """Return the optimised float graph with other values for its parameters, and its weights by the names of constants."""
    leaves = {path: x for path, x in flatten(packed)[0].items() if not is_key(x)}
    model = baked(converted, {path: np.asarray(to_dense(x)) for path, x in leaves.items()})
    weights = settle(model, {path: Weight.of(path, x) for path, x in leaves.items()})
    model = optimised(model, "BASIC")
    del model.graph.value_info[:]
    there = {each.name for each in model.graph.initializer}
    return model, {name: weight for name, weight in weights.items() if name in there}


def _integers(model: Any, places: Mapping[str, Placed], simulated: Simulation, asked: Asked) -> tuple[str, ...]:
    """Quantize what the simulation quantizes; return what must be told of it."""

    def measured(names: Sequence[str]) -> Mapping[str, Any]:
        if not asked.batches:
            raise ExportError(f"{len(names)} results of convolutions go into residual sums and need ranges: pass batches=")
        return extremes(model, names, asked.batches)

    chosen = {name: each for name, each in places.items() if name in simulated.grids}
    return qdq.write(model, chosen, simulated.grids, measured, asked.unsigned)
