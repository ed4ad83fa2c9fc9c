"""Parameters of a graph: moved, folded with batch norm, split into integers and scales."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from compress_jax.core.packed import Quantized, to_dense
from compress_jax.core.sparse import Sparse, width
from compress_jax.core.types import Model, PyTree
from compress_jax.export._onnx import graph as g

Change = Callable[[np.ndarray], np.ndarray]
"""A transposition or a reshape: entries move, and none changes."""


@dataclass(frozen=True)
class Weight:
    """A parameter as a node of the graph takes it.

    Attributes:
      path: of the parameter.
      values: dense.
      bits: of a code; 0 if the parameter is not quantized, and then the others are None.
      codes: unsigned codes, int32 in the shape of ``values``.
      zero: the code of zero of every entry, likewise.
      scale: of every entry, float32 likewise: ``values = (codes - zero) * scale``.
      moved: whether its axes are not as the parameter has them.
    """

    path: str
    values: np.ndarray
    bits: int = 0
    codes: np.ndarray | None = None
    zero: np.ndarray | None = None
    scale: np.ndarray | None = None
    moved: bool = False

    @classmethod
    def of(cls, path: str, leaf: PyTree) -> "Weight":
        """Return a leaf of a packed tree, as it is stored."""
        values = np.asarray(to_dense(leaf))
        if not isinstance(leaf, Quantized):
            return cls(path, values)
        # One scale and zero point for each entry, so that they move with the entries.
        spread = leaf.layout.spread
        zero_point = leaf.zero_point.astype(jnp.int32)
        zero = np.asarray(spread(jnp.broadcast_to(zero_point, leaf.layout.scale_shape)))
        codes = np.asarray(leaf.codes.unpack()).astype(np.int32)
        if isinstance(leaf.codes, Sparse):  # masked entries are zero
            codes = np.where(np.asarray(leaf.codes.mask.unpack()) != 0, codes, zero)
        return cls(path, values, width(leaf.codes), codes, zero, np.asarray(spread(leaf.scale)))

    def move(self, change: Change) -> "Weight":
        """Return the weight with its entries moved by a transposition or a reshape."""
        parts = {name: getattr(self, name) for name in ("values", "codes", "zero", "scale")}
        moved = {name: change(x) for name, x in parts.items() if x is not None}
        return replace(self, moved=True, **moved)

    def scaled(self, factor: np.ndarray) -> "Weight":
        """Return the weight times ``factor``, which broadcasts; codes change only their sign."""
        values = self.values * factor
        if self.codes is None or self.zero is None or self.scale is None:
            return replace(self, values=values)
        # -(codes - zero) = (top - codes) - (top - zero), and both stay in range.
        top = 2**self.bits - 1
        flip = factor < 0
        codes = np.where(flip, top - self.codes, self.codes)
        zero = np.where(flip, top - self.zero, self.zero)
        scale = self.scale * np.abs(factor)
        return replace(self, values=values, codes=codes, zero=zero, scale=scale)

    @property
    def levels(self) -> np.ndarray:
        """Signed integers, ``codes - zero``."""
        assert self.codes is not None and self.zero is not None
        return self.codes - self.zero

    def per_channel(self, axis: int) -> np.ndarray | None:
        """Return one scale for each index of an axis; None if one index has several."""
        if self.scale is None:
            return None
        # [channels, entries of a channel]
        rows = np.moveaxis(self.scale, axis, 0).reshape(self.scale.shape[axis], -1)
        return rows[:, 0] if (rows == rows[:, :1]).all() else None


def compact(x: np.ndarray) -> np.ndarray:
    """Return an array with length 1 along the axes on which its entries do not depend.

    Args:
      x: any array.

    Returns:
      The smallest array that broadcasts to it.

    Example:
      >>> compact(np.array([[1, 1], [2, 2]])).tolist()
      [[1], [2]]
    """
    for axis in range(x.ndim):
        first = np.take(x, [0], axis)
        x = first if x.shape[axis] and (x == first).all() else x
    return x


def settle(model: Model, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Apply every move of a parameter now, so that nodes take constants.

    Batch norm is folded into convolutions on the way.

    Args:
      model: from `convert`; changed.
      weights: by path.

    Returns:
      The weights by the names of the constants that nodes take now.
    """
    graph = model.graph
    found = dict(weights)
    constants = g.initializers(graph)
    # A node that only moves a parameter's entries is run here, and its result is the constant.
    others = []
    for each in graph.node:
        change = _move(each, constants) if each.input and each.input[0] in found else None
        if change is None:
            others.append(each)
        else:
            found[each.output[0]] = found[each.input[0]].move(change)
    g.replace_nodes(graph, others)
    _fold_batch_norm(graph, found, constants)
    return _named(model, found)


def _move(each: g.Node, constants: Mapping[str, np.ndarray]) -> Change | None:
    """Return a node as a function of its first input if it only moves entries, else None."""
    op = each.op_type
    rest = [constants[name] for name in each.input[1:] if name in constants]
    if op == "Transpose":  # without an order it reverses the axes, as NumPy does
        order = g.attribute(each, "perm", None)
        return lambda x: np.transpose(x, order)
    if op == "Identity":
        return lambda x: x
    if op not in ("Reshape", "Squeeze", "Unsqueeze") or len(rest) < len(each.input) - 1:
        return None
    if op == "Reshape":
        # ONNX takes 0 for the input's own size there, NumPy for an empty axis.
        shape = [int(n) for n in rest[0]]
        return None if 0 in shape else lambda x: x.reshape(shape)
    axes = tuple(int(a) for a in rest[0]) if rest else None
    if op == "Squeeze":
        return lambda x: np.squeeze(x, axes)
    return lambda x: np.expand_dims(x, axes or ())


def _fold_batch_norm(
    graph: g.Graph, weights: dict[str, Weight], constants: Mapping[str, np.ndarray]
) -> None:
    """Fold the scale of a batch norm into the convolution before it; codes stay."""
    made = g.producers(graph)
    taken = g.consumers(graph)
    for norm in [each for each in graph.node if each.op_type == "BatchNormalization"]:
        conv = made.get(norm.input[0])
        numbers = [constants.get(name) for name in norm.input[1:5]]
        if conv is None or conv.op_type != "Conv" or any(x is None for x in numbers):
            continue
        # Another node would take the scaled kernel, or the result before the norm.
        kernel = conv.input[1]
        shared = len(taken[norm.input[0]]) > 1 or len(taken[kernel]) > 1
        first = constants.get(conv.input[2]) if len(conv.input) > 2 else np.float32(0)
        if kernel not in weights or shared or first is None:
            continue
        # gain (w x + b - mean) / sqrt(variance + epsilon) + bias, as one convolution.
        gain, bias, mean, variance = (np.asarray(x, np.float64) for x in numbers)
        factor = gain / np.sqrt(variance + g.attribute(norm, "epsilon", 1e-5))  # [channels]
        weight = weights[kernel]
        ones = (1,) * (weight.values.ndim - 1)  # kernels are [out, in, *window]
        weights[kernel] = weight.scaled(factor.astype(np.float32).reshape(-1, *ones))
        shift = (bias + (first - mean) * factor).astype(np.float32)
        folded = g.add(graph, f"{weight.path}:bias", shift)
        conv.input[:] = [conv.input[0], kernel, folded]
        conv.output[0] = norm.output[0]
        graph.node.remove(norm)


def _named(model: Model, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Write the moved weights as constants named after their parameters; return their names."""
    graph = g.prune(model).graph
    result: dict[str, Weight] = {}
    taken = g.consumers(graph)
    there = {each.name: each for each in graph.initializer}
    for name, weight in weights.items():
        if name not in taken:
            continue
        if name in there:  # the batch norm may have scaled it
            graph.initializer.remove(there[name])
        # A parameter that nodes take in several forms has a number behind its path for each.
        new = weight.path
        number = 1
        while new in result or (new in weights and new != name and new in taken):
            number += 1
            new = f"{weight.path}#{number}"
        g.add(graph, new, weight.values)
        g.rename(graph, name, new)
        result[new] = weight
    g.prune(model)
    return result
