"""A compression is a differentiable view of named arrays, plus the state that defines it."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from compress_jax.core.axes import Axes
from compress_jax.core.errors import ArgumentError, StateError
from compress_jax.core.paths import flatten
from compress_jax.core.stamp import seal, unseal
from compress_jax.core.types import Key, PyTree, Schedule, Step
from compress_jax.core.types import Params as Params


class CompressionState(NamedTuple):
    """What defines a view, besides the params themselves.

    A state knows which compression made it and for which leaves (`core.stamp`); another one refuses
    it by name.

    Attributes:
      learned: ``{path: float arrays}`` an optimizer trains beside the params: centroids, factors,
        step sizes.
      fixed: ``{path: arrays}`` that are never differentiated: masks, codes, scales.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> signs = lambda x, key: (None, jnp.sign(x))
      >>> c = cj.leafwise(lambda x, learned, fixed: fixed, init=signs)
      >>> state = c.init({"kernel": jnp.array([1.5, -3.0])})
      >>> state.learned, state.fixed["kernel"].tolist()
      ({}, [1.0, -1.0])
    """

    learned: dict[str, PyTree]
    fixed: dict[str, PyTree]


class Pointwise(NamedTuple):
    """The view of one array, entry by entry: a function of the entry and of operands beside it.

    Attributes:
      fn: ``(x, *operands) -> x`` for entries of any shape, the operands sliced likewise; hashable,
        and the same object for arrays that are rounded in the same way.
      operands: arrays in the shape of the whole array: the scale of each entry, its mask.
    """

    fn: Callable[..., jax.Array]
    operands: tuple[jax.Array, ...]


ViewFn = Callable[[jax.Array, PyTree, PyTree], jax.Array]
"""``(x, layers, shared) -> x``; see `LeafView`."""


class LeafView(NamedTuple):
    """The view of one leaf by itself, and of each slice along its stack axes.

    Attributes:
      fn: ``(x, layers, shared) -> x`` for the whole leaf, or for a slice of it along its first axes
        with the same slice of every array of ``layers``.
      layers: a tree of arrays that have the stack axes in front.
      shared: a tree of arrays that every slice needs whole.
      stacked: how many of the leaf's first axes may be sliced away.

    Example:
      >>> import compress_jax as cj
      >>> import jax.numpy as jnp
      >>> half = cj.core.LeafView(lambda x, layers, shared: x * layers, jnp.full(3, 0.5), stacked=1)
      >>> half.fn(jnp.float32(4.0), half.layers[0], half.shared).tolist()
      2.0
    """

    fn: ViewFn
    layers: PyTree
    shared: PyTree = None
    stacked: int = 0


LeafViews = Callable[[Params, CompressionState], dict[str, LeafView]]
"""``(params, state) -> {path: LeafView}``; it uses the shapes of params, not their values."""


@dataclass(frozen=True)
class ByLeaf:
    """The `view` of a compression that sees each leaf by itself, as most do.

    A model that runs its layers in a loop can then take the view of a layer inside it, and the
    whole stack is never seen at once.

    Attributes:
      view: as in `Compression`.
      leaves: the views of the leaves that change.

    Example:
      >>> import compress_jax as cj
      >>> isinstance(cj.prune.magnitude(0.5).view, cj.core.ByLeaf)
      True
    """

    view: Callable[[Params, CompressionState], Params]
    leaves: LeafViews

    def __call__(self, params: Params, state: CompressionState) -> Params:
        """View."""
        return self.view(params, state)


def leaf_views(
    compression: "Compression", params: Params, state: CompressionState
) -> dict[str, LeafView]:
    """Return the views of single leaves that make up the view of a compression.

    A view that was replaced after the compression was made has none: it is taken as it is.

    Args:
      compression: any.
      params: a tree of arrays or shapes.
      state: of the compression.

    Returns:
      The views by path; leaves without one are seen only together with others, or not changed.

    Example:
      >>> import compress_jax as cj
      >>> import jax.numpy as jnp
      >>> half = cj.leafwise(lambda x, learned, fixed: x / 2)
      >>> params = {"w": jnp.array([2.0, 4.0])}
      >>> found = cj.core.leaf_views(half, params, half.init(params))
      >>> found["w"].fn(params["w"], found["w"].layers, found["w"].shared).tolist()
      [1.0, 2.0]
    """
    view = compression.view
    return view.leaves(params, state) if isinstance(view, ByLeaf) else {}


@dataclass(frozen=True)
class Scheduled:
    """The `update` of a compression, with the schedules it follows.

    Attributes:
      update: as in `Compression`.
      schedules: functions of the step.
      at_once: the same update without thinning of its own: it acts at every step. None if
        ``update`` does so itself.
    """

    update: Callable[..., CompressionState]
    schedules: tuple[Schedule, ...] = ()
    at_once: Callable[..., CompressionState] | None = None

    def __call__(
        self, params: Params, state: CompressionState, **inputs: PyTree
    ) -> CompressionState:
        """Update."""
        return self.update(params, state, **inputs)


def _nothing(*_: object) -> dict[str, Any]:
    return {}


class Compression(NamedTuple):
    """Four pure functions over a tree of arrays; every method in this library is one of these.

    In a training loop: ``state = c.init(params)``; in the loss,
    ``model.apply(c.view(params, state), x)``; after the optimizer,
    ``state = c.update(params, state, step=step)``; at the end ``packed = c.pack(params, state)``,
    and ``unpack(packed)`` equals ``c.view(params, state)`` bit for bit: what was trained is what is
    shipped.

    A bare algorithm acts on every floating-point leaf it is given; `at` and `rules` choose leaves
    by name.

    Attributes:
      init: ``(params) -> state``.
      view: ``(params, state) -> params``; same structure, shapes, dtypes and shardings. What the
        forward pass sees.
      update: ``(params, state, *, step, grads=None, stats=None, key=None) -> state``. Pure;
        ``grads`` has the structure of ``params``, ``stats`` is ``{path: statistics}``, ``key`` a
        typed PRNG key. Most algorithms need none of them.
      pack: ``(params, state) -> params`` whose compressed leaves are packed nodes (`Quantized`,
        `Sparse`, ...). Offline: takes concrete arrays.
      skipped: ``(params) -> {path: reason}``, the leaves it leaves alone. What is not compressed is
        never a secret.
      pointwise: ``(params, state) -> {path: Pointwise}`` of the leaves whose view, the state given,
        goes entry by entry (grids, masks): what the post-training solvers round with. Empty for
        anything else.
      call: the method with its options, as text: ``"uniform(bits=4, ...)"``.
      bind: ``({path: Axes}) -> Compression``, the same one for leaves whose axes are known; see
        `cj.bind`. None if the compression cannot be told.
      axes: ``(params) -> {path: Axes}``, the axes it takes the leaves it compresses to have.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> c = cj.leafwise(lambda x, learned, fixed: jnp.round(x))
      >>> params = {"kernel": jnp.array([1.2, -2.9])}
      >>> state = c.update(params, c.init(params), step=1)
      >>> c.view(params, state)["kernel"].tolist()
      [1.0, -3.0]
      >>> cj.unpack(c.pack(params, state))["kernel"].tolist()
      [1.0, -3.0]
    """

    init: Callable[[Params], CompressionState]
    view: Callable[[Params, CompressionState], Params]
    update: Callable[..., CompressionState]
    pack: Callable[[Params, CompressionState], Params]
    skipped: Callable[[Params], dict[str, str]] = _nothing
    pointwise: Callable[[Params, CompressionState], dict[str, Pointwise]] = _nothing
    call: str = ""
    bind: "Callable[[Mapping[str, Axes]], Compression] | None" = None
    axes: Callable[[Params], dict[str, Axes]] = _nothing


def stamped(
    compression: Compression, call: str, known: Mapping[str, Axes] | None = None
) -> Compression:
    """Return a compression whose states are stamped, and which refuses the states of others.

    Args:
      compression: any; its functions are wrapped.
      call: the method with its options, as text.
      known: the axes it is bound to, if any.

    Returns:
      The Compression.

    Example:
      >>> import compress_jax as cj
      >>> import jax.numpy as jnp
      >>> one, other = (stamped(cj.identity(), name) for name in ("one", "other"))
      >>> other.view({"w": jnp.ones(2)}, one.init({"w": jnp.ones(2)}))
      Traceback (most recent call last):
      ...
      compress_jax.core.errors.StateError: this state was made by
        one
      and is used by
        other
      Make a state with this compression's own `init`.
    """
    axes = None if known is None else dict(known)
    # Only where a schedule is followed does it matter at which step a state is made.
    takes_step = "step" in inspect.signature(compression.init).parameters

    def init(params: Params, *, step: Step = 0) -> CompressionState:
        inputs = {"step": step} if takes_step else {}
        return seal(call, axes, params, compression.init(params, **inputs))

    def view(params: Params, state: CompressionState) -> Params:
        return _alike(params, compression.view(params, unseal(call, axes, params, state)))

    def sealed(update: Callable[..., CompressionState]) -> Callable[..., CompressionState]:
        def sealed_update(
            params: Params,
            state: CompressionState,
            *,
            step: Step,
            grads: PyTree = None,
            stats: PyTree = None,
            key: Key = None,
        ) -> CompressionState:
            own = unseal(call, axes, params, state)
            # An update that does nothing returns its argument, whose stamp still holds.
            new = update(params, own, step=step, grads=grads, stats=stats, key=key)
            return state if new is own else seal(call, axes, params, new)

        sealed_update.__qualname__ = "update"  # what a TypeError of the call names
        return sealed_update

    def leaves(params: Params, state: CompressionState) -> dict[str, LeafView]:
        return leaf_views(compression, params, unseal(call, axes, params, state))

    update: Callable[..., CompressionState] = compression.update
    if isinstance(update, Scheduled):
        update = Scheduled(
            sealed(update.update), update.schedules, update.at_once and sealed(update.at_once)
        )
    else:
        update = sealed(update)

    def pack(params: Params, state: CompressionState) -> Params:
        return _alike(params, compression.pack(params, unseal(call, axes, params, state)))

    def pointwise(params: Params, state: CompressionState) -> dict[str, Pointwise]:
        return compression.pointwise(params, unseal(call, axes, params, state))

    return compression._replace(
        init=init,
        view=ByLeaf(view, leaves) if isinstance(compression.view, ByLeaf) else view,
        update=update,
        pack=pack,
        pointwise=pointwise,
        call=call,
    )


def _alike(params: Params, seen: Params) -> Params:
    """Check that a view has the shapes of its params: a state without a stamp may be another's."""
    if seen is params:
        return seen
    leaves = flatten(seen)[0]
    for path, x in flatten(params)[0].items():
        if not hasattr(x, "shape"):
            continue
        wanted, found = tuple(x.shape), tuple(leaves[path].shape)
        if wanted != found:
            raise StateError(
                f"leaf {path!r} of shape {wanted} is seen as {found}: the state is of other params"
            )
    return seen


def bound(compression: Compression, known: Mapping[str, Axes]) -> Compression:
    """Return a compression bound to the axes of its leaves; one without `bind` stays as it is.

    Args:
      compression: any.
      known: the axes by path.

    Returns:
      The Compression.

    Raises:
      ArgumentError: if one of its functions was replaced after it was made, which binding would
        undo.
    """
    if compression.bind is None:
        return compression
    # Binding makes a compression anew from its options: a function replaced since would be lost.
    again = compression.bind({})
    if any(_code(a) is not _code(b) for a, b in zip(compression[:6], again[:6], strict=True)):
        raise ArgumentError(
            f"a function of {compression.call or 'this compression'} was replaced after it was "
            "made, and binding makes it "
            "anew; bind first and replace then, or give the new one a `bind` of its own"
        )
    return compression.bind(known)


def _code(fn: object) -> object:
    """Return the code of a function, by which a replaced function is recognized."""
    # Functions are made anew with each compression; their code is not.
    fn = fn.update if isinstance(fn, Scheduled) else fn.view if isinstance(fn, ByLeaf) else fn
    return getattr(getattr(fn, "__func__", fn), "__code__", fn)


def identity() -> Compression:
    """Return the compression that changes nothing: neutral in `chain`, a baseline in experiments.

    Returns:
      A Compression with empty state whose view is the params.

    Example:
      >>> import compress_jax as cj
      >>> none = cj.identity()
      >>> none.view({"kernel": 1.0}, none.init({"kernel": 1.0}))
      {'kernel': 1.0}
    """

    def update(params: Params, state: CompressionState, **_: PyTree) -> CompressionState:
        return _empty(state)

    def keep(params: Params, state: CompressionState) -> Params:
        _empty(state)
        return params

    def skipped(params: Params) -> dict[str, str]:
        return dict.fromkeys(flatten(params)[0], "no compression is applied")

    nothing = Compression(lambda params: CompressionState({}, {}), keep, update, keep, skipped)
    return stamped(nothing, "identity()")


def _empty(state: CompressionState) -> CompressionState:
    if state.learned or state.fixed:
        raise StateError(
            "the identity has no state, and this one holds "
            f"{', '.join({**state.learned, **state.fixed})}"
        )
    return state


def joined(states: Sequence[CompressionState]) -> CompressionState:
    """Return the states of several compressions as one: theirs under ``"0"``, ``"1"``, ..."""
    return CompressionState(
        learned={str(i): s.learned for i, s in enumerate(states)},
        fixed={str(i): s.fixed for i, s in enumerate(states)},
    )


def parts_of(state: CompressionState, n: int) -> list[CompressionState]:
    """Return the states that `joined` put together; one of another making is refused."""
    keys = [str(i) for i in range(n)]
    learned, fixed = state
    if not (isinstance(fixed, Mapping) and set(fixed) == set(keys) == set(learned)):
        raise StateError(
            f"this state is not that of a chain or rules of {n} compressions; it has parts "
            f"{list(fixed)}"
        )
    return [CompressionState(learned[k], fixed[k]) for k in keys]
