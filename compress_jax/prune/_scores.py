"""Magnitude pruning: the smallest weights are seen as zero."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.arguments import random_key
from compress_jax.core.compression import Compression, CompressionState, bound, stamped
from compress_jax.core.describe import call_of
from compress_jax.core.errors import ShapeError, StateError
from compress_jax.core.leafwise import check_finite, fold_path, why_not_float
from compress_jax.core.paths import flatten
from compress_jax.core.schedules import begin
from compress_jax.core.types import Params, Step
from compress_jax.prune._masks.score import Score, Seen, masked
from compress_jax.prune._masks.structures import Structure
from compress_jax.prune._masks.target import Sparsity


def magnitude(
    sparsity: Sparsity | None,
    structure: Structure | None = None,
    *,
    scope: str = "leaf",
    every: int = 1,
    floor: float = 0.0,
) -> Compression:
    r"""Prune the weights of smallest magnitude, exactly as many as the sparsity says.

    With the mask ``m = 0`` on the ``floor(sparsity * n + 1/2)`` smallest of n magnitudes ``|x|``,
    else 1: ``view(x) = x`` where ``m = 1``, else ``+0.0``. The gradient is the view's own,
    ``dx = m * dview``. With a structure, n counts its units, and their magnitude is that of their
    entries as the structure reduces it; `n_m` keeps the largest n of each m.

    The mask is recomputed by every `update` from the params, which stay dense under the view. A
    pruned weight gets no gradient, so a plain optimizer leaves it where it was, and it comes back
    as soon as kept weights have shrunk below it, or the sparsity falls. Weight decay and momentum
    move pruned weights too. To hold a mask, stop updating it (`between`); for masks that only
    shrink, see `nested`.

    Of equal magnitudes the one earlier in C order is pruned first (with ``scope="global"``, the one
    in the earlier leaf), so the mask is that of a stable argsort, under every sharding; but nothing
    is sorted or flattened. Zeros of either sign are equal.

    Args:
      sparsity: share of the weights to prune, 0 to 1, or an optax schedule of the step, or
        ``{glob: either}``: leaves that no glob matches are left alone. `init` uses the schedule at
        step 0. What a schedule returns is clipped to [0, 1]; see `compress_jax.prune.amount` for
        the rounding. None with an `n_m` structure, which sets it.
      structure: `n_m`, `block`, `channel` or `head`; None for single weights.
      scope: ``"leaf"``: each leaf reaches the sparsity by itself; ``"global"``: all leaves it is
        given share one threshold, and only the total reaches it. With a structure, the sparsity is
        the share of all units.
      every: the mask is recomputed at steps divisible by it.
      floor: with ``scope="global"``, the share of every leaf that stays, and at least one weight: a
        threshold for all may empty a leaf. 0, the default, guards nothing; `shares` shows what each
        leaf lost.

    Returns:
      The Compression. ``fixed[path]`` is the mask, bool, the shape of the leaf, true where a weight
      is kept. Packs to `Sparse` where that is smaller than the dense array.

    Raises:
      ValueError: if ``sparsity`` is a number outside [0, 1], ``scope`` is neither of the two, or
        both contradict the structure.

    Example:
      >>> import jax.numpy as jnp
      >>> half, params = magnitude(0.5), {"kernel": jnp.array([0.1, -3.0, 0.2, -0.3])}
      >>> half.view(params, half.init(params))["kernel"].tolist()
      [0.0, -3.0, 0.0, -0.30000001192092896]

    References:
      Han, Pool, Tran and Dally, "Learning both Weights and Connections for Efficient Neural
      Networks", 2015, section 3.
    """
    return masked(
        Score(lambda seen: seen.x), sparsity, structure, scope=scope, every=every, floor=floor
    )


# Random pruning, the baseline: weights drawn by lot are seen as zero.


def random(
    sparsity: Sparsity | None,
    key: jax.Array,
    structure: Structure | None = None,
    *,
    scope: str = "leaf",
    every: int = 1,
) -> Compression:
    """Prune weights drawn at random, exactly as many as the sparsity says.

    Each weight draws a number once, from the key and the leaf's name; the lowest are pruned. So the
    mask stays as it is while the sparsity stays (static sparse training), and with a rising one
    nothing comes back.

    Args:
      sparsity: as of `magnitude`.
      key: typed PRNG key, from ``jax.random.key(seed)``.
      structure: `n_m`, `block`, `channel` or `head`; None for single weights.
      scope: ``"leaf"`` or ``"global"``.
      every: masks are looked at anew at steps divisible by it.

    Returns:
      The Compression. ``fixed[path]`` is the mask.

    Raises:
      ValueError: for impossible arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> c, params = random(0.75, jax.random.key(0)), {"w": jnp.ones((4, 5))}
      >>> int(c.view(params, c.init(params))["w"].sum())
      5

    References:
      Liu et al., "The Unreasonable Effectiveness of Random Pruning", 2022.
    """
    random_key("key", key)

    def measure(seen: Seen) -> jax.Array:
        own: Any = fold_path(key, seen.path)
        own = (
            own if seen.layer is None else jax.random.fold_in(own, seen.layer)
        )  # else all layers would have one mask
        return jax.random.uniform(own, seen.x.shape)

    return masked(Score(measure), sparsity, structure, scope=scope, every=every)


# Pruning by scores that were computed elsewhere: at initialisation, from a data set, by another
# library.


def scored(
    scores: Any | Callable[[Params], Any],
    sparsity: Sparsity | None,
    structure: Structure | None = None,
    *,
    scope: str = "leaf",
    every: int = 1,
) -> Compression:
    """Prune the entries of lowest given score, compared by value: one-shot, from `snip`, `grasp`, `synflow` or anywhere.

    Scores are kept in the state, so a schedule prunes further along the same ranking; with a fixed
    sparsity the mask never changes.

    Args:
      scores: tree of floating arrays in the shapes of the params, or ``{path: array}``, larger
        where an entry matters more; or a function of the params that returns one. Under `at` and
        `rules` the function is given ``{path: array}`` of the leaves that are pruned, so compute
        scores of a whole model beforehand.
      sparsity: as of `magnitude`.
      structure: `n_m`, `block`, `channel` or `head`; None for single weights.
      scope: ``"leaf"`` or ``"global"``.
      every: masks are chosen anew at steps divisible by it.

    Returns:
      The Compression. ``fixed[path]`` is ``{"mask": mask, "carried": scores}``.

    Raises:
      ValueError: for impossible arguments.
      StateError: in `init`, if a leaf has no scores.
      ShapeError: in `init`, if scores have another shape than their leaf.
      NonFiniteError: in `init`, if a score is NaN or infinite.

    Example:
      >>> c, params = scored({"w": jnp.array([0.1, -2.0, 5.0])}, 1 / 3), {"w": jnp.ones(3)}
      >>> c.view(params, c.init(params))["w"].tolist()
      [1.0, 0.0, 1.0]
    """
    score = Score(lambda seen: seen.carried, lambda seen: _own({}, seen), signed=True)
    ranked = masked(score, sparsity, structure, scope=scope, every=every)
    return _with_scores(
        scores,
        ranked,
        lambda found: masked(found, sparsity, structure, scope=scope, every=every),
        None,
    )


def _with_scores(
    scores: Any, ranked: Compression, build: Callable[[Score], Compression], known: Any
) -> Compression:
    """Replace the `init` of a method that has no scores yet by one that begins with those given."""

    def init(params: Params, *, step: Step = 0) -> CompressionState:
        found = flatten(scores(params) if callable(scores) else scores)[0]
        begun = build(Score(lambda seen: seen.carried, lambda seen: _own(found, seen), signed=True))
        return begin(bound(begun, known) if known else begun, params, step)

    def bind(known: Any) -> Compression:
        return _with_scores(scores, bound(ranked, known), build, known)

    kind = scores if callable(scores) else flatten(scores)[0]
    made = ranked._replace(init=init, bind=bind)
    return stamped(made, call_of("scored", scores=kind, of=ranked), known)


def _own(scores: dict[str, jax.Array], seen: Seen) -> jax.Array:
    if seen.path not in scores or why_not_float(seen.path, scores[seen.path]):
        raise StateError(
            f"leaf {seen.path!r} has no scores; there are floating ones for: "
            f"{', '.join(scores) or 'none'}"
        )
    score = jnp.asarray(scores[seen.path])
    if score.shape != seen.x.shape:
        raise ShapeError(
            f"leaf {seen.path!r} has shape {seen.x.shape}, its scores have {score.shape}"
        )
    check_finite(f"{seen.path} (its scores)", score)
    return score


# LAMP: one threshold for all layers, on magnitudes relative to what else is left of their layer.


def lamp(sparsity: Sparsity, *, every: int = 1) -> Compression:
    r"""Prune the weights of lowest layer-adaptive magnitude, over all leaves together.

    With a layer's weights in ascending order of magnitude, weight u scores
    :math:`w_u^2 / \sum_{v \ge u} w_v^2`: within a layer the order is that of magnitudes, the
    largest weight of each layer scores 1, and no layer vanishes before all have only one weight
    left. How many each layer loses is the allocation of LAMP; `shares` tells it, for other methods.

    This sorts every leaf, unlike the other methods: use ``every``, or its `shares` with
    `magnitude`.

    Args:
      sparsity: share of all weights to prune, a number or a schedule.
      every: masks are chosen anew at steps divisible by it.

    Returns:
      The Compression. ``fixed[path]`` is the mask.

    Raises:
      ValueError: for impossible arguments.

    Example:
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([10.0, 11.0])}
      >>> c = lamp(0.5)
      >>> [x.tolist() for x in c.view(params, c.init(params)).values()]
      [[0.0, 2.0], [0.0, 11.0]]

    References:
      Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021, equation 4.
    """
    return masked(Score(_lamp), sparsity, scope="global", every=every)


def _lamp(seen: Seen) -> jax.Array:
    magnitudes = jnp.abs(seen.x.astype(jnp.float32)).ravel()
    order = jnp.argsort(magnitudes, stable=True)
    squares = jnp.square(magnitudes / jnp.maximum(magnitudes.max(), jnp.finfo(jnp.float32).tiny))[
        order
    ]
    left = jnp.cumsum(squares[::-1])[::-1]
    scores = jnp.where(left > 0, squares / jnp.where(left > 0, left, 1.0), 0.0)
    return jnp.zeros_like(scores).at[order].set(scores).reshape(seen.x.shape)
