"""Queries and edits of a graph of ONNX nodes.

After the small ones: the edits that a converted graph needs so that the runtime has fast kernels
for it (`windows`, `pools`, `constant_shapes`, `without_zero_bias`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from compress_jax.core.types import Model
from compress_jax.export._extras import extra
from compress_jax.export._onnx.runtime import Named, evaluate

MICROSOFT = "com.microsoft"
FIRST = [0, 3, 1, 2]  # the axes from channels last to channels first
LAST = [0, 2, 3, 1]  # and back
MOST = 3  # axes of an image that the runtime pools over

T = TypeVar("T")


class Node(Protocol):
    """A ``NodeProto``: an operator, the names of its inputs and results, its attributes."""

    op_type: str
    input: list[str]
    output: list[str]
    attribute: list[Named]


class Graph(Protocol):
    """A ``GraphProto``: nodes in an order in which they can be computed, and constants."""

    node: list[Node]
    initializer: list[Named]
    input: list[Named]
    output: list[Named]
    value_info: list[Named]


def initializers(graph: Graph) -> dict[str, np.ndarray]:
    """Return the constants of a graph by name."""
    numpy_helper = extra("onnx.numpy_helper", "onnx")
    return {each.name: numpy_helper.to_array(each) for each in graph.initializer}


def add(graph: Graph, name: str, value: np.ndarray, kind: int | None = None) -> str:
    """Add a constant.

    ``kind`` is ``INT4`` or ``INT8``; the values are small integers of any dtype.
    """
    if kind is None:
        tensor = extra("onnx.numpy_helper", "onnx").from_array(np.asarray(value, order="C"), name)
    else:
        # Raw: as numbers of a protobuf, a negative one would take 10 bytes.
        raw = value.ravel().astype(np.int8).view(np.uint8)
        if kind == extra("onnx", "onnx").TensorProto.INT4:
            raw = halves(raw & 15)
        make = extra("onnx.helper", "onnx").make_tensor
        tensor = make(name, kind, value.shape, raw.tobytes(), raw=True)
    graph.initializer.append(tensor)
    return name


def halves(codes: np.ndarray) -> np.ndarray:
    """Pack 4-bit codes along the last axis, the first of two in the lower half of a byte."""
    codes = codes.astype(np.uint8)
    # Two codes a byte: an odd number of them is filled up.
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def node(op: str, inputs: Iterable[str], output: str, **attributes: object) -> Node:
    """Return a node with one result, which also names it."""
    return extra("onnx.helper", "onnx").make_node(
        op, list(inputs), [output], name=f"{op}:{output}", **attributes
    )


def attribute(each: Node, name: str, default: T) -> T:
    """Return an attribute of a node."""
    found = next((a for a in each.attribute if a.name == name), None)
    return default if found is None else extra("onnx.helper", "onnx").get_attribute_value(found)


def producers(graph: Graph) -> dict[str, Node]:
    """Return the node that makes each tensor."""
    found: dict[str, Node] = {}
    for each in graph.node:
        found |= dict.fromkeys(each.output, each)
    return found


def consumers(graph: Graph) -> dict[str, list[Node | None]]:
    """Return the consumers of each tensor, once for each use; None is the graph's output."""
    found: dict[str, list[Node | None]] = {}
    for each in graph.node:
        for name in each.input:
            found.setdefault(name, []).append(each)
    for out in graph.output:
        found.setdefault(out.name, []).append(None)
    return found


def rename(graph: Graph, old: str, new: str) -> None:
    """Replace the input ``old`` of every node by ``new``."""
    for each in graph.node:
        for i, name in enumerate(each.input):
            if name == old:
                each.input[i] = new


def replace_nodes(graph: Graph, nodes: Iterable[Node]) -> None:
    """Replace all nodes of a graph."""
    nodes = list(nodes)  # they may be an iterator over those that are deleted
    del graph.node[:]
    graph.node.extend(nodes)


def prune(model: Model) -> Model:
    """Drop unused nodes, unused constants and stale shapes; return the model."""
    graph = model.graph
    needed = {out.name for out in graph.output}
    nodes = []
    # Each node comes before those that take its results, so one walk from the end is enough.
    for each in reversed(graph.node):
        if needed & set(each.output):
            nodes.append(each)
            needed |= set(each.input)
    replace_nodes(graph, reversed(nodes))
    constants = [each for each in graph.initializer if each.name in needed]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(constants)
    return model


def pools(model: Model, inputs: Sequence[np.ndarray]) -> None:
    """Replace ``x.reshape(b, h, p, w, q, c).max((2, 4))`` by a ``MaxPool``.

    Args:
      model: changed.
      inputs: an example, to learn the shapes of tensors.
    """
    found = _pooled_reshapes(model.graph)
    if not found:
        return
    # The converter does not note the shape of every tensor; running the graph tells.
    images = evaluate(model, list({image for image, _ in found.values()}), inputs)
    nodes: list[Node] = []
    for each in model.graph.node:
        image, shape = found.get(each.output[0], ("", None))
        if shape is not None and _tiles(images[image].shape, shape):
            nodes += _pool(image, each.output[0], [int(shape[2]), int(shape[4])])
        else:
            nodes.append(each)
    replace_nodes(model.graph, nodes)


def _pooled_reshapes(graph: Graph) -> dict[str, tuple[str, np.ndarray]]:
    """Return ``{result: (x, shape)}`` of every ``x.reshape(shape).max((2, 4))``."""
    constants = initializers(graph)
    made = producers(graph)
    taken = consumers(graph)
    found: dict[str, tuple[str, np.ndarray]] = {}
    for each in graph.node:
        before = made.get(each.input[0]) if each.op_type == "ReduceMax" else None
        # A reshape whose result something else takes, too, has to stay.
        if before is None or before.op_type != "Reshape" or len(taken[before.output[0]]) > 1:
            continue
        shape = constants.get(before.input[1])
        axes = constants.get(each.input[1]) if len(each.input) > 1 else None
        if shape is None or axes is None or attribute(each, "keepdims", 1):
            continue
        # [batch, height, p, width, q, channels], reduced to [batch, height, width, channels].
        if shape.size == 6 and sorted(axes % 6) == [2, 4]:
            found[each.output[0]] = (before.input[0], shape)
    return found


def _tiles(image: tuple[int, ...], shape: np.ndarray) -> bool:
    """Return whether a reshape splits the rows and columns of images, and nothing else."""
    cut = (shape[1] * shape[2], shape[3] * shape[4], shape[5])  # height, width, channels
    return len(image) == 4 and tuple(image[1:]) == tuple(int(n) for n in cut)


def _pool(name: str, out: str, window: list[int]) -> list[Node]:
    # ONNX pools images with channels first; these have them last.
    return [
        node("Transpose", [name], f"{out}:first", perm=FIRST),
        node("MaxPool", [f"{out}:first"], f"{out}:pooled", kernel_shape=window, strides=window),
        node("Transpose", [f"{out}:pooled"], out, perm=LAST),
    ]


def windows(model: Model) -> None:
    """Replace ``Unsqueeze - Unsqueeze - MaxPool or Conv - Squeeze`` by one window node.

    The converter turns any window into a pool, or a convolution with ones, over all axes of
    ``x[None, None]``. The runtime has kernels for fewer axes: this pools only the axes that have a
    window.

    Args:
      model: changed.
    """
    graph = model.graph
    constants = initializers(graph)
    made = producers(graph)
    taken = consumers(graph)
    nodes: list[Node] = []
    for each in graph.node:
        new: list[Node] = []
        after = taken.get(each.output[0], [])
        squeeze = after[0] if len(after) == 1 else None
        if squeeze is not None and squeeze.op_type == "Squeeze":
            pool = each.op_type in ("MaxPool", "Conv")
            source = _unsqueezed(each, constants, made) if pool else ""
            window = _window(each, constants)
            if source and window:
                new = list(_exchanged(each, source, squeeze.output[0], window, graph))
        # The new nodes make the squeeze's result; it has no consumer left, and is pruned below.
        if new and squeeze is not None:
            squeeze.output[0] = f"{squeeze.output[0]}:unused"
        nodes += new or [each]
    replace_nodes(graph, nodes)
    prune(model)


def _unsqueezed(each: Node, constants: Mapping[str, np.ndarray], made: Mapping[str, Node]) -> str:
    """Return the name of x where a node takes ``x[None, None]``, else nothing."""
    # Two nodes add an axis each, or one adds both.
    name = each.input[0]
    for _ in range(2):
        before = made.get(name)
        if before is None or before.op_type != "Unsqueeze":
            return ""
        axes = constants.get(before.input[1])
        if axes is None or axes.tolist() not in ([0], [1], [0, 1]):
            return ""
        name = before.input[0]
        if axes.tolist() == [0, 1]:
            break
    return name


def _window(each: Node, constants: Mapping[str, np.ndarray]) -> list[int]:
    """Return the window of a pool or of a convolution with ones; empty if it is neither."""
    if each.op_type == "MaxPool":
        return [int(n) for n in attribute(each, "kernel_shape", [])]
    kernel = constants.get(each.input[1]) if len(each.input) == 2 else None  # [1, 1, *window]
    if kernel is None or kernel.ndim <= 2 or kernel.shape[:2] != (1, 1):
        return []
    return list(kernel.shape[2:]) if (kernel == 1).all() else []


def _exchanged(
    each: Node, source: str, out: str, window: list[int], graph: Graph
) -> Iterator[Node]:
    """Yield the nodes of a pool over those axes that have a window; none if there are too many."""
    rank = len(window)
    strides = attribute(each, "strides", [1] * rank)
    pads = attribute(each, "pads", [0] * 2 * rank)
    dilations = attribute(each, "dilations", [1] * rank)
    padded = [pads[a] != 0 or pads[a + rank] != 0 for a in range(rank)]
    # An axis without a window, a stride or padding is not changed, and need not be pooled over.
    pooled = [a for a in range(rank) if window[a] > 1 or strides[a] > 1 or padded[a]]
    others = [a for a in range(rank) if a not in pooled]
    # Of the others two can be batch and channel; more of them are pooled with a window of 1.
    while len(others) > 2 and len(pooled) < MOST:
        pooled.insert(0, others.pop())
    if len(pooled) > MOST or len(others) > 2 or not pooled:
        return
    # Batch and channel come first, so two axes must be before the pooled ones.
    order = [*others, *pooled]
    name = f"{out}:{source}"
    if order != list(range(rank)):
        yield node("Transpose", [source], f"{name}:moved", perm=order)
        source = f"{name}:moved"
    missing = list(range(2 - len(others)))
    if missing:
        axes = add(graph, f"{name}:axes", np.asarray(missing, np.int64))
        yield node("Unsqueeze", [source, axes], f"{name}:image")
        source = f"{name}:image"
    # All starts come first in ``pads``, then all ends.
    options = {
        "kernel_shape": [window[a] for a in pooled],
        "strides": [strides[a] for a in pooled],
        "pads": [pads[a] for a in pooled] + [pads[a + rank] for a in pooled],
    }
    if any(dilations[a] > 1 for a in pooled):
        options["dilations"] = [dilations[a] for a in pooled]
    last = f"{name}:pooled"
    if each.op_type == "MaxPool":
        yield node("MaxPool", [source], last, **options)
    else:
        # A convolution with ones is a sum: the mean times the number of entries.
        yield node("AveragePool", [source], f"{name}:mean", count_include_pad=1, **options)
        dtype = initializers(graph)[each.input[1]].dtype
        count = add(graph, f"{name}:count", np.asarray(np.prod(window), dtype))
        yield node("Mul", [f"{name}:mean", count], last)
    yield from _moved_back(last, out, name, order, missing, graph)


def _moved_back(
    last: str, out: str, name: str, order: list[int], missing: list[int], graph: Graph
) -> Iterator[Node]:
    """Yield the nodes that undo the transposition and the new axes before a pool."""
    back = [order.index(a) for a in range(len(order))]  # the inverse permutation
    steps: list[tuple[str, list[str], dict[str, list[int]]]] = []
    if missing:
        axes = add(graph, f"{name}:axes_back", np.asarray(missing, np.int64))
        steps.append(("Squeeze", [axes], {}))
    if back != list(range(len(order))):
        steps.append(("Transpose", [], {"perm": back}))
    # The last of them makes the result, under its own name.
    steps = steps or [("Identity", [], {})]
    for i, (kind, rest, attributes) in enumerate(steps):
        result = out if i == len(steps) - 1 else f"{name}:{kind}"
        yield node(kind, [last, *rest], result, **attributes)
        last = result


def constant_shapes(model: Model, inputs: Sequence[np.ndarray], dynamic: bool) -> None:
    """Write the shapes of reshapes as constants, with -1 for the batch axis.

    This removes a chain of small nodes for each.

    Args:
      model: changed.
      inputs: an example, to learn the shapes.
      dynamic: whether the first axis of every input is a batch of any size.
    """
    known = {each.name for each in model.graph.initializer}
    reshapes = [n for n in model.graph.node if n.op_type == "Reshape" and n.input[1] not in known]
    if not reshapes:
        return
    names = list(dict.fromkeys(each.input[1] for each in reshapes))
    # The entry that differs between two batch sizes is that of the batch.
    batches = [list(inputs)]
    if dynamic:
        # An input without axes is a number: it has no examples.
        batches = [
            [np.resize(x, (n, *x.shape[1:])) if np.ndim(x) else x for x in inputs] for n in (2, 3)
        ]
    shapes = [evaluate(model, names, batch) for batch in batches]
    for name in names:
        first = shapes[0][name]
        last = shapes[-1][name]
        if (first != last).sum() > 1:  # a reshape can have one -1 only
            continue
        constant = add(model.graph, f"{name}:constant", np.where(first == last, first, -1))
        for each in reshapes:
            if each.input[1] == name:
                each.input[1] = constant


def without_zero_bias(graph: Graph) -> None:
    """Drop the third operand of products that is multiplied by 0, or is 0."""
    # A Gemm is alpha A B + beta C.
    constants = initializers(graph)
    for each in graph.node:
        if each.op_type != "Gemm" or len(each.input) < 3:
            continue
        bias = constants.get(each.input[2])
        is_zero = bias is not None and bias.ndim == 0 and not bias
        if is_zero or attribute(each, "beta", 1.0) == 0:
            del each.input[2]
            for option in [a for a in each.attribute if a.name == "beta"]:
                each.attribute.remove(option)
