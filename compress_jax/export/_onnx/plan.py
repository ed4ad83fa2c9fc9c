"""Choose the conversion that leaves most sites in integers, and report the others."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from compress_jax.core.errors import ExportError
from compress_jax.core.packed import to_dense, unpack
from compress_jax.core.paths import flatten
from compress_jax.core.types import Model, ModelFn, Params, PyTree
from compress_jax.export._artifact.structure import is_key
from compress_jax.export._onnx import check
from compress_jax.export._onnx import graph as g
from compress_jax.export._onnx.convert import WAYS, Way, baked, convert
from compress_jax.export._onnx.places import Placed, int8, place, why_not
from compress_jax.export._onnx.runtime import extremes, optimized, run
from compress_jax.export._onnx.weights import Weight, settle
from compress_jax.export._scales import representable
from compress_jax.export._simulate import Simulation, simulation
from compress_jax.export._verify.agreement import agree

Grid = tuple[np.float32, np.uint8]  # scale and zero point
# Operators whose results have the entries of their input, and so its grid.
SAME = ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")
FLOAT = 1e-3  # relative difference between the float graph and the function that is allowed


def grid_of(low: np.float32, high: np.float32) -> Grid:
    """Return scale and zero point of uint8 codes over a range, zero included.

    Args:
      low: smallest value.
      high: largest value.

    Returns:
      ``(scale, zero_point)``.

    Example:
      >>> grid_of(np.float32(-1), np.float32(4.1))
      (np.float32(0.02), np.uint8(50))
    """
    bottom = min(float(low), 0.0)
    top = max(float(high), 0.0)
    scale = np.float32((top - bottom) / 255) or np.float32(1)
    return scale, np.uint8(np.clip(round(-bottom / float(scale)), 0, 255))


@dataclass
class Codes:
    """Which tensors are quantized.

    Attributes:
      grids: of tensors.
      whole: those that all nodes take quantized, since an integer kernel makes them.
    """

    grids: dict[str, Grid] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)


def write(
    model: Model,
    places: Mapping[str, Placed],
    grids: Mapping[str, Grid],
    extremes: Callable[[Sequence[str]], Mapping[str, tuple[np.float32, np.float32]]],
    unsigned: bool = False,
) -> tuple[str, ...]:
    """Quantize the nodes of sites.

    Args:
      model: changed.
      places: of the sites to quantize, each with an `int8` weight.
      grids: of their activations, by site.
      extremes: ``(names of tensors) -> {name: (lowest, highest)}``, asked once, if results of
        convolutions need ranges.
      unsigned: whether weights are written as uint8, 128 standing for zero.

    Returns:
      Notes on scales that are not those of the simulation, and why.

    Raises:
      ExportError: if a measured range is not finite.
    """
    codes = Codes({each.node.input[each.data]: grids[site] for site, each in places.items()})
    nodes = [each.node for each in places.values()]
    missing = _results(model.graph, nodes, codes)
    if missing:
        for name, ends in extremes(missing).items():
            codes.grids[name] = _finite(name, *ends)
    _without_relu(model.graph, codes)
    _moves(model.graph, codes)
    sums = {each.output[0] for each in model.graph.node if _summed(each, codes)}
    own = {each.node.output[0]: (each, grids[site]) for site, each in places.items()}
    return tuple(_rewrite(model, codes, sums, own, unsigned))


def _finite(name: str, low: np.float32, high: np.float32) -> Grid:
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ExportError(
            f"tensor {name!r} goes from {low} to {high} over the calibration batches; leave out "
            "the batch that does it"
        )
    return grid_of(low, high)


def _end(taken: Mapping[str, list[Any]], name: str) -> str:
    """Return the result of a node after the Relu that its kernel includes."""
    only = taken.get(name, [])
    if len(only) == 1 and only[0] is not None and only[0].op_type == "Relu":
        return only[0].output[0]
    return name


def _results(graph: Any, nodes: Iterable[Any], codes: Codes) -> list[str]:
    """Note which outputs of convolutions are quantized, and return the ungridded ones.

    Sums of two such results are quantized too: the Relu behind a residual sum would keep it in
    floats.
    """
    taken = g.consumers(graph)
    missing: list[str] = []

    def note(name: str) -> None:
        grid = _ahead(taken, name, codes)
        codes.whole.add(name)
        if grid is None and name not in codes.grids:
            missing.append(name)
        elif grid is not None:
            codes.grids.setdefault(name, grid)

    for each in nodes:
        if each.op_type == "Conv":
            note(_end(taken, each.output[0]))
    for each in graph.node:
        if _summed(each, codes):
            note(_end(taken, each.output[0]))
    return list(dict.fromkeys(missing))


def _without_relu(graph: Any, codes: Codes) -> None:
    """Drop every Relu whose result has zero point 0: quantizing it clips at 0 as well."""
    made = g.producers(graph)
    taken = g.consumers(graph)
    dropped: set[str] = set()
    for each in graph.node:
        name = each.output[0] if each.output else ""
        only = each.op_type == "Relu" and len(taken[each.input[0]]) == 1 and each.input[0] in made
        if only and name in codes.whole and codes.grids[name][1] == 0:
            before = made[each.input[0]]
            before.output[list(before.output).index(each.input[0])] = name
            dropped.add(name)
    nodes = [n for n in graph.node if n.op_type != "Relu" or n.output[0] not in dropped]
    g.replace_nodes(graph, nodes)


def _ahead(taken: Mapping[str, list[Any]], name: str, codes: Codes) -> Grid | None:
    """Return the grid of a tensor into which this one's entries are only moved."""
    while name not in codes.grids:
        only = taken.get(name, [])
        if len(only) != 1 or only[0] is None or only[0].op_type not in SAME:
            return None
        name = only[0].output[0]
    return codes.grids[name]


def _summed(each: Any, codes: Codes) -> bool:
    known = [name in codes.whole or name in codes.grids for name in each.input]
    return each.op_type == "Add" and all(known) and any(name in codes.whole for name in each.input)


def _moves(graph: Any, codes: Codes) -> None:
    """Note the tensors that hold moved entries of a quantized one on the same grid."""
    for each in graph.node:
        if each.op_type in SAME and each.input[0] in codes.whole:
            if codes.grids.get(each.output[0]) == codes.grids[each.input[0]]:
                codes.whole.add(each.output[0])


def _rewrite(
    model: Model,
    codes: Codes,
    sums: set[str],
    own: Mapping[str, tuple[Placed, Grid]],
    unsigned: bool,
) -> list[str]:
    """Insert the nodes that quantize and dequantize; return notes."""
    graph = model.graph
    out: list[Any] = []
    notes: list[str] = []
    outputs = {each.name for each in graph.output}
    made: dict[tuple[str, Grid], str] = {}

    def coded(name: str, grid: Grid, result: str = "") -> str:
        key = (name, grid)
        if key not in made:
            tag = name if grid == codes.grids.get(name) else f"{name}:{len(made)}"
            made[key] = result or f"{tag}:seen"
            numbers = [
                g.add(graph, f"{tag}:scale", np.asarray(grid[0])),
                g.add(graph, f"{tag}:zero_point", np.asarray(grid[1])),
            ]
            out.append(g.node("QuantizeLinear", [name, *numbers], f"{tag}:codes"))
            out.append(g.node("DequantizeLinear", [f"{tag}:codes", *numbers], made[key]))
        return made[key]

    for each in list(graph.node):
        placed = own.get(each.output[0])
        for i, name in enumerate(each.input):
            if placed is not None and i == placed[0].data:
                each.input[i] = coded(name, placed[1])
            elif name in codes.whole or each.output[0] in sums:
                each.input[i] = coded(name, codes.grids[name])
        if placed is not None:
            nodes, found = _weights(graph, each, *placed, unsigned)
            out.extend(nodes)
            notes.extend(found)
        for i, name in enumerate(each.output):
            if name in codes.whole and name in outputs:
                each.output[i] = f"{name}:float"
                codes.grids[f"{name}:float"] = codes.grids[name]
                out.append(each)
                coded(f"{name}:float", codes.grids[name], result=name)
                made[(name, codes.grids[name])] = name
                break
        else:
            out.append(each)
    g.replace_nodes(graph, out)
    g.prune(model)
    return notes


def _weights(
    graph: Any, each: Any, placed: Placed, grid: Grid, unsigned: bool
) -> tuple[list[Any], list[str]]:
    """Give a node int8 weight codes and int32 bias codes; return the new nodes and notes."""
    found = int8(placed)
    assert not isinstance(found, str) and placed.channel is not None
    levels, scale = found
    third = each.input[2] if each.op_type != "MatMul" and len(each.input) > 2 else ""
    bias = g.initializers(graph).get(third)
    if bias is not None and bias.shape != scale.shape:
        bias = None
    notes = []
    if bias is not None:
        values = placed.weight.values
        step = float(grid[0])
        levels, scale, changed = representable(levels, scale, values, placed.channel, bias, step)
        if changed:
            notes.append(
                f"{placed.site}: the weights of {changed} channels have larger scales, so that "
                "the bias fits in int32"
            )
    if unsigned:
        levels = (levels.astype(np.int16) + 128).astype(np.uint8)
    nodes = [_dequantized(graph, placed.site, levels, scale, placed.channel)]
    each.input[1 - placed.data] = nodes[0].output[0]
    if bias is not None:
        steps = (scale * grid[0]).astype(np.float32)
        whole = np.round(bias.astype(np.float64) / steps.astype(np.float64)).astype(np.int32)
        nodes.append(_dequantized(graph, f"{placed.site}:bias", whole, steps, 0))
        each.input[2] = nodes[1].output[0]
    return nodes, notes


def _dequantized(graph: Any, name: str, codes: np.ndarray, scale: np.ndarray, axis: int) -> Any:
    zero = np.full(scale.shape, 128 if codes.dtype == np.uint8 else 0, codes.dtype)
    parts = {"int": codes, "step": scale, "zero": zero}
    names = [g.add(graph, f"{name}:{what}", x) for what, x in parts.items()]
    return g.node("DequantizeLinear", names, f"{name}:weight", axis=axis)


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

    model: Model
    weights: dict[str, Weight]
    places: dict[str, Placed]
    simulated: Simulation
    floating: Any
    notes: tuple[str, ...]


def plan(fn: ModelFn, params: Params, inputs: Sequence[np.ndarray], asked: Asked) -> Plan:
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
    best = None
    failures: list[str] = []
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
        raise ExportError(
            f"no site can be computed in integers: {'; '.join(reasons) or '`how` names none'}"
        )
    if failures:
        note = f"converted operation by operation, as layers could not be: {failures[0]}"
        best = replace(best, notes=(note, *best.notes))
    return best


def _lost(made: Plan) -> bool:
    """Return whether another graph might compute more sites in integers."""
    return any(
        name not in made.places or reason.startswith("ONNX Runtime")
        for name, reason in made.simulated.left.items()
    )


def _planned(
    fn: ModelFn, params: Params, inputs: Sequence[np.ndarray], asked: Asked, way: Way
) -> Plan:
    """Convert in one way; leave out sites until the runtime computes the rest in integers."""
    leaves, rebuild = flatten(params)
    keys = {path: x for path, x in leaves.items() if is_key(x)}
    arrays = {path: np.asarray(to_dense(x)) for path, x in leaves.items() if path not in keys}
    converted = convert(
        fn, arrays, lambda arrays: rebuild({**arrays, **keys}), inputs, asked.dynamic, way
    )
    floating = jax.jit(fn)(unpack(params), *inputs)
    what = "the float graph in ONNX Runtime against the function in JAX"
    agree(floating, run(converted, inputs), FLOAT, what)
    left: dict[str, str] = {}
    ranges = asked.ranges
    while True:
        simulated = simulation(
            fn, params, inputs, asked.how, ranges, asked.batches, asked.where, left
        )
        left = dict(simulated.left)
        ranges = simulated.ranges  # calibrated once
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


def _settled(converted: Any, packed: PyTree) -> tuple[Any, dict[str, Weight]]:
    """Return the optimized float graph with other parameters, and its weights' names."""
    leaves = {path: x for path, x in flatten(packed)[0].items() if not is_key(x)}
    model = baked(converted, {path: np.asarray(to_dense(x)) for path, x in leaves.items()})
    weights = settle(model, {path: Weight.of(path, x) for path, x in leaves.items()})
    model = optimized(model, "BASIC")
    del model.graph.value_info[:]
    there = {each.name for each in model.graph.initializer}
    return model, {name: weight for name, weight in weights.items() if name in there}


def _integers(
    model: Model, places: Mapping[str, Placed], simulated: Simulation, asked: Asked
) -> tuple[str, ...]:
    """Quantize what the simulation quantizes; return notes."""

    def measured(names: Sequence[str]) -> Mapping[str, Any]:
        if not asked.batches:
            raise ExportError(
                f"{len(names)} results of convolutions go into residual sums and need ranges: "
                "pass batches="
            )
        return extremes(model, names, asked.batches)

    chosen = {name: each for name, each in places.items() if name in simulated.grids}
    return write(model, chosen, simulated.grids, measured, asked.unsigned)
