"""Which inputs of a layer's matrix form an n:m group, whatever the order its site sums them in."""

import math

import numpy as np

from compress_jax.core.axes import Axes
from compress_jax.prune.structures import NofM
from compress_jax.trace.matrix import MatrixForm


def input_order(form: MatrixForm, structure: NofM | None, block: int) -> tuple[np.ndarray, str]:
    """Return an order of a matrix's rows in which groups are consecutive, padded so that none crosses a block.

    Groups run along the structure's axes if the site sums over them (the channels of a convolution, at each place of its
    window), else along everything it sums over, which the note says: other groups are of no use to hardware.

    Args:
      form: how the stored parameter becomes matrices ``[k, n]``.
      structure: from `n_m`, or None for the order there is.
      block: a multiple of the group's size.

    Returns:
      ``(rows, note)``: int32, a multiple of ``block`` long, with ``form.k`` for padding.

    Example:
      >>> from compress_jax.prune import n_m
      >>> attention = MatrixForm((5, 2, 3), order=(0, 1, 2), batch=1, k=5)
      >>> rows, note = input_order(attention, n_m(2, 4), 4)
      >>> rows.tolist(), note
      ([0, 1, 2, 3, 4, 5, 5, 5], 'groups run along axes (0,), which its site sums over, not along (1,)')
    """
    rows, note = np.arange(form.k), ""
    if structure is not None:
        summed = _summed(form)
        sizes, axes = [form.shape[axis] for axis in summed], structure.axes(Axes.convention(form.shape))
        if not set(axes) <= set(summed):
            note = f"groups run along axes {summed}, which its site sums over, not along {axes}"
            axes = summed
        grid = np.moveaxis(rows.reshape(sizes), [summed.index(axis) for axis in axes], range(-len(axes), 0))
        lines = grid.reshape(-1, math.prod(form.shape[axis] for axis in axes))
        rows = np.pad(lines, ((0, 0), (0, -lines.shape[1] % structure.m)), constant_values=form.k).ravel()
    return np.pad(rows, (0, -len(rows) % block), constant_values=form.k).astype(np.int32), note


def _summed(form: MatrixForm) -> tuple[int, ...]:
    """Return the axes that are summed over: behind those of the batch, as many as make k."""
    start = next(i for i in range(len(form.order) + 1) if math.prod(form.shape[a] for a in form.order[:i]) == form.batch)
    ends = range(start, len(form.order) + 1)
    end = next(i for i in ends if math.prod(form.shape[a] for a in form.order[start:i]) == form.k)
    return form.order[start:end]
