"""The builder of all pruning methods that score entries: a new method is a score, and nothing else."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression, CompressionState, Params, Pointwise
from compress_jax.core.errors import ShapeError, StateError
from compress_jax.core.leafwise import check_finite, fold_path, leafwise, why_not_float
from compress_jax.core.packed import Sparse, nbytes
from compress_jax.core.paths import flatten
from compress_jax.prune.choose import Masks, kept
from compress_jax.prune.structures import Structure
from compress_jax.prune.target import Sparsity, Target


class Seen(NamedTuple):
    """What a score may look at: one leaf, and what came with the step.

    Attributes:
      path: the leaf's name.
      x: the stored weights, dense: pruned ones have their value.
      step: the step; 0 in `init`.
      grad: the gradient of the loss at the weights the model used; None in `init`.
      carried: what `Score.begin` or `Score.follow` returned last; None for a score without.
      key: the leaf's own typed PRNG key of this step, or None.
    """

    path: str
    x: jax.Array
    step: Any = 0
    grad: Any = None
    carried: Any = None
    key: Any = None


class Score(NamedTuple):
    """How much each entry of a leaf matters; what matters least is pruned.

    Attributes:
      measure: ``(Seen) -> scores``, floating point, the shape of the leaf.
      begin: ``(Seen) -> carried``, any tree of arrays, for a score that remembers; None for one that does not.
      follow: ``(Seen) -> carried`` at every update; by default what is carried stays.
      signed: scores are compared by value; by default by magnitude.
      needs_grads: it cannot be measured without gradients. Until the first come with an update, everything is kept.
    """

    measure: Callable[[Seen], jax.Array]
    begin: Callable[[Seen], Any] | None = None
    follow: Callable[[Seen], Any] | None = None
    signed: bool = False
    needs_grads: bool = False


def normalized(score: Score) -> Score:
    r"""Return a score that counts relative to its leaf: :math:`s / \lVert s \rVert_2`, and zero in a leaf of zeros.

    Within a leaf this changes nothing. With ``scope="global"`` leaves of large entries no longer outlive those of small ones
    for that alone. The norm is a sum, so masks may differ in the last bit of a score between shardings.

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
      Lee et al., "JaxPruner: A concise library for sparsity research", 2023, arXiv:2304.14082 (its global pruners).
    """

    def measure(seen: Seen) -> jax.Array:
        found = score.measure(seen).astype(jnp.float32)
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

    ``view(x) = x`` where the mask is true, else ``+0.0``; the gradient is the view's own. The params stay dense under it. Of
    equal scores the one earlier in C order is pruned first; nothing is sorted, and masks are the same under every sharding
    wherever scores are.

    Args:
      score: of each entry.
      sparsity: share of the entries (of the units of a structure) to prune: a number, an optax schedule of the step, or
        ``{glob: either}``, as `erk` and others return it: leaves that no glob matches are left alone. None with `n_m`.
      structure: `n_m`, `block`, `channel` or `head`; None for single entries.
      scope: ``"leaf"``: each leaf reaches the sparsity by itself; ``"global"``: all leaves share one threshold.
      every: masks are chosen anew at steps divisible by it; what a score remembers is updated at every step.
      floor: with ``scope="global"``, the share of every leaf's units that stays, and at least one: a threshold for all may
        empty a leaf, which ends training. The sparsity is then missed where the floors leave less to prune.

    Returns:
      The Compression. ``fixed[path]`` is the mask, or ``{"mask": mask, "carried": what the score remembers}``. Packs to
      `Sparse` where that is smaller than the dense array.

    Raises:
      ValueError: for impossible arguments; in `update`, if the score needs gradients and there are none.
      TypeError: if the score is not a `Score`.
      ShapeError: in `init` and `update`, if a leaf's scores are not of its shape.

    Example:
      >>> oldest = Score(lambda seen: jnp.arange(seen.x.size, dtype=jnp.float32).reshape(seen.x.shape))
      >>> c, params = masked(oldest, 0.5), {"w": jnp.array([5.0, 6.0, 7.0, 8.0])}
      >>> c.view(params, c.init(params))["w"].tolist()
      [0.0, 0.0, 7.0, 8.0]
    """
    if every < 1:
        raise ValueError(f"masks are chosen every 1 or more steps, got every={every}")
    return _Masked(_is_score(score), Target.of(sparsity, structure, scope, floor), every).compression()


def _is_score(score: Any) -> Score:
    """Return the argument if it is a `Score`: a bare function would fail far from here."""
    if not isinstance(score, Score):
        raise TypeError(f"a score is a prune.Score, got {score!r}; wrap a function of what is seen: prune.Score(fn)")
    return score


def _measured(score: Score, seen: Seen) -> jax.Array:
    """Return the scores of a leaf: one for each entry, or its mask would broadcast."""
    found = score.measure(seen)
    if found.shape != seen.x.shape:
        raise ShapeError(f"leaf {seen.path!r} of shape {seen.x.shape} was given scores of shape {found.shape}")
    return found


def see(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Return ``x`` where the mask is true, else zero: the pointwise view of a pruned array."""
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def pack(seen: jax.Array, mask: jax.Array) -> Any:
    """Return the smaller of the sparse and the dense form of a view."""
    return min(Sparse.pack(seen, mask), seen, key=nbytes)


def mask_of(fixed: Any) -> jax.Array:
    """Return the mask in the fixed state of one pruned leaf."""
    return fixed["mask"] if isinstance(fixed, Mapping) else fixed


def of_masks(why_not: Callable[[str, Any], str | None]) -> Compression:
    """Return a Compression whose view, packed form and reasons are those of masks; `init` and `update` are to be replaced.

    Args:
      why_not: ``(path, x) -> reason`` to leave a leaf alone, or None.

    Returns:
      The Compression.
    """
    return leafwise(
        lambda x, learned, fixed: see(x, mask_of(fixed)),
        init=lambda x, key: (None, jnp.full_like(x, True, dtype=bool)),
        pack=lambda x, learned, fixed: pack(see(x, mask_of(fixed)), mask_of(fixed)),
        why_not=why_not,
        pointwise=lambda x, learned, fixed: Pointwise(see, (mask_of(fixed),)),
    )


def pruned_leaves(params: Params, why_not: Callable[[str, Any], str | None]) -> dict[str, jax.Array]:
    """Return the leaves that are pruned, by path, all found to be finite."""
    leaves = {path: x for path, x in flatten(params)[0].items() if not (why_not_float(path, x) or why_not(path, x))}
    for path, x in leaves.items():
        check_finite(path, x)
    return leaves


def fixed_of(state: CompressionState, path: str) -> Any:
    """Return a leaf's fixed state, or say whose state this is."""
    if path not in state.fixed:
        known = ", ".join(map(str, state.fixed)) or "none"
        raise StateError(f"the compression state has nothing for leaf {path!r} (it has: {known}); was it made by `init`?")
    return state.fixed[path]


def gradients_of(leaves: Mapping[str, Any], grads: Any, needed: bool) -> dict[str, Any]:
    """Return the gradients given to `update`, by path; where they are needed, those of all leaves, found to be finite."""
    found = flatten(grads)[0] if grads is not None else {}
    missing = [path for path in leaves if found.get(path) is None]
    if needed and missing:
        raise ValueError(
            f"this method looks at gradients, and there is none for {', '.join(missing)}; give update(..., grads=...) "
            "the gradient of the loss at the weights the model used"
        )
    for path in leaves if needed else ():
        check_finite(f"{path} (its gradient)", found[path])
    return found


class _Masked(NamedTuple):
    """The arguments of `masked`, and the functions of its Compression."""

    score: Score
    target: Target
    every: int

    def compression(self) -> Compression:
        return of_masks(self.target.why_not)._replace(init=self.init, update=self.update)

    def init(self, params: Params) -> CompressionState:
        self.target.check(path for path, x in flatten(params)[0].items() if why_not_float(path, x) is None)
        seen = {path: Seen(path, x) for path, x in pruned_leaves(params, self.target.why_not).items()}
        if self.score.begin is not None:
            seen = {path: each._replace(carried=self.score.begin(each)) for path, each in seen.items()}
        if self.score.needs_grads:
            return self.state(seen, {path: jnp.full_like(each.x, True, dtype=bool) for path, each in seen.items()})
        return self.state(seen, self.masks(seen, 0))

    def update(
        self, params: Params, state: CompressionState, *, step: Any, grads: Any = None, key: Any = None, **_: Any
    ) -> CompressionState:
        leaves = pruned_leaves(params, self.target.why_not)
        gradients = gradients_of(leaves, grads, self.score.needs_grads)
        seen, old = {}, {}
        for path, x in leaves.items():
            fixed = fixed_of(state, path)
            old[path], carried = mask_of(fixed), fixed["carried"] if self.score.begin is not None else None
            each = Seen(path, x, step, gradients.get(path), carried, fold_path(key, path))
            seen[path] = each._replace(carried=self.score.follow(each)) if self.score.follow is not None else each
        if self.every == 1:
            return self.state(seen, self.masks(seen, step))
        now = jnp.asarray(step) % self.every == 0
        return self.state(seen, jax.lax.cond(now, lambda: self.masks(seen, step), lambda: old))

    def masks(self, seen: dict[str, Seen], step: Any) -> Masks:
        scores = {path: _measured(self.score, each) for path, each in seen.items()}
        return kept(scores, self.target, step, signed=self.score.signed)

    def state(self, seen: dict[str, Seen], masks: Masks) -> CompressionState:
        if self.score.begin is None:
            return CompressionState({}, masks)
        return CompressionState({}, {path: {"mask": mask, "carried": seen[path].carried} for path, mask in masks.items()})
