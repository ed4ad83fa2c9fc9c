"""Biases in int32 steps: kernels widened so that the quantizer's scales can hold them, and what it wrote held against them.

LiteRT's quantizer takes a channel's largest weight for its scale and clips or rounds the bias to what that scale allows: the
bias of a channel that is nearly or entirely zero is lost. One weight of such a channel is made just large enough.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from compress_jax.core.errors import ExportError
from compress_jax.export.extras import extra
from compress_jax.export.scales import floor

PLACES = {  # operator -> where its input, weights and bias are, and the weights' axis of output channels
    "FULLY_CONNECTED": (0, 1, 2, 0),
    "CONV_2D": (0, 1, 2, 0),
    "DEPTHWISE_CONV_2D": (0, 1, 2, 3),
    "TRANSPOSE_CONV": (2, 1, 3, 0),
}
SHARE = 16.0  # a widened bias has at most 2**30 / SHARE steps: the runtime's fixed-point multipliers must not underflow


class Product(NamedTuple):
    """An operator with constant weights and bias.

    Attributes:
      model: the flatbuffer's object tree.
      input: its tensors.
      weights: likewise.
      bias: likewise.
      axis: of output channels.
    """

    model: Any
    input: Any
    weights: Any
    bias: Any
    axis: int


def products(data: bytes) -> tuple[Any, list[Product]]:
    """Return the object tree of a flatbuffer and its operators that have weights and a bias, in order.

    Args:
      data: the flatbuffer.

    Returns:
      ``(tree, operators)``.
    """
    schema = extra("ai_edge_litert.schema_py_generated", "litert")
    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    return model, list(_products(model, names))


def _products(model: Any, names: Mapping[int, str]) -> Iterator[Product]:
    for graph in model.subgraphs:
        for each in graph.operators:
            code = model.operatorCodes[each.opcodeIndex]
            where = PLACES.get(names[max(code.builtinCode, code.deprecatedBuiltinCode)])
            if where is None or len(each.inputs) <= where[2] or each.inputs[where[2]] < 0:
                continue
            data, weights, bias = (graph.tensors[each.inputs[i]] for i in where[:3])
            if _stored(model, weights) is not None and _stored(model, bias) is not None:
                yield Product(model, data, weights, bias, where[3])


def _stored(model: Any, tensor: Any) -> Any:
    data = model.buffers[tensor.buffer].data
    return None if data is None or not len(data) else data


def _values(model: Any, tensor: Any) -> np.ndarray:
    """Return a constant in floats."""
    schema = extra("ai_edge_litert.schema_py_generated", "litert").TensorType
    kinds = {schema.FLOAT32: np.float32, schema.INT8: np.int8, schema.INT32: np.int32, schema.INT64: np.int64}
    raw = np.frombuffer(bytes(_stored(model, tensor)), kinds[tensor.type])
    return raw.reshape(tensor.shape).astype(np.float64) * _steps(tensor)


def _steps(tensor: Any) -> Any:
    """Return the scale of a constant, which broadcasts against it; 1 for floats."""
    about = tensor.quantization
    if about is None or about.scale is None or not len(about.scale):
        return 1.0
    shape = [1] * len(tensor.shape)
    if len(about.scale) > 1:
        shape[about.quantizedDimension] = -1
    return np.asarray(about.scale, np.float64).reshape(shape)


def widened(data: bytes, ranges: Mapping[str, Any]) -> tuple[bytes, int]:
    """Make the largest weight of every channel large enough for its bias to be a whole number of steps in int32.

    Args:
      data: the float flatbuffer.
      ranges: of its tensors.

    Returns:
      ``(flatbuffer, how many channels)``; the very same bytes if there is none.
    """
    model, found = products(data)
    count = 0
    for each in found:
        ends = ranges.get(_name(each.input))
        if ends is None or each.weights.type != each.bias.type:
            continue
        weights = _values(model, each.weights).astype(np.float32)
        changed = _widen(weights, _values(model, each.bias), each.axis, _step(ends))
        count += changed
        if changed:
            model.buffers[each.weights.buffer].data = np.frombuffer(weights.tobytes(), np.uint8)
    if not count:
        return data, 0
    builder = extra("flatbuffers", "litert").Builder(len(data))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output()), count


def _name(tensor: Any) -> str:
    return tensor.name.decode() if isinstance(tensor.name, bytes) else tensor.name


def _step(ends: Mapping[str, Any]) -> float:
    low, high = (float(np.ravel(ends[key])[0]) for key in ("min", "max"))
    return (max(high, 0.0) - min(low, 0.0)) / 255 or 1.0


def _widen(weights: np.ndarray, bias: np.ndarray, axis: int, step: float) -> int:
    """Change weights in place; return of how many channels."""
    rows = np.moveaxis(weights, axis, 0)
    least, changed = 127 * SHARE * floor(bias.ravel(), step), 0
    for row, value in zip(rows, least, strict=True):
        if np.abs(row).max(initial=0) < value:
            place = np.unravel_index(np.abs(row).argmax(), row.shape)
            row[place] = np.copysign(value, row[place])
            changed += 1
    return changed


def held(plain: bytes, quantized: bytes) -> None:
    """See that every constant of the quantized products is the float one, to half a step.

    Args:
      plain: the float flatbuffer.
      quantized: what was made of it.

    Raises:
      ExportError: if a weight or a bias is another, channel by channel.
    """
    (first, ours), (second, theirs) = products(plain), products(quantized)
    if len(ours) != len(theirs):
        return  # the quantizer left out or split some; results are compared all the same
    for a, b in zip(ours, theirs, strict=True):
        for mine, other in ((a.weights, b.weights), (a.bias, b.bias)):
            wanted, steps = _values(first, mine), _steps(other)
            off, largest = np.abs(_values(second, other) - wanted), np.abs(wanted).max()
            if (off > 0.51 * steps + 1e-5 * np.abs(wanted)).any():
                raise ExportError(f"LiteRT's quantizer wrote {_name(mine)!r} wrong: {off.max():.3g} off, of {largest:.3g}")
