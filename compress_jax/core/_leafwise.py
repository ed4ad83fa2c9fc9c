"""Lift functions over one array to a Compression over a tree."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from compress_jax.core.alike import map_leaves
from compress_jax.core.axes import Axes, known_axes, over_layers
from compress_jax.core.compression import (
    ByLeaf,
    Compression,
    CompressionState,
    LeafView,
    Pointwise,
    stamped,
)
from compress_jax.core.describe import call_of
from compress_jax.core.errors import NonFiniteError, ShapeError, StateError
from compress_jax.core.finite import where_finite
from compress_jax.core.packed import Sum, to_dense
from compress_jax.core.paths import flatten
from compress_jax.core.types import Key, Leaf, Params, PyTree, Step

P = ParamSpec("P")
R = TypeVar("R")

LeafState = tuple[PyTree, PyTree]
"""What a leaf adds to a `CompressionState`: ``(learned, fixed)``, None for nothing."""


def check_finite(path: str, x: Leaf) -> None:
    """Raise if a concrete array holds NaN or infinity; a traced one passes.

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
        f"leaf {path!r} of shape {jnp.shape(x)} has {bad} NaN or infinite entries; nothing "
        "computed from them would mean "
        "anything. Look at the training loss before this step, or restore an earlier checkpoint."
    )


@jax.jit
def _bad(x: jax.Array) -> jax.Array:
    return (~jnp.isfinite(x)).sum()


def why_not_float(path: str, x: Leaf) -> str | None:
    """Say why a leaf cannot be compressed by any algorithm here, or return None if it can."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        return f"{getattr(x, 'dtype', type(x).__name__)} is not a floating-point dtype"
    return "it has no entries" if 0 in x.shape else None


def fold_path(key: jax.Array | None, path: str) -> jax.Array | None:
    """Derive a leaf's key from its path: adding a leaf does not change the keys of others."""
    return fold_number(key, path_number(path))


def path_number(path: str) -> np.uint32:
    """Return the number by which a path is folded into a key."""
    # Python's own hash of a text differs from process to process.
    return np.uint32(zlib.crc32(path.encode()))


def fold_number(key: jax.Array | None, number: jax.Array | np.uint32) -> jax.Array | None:
    """Derive a leaf's key from the number of its path."""
    return None if key is None else jax.random.fold_in(key, number)


def leafwise(
    view: Callable[..., jax.Array],
    *,
    init: Callable[..., LeafState] | None = None,
    update: Callable[..., LeafState] | None = None,
    pack: Callable[..., Leaf] | None = None,
    why_not: Callable[..., str | None] | None = None,
    key: jax.Array | None = None,
    pointwise: Callable[..., Pointwise] | None = None,
    layout: bool = False,
    axis: int | Sequence[int] | None = None,
    call: str = "",
) -> Compression:
    """Lift functions over one array to a Compression over every floating-point leaf of a tree.

    A leaf that is known to hold a stack of layers (`cj.bind`) is compressed as each of them alone
    would be: ``init``, ``update`` and ``view`` are called on one layer, vectorized over all; state
    has the layers' axes in front.

    Args:
      view: ``(x, learned, fixed) -> x`` of the same shape and dtype.
      init: ``(x, key) -> (learned, fixed)``, one of them None if there is nothing to keep. Default:
        no state.
      update: ``(x, learned, fixed, *, step, grad, stats, key) -> (learned, fixed)``. Default: the
        state stays.
      pack: ``(x, learned, fixed) -> packed node or array``. Default: the view, dense.
      why_not: ``(path, x) -> reason`` to leave a leaf alone, or None to take it.
      key: typed PRNG key for ``init``; each leaf gets its own, derived from its path, and all
        layers of a stack the same.
      pointwise: ``(x, learned, fixed) -> Pointwise``, if the view goes entry by entry.
      layout: every function takes the `Axes` of the leaf as a last positional argument (``update``:
        as ``axes=``). Then ``view``, ``init`` and ``update`` are given one layer and its axes,
        ``pack``, ``pointwise`` and ``why_not`` the whole leaf, its state with layers in front, and
        its axes, the stack among them. Without it, a stack has neither packed form nor pointwise
        view, and `coverage` says so.
      axis: the axis or axes of outputs, whatever a trace says. Default: as bound, else the last.
      call: the method with its options, as text, for messages and to tell states apart. Default:
        made of the functions.

    Returns:
      The Compression. Outside ``jit`` it refuses leaves with NaN or infinity.

    Example:
      >>> import compress_jax as cj
      >>> halved = cj.leafwise(lambda x, learned, fixed: x / 2)
      >>> params = {"kernel": jnp.ones(2), "steps": jnp.array(7)}
      >>> halved.view(params, halved.init(params))["kernel"].tolist(), halved.skipped(params)
      ([0.5, 0.5], {'steps': 'int32 is not a floating-point dtype'})
    """
    functions = _Functions(view, init, update, pack, why_not, pointwise, layout)
    axis = axis if axis is None or isinstance(axis, int) else tuple(axis)
    call = call or call_of("", *functions[:6], key=key, axis=axis)
    return _Lifted(functions, key, axis, call).compression()


class _Functions(NamedTuple):
    """The functions over one array that `leafwise` was given."""

    view: Callable[..., jax.Array]
    init: Callable[..., LeafState] | None
    update: Callable[..., LeafState] | None
    pack: Callable[..., Leaf] | None
    why_not: Callable[..., str | None] | None
    pointwise: Callable[..., Pointwise] | None
    layout: bool

    def with_axes(self, fn: Callable[..., R], axes: Axes) -> Callable[..., R]:
        """Return a function with the axes as its last argument, if it takes them."""
        return (lambda *args: fn(*args, axes)) if self.layout else fn

    def per_layer(
        self, fn: Callable[..., R], axes: Axes, args: Sequence[str], out: str
    ) -> Callable[..., R]:
        """Return a function of one layer as one of the leaf."""
        return over_layers(self.with_axes(fn, axes.layer), axes, args, out)


class _Lifted(NamedTuple):
    """The functions over one array, lifted to a tree whose leaves' axes may be known."""

    fn: _Functions
    key: jax.Array | None
    axis: int | tuple[int, ...] | None
    call: str
    known: Mapping[str, Axes] | None = None

    def compression(self) -> Compression:
        made = Compression(
            self.init,
            ByLeaf(self.view, self.leaf_views),
            self.update,
            self.pack,
            self.skipped,
            self.pointwise,
            bind=self.bind,
            axes=self.axes,
        )
        return stamped(made, self.call, self.known)

    def bind(self, known: Mapping[str, Axes]) -> Compression:
        return self._replace(known=known).compression()

    def axes_of(self, path: str, x: Leaf) -> Axes:
        axes = known_axes(self.known, path, x)
        return axes if self.axis is None else _named(path, axes.with_outputs, self.axis)

    def axes(self, params: Params) -> dict[str, Axes]:
        return {path: self.axes_of(path, x) for path, x in self.chosen(params).items()}

    def chosen(self, params: Params) -> dict[str, Leaf]:
        """Return the leaves that are compressed."""
        leaves = flatten(params)[0]
        return {path: x for path, x in leaves.items() if self.why_skipped(path, x) is None}

    def why_skipped(self, path: str, x: Leaf) -> str | None:
        if why := why_not_float(path, x):
            return why
        if self.fn.why_not is None:
            return None
        if self.fn.layout:
            return self.fn.why_not(path, x, self.axes_of(path, x))
        return self.fn.why_not(path, x)

    def skipped(self, params: Params) -> dict[str, str]:
        reasons = {path: self.why_skipped(path, x) for path, x in flatten(params)[0].items()}
        return {path: reason for path, reason in reasons.items() if reason}

    def compressed(self, params: Params) -> dict[str, Leaf]:
        """Return the leaves that are compressed, dense, once they are found finite."""
        leaves = {path: to_dense(x) for path, x in self.chosen(params).items()}
        for path, x in leaves.items():
            check_finite(path, x)
        return leaves

    def init(self, params: Params) -> CompressionState:
        leaves = self.compressed(params)
        if self.fn.init is None:
            return CompressionState({}, {})
        inputs = {path: (x, path_number(path)) for path, x in leaves.items()}
        return _collect(map_leaves(self.init_leaf, inputs, self.axes(params)))

    def init_leaf(self, path: str, x: jax.Array, number: np.uint32) -> LeafState:
        fn = self.fn.init
        assert fn is not None
        # The layers of a stack share the leaf's key: each starts as it would alone.
        init = self.fn.per_layer(fn, self.axes_of(path, x), ("leaf", "shared"), "state")
        return _named(path, init, x, fold_number(self.key, number))

    def view(self, params: Params, state: CompressionState) -> Params:
        leaves, rebuild = flatten(params)
        new = {path: self.view_leaf(path, x, state) for path, x in self.compressed(params).items()}
        return rebuild({**leaves, **new})

    def view_leaf(self, path: str, x: jax.Array, state: CompressionState) -> jax.Array:
        return self.view_slice(path, self.axes_of(path, x), x, self.own(state, path))

    def view_slice(self, path: str, axes: Axes, x: jax.Array, own: LeafState) -> jax.Array:
        """Return the view of a leaf, or of a slice along the first axes of its stack."""
        axes = axes.without(len(axes.shape) - x.ndim)
        view = self.fn.per_layer(self.fn.view, axes, ("leaf", "state", "state"), "leaf")
        # A code in place of NaN would hide that training has diverged.
        return where_finite(x, _named(path, view, x, *own))

    def leaf_views(self, params: Params, state: CompressionState) -> dict[str, LeafView]:
        found = {}
        for path, x in self.compressed(params).items():
            axes = self.axes_of(path, x)

            def fn(
                x: jax.Array, own: LeafState, _: None, path: str = path, axes: Axes = axes
            ) -> jax.Array:
                return self.view_slice(path, axes, x, own)

            # A stack on other axes than the first is seen whole.
            leading = axes.stack == tuple(range(len(axes.stack)))
            stacked = len(axes.stack) if leading else 0
            found[path] = LeafView(fn, self.own(state, path), stacked=stacked)
        return found

    def pack(self, params: Params, state: CompressionState) -> Params:
        leaves, rebuild = flatten(params)
        new = {path: self.pack_leaf(path, x, state) for path, x in self.compressed(params).items()}
        # What is added to a leaf that is packed stands beside its packed form.
        new = {p: x.on(leaves[p]) if isinstance(x, Sum) else x for p, x in new.items()}
        return rebuild({**leaves, **new})

    def pack_leaf(self, path: str, x: jax.Array, state: CompressionState) -> Leaf:
        axes = self.axes_of(path, x)
        # `pack` is given the whole leaf, so without its axes it would take a stack for one layer.
        if self.fn.pack is None or (axes.stack and not self.fn.layout):
            return self.view_leaf(path, x, state)
        return _named(path, self.fn.with_axes(self.fn.pack, axes), x, *self.own(state, path))

    def update(
        self,
        params: Params,
        state: CompressionState,
        *,
        step: Step,
        grads: PyTree = None,
        stats: PyTree = None,
        key: Key = None,
    ) -> CompressionState:
        leaves = self.compressed(params)
        if self.fn.update is None:
            return state
        grads = {} if grads is None else flatten(grads)[0]
        stats = stats or {}
        # A gradient of another shape would broadcast into the statistics without an error.
        for path, x in leaves.items():
            if grads.get(path) is not None and jnp.shape(grads[path]) != x.shape:
                raise ShapeError(
                    f"leaf {path!r} has shape {x.shape}, its gradient {jnp.shape(grads[path])}"
                )
        inputs = {}
        for path, x in leaves.items():
            given = (grads.get(path), stats.get(path), path_number(path))
            inputs[path] = (x, *self.own(state, path), *given)
        return _collect(map_leaves(partial(self.update_leaf, step, key), inputs, self.axes(params)))

    def update_leaf(
        self,
        step: Step,
        key: Key,
        path: str,
        x: jax.Array,
        learned: PyTree,
        fixed: PyTree,
        grad: jax.Array | None,
        stats: PyTree,
        number: np.uint32,
    ) -> LeafState:
        axes = self.axes_of(path, x)
        fn = self.fn.update
        assert fn is not None

        # Positional arguments only: `vmap` maps keyword arguments over their first axis.
        def update(
            x: jax.Array,
            learned: PyTree,
            fixed: PyTree,
            step: Step,
            grad: jax.Array | None,
            stats: PyTree,
            key: Key,
        ) -> LeafState:
            extra = {"axes": axes.layer} if self.fn.layout else {}
            return fn(x, learned, fixed, step=step, grad=grad, stats=stats, key=key, **extra)

        key = fold_number(key, number)
        if key is not None and axes.stack:
            # Every layer draws its own randomness: keys [*layers].
            key = jax.random.split(key, tuple(axes.shape[a] for a in axes.stack))
        # What is None has no arrays, and `vmap` leaves it as it is.
        args = ("leaf", "state", "state", "shared", "leaf", "state", "state")
        over = over_layers(update, axes, args, "state")
        return _named(path, over, x, learned, fixed, step, grad, stats, key)

    def pointwise(self, params: Params, state: CompressionState) -> dict[str, Pointwise]:
        if self.fn.pointwise is None:
            return {}
        found = {}
        for path, x in self.compressed(params).items():
            axes = self.axes_of(path, x)
            # Operands of a stack must have the leaf's shape, for which its axes must be known.
            if self.fn.layout or not axes.stack:
                leaf = self.fn.with_axes(self.fn.pointwise, axes)
                found[path] = leaf(x, *self.own(state, path))
        return found

    def own(self, state: CompressionState, path: str) -> LeafState:
        """Return a leaf's ``(learned, fixed)``."""
        # Without an `init` no leaf has state; with one, each has an entry in one of the two.
        if self.fn.init is not None and path not in state.learned and path not in state.fixed:
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


def _named(path: str, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function of one array; if the array's shape is at fault, say which leaf it is."""
    try:
        return fn(*args, **kwargs)
    except ShapeError as error:
        raise ShapeError(f"leaf {path!r}: {error}") from error
