"""From functions over one array to a Compression over a tree, so that an algorithm's file holds only its mathematics."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from compress_jax.core.compression import Compression, CompressionState, Params, Pointwise
from compress_jax.core.errors import NonFiniteError, ShapeError, StateError
from compress_jax.core.finite import where_finite
from compress_jax.core.paths import flatten

LeafState = tuple[Any, Any]


def check_finite(path: str, x: Any) -> None:
    """Raise if a concrete array holds NaN or infinity; say nothing about traced ones, whose values are not known yet.

    Args:
      path: the name of the leaf, for the message.
      x: the array.

    Raises:
      NonFiniteError: naming the path and how many entries are bad.

    Example:
      >>> check_finite("dense/kernel", jnp.ones(3))
    """
    if isinstance(x, Tracer):
        return
    with jax.ensure_compile_time_eval():  # a concrete array may be closed over by a traced branch
        bad = int(_bad(x))
    if not bad:
        return
    raise NonFiniteError(
        f"leaf {path!r} of shape {jnp.shape(x)} has {bad} NaN or infinite entries; nothing computed from them would mean "
        "anything. Look at the training loss before this step, or restore an earlier checkpoint."
    )


@jax.jit
def _bad(x: jax.Array) -> jax.Array:
    return (~jnp.isfinite(x)).sum()


def why_not_float(path: str, x: Any) -> str | None:
    """Say why a leaf cannot be compressed by any algorithm here, or return None if it can."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        return f"{getattr(x, 'dtype', type(x).__name__)} is not a floating-point dtype"
    return "it has no entries" if x.size == 0 else None


def fold_path(key: jax.Array | None, path: str) -> jax.Array | None:
    """Derive a leaf's own PRNG key from its name, so that adding a leaf does not change the others' randomness."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(path.encode()))


def leafwise(
    view: Callable[..., Any],
    *,
    init: Callable[..., LeafState] | None = None,
    update: Callable[..., LeafState] | None = None,
    pack: Callable[..., Any] | None = None,
    why_not: Callable[[str, Any], str | None] | None = None,
    key: jax.Array | None = None,
    pointwise: Callable[..., Pointwise] | None = None,
) -> Compression:
    """Lift functions over one array to a Compression over every floating-point leaf of a tree.

    Args:
      view: ``(x, learned, fixed) -> x`` of the same shape and dtype.
      init: ``(x, key) -> (learned, fixed)``, one of them None if there is nothing to keep. Default: no state.
      update: ``(x, learned, fixed, *, step, grad, stats, key) -> (learned, fixed)``. Default: the state stays.
      pack: ``(x, learned, fixed) -> packed node or array``. Default: the view, dense.
      why_not: ``(path, x) -> reason`` to leave a leaf alone, or None to take it.
      key: typed PRNG key for ``init``; each leaf gets its own, derived from its path.
      pointwise: ``(x, learned, fixed) -> Pointwise``, if the view goes entry by entry.

    Returns:
      The Compression. Outside ``jit`` it refuses leaves with NaN or infinity.

    Example:
      >>> halved = leafwise(lambda x, learned, fixed: x / 2)
      >>> params = {"kernel": jnp.ones(2), "steps": jnp.array(7)}
      >>> halved.view(params, halved.init(params))["kernel"].tolist(), halved.skipped(params)
      ([0.5, 0.5], {'steps': 'int32 is not a floating-point dtype'})
    """
    lifted = _Lifted(view, init, update, pack or view, why_not, key, pointwise)
    return Compression(lifted.start, lifted.seen, lifted.follow, lifted.packed, lifted.skipped, lifted.pieces)


class _Lifted(NamedTuple):
    """The functions over one array that `leafwise` was given, and what they become over a tree."""

    view: Callable[..., Any]
    init: Callable[..., LeafState] | None
    update: Callable[..., LeafState] | None
    pack: Callable[..., Any]
    why_not: Callable[[str, Any], str | None] | None
    key: jax.Array | None
    pointwise: Callable[..., Pointwise] | None

    def reason(self, path: str, x: Any) -> str | None:
        return why_not_float(path, x) or (self.why_not(path, x) if self.why_not else None)

    def skipped(self, params: Params) -> dict[str, str]:
        return {path: why for path, x in flatten(params)[0].items() if (why := self.reason(path, x))}

    def taken(self, params: Params) -> dict[str, Any]:
        leaves = {path: x for path, x in flatten(params)[0].items() if self.reason(path, x) is None}
        for path, x in leaves.items():
            check_finite(path, x)
        return leaves

    def start(self, params: Params) -> CompressionState:
        leaves = self.taken(params)
        if self.init is None:
            return CompressionState({}, {})
        return _collect({path: _named(path, self.init, x, fold_path(self.key, path)) for path, x in leaves.items()})

    def seen(self, params: Params, state: CompressionState) -> Params:
        return self.replaced(params, lambda x, *own: where_finite(x, self.view(x, *own)), state)

    def packed(self, params: Params, state: CompressionState) -> Params:
        return self.replaced(params, self.pack, state)

    def replaced(self, params: Params, fn: Callable[..., Any], state: CompressionState) -> Params:
        leaves, rebuild = flatten(params)
        new = {path: _named(path, fn, x, *self.own(state, path)) for path, x in self.taken(params).items()}
        return rebuild({**leaves, **new})

    def follow(
        self, params: Params, state: CompressionState, *, step: Any, grads: Any = None, stats: Any = None, key: Any = None
    ) -> CompressionState:
        leaves = self.taken(params)
        if self.update is None:
            return state
        grads, stats = flatten(grads)[0] if grads is not None else {}, stats or {}
        for path, x in leaves.items():
            if grads.get(path) is not None and jnp.shape(grads[path]) != x.shape:
                raise ShapeError(f"leaf {path!r} has shape {x.shape}, its gradient {jnp.shape(grads[path])}")
        states = {}
        for path, x in leaves.items():
            inputs = {"step": step, "grad": grads.get(path), "stats": stats.get(path), "key": fold_path(key, path)}
            states[path] = _named(path, self.update, x, *self.own(state, path), **inputs)
        return _collect(states)

    def pieces(self, params: Params, state: CompressionState) -> dict[str, Pointwise]:
        if self.pointwise is None:
            return {}
        return {path: self.pointwise(x, *self.own(state, path)) for path, x in self.taken(params).items()}

    def own(self, state: CompressionState, path: str) -> LeafState:
        """Return a leaf's ``(learned, fixed)``."""
        if self.init is not None and path not in state.learned and path not in state.fixed:
            known = ", ".join({**state.fixed, **state.learned}) or "none"
            raise StateError(
                f"the compression state has nothing for leaf {path!r} (it has: {known}); "
                "was it made by `init` of this compression, on params with these names?"
            )
        return state.learned.get(path), state.fixed.get(path)


def _collect(states: dict[str, LeafState]) -> CompressionState:
    """Turn ``{path: (learned, fixed)}`` into a CompressionState without the Nones."""
    return CompressionState(
        learned={path: learned for path, (learned, _) in states.items() if learned is not None},
        fixed={path: fixed for path, (_, fixed) in states.items() if fixed is not None},
    )


def _named(path: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of one array; if the array's shape is at fault, say which leaf it is."""
    try:
        return fn(*args, **kwargs)
    except ShapeError as error:
        raise ShapeError(f"leaf {path!r}: {error}") from error
