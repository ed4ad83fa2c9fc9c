"""The nodes of a graph that compute a function's sites, and these nodes in integers.

`place` finds them, `why_not` says which cannot run in integers, and `write` quantizes the others.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from compress_jax.core.errors import ExportError
from compress_jax.core.types import Model
from compress_jax.export._onnx import graph as g
from compress_jax.export._onnx.weights import Weight
from compress_jax.export._scales import representable
from compress_jax.trace._jaxpr.site import Site

CONTRACTIONS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Placed:
    """A site's node.

    Attributes:
      site: name of the site.
      node: the node.
      weight: its weight.
      name: of the constant that is the weight.
      data: which input of the node the activation is.
    """

    site: str
    node: g.Node
    weight: Weight
    name: str
    data: int

    @property
    def channel(self) -> int | None:
        """The weight's axis of output channels; None if there is no integer kernel for the node."""
        if self.node.op_type == "Conv":  # [out, in, *window]
            return 0
        # Integer products take their weights on the right, as a matrix.
        if self.data or self.weight.values.ndim != 2:
            return None
        if self.node.op_type == "MatMul":
            return 1
        # A Gemm is alpha A B + beta C; one with factors, or A transposed, stays in floats.
        scaled = any(g.attribute(self.node, name, 1.0) != 1.0 for name in ("alpha", "beta"))
        if scaled or g.attribute(self.node, "transA", 0):
            return None
        return 1 - g.attribute(self.node, "transB", 0)  # [in, out], or [out, in] if transposed


def place(model: Model, weights: Mapping[str, Weight], sites: Sequence[Site]) -> dict[str, Placed]:
    """Find the nodes of sites: those that take the site's parameter, in the order of its uses.

    Args:
      model: with constants named as ``weights`` is.
      weights: by the names of constants.
      sites: of the function, in program order.

    Returns:
      The places by the names of sites; sites that no single node computes are not in it.
    """
    # By the path of a parameter: the nodes that take it, under which name, and as which operand.
    uses: dict[str, list[tuple[g.Node, str, int]]] = {}
    for each in model.graph.node:
        for index, name in enumerate(each.input[:2]):
            if each.op_type in CONTRACTIONS and name in weights and weights[name].values.ndim > 1:
                uses.setdefault(weights[name].path, []).append((each, name, 1 - index))
    found: dict[str, Placed] = {}
    for path, nodes in uses.items():
        own = [site for site in sites if site.param == path]
        # Nodes and sites are both in program order, so they belong together if they are as many. A
        # loop's nodes are in a graph of their own.
        if len(own) != len(nodes) or any(site.loops for site in own):
            continue
        for site, (each, name, data) in zip(own, nodes, strict=True):
            found[site.name] = Placed(site.name, each, weights[name], name, data)
    return found


def why_not(site: Site, placed: Placed | None) -> str:
    """Return why the runtime does not compute a site in integers; empty if it does.

    Args:
      site: the site.
      placed: its place, or None if no single node computes it.

    Returns:
      The reason.
    """
    if placed is not None:
        found = int8(placed)  # a reason, if it is text
        return found if isinstance(found, str) else ""
    if any(step > 1 for step in site.params.get("lhs_dilation", ())):
        return "ONNX Runtime has no integer kernel for transposed convolutions"
    if site.batch_axes or site.batch[0]:
        return "ONNX Runtime has no integer kernel for a product with a batch of weights"
    return (
        "no single node of the graph multiplies with this parameter (it is computed with first, or "
        "used elsewhere too)"
    )


def int8(placed: Placed) -> tuple[np.ndarray, np.ndarray] | str:
    """Return a weight as signed codes and a scale for each output channel, or why it cannot be.

    Args:
      placed: the place.

    Returns:
      ``(int8 codes, float32 scales)``, or a reason.
    """
    weight = placed.weight
    axis = placed.channel
    if axis is None:
        return f"ONNX Runtime has no integer kernel for this {placed.node.op_type}"
    scale = weight.per_channel(axis)  # [channels]
    if scale is None:
        return (
            "its weights have no single scale for each output channel (use granularity='channel' "
            "or 'tensor')"
        )
    levels = weight.levels
    if np.abs(levels).max(initial=0) > 127:
        return "its weights are not symmetric (use symmetric=True)"
    dead = scale == 0  # a batch norm that multiplies by 0
    shape = [-1 if i == axis else 1 for i in range(levels.ndim)]
    codes = np.where(dead.reshape(shape), 0, levels).astype(np.int8)
    return codes, np.where(dead, 1, scale).astype(np.float32)


# The graph in integers: which tensors are quantized, and by which nodes.

Grid = tuple[np.float32, np.uint8]  # scale and zero point
Ends = tuple[np.float32, np.float32]  # the lowest and the highest value of a tensor
# Operators whose results have the entries of their input, and so its grid.
SAME = ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")


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
    # Zero is a level, so that padding and a Relu's zeros are exact.
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
    extremes: Callable[[Sequence[str]], Mapping[str, Ends]],
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
    # The grids of the sites' inputs are known; those of other tensors follow, or are measured.
    codes = Codes({each.node.input[each.data]: grids[site] for site, each in places.items()})
    nodes = [each.node for each in places.values()]
    missing = _results(model.graph, nodes, codes)
    if missing:
        for name, ends in extremes(missing).items():
            codes.grids[name] = _finite(name, *ends)
    # All that is to be quantized as a whole has a grid now.
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


def _end(taken: Mapping[str, list[g.Node | None]], name: str) -> str:
    """Return the result of a node after the Relu that its kernel includes."""
    after = taken.get(name, [])
    only = after[0] if len(after) == 1 else None
    return name if only is None or only.op_type != "Relu" else only.output[0]


def _results(graph: g.Graph, nodes: Iterable[g.Node], codes: Codes) -> list[str]:
    """Note which outputs of convolutions are quantized, and return the ungridded ones.

    Sums of two such results are quantized too: the Relu behind a residual sum would keep it in
    floats.
    """
    taken = g.consumers(graph)
    missing: list[str] = []

    # A result that only moves into a site's input is on that site's grid, else it needs a range.
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
    # In the order of the graph, so that a sum of sums is met after the sums that it takes.
    for each in graph.node:
        if _summed(each, codes):
            note(_end(taken, each.output[0]))
    return list(dict.fromkeys(missing))


def _without_relu(graph: g.Graph, codes: Codes) -> None:
    """Drop every Relu whose result has zero point 0: quantizing it clips at 0 as well."""
    made = g.producers(graph)
    taken = g.consumers(graph)
    dropped: set[str] = set()
    for each in graph.node:
        name = each.output[0] if each.output else ""
        # Another node may need the values below zero.
        only = each.op_type == "Relu" and len(taken[each.input[0]]) == 1 and each.input[0] in made
        if only and name in codes.whole and codes.grids[name][1] == 0:
            before = made[each.input[0]]
            before.output[list(before.output).index(each.input[0])] = name
            dropped.add(name)
    nodes = [n for n in graph.node if n.op_type != "Relu" or n.output[0] not in dropped]
    g.replace_nodes(graph, nodes)


def _ahead(taken: Mapping[str, list[g.Node | None]], name: str, codes: Codes) -> Grid | None:
    """Return the grid of a tensor into which this one's entries are only moved."""
    while name not in codes.grids:
        after = taken.get(name, [])
        only = after[0] if len(after) == 1 else None
        if only is None or only.op_type not in SAME:
            return None
        name = only.output[0]
    return codes.grids[name]


def _summed(each: g.Node, codes: Codes) -> bool:
    """Return whether a node adds two quantized tensors, one of them of an integer kernel."""
    known = [name in codes.whole or name in codes.grids for name in each.input]
    return each.op_type == "Add" and all(known) and any(name in codes.whole for name in each.input)


def _moves(graph: g.Graph, codes: Codes) -> None:
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
    out: list[g.Node] = []
    notes: list[str] = []
    outputs = {each.name for each in graph.output}
    made: dict[tuple[str, Grid], str] = {}

    # Two sites that take one tensor may have two grids for it: a pair of nodes for each grid.
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
        # The node's inputs, through codes where an integer kernel takes them.
        for i, name in enumerate(each.input):
            if placed is not None and i == placed[0].data:
                each.input[i] = coded(name, placed[1])
            elif name in codes.whole or each.output[0] in sums:
                each.input[i] = coded(name, codes.grids[name])
        if placed is not None:
            nodes, found = _weights(graph, each, *placed, unsigned)
            out.extend(nodes)
            notes.extend(found)
        # A result of the whole graph keeps its name behind the nodes that quantize it.
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
    graph: g.Graph, each: g.Node, placed: Placed, grid: Grid, unsigned: bool
) -> tuple[list[g.Node], list[str]]:
    """Give a node int8 weight codes and int32 bias codes; return the new nodes and notes."""
    found = int8(placed)
    assert not isinstance(found, str) and placed.channel is not None
    levels, scale = found  # int8 in the shape of the weight, float32 [channels]
    third = each.input[2] if each.op_type != "MatMul" and len(each.input) > 2 else ""
    bias = g.initializers(graph).get(third)
    if bias is not None and bias.shape != scale.shape:  # one that broadcasts stays in floats
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
    # Integer kernels add the bias to the sums of products, whose step is s_x s_w: int32 [channels].
    if bias is not None:
        steps = (scale * grid[0]).astype(np.float32)
        whole = np.round(bias.astype(np.float64) / steps.astype(np.float64)).astype(np.int32)
        nodes.append(_dequantized(graph, f"{placed.site}:bias", whole, steps, 0))
        each.input[2] = nodes[1].output[0]
    return nodes, notes


def _dequantized(
    graph: g.Graph, name: str, codes: np.ndarray, scale: np.ndarray, axis: int
) -> g.Node:
    # uint8 weights are int8 ones moved by 128.
    zero = np.full(scale.shape, 128 if codes.dtype == np.uint8 else 0, codes.dtype)
    parts = {"int": codes, "step": scale, "zero": zero}
    names = [g.add(graph, f"{name}:{what}", x) for what, x in parts.items()]
    return g.node("DequantizeLinear", names, f"{name}:weight", axis=axis)
