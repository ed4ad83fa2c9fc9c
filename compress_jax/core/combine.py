"""Combinators: compressions on chosen leaves, at chosen steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from compress_jax.core import arguments
from compress_jax.core.arguments import whole
from compress_jax.core.axes import Axes
from compress_jax.core.compression import (
    ByLeaf,
    Compression,
    CompressionState,
    LeafView,
    Pointwise,
    bound,
    joined,
    leaf_views,
    parts_of,
    stamped,
)
from compress_jax.core.describe import describe
from compress_jax.core.errors import ArgumentError, NoMatchError, StateError
from compress_jax.core.paths import Patterns, flatten, match
from compress_jax.core.schedules import Scheduled, at_once, awake, begin, due, schedules_of
from compress_jax.core.types import Key, Leaf, Leaves, Params, PyTree, Schedule, Step


def rules(pairs: Sequence[tuple[Patterns, Compression]]) -> Compression:
    """Compress each leaf by the first rule whose pattern matches its path.

    Leaves that no pattern matches stay as they are.

    Args:
      pairs: ``(glob or tuple of globs, compression)``, first match wins.

    Returns:
      The Compression; its state holds the rules' states under ``"0"``, ``"1"``, ...

    Raises:
      NoMatchError: if a pattern matches no leaf, or none that earlier rules have left.

    Example:
      >>> import compress_jax as cj
      >>> keep, negate = cj.identity(), cj.leafwise(lambda x, learned, fixed: -x)
      >>> mixed = cj.rules([("head/*", keep), ("**/kernel", negate)])
      >>> params = {"body": {"kernel": jnp.ones(1)}, "head": {"kernel": jnp.ones(1)}}
      >>> view = mixed.view(params, mixed.init(params))
      >>> view["body"]["kernel"].tolist(), view["head"]["kernel"].tolist()
      ([-1.0], [1.0])
    """
    pairs = [
        (arguments.patterns("pattern", pattern), arguments.compression("compression", c))
        for pattern, c in pairs
    ]
    return _Rules(tuple(pairs)).compression()


class _Rules(NamedTuple):
    """The arguments of `rules`, and the functions of its Compression."""

    pairs: tuple[tuple[Patterns, Compression], ...]

    def compression(self) -> Compression:
        update = Scheduled(self.update, schedules_of(*(c for _, c in self.pairs)), self.at_once)
        made = Compression(
            self.init,
            ByLeaf(self.view, self.leaf_views),
            update,
            self.pack,
            self.skipped,
            self.pointwise,
            bind=self.bind,
            axes=self.axes,
        )
        return stamped(made, f"rules({describe(list(self.pairs))})")

    def bind(self, known: Mapping[str, Axes]) -> Compression:
        return _Rules(tuple((pattern, bound(c, known)) for pattern, c in self.pairs)).compression()

    def split(
        self, params: Params
    ) -> tuple[
        list[tuple[Compression, dict[str, Leaf]]], dict[str, Leaf], Callable[[Leaves], PyTree]
    ]:
        """Return each compression with its leaves, the rest, and how to rebuild the tree."""
        leaves, rebuild = flatten(params)
        parts = []
        left = dict(leaves)
        for pattern, c in self.pairs:
            # Matched against all leaves, to tell a misspelled pattern from one that comes too late.
            found = match(pattern, leaves)
            chosen = [path for path in found if path in left]
            if not chosen:
                raise NoMatchError(
                    f"rule {pattern!r} never applies: earlier rules take all it matches, "
                    f"{', '.join(found)}"
                )
            parts.append((c, {path: left.pop(path) for path in chosen}))
        return parts, left, rebuild

    def merged(self, params: Params, state: CompressionState, method: str) -> Params:
        parts, left, rebuild = self.split(params)
        for (c, part), own in zip(parts, parts_of(state, len(parts)), strict=True):
            left.update(getattr(c, method)(part, own))
        return rebuild(left)

    def view(self, params: Params, state: CompressionState) -> Params:
        return self.merged(params, state, "view")

    def pack(self, params: Params, state: CompressionState) -> Params:
        return self.merged(params, state, "pack")

    def init(self, params: Params, *, step: Step = 0) -> CompressionState:
        return joined([begin(c, part, step) for c, part in self.split(params)[0]])

    def update(
        self, params: Params, state: CompressionState, *, grads: PyTree = None, **inputs: PyTree
    ) -> CompressionState:
        parts, _, _ = self.split(params)
        gradients = flatten(grads)[0] if grads is not None else None
        if unknown := [path for path in gradients or () if path not in flatten(params)[0]]:
            raise ArgumentError(f"there are gradients for {', '.join(unknown)}, and no such leaf")
        states = []
        for (c, part), s in zip(parts, parts_of(state, len(parts)), strict=True):
            # A leaf without a gradient is left out; a method that needs it says so.
            own = None
            if gradients is not None:
                own = {path: gradients[path] for path in part if path in gradients}
            states.append(c.update(part, s, grads=own, **inputs))
        return joined(states)

    def at_once(
        self, params: Params, state: CompressionState, **inputs: PyTree
    ) -> CompressionState:
        return _Rules(tuple((pattern, awake(c)) for pattern, c in self.pairs)).update(
            params, state, **inputs
        )

    def skipped(self, params: Params) -> dict[str, str]:
        parts, left, _ = self.split(params)
        reasons = dict.fromkeys(left, "no pattern matches")
        for c, part in parts:
            reasons.update(c.skipped(part))
        return {path: reasons[path] for path in flatten(params)[0] if path in reasons}

    def pointwise(self, params: Params, state: CompressionState) -> dict[str, Pointwise]:
        parts, _, _ = self.split(params)
        found: dict[str, Pointwise] = {}
        for (c, part), own in zip(parts, parts_of(state, len(parts)), strict=True):
            found.update(c.pointwise(part, own))
        return found

    def leaf_views(self, params: Params, state: CompressionState) -> dict[str, LeafView]:
        parts, _, _ = self.split(params)
        found: dict[str, LeafView] = {}
        for (c, part), own in zip(parts, parts_of(state, len(parts)), strict=True):
            found.update(leaf_views(c, part, own))
        return found

    def axes(self, params: Params) -> dict[str, Axes]:
        found: dict[str, Axes] = {}
        for c, part in self.split(params)[0]:
            found.update(c.axes(part))
        return found


def at(pattern: Patterns, compression: Compression) -> Compression:
    """Apply a compression to the leaves whose names match a glob, and to no other.

    Args:
      pattern: a glob such as ``"**/kernel"``, or a tuple of globs.
      compression: what to apply there.

    Returns:
      The Compression.

    Raises:
      NoMatchError: in `init`, if the pattern matches no leaf; the message lists the leaves.

    Example:
      >>> import compress_jax as cj
      >>> c = cj.at("**/kernel", cj.leafwise(lambda x, l, f: 2 * x))
      >>> c.skipped({"dense": {"kernel": jnp.ones(1), "bias": jnp.ones(1)}})
      {'dense/bias': 'no pattern matches'}
    """
    return rules([(pattern, compression)])


def every(n: int, compression: Compression) -> Compression:
    """Update the state only at steps divisible by ``n``; the view does not change.

    A schedule inside it (of a sparsity, say) arrives all the same: one more update is made when it
    reaches its last value.

    Args:
      n: the period in steps, at least 1.
      compression: whose `update` is costly (a mask, a scale search).

    Returns:
      The Compression.

    Raises:
      ArgumentError: if ``n`` is not a whole number of at least 1.

    Example:
      >>> import compress_jax as cj
      >>> count = cj.leafwise(
      ...     lambda x, learned, fixed: x,
      ...     init=lambda x, key: (None, 0),
      ...     update=lambda x, learned, fixed, **_: (None, fixed + 1),
      ... )
      >>> c, params = cj.every(2, count), {"w": jnp.ones(1)}
      >>> state = c.init(params)
      >>> for step in range(4): state = c.update(params, state, step=jnp.array(step))
      >>> int(state.fixed["w"])
      2
    """
    n = whole("n (the period of every(n, ...) in steps)", n, 1)
    schedules = schedules_of(arguments.compression("compression", compression))

    def update(
        params: Params,
        state: CompressionState,
        *,
        step: Step,
        grads: PyTree = None,
        stats: PyTree = None,
        key: Key = None,
    ) -> CompressionState:
        acts, at = due(n, schedules, step)
        # Functions, so that outside `jit` only the branch that is taken runs.
        skip = lambda: state  # noqa: E731
        act = lambda: compression.update(params, state, step=at, grads=grads, stats=stats, key=key)  # noqa: E731
        return _switch(acts, [skip, act])

    return compression._replace(
        update=Scheduled(update, schedules, at_once(compression)),
        call=f"every({n}, {describe(compression)})",
        bind=lambda known: every(n, bound(compression, known)),
    )


def between(start: int, stop: int | None, compression: Compression) -> Compression:
    """Switch a compression on at one step and freeze its state at another.

    Before ``start`` the view is the params themselves. At ``start``, or at the first step after it
    that `update` sees, the state is made anew by `init` from the weights of that moment, for that
    step of its schedules; it is updated at the steps in ``(start, stop)`` and stays as it is from
    ``stop`` on. The last of these updates, at ``stop - 1`` or the first step after it that `update`
    sees, is made for the step ``stop``, whatever thins the compression's updates: a schedule that
    ends at ``stop`` has arrived.

    Args:
      start: first step at which the compression acts.
      stop: first step at which its state is frozen; None for never.
      compression: what to switch on.

    Returns:
      The Compression; ``fixed`` holds ``{"active": bool, "done": bool, "of": the fixed state of the
      compression}``, done once the last update is made. `pack` before ``start`` leaves the params
      as they are.

    Raises:
      ArgumentError: if the steps are not whole numbers, or ``stop`` is not after ``start``.

    Example:
      >>> import compress_jax as cj
      >>> c, params = cj.between(10, None, cj.leafwise(lambda x, l, f: 0 * x)), {"w": jnp.ones(1)}
      >>> state = c.init(params)
      >>> later = c.update(params, state, step=jnp.array(10))
      >>> c.view(params, state)["w"].tolist(), c.view(params, later)["w"].tolist()
      ([1.0], [0.0])
    """
    start = whole("start", start)
    compression = arguments.compression("compression", compression)
    if stop is not None and whole("stop", stop) <= start:
        raise ArgumentError(
            f"between(start, stop, ...) needs stop after start, got {start} and {stop}"
        )
    return _Between(start, stop, compression).compression()


class _Between(NamedTuple):
    """The arguments of `between`, and the functions of its Compression."""

    start: int
    stop: int | None
    of: Compression

    def compression(self) -> Compression:
        update = Scheduled(self.update, self.schedules, self.at_once)
        made = Compression(
            self.init,
            ByLeaf(self.view, self.leaf_views),
            update,
            self.pack,
            self.of.skipped,
            self.pointwise,
            bind=self.bind,
            axes=self.of.axes,
        )
        return stamped(made, f"between({self.start}, {self.stop}, {describe(self.of)})")

    def bind(self, known: Mapping[str, Axes]) -> Compression:
        return self._replace(of=bound(self.of, known)).compression()

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The schedules of the compression, and the freeze as one more."""
        stop = self.stop
        own = schedules_of(self.of)
        return own if stop is None else (*own, lambda step: step >= stop)

    def init(self, params: Params, *, step: Step = 0) -> CompressionState:
        # The state is there from the first step, unused, as its shapes must not change under `jit`.
        return _wrapped(begin(self.of, params, step), jnp.asarray(step) >= self.start, False)

    def view(self, params: Params, state: CompressionState) -> Params:
        # `active` may be traced, so both values are computed and one is chosen.
        view = self.of.view(params, _inner(state))
        active = state.fixed["active"]
        return jax.tree.map(lambda new, old: jnp.where(active, new, old), view, params)

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
        step = jnp.asarray(step)
        own = _inner(state)
        started, ending, at = self.phase(step)
        inputs = {"grads": grads, "stats": stats, "key": key}
        if not isinstance(step, Tracer) and not isinstance(state.fixed["active"], Tracer):
            self.of.view(params, own)  # refuses NaN, also where the state only stays
        branches: list[Callable[[], CompressionState]] = [
            lambda: own,  # 0: before the start, or frozen
            lambda: begin(self.of, params, at),  # 1: the first step
            lambda: self.of.update(params, own, step=step, **inputs),  # 2: in between
        ]
        # 3: the last update, once; not thinned, as `every` might skip it.
        if self.stop is not None:
            branches.append(lambda: at_once(self.of)(params, own, step=at, **inputs))
        moving = jnp.where(ending, jnp.where(state.fixed["done"], 0, 3), 2)
        # A state made by `init` at step ``start`` is active already, and is made anew all the same.
        first = jnp.logical_not(jnp.asarray(state.fixed["active"])) | (step == self.start)
        index = jnp.where(started, jnp.where(first, 1, moving), 0)
        return _wrapped(_switch(index, branches), started, ending)

    def phase(self, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return whether it has started, whether it ends now, and the step to update with."""
        started = step >= self.start
        if self.stop is None:
            return started, jnp.zeros((), bool), step
        # The state that an update makes is used at the step after it, hence one step early.
        ending = started & (step + 1 >= self.stop)
        return started, ending, jnp.where(ending, jnp.asarray(self.stop, step.dtype), step)

    def at_once(
        self, params: Params, state: CompressionState, **inputs: PyTree
    ) -> CompressionState:
        return self._replace(of=awake(self.of)).update(params, state, **inputs)

    def pack(self, params: Params, state: CompressionState) -> Params:
        own = _inner(state)
        return self.of.pack(params, own) if bool(state.fixed["active"]) else params

    def pointwise(self, params: Params, state: CompressionState) -> dict[str, Pointwise]:
        own = _inner(state)
        return self.of.pointwise(params, own) if bool(state.fixed["active"]) else {}

    def leaf_views(self, params: Params, state: CompressionState) -> dict[str, LeafView]:
        found = leaf_views(self.of, params, _inner(state))
        active = state.fixed["active"]
        return {path: _while_active(view, active) for path, view in found.items()}


def _while_active(view: LeafView, active: jax.Array) -> LeafView:
    """Return the view of a leaf that is the leaf itself where `active` is false."""

    def fn(x: jax.Array, layers: PyTree, shared: tuple[jax.Array, PyTree]) -> jax.Array:
        active, own = shared
        return jnp.where(active, view.fn(x, layers, own), x)

    return view._replace(fn=fn, shared=(active, view.shared))


def _inner(state: CompressionState) -> CompressionState:
    """Return the state of the compression that a `between` switches."""
    if not isinstance(state.fixed, Mapping) or set(state.fixed) != {"active", "done", "of"}:
        raise StateError(
            "this state is not that of a `between`, which holds 'active', 'done' and 'of'; it "
            f"has {list(state.fixed)}"
        )
    return CompressionState(state.learned, state.fixed["of"])


def _wrapped(
    state: CompressionState, active: jax.Array | bool, done: jax.Array | bool
) -> CompressionState:
    """Return the state of a `between`."""
    flags = {"active": jnp.asarray(active, bool), "done": jnp.asarray(done, bool)}
    return CompressionState(state.learned, {**flags, "of": state.fixed})


def _switch(
    index: jax.Array, branches: Sequence[Callable[[], CompressionState]]
) -> CompressionState:
    """Run one branch: at once if the index is concrete, else by `lax.switch`."""
    if not isinstance(index, Tracer):
        return branches[int(index)]()
    # Branches must return equal types, so Python numbers in a state become arrays. ``branch`` is a
    # default because a closure would see the last one.
    return jax.lax.switch(
        index.astype(jnp.int32),
        [lambda branch=branch: jax.tree.map(jnp.asarray, branch()) for branch in branches],
    )
