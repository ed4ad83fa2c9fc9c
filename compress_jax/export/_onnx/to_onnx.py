"""Any JAX function as an ONNX file that ONNX Runtime runs in integers."""

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from compress_jax.core.errors import ExportError
from compress_jax.core.files import write_atomically
from compress_jax.core.packed import is_packed
from compress_jax.core.paths import flatten
from compress_jax.core.types import Batch, Model, ModelFn, Params, PyTree
from compress_jax.export._exported import Exported, Row, advised, as_inputs
from compress_jax.export._extras import extra
from compress_jax.export._onnx import check
from compress_jax.export._onnx import graph as g
from compress_jax.export._onnx.convert import Asked, plan
from compress_jax.export._onnx.places import Placed
from compress_jax.export._onnx.runtime import run
from compress_jax.export._onnx.weights import Weight, compact
from compress_jax.export._verify.agreement import agree
from compress_jax.quantize._activations.activations import Ranges
from compress_jax.quantize._activations.site_patterns import QuantizerRules

EXACT = 1e-3  # relative difference from JAX that is allowed without rounded activations
ROUNDED = 0.02  # and with them
BLOCKS = (16, 32, 64, 128, 256)  # sizes the runtime has kernels for
WHOLE = 128  # block where one scale serves a whole channel


def multiply(model: Model, placed: Placed, accuracy_level: int) -> str:
    """Replace a matrix product by ``MatMulNBits``, which takes 4- or 8-bit blocks, if it can.

    Args:
      model: changed.
      placed: a site whose weight has codes.
      accuracy_level: 0 or 1 multiplies in float32; 4 rounds the activations of each block to int8,
        which is faster.

    Returns:
      What was done, in words; empty if nothing could be.
    """
    node = placed.node
    weight = placed.weight
    axis = placed.channel
    if node.op_type == "Conv" or axis is None or weight.codes is None:
        return ""
    arrays = [x for x in (weight.codes, weight.zero, weight.scale) if x is not None]
    codes, zero, scale = (x if axis else x.T for x in arrays)  # [k, n] each
    block = _block(scale, zero)
    if not block:
        return ""
    # The runtime's codes have 4 or 8 bits and are centered at half of their range.
    bits = 4 if weight.bits <= 4 else 8
    middle = 2 ** (bits - 1)
    shift = middle - 2 ** (weight.bits - 1)
    codes = codes + shift
    steps = scale[::block].T  # [n, blocks]
    zeros = (zero + shift)[::block].T  # [n, blocks]
    # The last block is filled up; the runtime takes the first K codes.
    missing = -len(codes) % block
    padded = np.pad(codes.T, ((0, 0), (0, missing)), constant_values=middle)
    blocks = padded.reshape(len(steps), -1, block)  # [n, blocks, block]
    names = [g.add(model.graph, f"{placed.site}:blocks", _bytes(blocks, bits))]
    names.append(g.add(model.graph, f"{placed.site}:step", np.ascontiguousarray(steps).ravel()))
    if (zeros != middle).any():
        names.append(g.add(model.graph, f"{placed.site}:zero", _bytes(zeros, bits).ravel()))
    new = g.node("MatMulNBits", [node.input[0], *names], node.output[0], domain=g.MICROSOFT)
    sizes = {
        "K": len(codes),
        "N": len(steps),
        "bits": bits,
        "block_size": block,
        "accuracy_level": accuracy_level,
    }
    make = extra("onnx.helper", "onnx").make_attribute
    new.attribute.extend(make(name, value) for name, value in sizes.items())
    _exchange(model, node, new)
    return f"MatMulNBits, {bits} bits in blocks of {block}"


def _block(scale: np.ndarray, zero: np.ndarray) -> int:
    """Return the largest block along axis 0 with one scale and zero point; 0 if none is."""
    # A scale that is the same in all rows fits blocks of any size; short rows fill a smaller one.
    if (scale == scale[:1]).all() and (zero == zero[:1]).all():
        return next((size for size in BLOCKS if len(scale) <= size < WHOLE), WHOLE)
    for size in reversed(BLOCKS):
        if all((x == np.repeat(x[::size], size, 0)[: len(x)]).all() for x in (scale, zero)):
            return size
    return 0


def _bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    return codes.astype(np.uint8) if bits == 8 else g.halves(codes)


def _exchange(model: Model, old: g.Node, new: g.Node) -> None:
    """Replace one node by another; the bias of a Gemm is added behind it."""
    end = old.output[0]
    new_nodes = [new]
    if old.op_type == "Gemm" and len(old.input) > 2:
        new.output[0] = f"{end}:product"
        new_nodes.append(g.node("Add", [new.output[0], old.input[2]], end))
    nodes: list[g.Node] = []
    for each in model.graph.node:
        nodes.extend(new_nodes if each.output[0] == end else [each])
    g.replace_nodes(model.graph, nodes)
    if g.MICROSOFT not in {each.domain for each in model.opset_import}:
        model.opset_import.append(extra("onnx.helper", "onnx").make_opsetid(g.MICROSOFT, 1))


def unfold(model: Model, name: str, weight: Weight) -> str:
    """Store a constant as integers and scales.

    ``Cast - Sub - Mul`` restores it, once, when the runtime loads the file.

    Args:
      model: changed.
      name: of the constant.
      weight: with codes.

    Returns:
      What was done, in words; empty if its scales take as much as its codes save.
    """
    assert weight.codes is not None and weight.zero is not None and weight.scale is not None
    zero = compact(weight.zero)
    scale = compact(weight.scale)
    kinds = extra("onnx", "onnx").TensorProto
    bits = 4 if weight.bits <= 4 else 8
    # Both sides in bits: scales and zeros are float32, as the dense weight would be.
    if 32 * (scale.size + zero.size) + bits * weight.codes.size > 32 * weight.codes.size:
        return ""
    middle = 2 ** (weight.bits - 1)
    graph = model.graph
    graph.initializer.remove(next(each for each in graph.initializer if each.name == name))
    # Signed codes; the last node makes the tensor under the constant's old name.
    nodes: list[g.Node] = []
    last = f"{name}:codes"
    g.add(graph, last, weight.codes - middle, kinds.INT4 if bits == 4 else kinds.INT8)
    steps = [("Cast", [], {"to": kinds.FLOAT}), ("Mul", [g.add(graph, f"{name}:scale", scale)], {})]
    if (zero != middle).any():
        shift = g.add(graph, f"{name}:zero", (zero - middle).astype(np.float32))
        steps.insert(1, ("Sub", [shift], {}))
    for i, (op, rest, options) in enumerate(steps):
        out = name if i == len(steps) - 1 else f"{name}:{op}"
        nodes.append(g.node(op, [last, *rest], out, **options))
        last = out
    g.replace_nodes(graph, [*nodes, *graph.node])
    return f"{bits} bits in the file, float32 when loaded"


def unused(found: Mapping[str, Weight], model: Model) -> set[str]:
    """Return the names of weights that no node takes any more."""
    taken = g.consumers(model.graph)
    return {name for name in found if name not in taken}


def to_onnx(
    fn: ModelFn,
    params: Params,
    example: PyTree,
    path: str | PathLike[str],
    *,
    how: QuantizerRules | None = None,
    ranges: Ranges | None = None,
    batches: Iterable[Batch] = (),
    where: str | tuple[str, ...] | None = None,
    batch: Literal["any", "example"] = "any",
    weights: Literal["int8", "uint8"] = "int8",
    accuracy_level: int = 4,
    tolerance: float | None = None,
) -> Exported:
    r"""Write a function and its params as an ONNX file, and verify it in ONNX Runtime.

    ``params`` and ``how`` decide what is written. Arrays stay float32. With a static quantizer
    ``how`` the contractions run in integers: activations as uint8, :math:`x = s (q - z)` with the
    scales of the simulation ``activations(fn, how).apply(unpack(params), ranges, x)``; weights as
    their codes, with a scale for each output channel. Batch norm is folded into the scales, which
    leaves the codes unchanged. Weights that are still arrays there are quantized by
    ``uniform(8, granularity="channel")`` along the axes that no site sums over. A site that the
    runtime has no integer kernel for stays in floats and is listed with the reason; if none has
    one, that is an error. Without ``how``, packed integers become weight-only 4- or 8-bit blocks
    (``MatMulNBits``) in matrix products, and elsewhere small constants that are unfolded when the
    file is loaded.

    Args:
      fn: a pure function of params and inputs, such as ``model.apply``; only what it computes in
        inference.
      params: its params, packed or not; pruned and shrunk ones too.
      example: an input, or a tuple of inputs; the first axis is the batch.
      path: the file.
      how: ``static(bits=8, symmetric=False)``, or pairs of a glob over sites and such a quantizer
        or None, as for `quantize.activations`.
      ranges: ``activations(fn, how).init(unpack(params), batches)``; made from ``batches`` if not
        given.
      batches: calibration inputs, each as ``example``: for ranges, and for results that no site
        takes (residual sums).
      where: as for `quantize.activations`.
      batch: ``"any"`` for batches of any size, or ``"example"`` for exactly the shapes of the
        example.
      weights: the type of weights beside uint8 activations; the codes are the same. ``"int8"`` has
        the fastest kernels, but on x86 processors without VNNI they saturate sums of two products
        at 16 bits; ``"uint8"`` is exact everywhere.
      accuracy_level: of ``MatMulNBits``: 4 rounds activations to int8 in blocks, 0 multiplies in
        float32.
      tolerance: the root mean square difference from the simulation that is allowed on the example,
        relative to the result's: by default 1e-3, and 0.02 where activations are rounded. Every
        channel of every result is held to it, see `agreement.agree`.

    Returns:
      ``Exported(path, target, nbytes, rows, difference, simulation, notes)``; ``print`` shows how
      every site is computed.

    Raises:
      ExportError: if the packages are not installed, params have no names, the function cannot be
        converted, no site can be computed in integers although ``how`` is given, or results are not
        those of JAX. No file is written then.

    Example:
      >>> import jax.numpy as jnp
      >>> fn, x = lambda p, x: jax.nn.relu(x @ p["kernel"]), jnp.ones((1, 4))
      >>> to_onnx(fn, {"kernel": jnp.eye(4)}, x, "model.onnx").rows[0]  # doctest: +SKIP
      Row(name='kernel', form='float32', reason='not quantized')

    References:
      ONNX Runtime, "Quantize ONNX models" (the QDQ format),
      https://onnxruntime.ai/docs/performance/model-optimizations.
    """
    if "" in flatten(params)[0]:
        raise ExportError(
            "params are an array by itself, and constants of an ONNX file have names: give them in "
            "a dict, as in to_onnx(lambda p, x: fn(p['w'], x), {'w': params}, ...)"
        )
    inputs = as_inputs(example)
    calibration = [as_inputs(each) for each in batches]
    asked = Asked(how, ranges, calibration, where, batch == "any", weights == "uint8")
    with advised(fn, params, inputs):
        planned = plan(fn, params, inputs, asked)
    model = planned.model
    simulated = planned.simulated
    # How each site is computed: in integers, or in floats and why.
    rows: dict[str, Row] = {}
    form = "uint8 x uint8" if weights == "uint8" else "uint8 x int8"
    for site in simulated.sites:
        name = site.name
        reason = simulated.left.get(name, "not quantized")
        rows[name] = Row(name, form) if name in simulated.grids else Row(name, "float32", reason)
    floats = {name: each for name, each in planned.places.items() if name not in simulated.grids}
    rows |= _weights_only(model, planned.weights, floats, rows, accuracy_level)
    seen = {*rows, *(site.param for site in simulated.sites)}
    for name, leaf in flatten(params)[0].items():
        if is_packed(leaf) and name not in seen:
            reason = "no product takes it whole; its parts are constants of the file"
            rows[name] = Row(name, "float32", reason)
    check.valid(model)
    # The gate: what was made runs and agrees before a file is written.
    rounds = bool(simulated.grids) or any("MatMulNBits" in row.form for row in rows.values())
    default = ROUNDED if rounds else EXACT
    difference = agree(
        jax.jit(simulated.apply)(*inputs),
        run(model, inputs),
        default if tolerance is None else tolerance,
        "ONNX Runtime against the simulation in JAX",
        planned.floating if simulated.grids and tolerance is None else None,
    )
    data = model.SerializeToString()
    write_atomically(Path(path), data)
    found = tuple(rows.values())
    apply = simulated.apply
    return Exported(Path(path), "onnx", len(data), found, difference, apply, planned.notes)


def _weights_only(
    model: Model,
    weights: Mapping[str, Weight],
    places: Mapping[str, Placed],
    rows: Mapping[str, Row],
    accuracy_level: int,
) -> dict[str, Row]:
    """Multiply with packed integers where the runtime can, else store them packed."""
    done: dict[str, Row] = {}
    for name, each in places.items():
        if form := multiply(model, each, accuracy_level):
            done[name] = Row(name, form, _reason(rows[name]))
    # What no product could take packed is unfolded when the runtime loads the file.
    gone = unused(weights, model)
    for name, weight in weights.items():
        if name in gone or weight.codes is None:
            continue
        row = name if name in rows else weight.path
        if form := unfold(model, name, weight):
            done[row] = Row(row, form, _reason(rows[row]) if row in rows else "")
        else:
            reason = "its scales would take as much as its codes save"
            done[row] = Row(row, "float32", reason)
    g.prune(model)  # the dense weights that were replaced
    return done


def _reason(row: Row) -> str:
    """Return why a site that was to be quantized stays in floats; empty for other sites."""
    return "" if row.reason == "not quantized" else row.reason
