"""Rotate the residual stream and the heads of a transformer, so that no channel sticks out; the function stays as it is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import hadamard

from compress_jax.core.paths import flatten
from compress_jax.core.types import Leaves, ModelFn, Params, PyTree
from compress_jax.trace._groups.groups import Group
from compress_jax.trace._symmetry.rotation import Rotation, rotations


class Rotated(NamedTuple):
    """Params of the same function in rotated coordinates.

    Attributes:
      params: plain arrays.
      rotated: ``{name of a group of axes: the parameters that were rotated}``.
      skipped: ``{name of a group of axes: why it cannot be rotated}``.
    """

    params: Params
    rotated: dict[str, tuple[str, ...]]
    skipped: dict[str, str]


def rotate(
    fn: ModelFn,
    params: Params,
    *inputs: PyTree,
    key: jax.Array,
    where: str | tuple[str, ...] | None = None,
) -> Rotated:
    r"""Multiply parameters by random orthogonal matrices that cancel, and so spread outliers over all channels.

    A residual stream x becomes :math:`Q x`: whatever writes to it (embeddings, output projections,
    biases) is multiplied by Q, whatever reads from it by Q as well, and
    :math:`(Q W)^\top Q x = W^\top x`. Norms let it through, for :math:`\|Q x\| = \|x\|`, once their
    scales are moved into the kernels that read them. Where means are taken along x (LayerNorm), Q
    is drawn among the rotations that leave the vector of ones as it is. Likewise the head dimension
    of values and output projections, and of queries and keys where nothing (rotary embeddings)
    tells its coordinates apart.

    Q is a random Hadamard matrix, :math:`H D / \sqrt n` with random signs D, times a random
    orthogonal matrix for an odd factor of n. Which axes may be rotated is read off the function's
    jaxpr.

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays.
      inputs: one example of them; only shapes matter.
      key: typed PRNG key.
      where: a glob, or several, over the names of groups of axes (``trace.groups``); by default
        all.

    Returns:
      `Rotated`: params of the same function; groups that cannot be rotated are listed with the
      reason.

    Example:
      >>> p = {"in": jnp.eye(2, 4) * 8, "norm": jnp.array([1.0, 2.0, 3.0, 4.0]), "out": jnp.ones((4, 3))}
      >>> def fn(p, x):
      ...     x = x @ p["in"]
      ...     return x / jnp.sqrt((x * x).mean(-1, keepdims=True)) * p["norm"] @ p["out"]
      >>> result = rotate(fn, p, jnp.ones((1, 2)), key=jax.random.key(0))
      >>> result.rotated, float(jnp.abs(result.params["in"]).max()), result.params["norm"].tolist()
      ({'in:1': ('in', 'out')}, 4.0, [1.0, 1.0, 1.0, 1.0])

    References:
      Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024,
      arXiv:2404.00456, section 4, stage 1 (without the rotations at run time). Ashkboos et al.,
      "SliceGPT", 2024, arXiv:2401.15024, theorem 1.
    """
    leaves, rebuild = flatten(params)
    found, skipped = rotations(fn, params, *inputs, where=where)
    rotated: dict[str, tuple[str, ...]] = {}
    for i, (name, turn) in enumerate(found.items()):
        if (reason := _why_not(turn, leaves)) is not None:
            skipped[name] = reason
            continue
        leaves |= _without_gains(turn, leaves)
        q = jnp.asarray(
            rotation(turn.group.size, jax.random.fold_in(key, i), turn.keeps_ones), jnp.float32
        )
        still = {*turn.unrotated, *(gain.path for gain in turn.gains)}
        members = [member for member in turn.group.members if member[0] not in still]
        for path, axis in members:
            leaves[path] = _turned(leaves[path], axis, turn.group, (path, axis), q)
        rotated[name] = tuple(dict.fromkeys(path for path, _ in members))
    return Rotated(rebuild(leaves), rotated, skipped)


def rotation(size: int, key: jax.Array, keeps_ones: bool = False) -> np.ndarray:
    r"""Return a random orthogonal matrix that spreads every coordinate over all.

    Args:
      size: n.
      key: typed PRNG key.
      keeps_ones: whether :math:`Q 1 = 1` is asked for.

    Returns:
      float64 ``[n, n]``.

    Example:
      >>> q = rotation(12, jax.random.key(0), keeps_ones=True)
      >>> bool(np.allclose(q @ q.T, np.eye(12))), bool(np.allclose(q.sum(1), 1))
      (True, True)
    """
    if keeps_ones:
        inner = rotation(size - 1, key) if size > 1 else np.ones((0, 0))
        axis = np.ones(size) / np.sqrt(size)
        axis[0] -= 1
        mirror = np.eye(size) - 2 * np.outer(axis, axis) / (axis @ axis) if size > 1 else np.eye(1)
        whole = np.eye(size)
        whole[1:, 1:] = inner
        return mirror @ whole @ mirror
    power = size & -size
    normal = np.asarray(
        jax.random.normal(jax.random.fold_in(key, 0), (size // power, size // power)), np.float64
    )
    odd, triangle = np.linalg.qr(normal)
    odd = odd * np.where(np.diag(triangle) < 0, -1.0, 1.0)
    signs = np.asarray(jax.random.rademacher(jax.random.fold_in(key, 1), (size,)), np.float64)
    return np.kron(hadamard(power) / np.sqrt(power), odd) * signs


def _turned(
    x: jax.Array, axis: int, group: Group, member: tuple[str, int], q: jax.Array
) -> jax.Array:
    """Multiply one axis by a rotation, along every run of coordinates that lies in it."""
    place = group.coordinates[member]
    inside = np.flatnonzero(place >= 0)
    index = inside[np.argsort(place[inside], kind="stable")].reshape(group.size, -1)
    rows = jnp.moveaxis(x.astype(jnp.float32), axis, 0)
    new = jnp.tensordot(q, rows[index], axes=1, precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(rows.at[index].set(new), 0, axis).astype(x.dtype)


def _why_not(turn: Rotation, leaves: Leaves) -> str | None:
    """Say why the gains of a turn cannot be moved into the kernels that read them."""
    gains: dict[str, set[str | None]] = {}
    for use in turn.uses:
        if use.role != "gain":
            gains.setdefault(use.param.path, set()).add(use.gain.path if use.gain else None)
        if use.gain is not None and use.role == "other":
            return f"{use.param.path!r} is used after the scale {use.gain.path!r} in another way than a product"
    for gain in turn.gains:
        if gain.path in gains:
            return f"the scale {gain.path!r} is used in other ways too"
        shifts = [use for use in turn.uses if use.role == "shift" and use.gain == gain]
        if shifts and not bool(jnp.all(leaves[gain.path] != 0)):
            return (
                f"the scale {gain.path!r} has zeros, and {shifts[0].param.path!r} is added after it"
            )
    mixed = next((path for path, own in gains.items() if len(own) > 1), None)
    return f"{mixed!r} is used with several scales" if mixed else None


def _without_gains(turn: Rotation, leaves: Leaves) -> dict[str, Any]:
    """Move scales of norms into the kernels that read them, and out of the biases that are added to them."""
    new: dict[str, Any] = {}
    for gain in turn.gains:
        scale = leaves[gain.path].astype(jnp.float32)
        done: set[str] = set()
        for use in turn.uses:
            path = use.param.path
            if use.gain is None or use.gain.path != gain.path or path in done or use.role == "gain":
                continue
            done.add(path)
            axes = [axis for member, axis in turn.group.members if member == path]
            x = new.get(path, leaves[path]).astype(jnp.float32)
            for axis in axes:
                own = _placed(scale, len(gain.stack), x.ndim, axis)
                x = x / own if use.role == "shift" else x * own
            new[path] = x.astype(leaves[path].dtype)
        new[gain.path] = jnp.ones_like(leaves[gain.path])
    return new


def _placed(scale: jax.Array, stacked: int, ndim: int, axis: int) -> jax.Array:
    """Return a scale ``[*stack, n]`` where a parameter with the same stack has the axis."""
    shape = [1] * ndim
    shape[:stacked] = scale.shape[:stacked]
    shape[axis] = scale.shape[-1]
    return scale.reshape(shape)
