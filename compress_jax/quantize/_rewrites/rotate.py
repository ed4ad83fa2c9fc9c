"""Rotate the residual stream and the heads of a transformer, so that no channel is an outlier."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import hadamard

from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.paths import flatten
from compress_jax.core.types import Leaves, ModelFn, Params, PyTree
from compress_jax.layerwise._result import Rewritten
from compress_jax.trace._groups.groups import Group
from compress_jax.trace._symmetry.rotation import Rotation, rotations


@renamed_arguments(where="pattern")
def rotate(
    fn: ModelFn,
    params: Params,
    *inputs: PyTree,
    key: jax.Array,
    pattern: str | tuple[str, ...] | None = None,
) -> Rewritten:
    r"""Multiply parameters by random orthogonal matrices that cancel, to spread outliers evenly.

    A residual stream x becomes :math:`Q x`: parameters that write to it (embeddings, output
    projections, biases) are multiplied by Q, parameters that read from it by Q as well, and
    :math:`(Q W)^\top Q x = W^\top x`. Norms commute with Q, as :math:`\|Q x\| = \|x\|`, once their
    scales are moved into the kernels that read them. Where means are taken along x (LayerNorm), Q
    is drawn among the rotations that leave the vector of ones unchanged. The head dimension of
    values and output projections is rotated likewise, and that of queries and keys where nothing
    (rotary embeddings) distinguishes its coordinates.

    Q is a random Hadamard matrix, :math:`H D / \sqrt n` with random signs D, times a random
    orthogonal matrix for an odd factor of n. Which axes may be rotated is found in the function's
    jaxpr.

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays.
      inputs: one example of them; only shapes matter.
      key: typed PRNG key.
      pattern: a glob, or several, over the names of groups of axes (``trace.groups``); by default
        all.

    Returns:
      ``Rewritten``: params of the same function. ``changed`` maps the names of groups of axes to
      the parameters that were rotated, ``skipped`` to why they cannot be.

    Example:
      >>> p = {"in": jnp.eye(2, 4) * 8, "norm": jnp.arange(1.0, 5.0), "out": jnp.ones((4, 3))}
      >>> def fn(p, x):
      ...     x = x @ p["in"]
      ...     return x / jnp.sqrt((x * x).mean(-1, keepdims=True)) * p["norm"] @ p["out"]
      >>> result = rotate(fn, p, jnp.ones((1, 2)), key=jax.random.key(0))
      >>> result.changed, float(jnp.abs(result.params["in"]).max()), result.params["norm"].tolist()
      ({'in:1': ('in', 'out')}, 4.0, [1.0, 1.0, 1.0, 1.0])

    References:
      Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024,
      arXiv:2404.00456, section 4, stage 1 (without the rotations at run time). Ashkboos et al.,
      "SliceGPT", 2024, arXiv:2401.15024, theorem 1.
    """
    leaves, rebuild = flatten(params)
    found, skipped = rotations(fn, params, *inputs, where=pattern)
    changed: dict[str, tuple[str, ...]] = {}
    for i, (name, each) in enumerate(found.items()):
        if (reason := _why_not(each, leaves)) is not None:
            skipped[name] = reason
            continue
        # Norms commute with Q only once they have no scales.
        leaves |= _without_gains(each, leaves)
        q = rotation(each.group.size, jax.random.fold_in(key, i), each.keeps_ones)
        # The scales of norms stay: by now each has equal entries.
        still = {*each.unrotated, *(gain.path for gain in each.gains)}
        members = [member for member in each.group.members if member[0] not in still]
        for path, axis in members:
            leaves[path] = _rotated(leaves[path], axis, each.group, (path, axis), q)
        changed[name] = tuple(dict.fromkeys(path for path, _ in members))
    return Rewritten(rebuild(leaves), changed=changed, skipped=skipped)


def rotation(size: int, key: jax.Array, keeps_ones: bool = False) -> np.ndarray:
    r"""Return a random orthogonal matrix that mixes all coordinates evenly.

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
        return _rotation_about_ones(size, key)
    power = size & -size  # the largest power of two in size
    rest = size // power
    normal = jax.random.normal(jax.random.fold_in(key, 0), (rest, rest))
    odd, triangle = np.linalg.qr(np.asarray(normal, np.float64))
    odd = odd * np.where(np.diag(triangle) < 0, -1.0, 1.0)  # uniform over orthogonal matrices
    signs = np.asarray(jax.random.rademacher(jax.random.fold_in(key, 1), (size,)), np.float64)
    return np.kron(hadamard(power) / np.sqrt(power), odd) * signs  # D scales the columns


def _rotation_about_ones(size: int, key: jax.Array) -> np.ndarray:
    """Return a rotation of the other coordinates, seen in a mirror that maps ones to the first."""
    if size == 1:
        return np.eye(1)
    # Householder: a reflection whose normal is the difference of the two unit vectors.
    normal = np.ones(size) / np.sqrt(size)
    normal[0] -= 1
    mirror = np.eye(size) - 2 * np.outer(normal, normal) / (normal @ normal)
    whole = np.eye(size)
    whole[1:, 1:] = rotation(size - 1, key)
    return mirror @ whole @ mirror


def _rotated(
    x: jax.Array, axis: int, group: Group, member: tuple[str, int], q: np.ndarray
) -> jax.Array:
    """Multiply one axis by a rotation, along every run of the group's coordinates in it."""
    place = group.coordinates[member]
    inside = np.flatnonzero(place >= 0)
    index = inside[np.argsort(place[inside], kind="stable")].reshape(group.size, -1)  # [n, runs]
    rows = jnp.moveaxis(_wide(x), axis, 0)  # [axis, *others]
    # [n, n] x [n, runs, *others], at full precision: rotations cancel only up to its rounding.
    new = jnp.tensordot(
        jnp.asarray(q, rows.dtype), rows[index], axes=1, precision=jax.lax.Precision.HIGHEST
    )
    return jnp.moveaxis(rows.at[index].set(new), 0, axis).astype(x.dtype)


def _why_not(each: Rotation, leaves: Leaves) -> str | None:
    """Say why the scales of norms cannot be moved into the kernels that read them."""
    gains: dict[str, set[str | None]] = {}
    for use in each.uses:
        if use.role != "gain":
            gains.setdefault(use.param.path, set()).add(use.gain.path if use.gain else None)
        if use.gain is not None and use.role == "other":
            return (
                f"{use.param.path!r} is used after the scale {use.gain.path!r} in another way than "
                "a product"
            )
    for gain in each.gains:
        if gain.path in gains:
            return f"the scale {gain.path!r} is used in other ways too"
        shifts = [use for use in each.uses if use.role == "shift" and use.gain == gain]
        if shifts and not bool(jnp.all(leaves[gain.path] != 0)):
            return (
                f"the scale {gain.path!r} has zeros, and {shifts[0].param.path!r} is added after it"
            )
    mixed = next((path for path, own in gains.items() if len(own) > 1), None)
    return f"{mixed!r} is used with several scales" if mixed else None


def _without_gains(each: Rotation, leaves: Leaves) -> dict[str, jax.Array]:
    """Move scales of norms into the kernels that read them, and out of biases added to them."""
    new: dict[str, jax.Array] = {}
    for gain in each.gains:
        scale = _wide(leaves[gain.path])
        done: set[str] = set()
        for use in each.uses:
            path = use.param.path
            if use.gain is None or use.gain.path != gain.path or path in done or use.role == "gain":
                continue
            done.add(path)
            axes = [axis for member, axis in each.group.members if member == path]
            x = _wide(new[path] if path in new else leaves[path])
            # W^T (g n + b) = (g W)^T (n + b / g): kernels take the scale, biases lose it.
            for axis in axes:
                own = _placed(scale, len(gain.stack), x.ndim, axis).astype(x.dtype)
                x = x / own if use.role == "shift" else x * own
            new[path] = x.astype(leaves[path].dtype)
        new[gain.path] = jnp.ones_like(leaves[gain.path])
    return new


def _placed(scale: jax.Array, stacked: int, ndim: int, axis: int) -> jax.Array:
    """Return a scale ``[*stack, n]`` as it broadcasts along an axis of a stacked parameter."""
    shape = [1] * ndim
    shape[:stacked] = scale.shape[:stacked]
    shape[axis] = scale.shape[-1]
    return scale.reshape(shape)


def _wide(x: jax.Array) -> jax.Array:
    """Return an array in float32, or as it is if it is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
