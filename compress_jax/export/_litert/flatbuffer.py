"""The operators and tensors of a flatbuffer, and which of them packed weights enter."""

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from compress_jax.core.types import Model
from compress_jax.export._extras import extra

# Operators whose results are entries of their inputs.
MOVES = (
    "CONCATENATION",
    "EXPAND_DIMS",
    "PAD",
    "RESHAPE",
    "SLICE",
    "SQUEEZE",
    "STRIDED_SLICE",
    "TRANSPOSE",
)


class Scales(Protocol):
    """The scales of a tensor: none for floats, one, or one for each index of an axis."""

    scale: np.ndarray | None
    quantizedDimension: int


class Tensor(Protocol):
    """A tensor of a flatbuffer; it is a constant if its buffer has data."""

    name: bytes | str
    buffer: int
    shape: np.ndarray
    type: int
    quantization: Scales | None


class Operator(Protocol):
    """An operator of a flatbuffer; inputs are indices of tensors, -1 for one left out."""

    inputs: Sequence[int]
    outputs: Sequence[int]
    opcodeIndex: int


class Subgraph(Protocol):
    """A graph of a flatbuffer."""

    tensors: Sequence[Tensor]
    inputs: Sequence[int]
    operators: Sequence[Operator]


def read(data: bytes) -> tuple[Model, list[tuple[str, Operator, Subgraph]]]:
    """Return a flatbuffer's object tree, and its operators.

    Args:
      data: its bytes.

    Returns:
      ``(tree, [(name, operator, its graph)])``.
    """
    schema = extra("ai_edge_litert.schema_py_generated", "litert")
    constants = vars(schema.BuiltinOperator).items()
    names = {number: name for name, number in constants if isinstance(number, int)}
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    found = []
    for graph in model.subgraphs:
        for each in graph.operators:
            code = model.operatorCodes[each.opcodeIndex]
            # The schema has two fields, of 8 and of 32 bits; the larger one is the code.
            name = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
            found.append((name, each, graph))
    return model, found


def operators(data: bytes) -> dict[str, bool]:
    """Return the operators of a flatbuffer, and whether one of a kind has a constant input.

    Args:
      data: its bytes.

    Returns:
      Such as ``{"FULLY_CONNECTED": True, "BATCH_MATMUL": False}``; that one multiplies two
      activations.
    """
    model, found = read(data)
    constant: dict[str, bool] = {}
    for name, each, graph in found:
        buffers = [model.buffers[graph.tensors[i].buffer] for i in each.inputs if i >= 0]
        has_constant = any(b.data is not None or b.size for b in buffers)
        constant[name] = constant.get(name, False) or has_constant
    return constant


def name_of(tensor: Tensor) -> str:
    """Return the name of a tensor."""
    return tensor.name.decode() if isinstance(tensor.name, bytes) else tensor.name


def stored(model: Model, tensor: Tensor) -> np.ndarray | None:
    """Return the bytes of a constant; None for a tensor that is computed."""
    data = model.buffers[tensor.buffer].data
    return None if data is None or not len(data) else data


def constants(data: bytes, others: bytes) -> set[str]:
    """Return the constants of a model that depend on the weights that another model has changed.

    A convolution's weights may be those of a parameter times the scale of a batch norm, transposed:
    the two models tell what comes from where, whatever the converter did to it.

    Args:
      data: a flatbuffer.
      others: a flatbuffer of the same function with other values for some of its weights.

    Returns:
      The names of tensors of ``data``: floats that ``others`` has not.
    """
    theirs = {bytes(buffer.data) for buffer in read(others)[0].buffers if buffer.data is not None}
    float32 = extra("ai_edge_litert.schema_py_generated", "litert").TensorType.FLOAT32
    model, _ = read(data)
    found = set()
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            raw = stored(model, tensor)
            if tensor.type == float32 and raw is not None and bytes(raw) not in theirs:
                found.add(name_of(tensor))
    return found


def takers(data: bytes, weights: set[str]) -> set[str]:
    """Return the operators that take some of the constants, by the name of their first result."""
    found = set()
    for _, each, graph in read(data)[1]:
        if weights & set(_names(graph, each.inputs)):
            found.update(_names(graph, each.outputs)[:1])
    return found


def after(data: bytes, weights: set[str]) -> set[str]:
    """Return the operators whose results depend on the constants, or that only move inputs.

    What comes before any of them stays in floats: what a model computes of its inputs first, such
    as a spectrum and its logarithm, has more digits than 8 bits. What moves inputs to the constants
    without computing is on the same grid before as behind.

    Args:
      data: a flatbuffer.
      weights: the names of constants.

    Returns:
      The operators, by the names of their first results.
    """
    model, found = read(data)
    # What a loop or a branch is given may depend on anything.
    reached = {name for graph in model.subgraphs[1:] for name in _names(graph, graph.inputs)}
    reached |= weights
    for _, each, graph in found:
        if reached & set(_names(graph, each.inputs)):
            reached.update(_names(graph, each.outputs))
    # From the end back: what goes into an operation in floats is in floats.
    floats: set[str] = set()
    result = set()
    for kind, each, graph in reversed(found):
        outputs = _names(graph, each.outputs)
        if reached & set(outputs) or (kind in MOVES and not floats & set(outputs)):
            result.update(outputs[:1])
        else:
            floats.update(_names(graph, each.inputs))
    return result


def others(data: bytes, chosen: set[str]) -> str:
    """Return a pattern of the scopes of all operators but some, as LiteRT's quantizer has them.

    Args:
      data: a flatbuffer.
      chosen: the others, by the names of their first results.

    Returns:
      A regular expression; empty if all are chosen.
    """
    firsts = [_names(graph, each.outputs)[:1] for _, each, graph in read(data)[1]]
    names = {name for first in firsts for name in first} - chosen
    # A scope is the names of an operator's results, each with a semicolon behind it.
    return f"^(?:{'|'.join(re.escape(name) for name in sorted(names))});" if names else ""


def _names(graph: Subgraph, places: Sequence[int]) -> list[str]:
    return [name_of(graph.tensors[i]) for i in places if i >= 0]


def in_floats(data: bytes, weights: set[str]) -> list[str]:
    """Return the kinds of operators that take some of the constants in float32 in a model."""
    float32 = extra("ai_edge_litert.schema_py_generated", "litert").TensorType.FLOAT32
    model, found = read(data)
    kinds = set()
    for kind, each, graph in found:
        for tensor in (graph.tensors[i] for i in each.inputs if i >= 0):
            known = tensor.type == float32 and stored(model, tensor) is not None
            if known and name_of(tensor) in weights:
                kinds.add(kind)
    return sorted(kinds)
