"""Pooling that was written as a reshape and a maximum, as the pooling that runtimes have fast kernels for."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from compress_jax.export.onnx import graph as g
from compress_jax.export.onnx.runtime import evaluate

FIRST, LAST = [0, 3, 1, 2], [0, 2, 3, 1]  # from channels last to channels first, and back


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
