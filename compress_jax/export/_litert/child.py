"""Convert and run once, in a child process.

Converter and runtime are native code: a crash of theirs ends this process alone.

``python -m compress_jax.export._litert.child FOLDER`` reads ``job.json``, ``module.mlir`` and
``arrays.npz`` there, and ``changed.mlir`` where something is quantized: the same function with
other values for the weights that are. It writes ``model.tflite``, ``answer.json`` and the model's
results for the example, ``results.npz``.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compress_jax.core.errors import ExportError
from compress_jax.core.types import JsonObject, Model
from compress_jax.export._extras import extra
from compress_jax.export._litert.flatbuffer import (
    Operator,
    Subgraph,
    Tensor,
    after,
    constants,
    in_floats,
    name_of,
    operators,
    others,
    read,
    stored,
    takers,
)
from compress_jax.export._litert.interpreter import interpreter, results, tensors
from compress_jax.export._scales import floor

# {operator: indices of its input, weights and bias, and the weights' axis of output channels}
PLACES = {
    "FULLY_CONNECTED": (0, 1, 2, 0),
    "CONV_2D": (0, 1, 2, 0),
    "DEPTHWISE_CONV_2D": (0, 1, 2, 3),
    "TRANSPOSE_CONV": (2, 1, 3, 0),
}
# A bias has at most 2**30 / SHARE steps of a widened scale: the runtime's fixed-point multipliers
# must not underflow.
SHARE = 16.0
SIGNATURE = "serving_default"
# Model inputs and outputs stay float32, as in every other export; a SELECT may be of indices, which
# the quantizer would round and crash on.
FLOAT = ("INPUT", "OUTPUT", "SELECT")
# Models that normalize activations compute in int8 where weights are multiplied, as the simulation
# does, and in floats elsewhere: in 8 bits the epsilon added to a variance has a scale that the
# runtime aborts at, and a small vision transformer was 6 times further from the simulation and took
# 1.8 times as long.
WEIGHTS = (
    "FULLY_CONNECTED",
    "CONV_2D",
    "DEPTHWISE_CONV_2D",
    "CONV_2D_TRANSPOSE",
    "EMBEDDING_LOOKUP",
    "GATHER",
    "GATHER_ND",
)


Ranges = dict[str, dict[str, np.ndarray]]
"""``{tensor: {"min": array, "max": array}}``, as LiteRT's quantizer measures them."""


class Product(NamedTuple):
    """An operator with constant weights and bias.

    Attributes:
      model: the flatbuffer's object tree.
      input: the activations.
      weights: the constant that multiplies them.
      bias: the constant that is added.
      axis: of output channels, in the weights.
    """

    model: Model
    input: Tensor
    weights: Tensor
    bias: Tensor
    axis: int


def products(data: bytes) -> tuple[Model, list[Product]]:
    """Return a flatbuffer's object tree and its operators with weights and a bias.

    Args:
      data: the flatbuffer.

    Returns:
      ``(tree, operators)``.
    """
    model, found = read(data)
    return model, list(_products(model, found))


def _products(model: Model, found: Sequence[tuple[str, Operator, Subgraph]]) -> Iterator[Product]:
    for name, each, graph in found:
        where = PLACES.get(name)
        if where is None or len(each.inputs) <= where[2] or each.inputs[where[2]] < 0:
            continue
        data, weights, bias = (graph.tensors[each.inputs[i]] for i in where[:3])
        if stored(model, weights) is not None and stored(model, bias) is not None:
            yield Product(model, data, weights, bias, where[3])


def _values(model: Model, tensor: Tensor) -> np.ndarray:
    """Return a constant in floats."""
    # float64: a bias of int32 codes has more digits than float32 holds.
    schema = extra("ai_edge_litert.schema_py_generated", "litert").TensorType
    kinds = {
        schema.FLOAT32: np.float32,
        schema.INT8: np.int8,
        schema.INT32: np.int32,
        schema.INT64: np.int64,
    }
    data = stored(model, tensor)
    assert data is not None
    raw = np.frombuffer(bytes(data), kinds[tensor.type])
    return raw.reshape(tensor.shape).astype(np.float64) * _steps(tensor)


def _steps(tensor: Tensor) -> np.ndarray | float:
    """Return the scale of a constant, which broadcasts against it; 1 for floats."""
    grid = tensor.quantization
    if grid is None or grid.scale is None or not len(grid.scale):
        return 1.0
    shape = [1] * len(tensor.shape)
    if len(grid.scale) > 1:
        shape[grid.quantizedDimension] = -1
    return np.asarray(grid.scale, np.float64).reshape(shape)


def widened(data: bytes, ranges: Ranges) -> tuple[bytes, int]:
    """Raise each channel's scale until its bias is a whole number of int32 steps.

    Args:
      data: the float flatbuffer.
      ranges: of its tensors.

    Returns:
      ``(flatbuffer, how many channels)``; the very same bytes if there is none.
    """
    model, found = products(data)
    count = 0
    for each in found:
        ends = ranges.get(name_of(each.input))
        # Weights of another type than their bias are no floats.
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


def _step(ends: Mapping[str, np.ndarray]) -> float:
    # The scale that the quantizer gives a tensor of this range: 255 steps, zero a level.
    low, high = (float(np.ravel(ends[key])[0]) for key in ("min", "max"))
    return (max(high, 0.0) - min(low, 0.0)) / 255 or 1.0


def _widen(weights: np.ndarray, bias: np.ndarray, axis: int, step: float) -> int:
    """Raise the largest weight of channels in place; return the number of changed channels."""
    rows = np.moveaxis(weights, axis, 0)  # views, [channels, ...]
    # The quantizer's scale of a channel is its largest weight over 127.
    least = 127 * SHARE * floor(bias.ravel(), step)  # [channels]
    changed = 0
    for row, value in zip(rows, least, strict=True):
        if np.abs(row).max(initial=0) < value:
            place = np.unravel_index(np.abs(row).argmax(), row.shape)
            row[place] = np.copysign(value, row[place])
            changed += 1
    return changed


def require_rounded(plain: bytes, quantized: bytes) -> None:
    """Check that every constant of the quantized products is the float one, to half a step.

    Args:
      plain: the float flatbuffer.
      quantized: what was made of it.

    Raises:
      ExportError: if a weight or a bias is another, channel by channel.
    """
    first, ours = products(plain)
    second, theirs = products(quantized)
    if len(ours) != len(theirs):
        return  # the quantizer left out or split some; results are compared all the same
    for a, b in zip(ours, theirs, strict=True):
        for mine, other in ((a.weights, b.weights), (a.bias, b.bias)):
            wanted = _values(first, mine)
            # Half a step, and a little for the quantizer's float32.
            steps = _steps(other)
            off = np.abs(_values(second, other) - wanted)
            largest = np.abs(wanted).max()
            if (off > 0.51 * steps + 1e-5 * np.abs(wanted)).any():
                raise ExportError(
                    f"LiteRT's quantizer wrote {name_of(mine)!r} wrong: {off.max():.3g} off, of "
                    f"{largest:.3g}"
                )


def main(folder: Path) -> None:
    """Convert what a folder describes.

    Args:
      folder: see above.
    """
    job = json.loads((folder / "job.json").read_text())
    arrays = dict(np.load(folder / "arrays.npz"))
    names = job["inputs"]
    data = convert((folder / "module.mlir").read_text(), names, job["outputs"])
    answer: JsonObject = {"matched": {}, "missing": [], "widened": 0, "floats": []}
    if job["recipe"]:
        changed = convert((folder / "changed.mlir").read_text(), names, job["outputs"])
        data, found = quantized(data, constants(data, changed), job, arrays)
        answer |= found
    # Written before it is run: if the runtime crashes, the parent sees that the converter did not.
    (folder / "model.tflite").write_bytes(data)
    (folder / "answer.json").write_text(json.dumps(answer))
    example = {name: arrays[f"{name}:example"] for name in job["inputs"]}
    found = results(interpreter(data), example, job["outputs"])
    np.savez(folder / "results.npz", **dict(zip(job["outputs"], found, strict=True)))  # pyright: ignore[reportArgumentType]


def quantized(
    data: bytes, weights: set[str], job: JsonObject, arrays: Mapping[str, np.ndarray]
) -> tuple[bytes, JsonObject]:
    """Quantize a flatbuffer.

    Args:
      data: the float flatbuffer.
      weights: the constants that are made of quantized parameters.
      job: as in `main`.
      arrays: likewise.

    Returns:
      ``(flatbuffer, answer)``.
    """
    answer: JsonObject = {}
    static = job["recipe"].startswith("static")
    left = others(data, after(data, weights) if static else takers(data, weights))
    quantizer = _quantizer(data, job["recipe"], left)
    ranges = None
    plain = data
    # Static recipes: measured ranges, then ours where a tensor is a site's activation, then weights
    # whose scales leave room for their bias.
    if quantizer.need_calibration:
        names = job["inputs"]
        numbers = range(job["batches"])
        batches = [{name: arrays[f"{name}:{i}"] for name in names} for i in numbers]
        ranges = quantizer.calibrate({SIGNATURE: batches})
        answer |= put_ranges(data, ranges, job, arrays)
        plain, answer["widened"] = widened(data, ranges)
        quantizer = _quantizer(plain, job["recipe"], left)
    made = bytes(quantizer.quantize(ranges, enable_progress_report=False).quantized_model)
    if ranges is not None:
        require_rounded(plain, made)
    return made, answer | {"floats": in_floats(made, weights)}


def _quantizer(data: bytes, name: str, left: str) -> Model:
    """Return the quantizer of a float flatbuffer, with the operators that stay in floats."""
    recipe = getattr(extra("ai_edge_quantizer.recipe", "litert"), name)()
    quantizer = extra("ai_edge_quantizer.quantizer", "litert").Quantizer(data, recipe)
    # A batched product with a constant is of weights, one of two activations is not.
    found = operators(data)
    multiplied = {*WEIGHTS, "ALL_SUPPORTED"}
    if found.get("BATCH_MATMUL"):
        multiplied.add("BATCH_MATMUL")
    kinds = extra("ai_edge_quantizer.qtyping", "litert").TFLOperationName
    for kind in kinds:
        # A normalization of activations shows as an RSQRT.
        if kind.name in FLOAT or ("RSQRT" in found and kind.name not in multiplied):
            quantizer.update_quantization_recipe(".*", kind, algorithm_key="no_quantize")
    if left:  # the last rule that fits an operator is the one that counts
        every = kinds.ALL_SUPPORTED
        quantizer.update_quantization_recipe(left, every, algorithm_key="no_quantize")
    return quantizer


def convert(text: str, inputs: list[str], outputs: list[str]) -> bytes:
    """Return the float flatbuffer of a StableHLO module.

    Args:
      text: the module.
      inputs: names for its inputs.
      outputs: names for its outputs.

    Returns:
      The bytes.
    """
    ir = extra("litert_converter.mlir.ir", "litert")
    passes = extra("litert_converter.mlir.passmanager", "litert")
    api = extra("litert_converter.mlir._mlir_libs.converter_api_ext", "litert")
    context = ir.Context()
    api.prepare_mlir_context(context)
    with context:
        context.allow_unregistered_dialects = True
        module = ir.Module.parse(text)
        api.set_signature(
            module.operation, signature_name=SIGNATURE, input_names=inputs, output_names=outputs
        )
        config = api.ConvertToTFLConfig()
        config.model_origin_framework = "PYTORCH"  # the converter's name for StableHLO modules
        config.canonicalizing_inf_as_min_max_float = False
        api.run_convert_to_tfl_passes(module, passes.PassManager(), config)
        return bytes(api.export_flatbuffer_to_bytes(module.operation))


def put_ranges(
    data: bytes, ranges: Ranges, job: JsonObject, arrays: Mapping[str, np.ndarray]
) -> JsonObject:
    """Replace the ranges that the quantizer measured by those of the sites' activations.

    LiteRT has JAX's layout of images, so the tensor of an activation equals it entry by entry on
    the same example.

    Args:
      data: the float flatbuffer.
      ranges: of all tensors, changed.
      job: with ``sites``, ``{name: [low, high]}``, and the names of ``inputs``.
      arrays: the example's inputs and, as ``site:NAME``, the activations in JAX.

    Returns:
      ``{"matched": {site: tensors}, "missing": [sites]}``.
    """
    runner = interpreter(data, preserve=True)
    found = tensors(runner, [arrays[f"{name}:example"] for name in job["inputs"]])
    matched: dict[str, list[str]] = {}
    for site, (low, high) in job["sites"].items():
        ours = arrays[f"site:{site}"]
        # Only a tensor that is equal everywhere is the same activation.
        atol = 1e-3 * (np.abs(ours).max() or 1)
        for name, theirs in found.items():
            if name not in ranges or theirs.size != ours.size:
                continue
            if np.allclose(theirs.ravel(), ours.ravel(), 1e-3, atol):
                matched.setdefault(site, []).append(name)
                for key, end in (("min", low), ("max", high)):
                    ranges[name][key] = np.full(np.shape(ranges[name][key]), end, np.float32)
    return {"matched": matched, "missing": [site for site in job["sites"] if site not in matched]}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
