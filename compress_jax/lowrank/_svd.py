"""Truncated singular value decomposition with trained factors."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from compress_jax.core import Compression, LowRank, ShapeError, leafwise
from compress_jax.core.arguments import number, whole
from compress_jax.core.errors import ArgumentError
from compress_jax.core.paths import flatten

Factors = dict[str, jax.Array]
Rank = Callable[[jax.Array], int]


def svd(rank: int | None = None, *, energy: float | None = None) -> Compression:
    """Replace each kernel by ``left @ right``, the best approximation of its rank, and train the two factors.

    A kernel is taken as the matrix W ``[m, n]`` of all axes but the last against the last (for a convolution:
    ``[height * width * in, out]``). With ``W = U diag(s) V^T``, ``left = U sqrt(s)`` and ``right = sqrt(s) V^T`` keep the r
    largest singular values, so that ``||W - left @ right||_F**2 = sum_{i > r} s_i**2``, the least possible. From then on
    the view is their product: the factors are ``learned``, and the params, which it no longer depends on, get zero
    gradients.

    Leaves with one axis, and leaves whose float32 factors would not be smaller, are left alone; `skipped` says so.

    Args:
      rank: r, the same for every leaf. Give this or ``energy``.
      energy: the share of ``sum s_i**2`` to keep, above 0 and up to 1; each leaf gets the least r that keeps it. As the
        shape of the factors then depends on values, `init` needs concrete arrays: call it outside `jit`, and not in
        `between` under `jit`.

    Returns:
      The Compression: ``learned[path]`` is ``{"left": float32 [m, r], "right": float32 [r, n]}``; `pack` gives `LowRank`.

    Raises:
      ArgumentError: if not exactly one of ``rank`` and ``energy`` is given, or it is out of range.
      ShapeError: in `init`, if ``energy`` is given and the arrays are traced.

    Example:
      >>> params = {"kernel": jnp.outer(jnp.arange(4.0), jnp.ones(6))}
      >>> thin = svd(energy=0.99)
      >>> state = thin.init(params)
      >>> {name: factor.shape for name, factor in state.learned["kernel"].items()}
      {'left': (4, 1), 'right': (1, 6)}
      >>> thin.view(params, state)["kernel"][3].round(4).tolist()
      [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]

    References:
      Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.
      Denton et al., "Exploiting Linear Structure Within Convolutional Networks for Efficient Evaluation", NeurIPS 2014.
    """
    if (rank is None) == (energy is None):
        raise ArgumentError(f"give exactly one of rank and energy, got rank={rank} and energy={energy}")
    if rank is not None:
        return _truncated(rank)
    assert energy is not None
    return _by_energy(energy)


def _truncated(rank: int) -> Compression:
    """Return the Compression that keeps a given rank."""
    rank = whole("rank", rank)
    if rank < 1:
        raise ArgumentError(f"rank must be at least 1, got {rank}")

    def why_not(path: str, x: jax.Array) -> str | None:
        return _too_thin(x) or _no_gain(x, rank)

    def init(x: jax.Array, key: None) -> tuple[Factors, None]:
        return _factors(x, rank), None

    return leafwise(_view, init=init, pack=_pack, why_not=why_not)


def _by_energy(energy: float) -> Compression:
    """Return the Compression that keeps a share of the energy; where that does not pay, a leaf has no factors."""
    energy = number("energy", energy)
    if not 0 < energy <= 1:
        raise ArgumentError(f"energy is the share of the squared singular values to keep, above 0 and up to 1; got {energy}")

    def init(x: jax.Array, key: None) -> tuple[Factors | None, dict[str, Any]]:
        rank = _rank_for(x, energy)
        return (None if _no_gain(x, rank) else _factors(x, rank)), {}

    thin = leafwise(_view, init=init, pack=_pack, why_not=lambda path, x: _too_thin(x))

    def skipped(params: Any) -> dict[str, str]:
        reasons = thin.skipped(params)
        matrices = {path: x for path, x in flatten(params)[0].items() if path not in reasons}
        found = {path: _no_gain(x, _rank_for(x, energy)) for path, x in matrices.items()}
        return {**reasons, **{path: why for path, why in found.items() if why}}

    return thin._replace(skipped=skipped)


def _view(x: jax.Array, factors: Factors | None, fixed: Any) -> jax.Array:
    return x if factors is None else _pack(x, factors, fixed).unpack()


def _pack(x: jax.Array, factors: Factors | None, fixed: Any) -> Any:
    return x if factors is None else LowRank(factors["left"], factors["right"], x.shape, x.dtype)


def _matrix(x: jax.Array) -> jax.Array:
    """Return an array as a float32 matrix: all axes but the last, against the last."""
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


def _factors(x: jax.Array, rank: int) -> Factors:
    """Return the balanced factors of the best approximation of a rank."""
    u, s, v = jnp.linalg.svd(_matrix(x), full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return {"left": u[:, :rank] * root[None, :], "right": root[:, None] * v[:rank]}


def _rank_for(x: jax.Array, energy: float) -> int:
    """Return the least rank whose squared singular values are that share of all, at least 1."""
    if isinstance(x, Tracer):
        raise ShapeError(
            "svd(energy=...) chooses the factors' shapes by the values of the weights, so its `init` cannot run under jit; "
            "call it outside, or give svd(rank=...)"
        )
    s = jnp.linalg.svd(_matrix(x), compute_uv=False)
    squares = (s / jnp.maximum(s[0], jnp.finfo(jnp.float32).tiny)) ** 2
    left_out = jnp.append(jnp.cumsum(squares[::-1])[::-1], 0.0)  # from the smallest: no rounding at energy 1
    return max(1, int((left_out > (1 - energy) * squares.sum()).sum()))


def _too_thin(x: jax.Array) -> str | None:
    return f"it has {x.ndim} axes and a factorisation needs 2" if x.ndim < 2 else None


def _no_gain(x: jax.Array, rank: int) -> str | None:
    """Say so if the float32 factors would not be smaller than the array."""
    rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
    factors, dense = 4 * rank * (rows + columns), x.size * x.dtype.itemsize
    if factors < dense:
        return None
    return f"factors of rank {rank} take {factors:,} bytes, the {rows}x{columns} array itself {dense:,}"
