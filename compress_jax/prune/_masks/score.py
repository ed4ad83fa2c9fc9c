"""The builder of every pruning method that scores entries: a new method is one new score."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from compress_jax.core._leafwise import check_finite, fold_path, why_not_float
from compress_jax.core.arguments import refused, whole
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
from compress_jax.core.errors import ArgumentError, NonFiniteError, ShapeError, StateError
from compress_jax.core.finite import saturate, where_finite
from compress_jax.core.packed import Sparse, nbytes
from compress_jax.core.paths import flatten
from compress_jax.core.schedules import Scheduled, due
from compress_jax.core.types import Key, Leaf, Params, PyTree, Step
from compress_jax.prune._masks.bit_mask import unpacked
from compress_jax.prune._masks.choose import (
    Masks,
    checked_gradients,
    keep_masks,
    skip_nonfinite,
    update_if,
)
from compress_jax.prune._masks.structures import Structure
from compress_jax.prune._masks.target import Sparsity, Target


class ScoreInputs(NamedTuple):
    """The inputs of a score: one leaf and what `update` was given for it.

    Attributes:
      path: the leaf's path.
      x: the stored weights. They are dense: a pruned weight still has its value.
      step: the training step; 0 in `init`.
      grad: the gradient of the loss at the weights the model used; None in `init`.
      carried: what `Score.begin` or `Score.follow` returned last; None for a score without state.
      key: a typed PRNG key for this leaf and step, or None.
      layer: the index of the layer ``x`` in a stack, a traced integer; None if the leaf is no
        stack.

    Example:
      >>> import compress_jax as cj
      >>> cj.prune.ScoreInputs("dense/kernel", jnp.ones((2, 3))).step
      0
    """

    path: str
    x: jax.Array
    step: Step = 0
    grad: Any = None
    carried: PyTree = None
    key: Any = None
    layer: jax.Array | None = None


class Score(NamedTuple):
    """The importance of each entry of a leaf; entries of lowest score are pruned.

    Attributes:
      measure: ``(ScoreInputs) -> scores``, floating point, in the shape of the leaf. For a stack it
        is called on one layer at a time, with that layer's slice of ``carried``.
      begin: ``(ScoreInputs) -> carried``, any tree of arrays, for a score with state; else None.
      follow: ``(ScoreInputs) -> carried``, called at every update; by default the state is
        constant.
      signed: compare scores by value; by default by magnitude.
      needs_grads: the score needs gradients. Nothing is pruned until an update has some.

    Example:
      >>> import compress_jax as cj
      >>> largest = cj.prune.Score(lambda inputs: inputs.x)
      >>> cj.prune.by_score(largest, 0.5).init({"w": jnp.array([1.0, -3.0])}).fixed["w"].tolist()
      [False, True]
    """

    measure: Callable[[ScoreInputs], jax.Array]
    begin: Callable[[ScoreInputs], PyTree] | None = None
    follow: Callable[[ScoreInputs], PyTree] | None = None
    signed: bool = False
    needs_grads: bool = False


def by_score(
    score: Score,
    sparsity: Sparsity | None,
    structure: Structure | None = None,
    *,
    scope: str = "leaf",
    every: int = 1,
    floor: float = 0.0,
) -> Compression:
    r"""Prune the entries of lowest score, exactly as many as the sparsity says.

    ``view(x) = x`` where the mask is true, else ``+0.0``; the gradient is the view's own. The
    stored params stay dense. Of equal scores the one earlier in C order is pruned first. Nothing is
    sorted, and masks are the same under every sharding wherever scores are.

    Args:
      score: scores each entry.
      sparsity: share of the entries (of the units of a structure) to prune: a number, an optax
        schedule of the step, or ``{glob: either}`` as `erk` returns it. Leaves that no glob matches
        are not pruned. None with `n_m`.
      structure: `n_m`, `block`, `channel` or `head`; None for single entries.
      scope: ``"leaf"``: each leaf reaches the sparsity by itself; ``"global"``: all leaves share
        one threshold.
      every: masks are recomputed at steps divisible by it, and when a schedule reaches its last
        value. The state of a score is updated at every step.
      floor: with ``scope="global"``, the least share of each leaf's units that stays, and at least
        one. Without it a global threshold may empty a leaf, which ends training. The sparsity is
        not reached where the floors leave too little to prune.

    Returns:
      The Compression. ``fixed[path]`` is the mask, or
      ``{"mask": mask, "carried": state of the score}``. Packs to `Sparse` where that is smaller
      than the dense array.

    Raises:
      ArgumentError: for impossible arguments, such as a function that is no `Score`; in `update`,
        if the score needs gradients and there are none.
      ShapeError: in `init` and `update`, if a leaf's scores or gradients do not have its shape.
      NonFiniteError: outside ``jit``, if scores are NaN, or gradients that the score needs are not
        finite. Under ``jit`` such gradients leave the whole state unchanged for that step, and such
        scores leave all masks unchanged.

    Example:
      >>> import compress_jax as cj
      >>> position = cj.prune.Score(lambda inputs: jnp.arange(inputs.x.size, dtype=jnp.float32))
      >>> c = cj.prune.by_score(position, 0.5)
      >>> params = {"w": jnp.array([5.0, 6.0, 7.0, 8.0])}
      >>> c.view(params, c.init(params))["w"].tolist()
      [0.0, 0.0, 7.0, 8.0]
    """
    if whole("every", every) < 1:
        raise ArgumentError(f"masks are chosen every 1 or more steps, got every={every}")
    target = Target.of(sparsity, structure, scope, floor)
    return _ByScore(_check_score(score), target, every).compression()


def normalized(score: Score) -> Score:
    r"""Divide a score by its norm over the leaf, :math:`s / \lVert s \rVert_2`.

    In a leaf of zeros it is 0. Within a leaf this changes nothing. With ``scope="global"`` it makes
    leaves of large and of small entries comparable. The norm is a sum, so masks may differ between
    shardings where two scores differ in the last bit.

    Args:
      score: any score.

    Returns:
      The score relative to its leaf.

    Raises:
      ArgumentError: if it is not a `Score`.

    Example:
      >>> import compress_jax as cj
      >>> params = {"small": jnp.array([0.1, 0.2]), "large": jnp.array([10.0, 30.0])}
      >>> relative = cj.prune.normalized(cj.prune.Score(lambda inputs: inputs.x))
      >>> c = cj.prune.by_score(relative, 0.5, scope="global")
      >>> jax.tree.map(lambda x: x.tolist(), c.view(params, c.init(params)))
      {'large': [0.0, 30.0], 'small': [0.0, 0.20000000298023224]}

    References:
      Lee et al., "JaxPruner: A concise library for sparsity research", 2023, arXiv:2304.14082 (its
      global pruners).
    """

    def measure(inputs: ScoreInputs) -> jax.Array:
        found = saturate(score.measure(inputs).astype(jnp.float32), jnp.float32)
        # Divide by the maximum first, so that the squares neither overflow nor vanish.
        largest = jnp.maximum(jnp.abs(found).max(initial=0.0), jnp.finfo(jnp.float32).tiny)
        found = found * (1 / largest)
        return found * (1 / jnp.maximum(jnp.sqrt(jnp.sum(found**2)), 1.0))

    return _check_score(score)._replace(measure=measure)


def _check_score(score: object) -> Score:
    """Return the argument if it is a `Score`: a bare function would fail far from here."""
    if not isinstance(score, Score):
        refused("score", score, "a prune.Score: wrap a function of ScoreInputs, prune.Score(fn)")
    return score


class _ByScore(NamedTuple):
    """The arguments of `by_score`, and the functions of its Compression."""

    score: Score
    target: Target
    every: int
    known: Mapping[str, Axes] | None = None

    @property
    def leaves(self) -> "Leaves":
        return Leaves(self.target.why_not, self.known)

    def compression(self) -> Compression:
        update = Scheduled(self.update, self.target.schedules, self._replace(every=1).update)
        made = mask_compression(self.leaves)
        made = made._replace(init=self.init, update=update, bind=self.bind)
        # Saved states hold this text and are refused under another one, so the name is the old one.
        call = call_of("masked", score=self.score, sparsity=self.target, every=self.every)
        return stamped(made, call, self.known)

    def bind(self, known: Mapping[str, Axes]) -> Compression:
        return self._replace(known=known).compression()

    def init(self, params: Params, *, step: Step = 0) -> CompressionState:
        self.target.check_leaves(params)
        inputs = {path: ScoreInputs(path, x, step) for path, x in self.leaves.of(params).items()}
        if self.score.begin is not None:
            for path, each in inputs.items():
                inputs[path] = each._replace(carried=self.score.begin(each))
        # `init` has no gradients, so nothing is pruned before the first update.
        if self.score.needs_grads:
            everything = {path: jnp.ones_like(each.x, bool) for path, each in inputs.items()}
            return self.state(inputs, everything)
        return self.state(inputs, self.masks(params, inputs, step))

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
        leaves = self.leaves.of(params)
        gradients = checked_gradients(leaves, params, grads, self.score.needs_grads)
        before = CompressionState({}, {path: fixed_of(state, path) for path in leaves})
        # The state of a score follows every step, also those at which masks are not due.
        inputs = {}
        for path, x in leaves.items():
            carried = before.fixed[path]["carried"] if self.score.begin is not None else None
            each = ScoreInputs(path, x, step, gradients.get(path), carried, fold_path(key, path))
            if self.score.follow is not None:
                each = each._replace(carried=self.score.follow(each))
            inputs[path] = each
        old = {path: mask_of(fixed) for path, fixed in before.fixed.items()}
        is_due: jax.Array | bool = True
        at = step
        if self.every > 1:
            is_due, at = due(self.every, self.target.schedules, step)
        masks = update_if(is_due, lambda: self.masks(params, inputs, at, old), lambda: old)
        # Gradients that the score does not use may be infinite without harm.
        needed = gradients if self.score.needs_grads else {}
        return skip_nonfinite(needed, self.state(inputs, masks), before)

    def masks(
        self,
        params: Params,
        inputs: Mapping[str, ScoreInputs],
        step: Step,
        old: Masks | None = None,
    ) -> Masks:
        axes = self.leaves.axes(params)
        scores = {
            path: measure(self.score.measure, each, axes[path]) for path, each in inputs.items()
        }
        masks = keep_masks(scores, self.target, step, signed=self.score.signed, axes=axes)
        if old is None or not scores:
            return masks
        # Under jit a NaN cannot raise. It has no rank either, so all masks stay as they were.
        broken = jnp.stack([jnp.isnan(score).any() for score in scores.values()]).any()
        return {path: jnp.where(broken, old[path], mask) for path, mask in masks.items()}

    def state(self, inputs: Mapping[str, ScoreInputs], masks: Masks) -> CompressionState:
        if self.score.begin is None:
            return CompressionState({}, masks)
        fixed = {
            path: {"mask": mask, "carried": inputs[path].carried} for path, mask in masks.items()
        }
        return CompressionState({}, fixed)


def measure(fn: Callable[[ScoreInputs], jax.Array], inputs: ScoreInputs, axes: Axes) -> jax.Array:
    """Return the scores of a leaf by the ``measure`` of a `Score` or a `Growth`.

    The shape is checked, because the mask of scores of another shape would broadcast.

    Raises:
      ShapeError: unless there is one score for each entry.
      NonFiniteError: outside ``jit``, if one is NaN.
    """
    found = _measure_by_layer(fn, inputs, axes) if axes.stack else fn(inputs)
    if found.shape != inputs.x.shape:
        raise ShapeError(
            f"leaf {inputs.path!r} of shape {inputs.x.shape} was given scores of shape "
            f"{found.shape}; return one score for each entry"
        )
    if not isinstance(found, Tracer):
        with jax.ensure_compile_time_eval():  # concrete scores may be used by a traced branch
            bad = int(jnp.isnan(found).sum())
        if bad:
            raise NonFiniteError(
                f"leaf {inputs.path!r} was given {bad} scores that are NaN; a NaN cannot be "
                "compared, so return a finite score or an infinity"
            )
    return found


def _measure_by_layer(
    fn: Callable[[ScoreInputs], jax.Array], inputs: ScoreInputs, axes: Axes
) -> jax.Array:
    """Return the scores of a stack, each layer scored by itself."""

    def measure_layer(x: jax.Array, grad: PyTree, carried: PyTree, layer: jax.Array) -> jax.Array:
        return fn(inputs._replace(x=x, grad=grad, carried=carried, layer=layer))

    stack = tuple(axes.shape[axis] for axis in axes.stack)
    # The index of each layer, in the shape of the stack axes.
    layers = jnp.arange(axes.layers, dtype=jnp.int32).reshape(stack)
    # Gradients and state lie as the leaf does; None, where there are none, has no axes.
    kinds = ("leaf", "leaf", "leaf", "state")
    by_layer = over_layers(measure_layer, axes, kinds, "leaf")
    return by_layer(inputs.x, inputs.grad, inputs.carried, layers)


def apply_mask(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Return ``x`` where the mask is true, else zero: the pointwise view of a pruned array."""
    # A product with the mask would leave -0.0, and NaN of an infinity.
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def pack_masked(pruned: jax.Array, mask: jax.Array) -> Sparse | jax.Array:
    """Return a pruned array as `Sparse`, or as it is where that is smaller."""
    return min(Sparse.pack(pruned, mask), pruned, key=nbytes)


def mask_of(fixed: PyTree) -> jax.Array:
    """Return the mask in the fixed state of one pruned leaf, bool."""
    return unpacked(fixed["mask"] if isinstance(fixed, Mapping) else fixed)


def mask_compression(leaves: "Leaves") -> Compression:
    """Return the Compression of masks in the state: `view`, `pack`, `skipped` and `pointwise`.

    Args:
      leaves: which leaves are pruned.

    Returns:
      The Compression. The caller replaces `init` and `update` and adds a stamp.
    """

    def masked_leaves(
        params: Params, state: CompressionState
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        pruned = leaves.of(params)
        return {path: (x, mask_of(fixed_of(state, path))) for path, x in pruned.items()}

    def view(params: Params, state: CompressionState) -> Params:
        found, rebuild = flatten(params)
        for path, (x, mask) in masked_leaves(params, state).items():
            found[path] = _seen(x, mask)
        return rebuild(found)

    def leaf_views(params: Params, state: CompressionState) -> dict[str, LeafView]:
        found = masked_leaves(params, state)
        return {path: LeafView(_seen, mask, stacked=x.ndim) for path, (x, mask) in found.items()}

    def pack(params: Params, state: CompressionState) -> Params:
        found, rebuild = flatten(params)
        for path, (x, mask) in masked_leaves(params, state).items():
            # The masked array is what stands for the leaf where sparse storage is no smaller.
            found[path] = pack_masked(apply_mask(x, mask), mask)
        return rebuild(found)

    def pointwise(params: Params, state: CompressionState) -> dict[str, Pointwise]:
        found = masked_leaves(params, state)
        return {path: Pointwise(apply_mask, (mask,)) for path, (_, mask) in found.items()}

    # A method replaces both before its Compression is used.
    def unset(*_: object, **__: object) -> CompressionState:
        raise NotImplementedError

    by_leaf = ByLeaf(view, leaf_views)
    return Compression(unset, by_leaf, unset, pack, leaves.skipped, pointwise, axes=leaves.axes)


def _seen(x: jax.Array, mask: jax.Array, _: None = None) -> jax.Array:
    """Return the view of a pruned leaf, whole or a slice."""
    # A mask must not hide that a pruned weight has become NaN.
    return where_finite(x, apply_mask(x, mask))


class Leaves(NamedTuple):
    """Which leaves a method prunes, and the axes of each.

    Attributes:
      why_not: ``(path, x, axes) -> reason`` not to prune a leaf, or None.
      known: the axes by path, if the method is bound to a function.
    """

    why_not: Callable[[str, Leaf, Axes], str | None]
    known: Mapping[str, Axes] | None = None

    def reason(self, path: str, x: Leaf) -> str | None:
        """Return why a leaf is not pruned, or None."""
        return why_not_float(path, x) or self.why_not(path, x, known_axes(self.known, path, x))

    def skipped(self, params: Params) -> dict[str, str]:
        """Return the leaves that are not pruned, with the reasons."""
        reasons = {path: self.reason(path, x) for path, x in flatten(params)[0].items()}
        return {path: reason for path, reason in reasons.items() if reason}

    def of(self, params: Params) -> dict[str, jax.Array]:
        """Return the leaves that are pruned, by path; raise NonFiniteError if one is not finite."""
        leaves = self._pruned(params)
        for path, x in leaves.items():
            check_finite(path, x)
        return leaves

    def axes(self, params: Params) -> dict[str, Axes]:
        """Return the axes of the leaves that are pruned."""
        return {path: known_axes(self.known, path, x) for path, x in self._pruned(params).items()}

    def _pruned(self, params: Params) -> dict[str, jax.Array]:
        leaves = flatten(params)[0]
        return {path: x for path, x in leaves.items() if self.reason(path, x) is None}


def fixed_of(state: CompressionState, path: str) -> PyTree:
    """Return a leaf's fixed state.

    Raises:
      StateError: if the state has none, with the paths it has.
    """
    if path not in state.fixed:
        known = ", ".join(map(str, state.fixed)) or "none"
        raise StateError(
            f"the compression state has nothing for leaf {path!r} (it has: {known}); was it made "
            "by `init`?"
        )
    return state.fixed[path]
