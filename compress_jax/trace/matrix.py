"""A stored parameter as the matrices that its site multiplies by: what the layer-wise solvers work on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.trace._calibrate import require
from compress_jax.trace._gram import Gram
from compress_jax.trace.site import Axes, Shape, Site


@dataclass(frozen=True)
class MatrixForm:
    """How a stored parameter becomes ``[batch, k, n]``: k entries are summed over for each of n outputs.

    Attributes:
      shape: the shape it is stored in.
      order: its axes in the order stacked, batch, summed over, kept.
      batch: product of the sizes of stacked and batch axes.
      k: product of the sizes that are summed over.
      groups: feature groups of a convolution; the outputs of each are matrices of their own.
    """

    shape: Shape
    order: Axes
    batch: int
    k: int
    groups: int = 1

    def matrices(self, x: jax.Array) -> jax.Array:
        """Return an array of the stored shape as ``[batch * groups, k, n]``."""
        flat = jnp.transpose(x, self.order).reshape(self.batch, self.k, self.groups, -1)
        return jnp.swapaxes(flat, 1, 2).reshape(self.batch * self.groups, self.k, -1)

    def stored(self, matrices: jax.Array) -> jax.Array:
        """Undo `matrices`."""
        flat = jnp.swapaxes(matrices.reshape(self.batch, self.groups, self.k, -1), 1, 2)
        back = tuple(self.order.index(axis) for axis in range(len(self.order)))
        return jnp.transpose(flat.reshape(tuple(self.shape[axis] for axis in self.order)), back)

    @classmethod
    def of(cls, site: Site, shape: Shape) -> "MatrixForm":
        """Return the form of the parameter of a site that `why_not` has nothing against.

        Args:
          site: where it is used.
          shape: the shape it is stored in.

        Returns:
          The form.

        Example:
          >>> import jax
          >>> from compress_jax.trace import sites
          >>> def fn(p, x):
          ...     return jax.lax.scan(lambda x, w: (x @ w, None), x, p["layers"])[0]
          >>> (site,) = sites(fn, {"layers": jnp.ones((2, 3, 3))}, jnp.ones((5, 3)))
          >>> MatrixForm.of(site, (2, 3, 3))
          MatrixForm(shape=(2, 3, 3), order=(0, 1, 2), batch=2, k=3, groups=1)
        """
        lead = (*_stacked(site), *(site.batch_axes or ()))
        summed = site.param_axes or ()
        kept = tuple(axis for axis in range(len(shape)) if axis not in (*lead, *summed))
        size = {axes: math.prod(shape[axis] for axis in axes) for axes in (lead, summed)}
        return cls(tuple(shape), (*lead, *summed, *kept), size[lead], size[summed], site.groups)


def _stacked(site: Site) -> Axes:
    """Return the stacked axes, that of the outermost loop first."""
    pairs = zip(site.stack_loops, site.stack_axes, strict=True)
    return tuple(axis for _, axis in sorted(pairs, key=lambda pair: pair[0] or 0))


def why_not(site: Site, shape: Shape) -> str | None:
    """Say why the parameter of a site, stored in this shape, cannot be laid out as matrices; None if it can."""
    if site.param is None:
        return "no parameter feeds it"
    if site.also:
        return "several parameters enter one product: " + ", ".join((site.param, *site.also))
    if site.param_axes is None or site.batch_axes is None:
        return "a reshape mixes the axes that are summed over with others"
    if None in site.stack_loops:
        return "a slice of the parameter is used, and which one is not known"
    operand = site.lhs_shape if site.operand == "lhs" else site.rhs_shape
    if math.prod(operand) * math.prod(shape[axis] for axis in site.stack_axes) != math.prod(shape):
        return "only a part of the parameter is used"
    return None


@dataclass(frozen=True)
class Problem:
    """One parameter, the form it is solved in, and what it is fed.

    Attributes:
      form: how it becomes matrices.
      gram: float32 ``[batch, k, k]``, the mean of x x^T over the rows that met each matrix.
    """

    form: MatrixForm
    gram: jax.Array


def problems(calibration: Any, leaves: Mapping[str, Any]) -> tuple[dict[str, Problem], dict[str, str]]:
    """Return the layer-wise problems of a calibration with `gram`, and why some parameters have none.

    Args:
      calibration: from ``calibrate(fn, gram(), ...)``.
      leaves: arrays or shapes by path.

    Returns:
      ``({path: Problem}, {path: reason})``; a parameter that several sites share is fed by all of them.

    Raises:
      StateError: if these are other statistics.
    """
    require(calibration, Gram, "gram()")
    found: dict[str, Problem] = {}
    reasons: dict[str, str] = {}
    sums: dict[str, tuple[jax.Array, jax.Array]] = {}
    for name, site in calibration.sites.items():
        if site.param is None or site.param not in leaves:
            continue
        if reason := why_not(site, leaves[site.param].shape):
            reasons |= dict.fromkeys((site.param, *site.also), reason)
            continue
        form = MatrixForm.of(site, leaves[site.param].shape)
        if site.param in found and found[site.param].form != form:
            reasons[site.param] = "it is used at several sites that sum over different axes of it"
            continue
        added = tuple(loop for loop in range(len(site.loops)) if loop not in site.stack_loops)
        own = _fed(*calibration[name]["input"], added, form.k)
        sums[site.param] = jax.tree.map(jnp.add, sums[site.param], own) if site.param in sums else own
        found[site.param] = Problem(form, _mean(*sums[site.param]))
    return {path: problem for path, problem in found.items() if path not in reasons}, reasons


@partial(jax.jit, static_argnames=("added", "k"))
def _fed(gram: jax.Array, count: jax.Array, added: Axes, k: int) -> tuple[jax.Array, jax.Array]:
    """Return the sums of outer products ``[batch, k, k]`` and the rows of each, loops over time and devices added up."""
    ran = count.reshape(count.shape + (1,) * (gram.ndim - count.ndim)) > 0
    total, rows = jnp.where(ran, gram, 0).sum(added).reshape(-1, k, k), count.sum(added).reshape(-1)
    return total, jnp.repeat(rows, total.shape[0] // rows.size)


@jax.jit
def _mean(total: jax.Array, rows: jax.Array) -> jax.Array:
    return total / jnp.maximum(rows, 1)[:, None, None].astype(jnp.float32)
