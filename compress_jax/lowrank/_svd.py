"""Truncated singular value decomposition with trained factors.

With a given rank, `svd` is leafwise. With a share of the energy it is a Compression of its own
(`_ByEnergy`), as the shapes of the factors then depend on the values of the weights.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from compress_jax.core import (
    ArgumentError,
    Compression,
    CompressionState,
    LowRank,
    ShapeError,
    leafwise,
    unpack,
)
from compress_jax.core._leafwise import check_finite, why_not_float
from compress_jax.core.arguments import number, whole
from compress_jax.core.axes import Axes, known_axes, over_layers
from compress_jax.core.compression import stamped
from compress_jax.core.describe import call_of
from compress_jax.core.finite import where_finite
from compress_jax.core.paths import flatten
from compress_jax.core.types import Params, PyTree
from compress_jax.lowrank._factors import Factors, matrix, product, sides, too_thin


def svd(rank: int | None = None, *, energy: float | None = None) -> Compression:
    """Replace each kernel by ``left @ right``, its best approximation of rank r, and train both.

    A kernel is taken as the matrix W ``[m, n]`` of its inputs against its outputs, which are on the
    last axis unless a trace says otherwise (for a convolution: ``[height * width * in, out]``);
    each layer of a stack as a matrix of its own. With ``W = U diag(s) V^T``, ``left = U sqrt(s)``
    and ``right = sqrt(s) V^T`` keep the r largest singular values, so that
    ``||W - left @ right||_F**2 = sum_{i > r} s_i**2``, the least possible. From then on the view is
    their product: the factors are ``learned``, and the params, which it no longer depends on, get
    zero gradients.

    Leaves with one axis, and leaves whose float32 factors would not be smaller, are left alone;
    `skipped` says so.

    Args:
      rank: r, the same for every leaf. Give this or ``energy``.
      energy: the share of ``sum s_i**2`` to keep, above 0 and up to 1; each leaf gets the least r
        that keeps it. As the shape of the factors then depends on values, `init` needs concrete
        arrays: call it outside `jit`, and not in `between` under `jit`.

    Returns:
      The Compression: ``learned[path]`` is ``{"left": float32 [m, r], "right": float32 [r, n]}``;
      `pack` gives `LowRank`.

    Raises:
      ArgumentError: if not exactly one of ``rank`` and ``energy`` is given, or it is out of range.
      ShapeError: in `init`, if ``energy`` is given and the arrays are traced.

    Example:
      >>> import compress_jax as cj
      >>> params = {"kernel": jnp.outer(jnp.arange(4.0), jnp.ones(6))}
      >>> thin = cj.lowrank.svd(energy=0.99)
      >>> state = thin.init(params)
      >>> {name: factor.shape for name, factor in state.learned["kernel"].items()}
      {'left': (4, 1), 'right': (1, 6)}
      >>> thin.view(params, state)["kernel"][3].round(4).tolist()
      [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]

    References:
      Eckart and Young, "The approximation of one matrix by another of lower rank", 1936. Denton et
      al., "Exploiting Linear Structure Within Convolutional Networks for Efficient Evaluation",
      NeurIPS 2014.
    """
    if (rank is None) == (energy is None):
        raise ArgumentError(
            f"give exactly one of rank and energy, got rank={rank} and energy={energy}"
        )
    if rank is not None:
        return _truncated(rank)
    assert energy is not None
    return _by_energy(energy)


def _truncated(rank: int) -> Compression:
    """Return the Compression that keeps a given rank."""
    rank = whole("rank", rank)
    if rank < 1:
        raise ArgumentError(f"rank must be at least 1, got {rank}")

    def why_not(path: str, x: jax.Array, axes: Axes) -> str | None:
        return too_thin(axes.layer) or _no_gain(x, axes.layer, rank)

    def init(x: jax.Array, key: None, axes: Axes) -> tuple[Factors, None]:
        return _factors(matrix(x, axes), rank), None

    call = call_of("svd", rank=rank)
    return leafwise(_view, init=init, pack=_pack, why_not=why_not, layout=True, call=call)


def _by_energy(energy: float) -> Compression:
    """Return the Compression that keeps a share of the energy.

    A leaf whose factors would not be smaller has none.
    """
    energy = number("energy", energy)
    if not 0 < energy <= 1:
        raise ArgumentError(
            "energy is the share of the squared singular values to keep, above 0 and up to 1; "
            f"got {energy}"
        )
    return _ByEnergy(energy).compression()


class _ByEnergy(NamedTuple):
    """The Compression of ``svd(energy=...)``, whose ranks depend on the values of the weights.

    The layers of a stack may have different ranks; their factors have the shape of the largest.
    """

    energy: float
    known: Mapping[str, Axes] | None = None

    def compression(self) -> Compression:
        made = Compression(
            self.init,
            self.view,
            self.update,
            self.pack,
            self.skipped,
            bind=self.bind,
            axes=self.axes,
        )
        return stamped(made, call_of("svd", energy=self.energy), self.known)

    def bind(self, known: Mapping[str, Axes]) -> Compression:
        return self._replace(known=known).compression()

    def axes(self, params: Params) -> dict[str, Axes]:
        floats = {path: x for path, x in flatten(params)[0].items() if not why_not_float(path, x)}
        found = {path: known_axes(self.known, path, x) for path, x in floats.items()}
        return {path: axes for path, axes in found.items() if not too_thin(axes.layer)}

    def ranks(self, params: Params) -> dict[str, tuple[int, ...]]:
        """Return the least rank of every layer of every matrix, found by one decomposition each."""
        leaves = flatten(params)[0]
        for path in self.axes(params):
            check_finite(path, leaves[path])
        return {
            path: _ranks_for(leaves[path], axes, self.energy)
            for path, axes in self.axes(params).items()
        }

    def init(self, params: Params) -> CompressionState:
        leaves = flatten(params)[0]
        axes = self.axes(params)
        learned: dict[str, Factors] = {}
        # Layers of different ranks share one array, so the largest rank decides.
        for path, ranks in self.ranks(params).items():
            if _no_gain(leaves[path], axes[path].layer, max(ranks)) is None:
                learned[path] = _padded_factors(leaves[path], axes[path], ranks)
        return CompressionState(learned, {})

    def update(self, params: Params, state: CompressionState, **_: PyTree) -> CompressionState:
        leaves = flatten(params)[0]
        for path in self.axes(params):
            check_finite(path, leaves[path])
        return state

    def view(self, params: Params, state: CompressionState) -> Params:
        dense, rebuild = flatten(unpack(self.pack(params, state)))
        stored = flatten(params)[0]
        # A leaf without factors is as it was; NaN in a factored one must not be hidden by them.
        factored = {path: where_finite(stored[path], dense[path]) for path in state.learned}
        return rebuild({**dense, **factored})

    def pack(self, params: Params, state: CompressionState) -> Params:
        leaves, rebuild = flatten(params)
        axes = self.axes(params)
        for path in axes:
            check_finite(path, leaves[path])
        packed = {
            path: _pack(leaves[path], own, {}, axes[path]) for path, own in state.learned.items()
        }
        return rebuild({**leaves, **packed})

    def skipped(self, params: Params) -> dict[str, str]:
        leaves = flatten(params)[0]
        axes = self.axes(params)
        reasons: dict[str, str | None] = {}
        for path, x in leaves.items():
            not_float = why_not_float(path, x)
            reasons[path] = not_float or too_thin(known_axes(self.known, path, x).layer)
        for path, ranks in self.ranks(params).items():
            reasons[path] = _no_gain(leaves[path], axes[path].layer, max(ranks))
        return {path: why for path, why in reasons.items() if why}


def _padded_factors(x: jax.Array, axes: Axes, ranks: Sequence[int]) -> Factors:
    """Return the factors of every layer, padded with zeros from its own rank to the largest.

    The gradients of that padding are zero: each factor's gradient is a product with the other's
    zeros.
    """
    largest = max(ranks)

    def factors(x: jax.Array, rank: jax.Array) -> Factors:
        both = _factors(matrix(x, axes.layer), largest)
        in_rank = jnp.arange(largest) < rank  # [largest]
        return {
            "left": jnp.where(in_rank[None, :], both["left"], 0),  # [m, largest]
            "right": jnp.where(in_rank[:, None], both["right"], 0),  # [largest, n]
        }

    own = jnp.asarray(ranks, jnp.int32).reshape(tuple(axes.shape[a] for a in axes.stack))
    return over_layers(factors, axes, ("leaf", "state"), "state")(x, own)


def _view(x: jax.Array, factors: Factors, fixed: PyTree, axes: Axes) -> jax.Array:
    return _pack(x, factors, fixed, axes).unpack()


def _pack(x: jax.Array, factors: Factors, fixed: PyTree, axes: Axes) -> LowRank:
    return product(factors, axes, x.dtype)


def _factors(w: jax.Array, rank: int) -> Factors:
    """Return the factors ``U sqrt(s)`` and ``sqrt(s) V^T`` of the best approximation of a rank."""
    u, s, v = jnp.linalg.svd(w, full_matrices=False)  # [m, k], [k], [k, n]
    root = jnp.sqrt(s[:rank])
    return {"left": u[:, :rank] * root[None, :], "right": root[:, None] * v[:rank]}


def _ranks_for(x: jax.Array, axes: Axes, energy: float) -> tuple[int, ...]:
    """Return the least rank of each layer that keeps that share of the squared singular values."""
    if isinstance(x, Tracer):
        raise ShapeError(
            "svd(energy=...) chooses the factors' shapes by the values of the weights, so its "
            "`init` cannot run under jit; call it outside, or give svd(rank=...)"
        )

    def rank(x: jax.Array) -> jax.Array:
        s = jnp.linalg.svd(matrix(x, axes.layer), compute_uv=False)
        # Relative to the largest singular value: squares neither overflow nor underflow.
        squares = (s / jnp.maximum(s[0], jnp.finfo(jnp.float32).tiny)) ** 2
        # Entry r is the energy lost at rank r, summed from the smallest: exactly 0 at energy 1.
        left_out = jnp.append(jnp.cumsum(squares[::-1])[::-1], 0.0)  # [k + 1]
        return jnp.maximum(1, (left_out > (1 - energy) * squares.sum()).sum())

    ranks = over_layers(rank, axes, ("leaf",), "state")(x)
    return tuple(int(r) for r in ranks.ravel())


def _no_gain(x: jax.Array, axes: Axes, rank: int) -> str | None:
    """Return why a layer has no factors, or None if they are smaller than the layer."""
    rows, columns = sides(axes)
    factors = 4 * rank * (rows + columns)  # float32
    dense = rows * columns * x.dtype.itemsize
    if factors < dense:
        return None
    return (
        f"factors of rank {rank} take {factors:,} bytes, "
        f"the {rows}x{columns} array itself {dense:,}"
    )
