"""Queries and edits of a graph of ONNX nodes."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from compress_jax.core.types import Model
from compress_jax.export._extras import extra

MICROSOFT = "com.microsoft"


def initializers(graph: Any) -> dict[str, np.ndarray]:
    """Return the constants of a graph by name."""
    numpy_helper = extra("onnx.numpy_helper", "onnx")
    return {each.name: numpy_helper.to_array(each) for each in graph.initializer}


def add(graph: Any, name: str, value: np.ndarray, kind: int | None = None) -> str:
    """Add a constant.

    ``kind`` is an ONNX type without a NumPy dtype; its values are given as small integers.
    """
    if kind is None:
        tensor = extra("onnx.numpy_helper", "onnx").from_array(np.asarray(value, order="C"), name)
    else:
        tensor = extra("onnx.helper", "onnx").make_tensor(name, kind, value.shape, value.ravel())
    graph.initializer.append(tensor)
    return name


def node(op: str, inputs: Iterable[str], output: str, **attributes: Any) -> Any:
    """Return a node with one result, which also names it."""
    return extra("onnx.helper", "onnx").make_node(
        op, list(inputs), [output], name=f"{op}:{output}", **attributes
    )


def attribute(each: Any, name: str, default: Any) -> Any:
    """Return an attribute of a node."""
    found = next((a for a in each.attribute if a.name == name), None)
    return default if found is None else extra("onnx.helper", "onnx").get_attribute_value(found)


def producers(graph: Any) -> dict[str, Any]:
    """Return the node that makes each tensor."""
    return {name: each for each in graph.node for name in each.output}


def consumers(graph: Any) -> dict[str, list[Any]]:
    """Return the consumers of each tensor, once for each use; None is the graph's output."""
    found: dict[str, list[Any]] = {}
    for each in graph.node:
        for name in each.input:
            found.setdefault(name, []).append(each)
    for out in graph.output:
        found.setdefault(out.name, []).append(None)
    return found


def rename(graph: Any, old: str, new: str) -> None:
    """Replace the input ``old`` of every node by ``new``."""
    for each in graph.node:
        for i, name in enumerate(each.input):
            if name == old:
                each.input[i] = new


def replace_nodes(graph: Any, nodes: Iterable[Any]) -> None:
    """Replace all nodes of a graph."""
    nodes = list(nodes)
    del graph.node[:]
    graph.node.extend(nodes)


def prune(model: Model) -> Any:
    """Drop unused nodes, unused constants and stale shapes; return the model."""
    graph = model.graph
    needed = {out.name for out in graph.output}
    nodes = []
    for each in reversed(graph.node):
        if needed & set(each.output):
            nodes.append(each)
            needed |= set(each.input)
    replace_nodes(graph, reversed(nodes))
    constants = [each for each in graph.initializer if each.name in needed]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(constants)
    return model
