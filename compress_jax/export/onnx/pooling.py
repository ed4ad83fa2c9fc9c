"""Pooling in the form that runtimes have fast kernels for: ``MaxPool`` and ``AveragePool`` over the last axes of images."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from compress_jax.export.onnx import graph as g
from compress_jax.export.onnx.runtime import evaluate

FIRST, LAST = [0, 3, 1, 2], [0, 2, 3, 1]  # from channels last to channels first, and back
MOST = 3  # axes of an image that the runtime pools over


def pools(model: Any, inputs: Sequence[np.ndarray]) -> None:
    """Exchange ``x.reshape(b, h, p, w, q, c).max((2, 4))`` for a ``MaxPool``.

    Args:
      model: changed.
      inputs: an example, to learn the shapes of tensors.
    """
    graph = model.graph
    constants, made, taken = g.initializers(graph), g.producers(graph), g.consumers(graph)
    found: dict[str, tuple[Any, np.ndarray]] = {}
    for each in graph.node:
        before = made.get(each.input[0]) if each.op_type == "ReduceMax" else None
        if before is None or before.op_type != "Reshape" or len(taken[before.output[0]]) > 1:
            continue
        shape, axes = constants.get(before.input[1]), constants.get(each.input[1]) if len(each.input) > 1 else None
        if shape is not None and axes is not None and (shape.size, sorted(axes % 6)) == (6, [2, 4]):
            if not g.attribute(each, "keepdims", 1):
                found[each.output[0]] = (before, shape)
    if not found:
        return
    images = evaluate(model, list({before.input[0] for before, _ in found.values()}), inputs)
    nodes = []
    for each in graph.node:
        if each.output[0] in found and _tiles(images[found[each.output[0]][0].input[0]].shape, found[each.output[0]][1]):
            before, shape = found[each.output[0]]
            nodes += _pool(before.input[0], each.output[0], [int(shape[2]), int(shape[4])])
        else:
            nodes.append(each)
    g.replace_nodes(graph, nodes)


def _tiles(image: tuple[int, ...], shape: np.ndarray) -> bool:
    """Tell whether a reshape cuts the rows and columns of images, and nothing else."""
    cut = (shape[1] * shape[2], shape[3] * shape[4], shape[5])
    return len(image) == 4 and tuple(image[1:]) == tuple(int(n) for n in cut)


def _pool(name: str, out: str, window: list[int]) -> list[Any]:
    return [
        g.node("Transpose", [name], f"{out}:first", perm=FIRST),
        g.node("MaxPool", [f"{out}:first"], f"{out}:pooled", kernel_shape=window, strides=window),
        g.node("Transpose", [f"{out}:pooled"], out, perm=LAST),
    ]


def windows(model: Any) -> None:
    """Exchange every ``Unsqueeze - Unsqueeze - MaxPool or Conv - Squeeze`` that the converter wrote for a window.

    It makes of any window, of whatever axes, a pool or a convolution with ones over all axes of ``x[None, None]``, more than
    the runtime has kernels for: what it wants is a pool of those axes alone that have a window.

    Args:
      model: changed.
    """
    graph = model.graph
    constants, made, taken = g.initializers(graph), g.producers(graph), g.consumers(graph)
    nodes = []
    for each in graph.node:
        source = _unsqueezed(each, constants, made) if each.op_type in ("MaxPool", "Conv") else ""
        after: list[Any] = [taker for taker in taken.get(each.output[0], []) if taker is not None]
        alone = len(after) == 1 and len(taken.get(each.output[0], [])) == 1
        window = _window(each, constants)
        squeezed = alone and after[0].op_type == "Squeeze"
        if source and window and squeezed and (new := list(_exchanged(each, source, after[0].output[0], window, graph))):
            nodes += new
            after[0].output[0] = f"{after[0].output[0]}:unused"
        else:
            nodes.append(each)
    g.replace_nodes(graph, nodes)
    g.prune(model)


def _unsqueezed(each: Any, constants: Any, made: Any) -> str:
    """Return the name of x where a node takes ``x[None, None]``, else nothing."""
    name = each.input[0]
    for _ in range(2):
        before: Any = made.get(name)
        if before is None or before.op_type != "Unsqueeze":
            return ""
        axes = constants.get(before.input[1])
        if axes is None or axes.tolist() not in ([0], [1], [0, 1]):
            return ""
        name = before.input[0]
        if axes.tolist() == [0, 1]:
            break
    return name


def _window(each: Any, constants: Any) -> list[int]:
    """Return the window of a pool, or of a convolution with ones, over one channel; empty if it is neither."""
    if each.op_type == "MaxPool":
        return [int(n) for n in g.attribute(each, "kernel_shape", [])]
    kernel = constants.get(each.input[1]) if len(each.input) == 2 else None
    alone = kernel is not None and kernel.ndim > 2 and kernel.shape[:2] == (1, 1) and bool((kernel == 1).all())
    return list(kernel.shape[2:]) if kernel is not None and alone else []


def _exchanged(each: Any, source: str, out: str, window: list[int], graph: Any) -> Iterator[Any]:
    """Yield the nodes of a pool over those axes that have a window; none if there are too many."""
    rank = len(window)
    strides = g.attribute(each, "strides", [1] * rank)
    pads = g.attribute(each, "pads", [0] * 2 * rank)
    dilations = g.attribute(each, "dilations", [1] * rank)
    pooled = [a for a in range(rank) if window[a] > 1 or strides[a] > 1 or pads[a] or pads[a + rank]]
    kept = [a for a in range(rank) if a not in pooled]
    while len(kept) > 2 and len(pooled) < MOST:
        pooled.insert(0, kept.pop())
    if len(pooled) > MOST or len(kept) > 2 or not pooled:
        return
    order = [*kept, *pooled]
    name = f"{out}:{source}"
    if order != list(range(rank)):
        yield g.node("Transpose", [source], f"{name}:moved", perm=order)
        source = f"{name}:moved"
    missing = list(range(2 - len(kept)))
    if missing:
        axes = g.add(graph, f"{name}:axes", np.asarray(missing, np.int64))
        yield g.node("Unsqueeze", [source, axes], f"{name}:image")
        source = f"{name}:image"
    options = {
        "kernel_shape": [window[a] for a in pooled],
        "strides": [strides[a] for a in pooled],
        "pads": [pads[a] for a in pooled] + [pads[a + rank] for a in pooled],
    }
    if any(dilations[a] > 1 for a in pooled):
        options["dilations"] = [dilations[a] for a in pooled]
    last = f"{name}:pooled"
    if each.op_type == "MaxPool":
        yield g.node("MaxPool", [source], last, **options)
    else:
        yield g.node("AveragePool", [source], f"{name}:mean", count_include_pad=1, **options)
        count = g.add(graph, f"{name}:count", np.asarray(np.prod(window), g.initializers(graph)[each.input[1]].dtype))
        yield g.node("Mul", [f"{name}:mean", count], last)
    back = [order.index(a) for a in range(rank)]
    steps: list[tuple[str, list[str], dict[str, Any]]] = []
    if missing:
        steps.append(("Squeeze", [g.add(graph, f"{name}:axes_back", np.asarray(missing, np.int64))], {}))
    if back != list(range(rank)):
        steps.append(("Transpose", [], {"perm": back}))
    steps = steps or [("Identity", [], {})]
    for i, (kind, rest, attributes) in enumerate(steps):
        result = out if i == len(steps) - 1 else f"{name}:{kind}"
        yield g.node(kind, [last, *rest], result, **attributes)
        last = result
