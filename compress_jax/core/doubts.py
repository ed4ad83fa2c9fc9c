"""Reasons to doubt the convention that a leaf's last axis is its outputs, from names and shapes alone."""

import math
from collections.abc import Mapping
from typing import Any

from compress_jax.core.axes import Axes

BIASES = ("bias", "b", "offset", "beta")
TORCH = ("weight", "weights")


def doubts(path: str, axes: Axes, leaves: Mapping[str, Any]) -> str:
    """Say what speaks against the axes a leaf is taken to have; empty if nothing does, or a trace told them.

    Args:
      path: the name of the leaf.
      axes: what it is taken to have.
      leaves: all leaves of the tree by path, for those beside it.

    Returns:
      A sentence that says what to do, or an empty text.

    Example:
      >>> import jax.numpy as jnp
      >>> leaves = {"dense/weight": jnp.ones((8, 4)), "dense/bias": jnp.ones(8)}
      >>> doubts("dense/weight", Axes.convention((8, 4)), leaves)
      'its bias has 8 entries, as many as axis 0: outputs may be there; use cj.bind'
    """
    if axes.source != "convention" or len(axes.shape) < 2:
        return axes.note
    reason = axes.note or _beside(path, axes, leaves) or _by_shape(axes) or _by_name(path)
    return f"{reason}; use cj.bind" if reason else ""


def _beside(path: str, axes: Axes, leaves: Mapping[str, Any]) -> str:
    """Compare with the bias of the same layer."""
    shape, layer = axes.shape, path.rpartition("/")[0]
    names = (f"{layer}/{name}" if layer else name for name in BIASES)
    for bias in (leaves[name] for name in names if name in leaves and name != path):
        if not hasattr(bias, "shape"):
            continue
        outputs = tuple(shape[a] for a in axes.outputs)
        if len(bias.shape) == 1 and bias.shape != outputs and bias.shape[0] == shape[0]:
            return f"its bias has {bias.shape[0]} entries, as many as axis 0: outputs may be there"
        if len(bias.shape) > 1 and bias.shape == (shape[0], *shape[len(shape) - len(bias.shape) + 1 :]):
            return f"its bias has shape {tuple(bias.shape)}: both may be stacks of {shape[0]} layers"
        if len(bias.shape) > 1 and bias.shape == shape[len(shape) - len(bias.shape) :]:
            return f"its bias has shape {tuple(bias.shape)}: outputs may be on the last {len(bias.shape)} axes"
    return ""


def _by_shape(axes: Axes) -> str:
    shape = axes.shape
    if shape[-1] == 1 and math.prod(shape) > 1:
        return "its last axis has size 1, so there is one output; if it is depthwise, outputs are elsewhere"
    if len(shape) == 4 and shape[2] == shape[3] and shape[2] <= 7 < max(shape[:2]):
        return "it looks like a kernel stored [out, in, height, width]"
    if len(shape) == 3 or len(shape) > 4:
        return f"its {len(shape)} axes may hold stacked layers, experts or heads"
    return ""


def _by_name(path: str) -> str:
    name = path.rpartition("/")[2]
    if name in TORCH:
        return f"leaves named {name!r} are stored [out, in] in PyTorch and Equinox"
    if name in ("embedding", "embeddings", "table", "wte"):
        return "a table that is also the last layer has its outputs on axis 0"
    return ""
