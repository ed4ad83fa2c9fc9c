"""Weights alone in few bits: integer constants that the runtime multiplies with, or unfolds when it loads the file."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from compress_jax.export.extras import extra
from compress_jax.export.onnx import graph as g
from compress_jax.export.onnx.places import Placed
from compress_jax.export.onnx.weights import Weight, compact

BLOCKS = (16, 32, 64, 128, 256)  # sizes the runtime has kernels for
WHOLE = 128  # block where one scale serves a whole channel


def multiply(model: Any, placed: Placed, accuracy_level: int) -> str:
    """Exchange a matrix product for one that takes 4- or 8-bit blocks (``MatMulNBits``), if there is one.

    Args:
      model: changed.
      placed: a site whose weight has codes.
      accuracy_level: 0 or 1 multiplies in float32; 4 rounds the activations of each block to int8, which is faster.

    Returns:
      What was done, in words; empty if nothing could be.
    """
    node, weight, axis = placed.node, placed.weight, placed.channel
    if node.op_type == "Conv" or axis is None or weight.codes is None:
        return ""
    codes, zero, scale = (x if axis else x.T for x in (weight.codes, weight.zero, weight.scale) if x is not None)  # [k, n]
    block = _block(scale, zero)
    if not block:
        return ""
    bits = 4 if weight.bits <= 4 else 8
    codes, zero = codes + 2 ** (bits - 1) - 2 ** (weight.bits - 1), zero + 2 ** (bits - 1) - 2 ** (weight.bits - 1)
    steps, zeros = scale[::block].T, zero[::block].T  # [n, blocks]
    missing = -len(codes) % block
    blocks = np.pad(codes.T, ((0, 0), (0, missing)), constant_values=2 ** (bits - 1)).reshape(len(steps), -1, block)
    names = [g.add(model.graph, f"{placed.site}:blocks", _bytes(blocks, bits))]
    names.append(g.add(model.graph, f"{placed.site}:step", np.ascontiguousarray(steps).ravel()))
    if (zeros != 2 ** (bits - 1)).any():
        names.append(g.add(model.graph, f"{placed.site}:zero", _bytes(zeros, bits).ravel()))
    new = g.node("MatMulNBits", [node.input[0], *names], node.output[0], domain=g.MICROSOFT)
    sizes = {"K": len(codes), "N": len(steps), "bits": bits, "block_size": block, "accuracy_level": accuracy_level}
    new.attribute.extend(extra("onnx.helper", "onnx").make_attribute(name, value) for name, value in sizes.items())
    _exchange(model, node, new)
    return f"MatMulNBits, {bits} bits in blocks of {block}"


def _block(scale: np.ndarray, zero: np.ndarray) -> int:
    """Return the largest block along the first axis in which scale and zero are one number; 0 if none is."""
    sizes = [WHOLE, *(size for size in reversed(BLOCKS) if size != WHOLE)]
    whole = (scale == scale[:1]).all() and (zero == zero[:1]).all()
    for size in sizes if whole else reversed(BLOCKS):
        if all((x == np.repeat(x[::size], size, 0)[: len(x)]).all() for x in (scale, zero)):
            return size
    return 0


def _bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned codes along the last axis, the first of two 4-bit codes in the low half."""
    codes = codes.astype(np.uint8)
    if bits == 8:
        return codes
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _exchange(model: Any, old: Any, new: Any) -> None:
    """Put one node in the place of another; the bias of a Gemm is added behind it."""
    end = old.output[0]
    nodes, bias = [new], old.input[2] if old.op_type == "Gemm" and len(old.input) > 2 else ""
    if bias:
        new.output[0] = f"{end}:product"
        nodes.append(g.node("Add", [new.output[0], bias], end))
    kept = [each for at in model.graph.node for each in (nodes if at.output[0] == end else [at])]
    g.replace_nodes(model.graph, kept)
    _import(model)


def _import(model: Any) -> None:
    if g.MICROSOFT not in {each.domain for each in model.opset_import}:
        model.opset_import.append(extra("onnx.helper", "onnx").make_opsetid(g.MICROSOFT, 1))


def unfold(model: Any, name: str, weight: Weight) -> str:
    """Keep a constant as integers and scales; ``Cast - Sub - Mul`` gives it back, once, when the runtime loads the file.

    Args:
      model: changed.
      name: of the constant.
      weight: with codes.

    Returns:
      What was done, in words; empty if its scales take as much as its codes save.
    """
    assert weight.codes is not None and weight.zero is not None and weight.scale is not None
    zero, scale = compact(weight.zero), compact(weight.scale)
    kinds = extra("onnx", "onnx").TensorProto
    kind, bits = (kinds.INT4, 4) if weight.bits <= 4 else (kinds.INT8, 8)
    if 32 * (scale.size + zero.size) + bits * weight.codes.size > 32 * weight.codes.size:
        return ""
    middle, graph = 2 ** (weight.bits - 1), model.graph
    graph.initializer.remove(next(each for each in graph.initializer if each.name == name))
    nodes, last = [], f"{name}:codes"
    g.add(graph, last, weight.codes - middle, kind)
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


def unused(found: Mapping[str, Weight], model: Any) -> set[str]:
    """Return the names of weights that no node takes any more."""
    taken = g.consumers(model.graph)
    return {name for name in found if name not in taken}
