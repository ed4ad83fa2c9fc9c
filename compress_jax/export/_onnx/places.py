"""The nodes of a graph that compute a function's sites, and whether they can run in integers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress_jax.core.types import Model
from compress_jax.export._onnx import graph as g
from compress_jax.export._onnx.weights import Weight
from compress_jax.trace._jaxpr.site import Site

CONTRACTIONS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Placed:
    """A site's node.

    Attributes:
      site: name of the site.
      node: the node.
      weight: its weight.
      name: of the constant that is the weight.
      data: which input of the node the activation is.
    """

    site: str
    node: Any
    weight: Weight
    name: str
    data: int

    @property
    def channel(self) -> int | None:
        """The weight's axis of output channels; None if there is no integer kernel for the node."""
        if self.node.op_type == "Conv":
            return 0
        if self.data or self.weight.values.ndim != 2:
            return None
        if self.node.op_type == "MatMul":
            return 1
        scaled = any(g.attribute(self.node, name, 1.0) != 1.0 for name in ("alpha", "beta"))
        if scaled or g.attribute(self.node, "transA", 0):
            return None
        return 1 - g.attribute(self.node, "transB", 0)


def place(model: Model, weights: Mapping[str, Weight], sites: Sequence[Site]) -> dict[str, Placed]:
    """Find the nodes of sites: those that take the site's parameter, in the order of its uses.

    Args:
      model: with constants named as ``weights`` is.
      weights: by the names of constants.
      sites: of the function, in program order.

    Returns:
      The places by the names of sites; sites that no single node computes are not in it.
    """
    uses: dict[str, list[tuple[Any, str, int]]] = {}
    for each in model.graph.node:
        for index, name in enumerate(each.input[:2]):
            if each.op_type in CONTRACTIONS and name in weights and weights[name].values.ndim > 1:
                uses.setdefault(weights[name].path, []).append((each, name, 1 - index))
    found: dict[str, Placed] = {}
    for path, nodes in uses.items():
        own = [site for site in sites if site.param == path]
        if len(own) != len(nodes) or any(site.loops for site in own):
            continue
        for site, (each, name, data) in zip(own, nodes, strict=True):
            found[site.name] = Placed(site.name, each, weights[name], name, data)
    return found


def why_not(site: Site, placed: Placed | None) -> str:
    """Return why the runtime does not compute a site in integers; empty if it does.

    Args:
      site: the site.
      placed: its place, or None if no single node computes it.

    Returns:
      The reason.
    """
    if placed is not None:
        found = int8(placed)
        return found if isinstance(found, str) else ""
    if any(step > 1 for step in site.params.get("lhs_dilation", ())):
        return "ONNX Runtime has no integer kernel for transposed convolutions"
    if site.batch_axes or site.batch[0]:
        return "ONNX Runtime has no integer kernel for a product with a batch of weights"
    return (
        "no single node of the graph multiplies with this parameter (it is computed with first, or "
        "used elsewhere too)"
    )


def int8(placed: Placed) -> tuple[np.ndarray, np.ndarray] | str:
    """Return a weight as signed codes and a scale for each output channel, or why it cannot be.

    Args:
      placed: the place.

    Returns:
      ``(int8 codes, float32 scales)``, or a reason.
    """
    weight = placed.weight
    axis = placed.channel
    if axis is None:
        return f"ONNX Runtime has no integer kernel for this {placed.node.op_type}"
    scale = weight.per_channel(axis)
    if scale is None:
        return (
            "its weights have no single scale for each output channel (use granularity='channel' "
            "or 'tensor')"
        )
    levels = weight.levels
    if np.abs(levels).max(initial=0) > 127:
        return "its weights are not symmetric (use symmetric=True)"
    dead = scale == 0  # a batch norm that multiplies by 0
    shape = [-1 if i == axis else 1 for i in range(levels.ndim)]
    codes = np.where(dead.reshape(shape), 0, levels).astype(np.int8)
    return codes, np.where(dead, 1, scale).astype(np.float32)
