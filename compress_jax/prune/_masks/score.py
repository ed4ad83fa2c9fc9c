"""The builder of all pruning methods that score entries: a new method is a score, and nothing else."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from compress_jax.core.arguments import whole
from compress_jax.core.axes import Axes, known_axes, over_layers
from compress_jax.core.compression import Compression, CompressionState, Pointwise, stamped
from compress_jax.core.describe import call_of
from compress_jax.core.errors import ArgumentError, NonFiniteError, ShapeError, StateError
from compress_jax.core.finite import saturate, where_finite
from compress_jax.core.leafwise import check_finite, fold_path, why_not_float
from compress_jax.core.packed import Sparse, nbytes
from compress_jax.core.paths import flatten
from compress_jax.core.schedules import Scheduled, due
from compress_jax.core.types import Params, PyTree, Step
from compress_jax.prune._masks.choose import Masks, chosen, gradients_of, kept, unless_broken
from compress_jax.prune._masks.structures import Structure
from compress_jax.prune._masks.target import Sparsity, Target


class Seen(NamedTuple):
    """What a score may look at: one leaf, and what came with the step.

    Attributes:
      path: the leaf's name.
      x: the stored weights, dense: pruned ones have their value.
      step: the step; 0 in `init`.
      grad: the gradient of the loss at the weights the model used; None in `init`.
      carried: what `Score.begin` or `Score.follow` returned last; None for a score without.
      key: the leaf's own typed PRNG key of this step, or None.
      layer: which layer of a stack ``x`` is, a traced integer; None where the leaf is no stack.
    """

    path: str
    x: jax.Array
    step: Step = 0
    grad: Any = None
    carried: Any = None
    key: Any = None
    layer: Any = None


class Score(NamedTuple):
    """How much each entry of a leaf matters; what matters least is pruned.

    Attributes:
      measure: ``(Seen) -> scores``, floating point, the shape of the leaf. Of a stack it is given
        one layer at a time, what is carried cut likewise.
      begin: ``(Seen) -> carried``, any tree of arrays, for a score that remembers; None for one
        that does not.
      follow: ``(Seen) -> carried`` at every update; by default what is carried stays.
      signed: scores are compared by value; by default by magnitude.
      needs_grads: it cannot be measured without gradients. Until the first come with an update,
        everything is kept.
    """

    measure: Callable[[Seen], jax.Array]
    begin: Callable[[Seen], Any] | None = None
    follow: Callable[[Seen], Any] | None = None
    signed: bool = False
    needs_grads: bool = False


def normalized(score: Score) -> Score:
    r"""Return a score that counts relative to its leaf: :math:`s / \lVert s \rVert_2`, and zero in a leaf of zeros.

    Within a leaf this changes nothing. With ``scope="global"`` leaves of large entries no longer
    outlive those of small ones for that alone. The norm is a sum, so masks may differ in the last
    bit of a score between shardings.

    Args:
      score: any.

    Returns:
      The score, measured in the norm of each leaf's own.

    Raises:
      TypeError: if it is not a `Score`.

    Example:
      >>> params = {"small": jnp.array([0.1, 0.2]), "large": jnp.array([10.0, 30.0])}
      >>> c = masked(normalized(Score(lambda seen: seen.x)), 0.5, scope="global")
      >>> jax.tree.map(lambda x: x.tolist(), c.view(params, c.init(params)))
      {'large': [0.0, 30.0], 'small': [0.0, 0.20000000298023224]}

    References:
      Lee et al., "JaxPruner: A concise library for sparsity research", 2023, arXiv:2304.14082 (its
      global pruners).
    """

    def measure(seen: Seen) -> jax.Array:
        found = saturate(score.measure(seen).astype(jnp.float32), jnp.float32)
        largest = jnp.maximum(jnp.abs(found).max(initial=0.0), jnp.finfo(jnp.float32).tiny)
        found = found * (1 / largest)  # whose squares neither overflow nor vanish
        return found * (1 / jnp.maximum(jnp.sqrt(jnp.sum(found**2)), 1.0))

    return _is_score(score)._replace(measure=measure)


def masked(
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
    params stay dense under it. Of equal scores the one earlier in C order is pruned first; nothing
    is sorted, and masks are the same under every sharding wherever scores are.

    Args:
      score: of each entry.
      sparsity: share of the entries (of the units of a structure) to prune: a number, an optax
        schedule of the step, or ``{glob: either}``, as `erk` and others return it: leaves that no
        glob matches are left alone. None with `n_m`.
      structure: `n_m`, `block`, `channel` or `head`; None for single entries.
      scope: ``"leaf"``: each leaf reaches the sparsity by itself; ``"global"``: all leaves share
        one threshold.
      every: masks are chosen anew at steps divisible by it, and when a schedule reaches its last
        value; what a score remembers is updated at every step.
      floor: with ``scope="global"``, the share of every leaf's units that stays, and at least one:
        a threshold for all may empty a leaf, which ends training. The sparsity is then missed where
        the floors leave less to prune.

    Returns:
      The Compression. ``fixed[path]`` is the mask, or
      ``{"mask": mask, "carried": what the score remembers}``. Packs to `Sparse` where that is
      smaller than the dense array.

    Raises:
      ArgumentError: for impossible arguments; in `update`, if the score needs gradients and there
        are none.
      TypeError: if the score is not a `Score`.
      ShapeError: in `init` and `update`, if a leaf's scores or gradients are not of its shape.
      NonFiniteError: outside ``jit``, if scores are NaN or gradients that the score needs are not
        finite. Under ``jit`` the whole state stays as it was in a step with such gradients, and all
        masks in one with such scores.

    Example:
      >>> oldest = Score(lambda seen: jnp.arange(seen.x.size, dtype=jnp.float32).reshape(seen.x.shape))
      >>> c, params = masked(oldest, 0.5), {"w": jnp.array([5.0, 6.0, 7.0, 8.0])}
      >>> c.view(params, c.init(params))["w"].tolist()
      [0.0, 0.0, 7.0, 8.0]
    """
    if whole("every", every) < 1:
        raise ArgumentError(f"masks are chosen every 1 or more steps, got every={every}")
    return _Masked(
        _is_score(score), Target.of(sparsity, structure, scope, floor), every
    ).compression()


def _is_score(score: Any) -> Score:
    """Return the argument if it is a `Score`: a bare function would fail far from here."""
    if not isinstance(score, Score):
        raise TypeError(
            f"a score is a prune.Score, got {score!r}; wrap a function of what is seen: "
            "prune.Score(fn)"
        )
    return score


def measured(score: Any, seen: Seen, axes: Axes) -> jax.Array:
    """Return the scores of a leaf by a `Score` or a `Growth`: one for each entry, or its mask would broadcast.

    Raises:
      ShapeError: if there are more or fewer.
      NonFiniteError: outside ``jit``, if one is NaN.
    """
    found = _by_layer(score, seen, axes) if axes.stack else score.measure(seen)
    if found.shape != seen.x.shape:
        raise ShapeError(
            f"leaf {seen.path!r} of shape {seen.x.shape} was given scores of shape {found.shape}"
        )
    if not isinstance(found, Tracer):
        with jax.ensure_compile_time_eval():  # known scores may be used by a traced branch
            bad = int(jnp.isnan(found).sum())
        if bad:
            raise NonFiniteError(
                f"leaf {seen.path!r} was given {bad} scores that are NaN, among which none is the "
                "least"
            )
    return found


def _by_layer(score: Any, seen: Seen, axes: Axes) -> jax.Array:
    """Return the scores of a stack, each layer measured by itself."""

    def measure(x: jax.Array, grad: Any, carried: Any, layer: Any) -> jax.Array:
        return score.measure(seen._replace(x=x, grad=grad, carried=carried, layer=layer))

    layers = jnp.arange(axes.layers, dtype=jnp.int32).reshape(
        tuple(axes.shape[a] for a in axes.stack)
    )
    args = ("leaf", "leaf", "leaf", "state")
    return over_layers(measure, axes, args, "leaf")(seen.x, seen.grad, seen.carried, layers)


def see(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Return ``x`` where the mask is true, else zero: the pointwise view of a pruned array."""
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def pack(seen: jax.Array, mask: jax.Array) -> Any:
    """Return the smaller of the sparse and the dense form of a view."""
    return min(Sparse.pack(seen, mask), seen, key=nbytes)


def mask_of(fixed: PyTree) -> jax.Array:
    """Return the mask in the fixed state of one pruned leaf."""
    return fixed["mask"] if isinstance(fixed, Mapping) else fixed


def of_masks(leaves: "Leaves") -> Compression:
    """Return a Compression whose view, packed form and reasons are those of masks; `init` and `update` are to be replaced.

    Args:
      leaves: which are pruned.

    Returns:
      The Compression, without a stamp: whoever replaces its functions gives it one.
    """

    def masks(params: Params, state: CompressionState) -> dict[str, tuple[jax.Array, jax.Array]]:
        return {path: (x, mask_of(fixed_of(state, path))) for path, x in leaves.of(params).items()}

    def view(params: Params, state: CompressionState) -> Params:
        every, rebuild = flatten(params)
        seen = {
            path: where_finite(x, see(x, mask)) for path, (x, mask) in masks(params, state).items()
        }
        return rebuild({**every, **seen})

    def packed(params: Params, state: CompressionState) -> Params:
        every, rebuild = flatten(params)
        return rebuild(
            {
                **every,
                **{
                    path: pack(see(x, mask), mask)
                    for path, (x, mask) in masks(params, state).items()
                },
            }
        )

    def pointwise(params: Params, state: CompressionState) -> dict[str, Pointwise]:
        return {path: Pointwise(see, (mask,)) for path, (_, mask) in masks(params, state).items()}

    def unset(*_: Any, **__: Any) -> CompressionState:
        raise NotImplementedError

    return Compression(unset, view, unset, packed, leaves.skipped, pointwise, axes=leaves.axes)


class Leaves(NamedTuple):
    """Which leaves a method prunes, and what is known of their axes.

    Attributes:
      why_not: ``(path, x, axes) -> reason`` to leave a leaf alone, or None.
      known: the axes by path, if the method is bound.
    """

    why_not: Callable[[str, Any, Axes], str | None]
    known: Mapping[str, Axes] | None = None

    def reason(self, path: str, x: Any) -> str | None:
        """Say why a leaf is left alone, or return None."""
        return why_not_float(path, x) or self.why_not(path, x, known_axes(self.known, path, x))

    def skipped(self, params: Params) -> dict[str, str]:
        """Return the leaves that are left alone, with the reasons."""
        return {
            path: why for path, x in flatten(params)[0].items() if (why := self.reason(path, x))
        }

    def of(self, params: Params) -> dict[str, jax.Array]:
        """Return the leaves that are pruned, by path, all found to be finite."""
        leaves = {path: x for path, x in flatten(params)[0].items() if self.reason(path, x) is None}
        for path, x in leaves.items():
            check_finite(path, x)
        return leaves

    def axes(self, params: Params) -> dict[str, Axes]:
        """Return the axes of the leaves that are pruned."""
        leaves = {path: x for path, x in flatten(params)[0].items() if self.reason(path, x) is None}
        return {path: known_axes(self.known, path, x) for path, x in leaves.items()}


def fixed_of(state: CompressionState, path: str) -> Any:
    """Return a leaf's fixed state, or say whose state this is."""
    if path not in state.fixed:
        known = ", ".join(map(str, state.fixed)) or "none"
        raise StateError(
            f"the compression state has nothing for leaf {path!r} (it has: {known}); was it made "
            "by `init`?"
        )
    return state.fixed[path]


class _Masked(NamedTuple):
    """The arguments of `masked`, and the functions of its Compression."""

    score: Score
    target: Target
    every: int
    known: Mapping[str, Axes] | None = None

    @property
    def leaves(self) -> Leaves:
        return Leaves(self.target.why_not, self.known)

    def compression(self) -> Compression:
        update = Scheduled(self.update, self.target.schedules, self._replace(every=1).update)
        made = of_masks(self.leaves)._replace(init=self.init, update=update, bind=self.bind)
        call = call_of("masked", score=self.score, sparsity=self.target, every=self.every)
        return stamped(made, call, self.known)

    def bind(self, known: Mapping[str, Axes]) -> Compression:
        return self._replace(known=known).compression()

    def init(self, params: Params, *, step: Step = 0) -> CompressionState:
        self.target.check(
            path for path, x in flatten(params)[0].items() if why_not_float(path, x) is None
        )
        seen = {path: Seen(path, x, step) for path, x in self.leaves.of(params).items()}
        if self.score.begin is not None:
            seen = {
                path: each._replace(carried=self.score.begin(each)) for path, each in seen.items()
            }
        if self.score.needs_grads:
            return self.state(
                seen, {path: jnp.full_like(each.x, True, dtype=bool) for path, each in seen.items()}
            )
        return self.state(seen, self.masks(params, seen, step))

    def update(
        self,
        params: Params,
        state: CompressionState,
        *,
        step: Step,
        grads: PyTree = None,
        stats: PyTree = None,
        key: Any = None,
    ) -> CompressionState:
        leaves = self.leaves.of(params)
        gradients = gradients_of(leaves, params, grads, self.score.needs_grads)
        seen, old = {}, {}
        for path, x in leaves.items():
            fixed = fixed_of(state, path)
            old[path], carried = (
                mask_of(fixed),
                fixed["carried"] if self.score.begin is not None else None,
            )
            each = Seen(path, x, step, gradients.get(path), carried, fold_path(key, path))
            seen[path] = (
                each._replace(carried=self.score.follow(each))
                if self.score.follow is not None
                else each
            )
        acts, at = (True, step) if self.every == 1 else due(self.every, self.target.schedules, step)
        masks = chosen(acts, lambda: self.masks(params, seen, at, old), lambda: old)
        before = CompressionState({}, {path: state.fixed[path] for path in leaves})
        return unless_broken(
            gradients if self.score.needs_grads else {}, self.state(seen, masks), before
        )

    def masks(
        self, params: Params, seen: dict[str, Seen], step: Step, old: Masks | None = None
    ) -> Masks:
        axes = self.leaves.axes(params)
        scores = {path: measured(self.score, each, axes[path]) for path, each in seen.items()}
        masks = kept(scores, self.target, step, signed=self.score.signed, axes=axes)
        if old is None or not scores:
            return masks
        broken = jnp.stack(
            [jnp.isnan(score).any() for score in scores.values()]
        ).any()  # under jit: NaN ranks nothing
        return {path: jnp.where(broken, old[path], mask) for path, mask in masks.items()}

    def state(self, seen: dict[str, Seen], masks: Masks) -> CompressionState:
        if self.score.begin is None:
            return CompressionState({}, masks)
        return CompressionState(
            {},
            {path: {"mask": mask, "carried": seen[path].carried} for path, mask in masks.items()},
        )
