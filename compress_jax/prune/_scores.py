"""Pruning by scores that need no gradients: magnitude, random, scores computed elsewhere, LAMP."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from compress_jax.core._leafwise import check_finite, fold_path, why_not_float
from compress_jax.core.arguments import random_key
from compress_jax.core.axes import Axes
from compress_jax.core.compression import Compression, CompressionState, bound, stamped
from compress_jax.core.describe import call_of
from compress_jax.core.errors import ShapeError, StateError
from compress_jax.core.paths import flatten
from compress_jax.core.schedules import begin
from compress_jax.core.types import Params, PyTree, Step
from compress_jax.prune._masks.score import Score, ScoreInputs, by_score
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
    ``dx = m * dview``. With a structure, n counts its units, whose magnitude is reduced from that
    of their entries; `n_m` keeps the largest n of each m.

    Every `update` recomputes the mask from the params, which stay dense. A pruned weight gets no
    gradient, so a plain optimizer leaves it unchanged, and it comes back as soon as other weights
    have shrunk below it, or the sparsity falls. Weight decay and momentum move pruned weights too.
    To hold a mask, stop updating it (`between`); for masks that only shrink, see `nested`.

    Of equal magnitudes the one earlier in C order is pruned first (with ``scope="global"``, the one
    in the earlier leaf), so the mask is that of a stable argsort, under every sharding. Nothing is
    sorted or flattened. Zeros of either sign are equal.

    Args:
      sparsity: share of the weights to prune, 0 to 1, or an optax schedule of the step, or
        ``{glob: either}``: leaves that no glob matches are not pruned. `init` uses the schedule at
        step 0. The value of a schedule is clipped to [0, 1]. None with an `n_m` structure, which
        sets it.
      structure: `n_m`, `block`, `channel` or `head`; None for single weights.
      scope: ``"leaf"``: each leaf reaches the sparsity by itself; ``"global"``: all leaves share
        one threshold, and only the total reaches it. With a structure, the sparsity is the share of
        all units.
      every: the mask is recomputed at steps divisible by it.
      floor: with ``scope="global"``, the least share of each leaf that stays, and at least one
        weight: a global threshold may empty a leaf. With 0, the default, it may; `shares` returns
        the sparsity of each leaf.

    Returns:
      The Compression. ``fixed[path]`` is the mask, bool, in the shape of the leaf, true where a
      weight is kept. Packs to `Sparse` where that is smaller than the dense array.

    Raises:
      ArgumentError: if ``sparsity`` is a number outside [0, 1], ``scope`` is neither of the two, or
        both contradict the structure.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> half = cj.prune.magnitude(0.5)
      >>> params = {"kernel": jnp.array([0.1, -3.0, 0.2, -0.3])}
      >>> half.view(params, half.init(params))["kernel"].tolist()
      [0.0, -3.0, 0.0, -0.30000001192092896]

    References:
      Han, Pool, Tran and Dally, "Learning both Weights and Connections for Efficient Neural
      Networks", 2015, section 3.
    """
    score = Score(lambda inputs: inputs.x)
    return by_score(score, sparsity, structure, scope=scope, every=every, floor=floor)


def random(
    sparsity: Sparsity | None,
    key: jax.Array,
    structure: Structure | None = None,
    *,
    scope: str = "leaf",
    every: int = 1,
) -> Compression:
    """Prune random weights, exactly as many as the sparsity says: the baseline of all methods.

    The score of a weight is a random number that depends only on the key, the path and the layer.
    So the mask is constant while the sparsity is (static sparse training), and with a rising
    sparsity no pruned weight comes back.

    Args:
      sparsity: as of `magnitude`.
      key: typed PRNG key, from ``jax.random.key(seed)``.
      structure: `n_m`, `block`, `channel` or `head`; None for single weights.
      scope: ``"leaf"`` or ``"global"``.
      every: masks are recomputed at steps divisible by it.

    Returns:
      The Compression. ``fixed[path]`` is the mask.

    Raises:
      ArgumentError: for impossible arguments.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> c = cj.prune.random(0.75, jax.random.key(0))
      >>> params = {"w": jnp.ones((4, 5))}
      >>> int(c.view(params, c.init(params))["w"].sum())
      5

    References:
      Liu et al., "The Unreasonable Effectiveness of Random Pruning", 2022.
    """
    random_key("key", key)

    def measure(inputs: ScoreInputs) -> jax.Array:
        own = fold_path(key, inputs.path)
        assert own is not None
        # Without the index all layers of a stack would have one mask.
        if inputs.layer is not None:
            own = jax.random.fold_in(own, inputs.layer)
        return jax.random.uniform(own, inputs.x.shape)

    return by_score(Score(measure), sparsity, structure, scope=scope, every=every)


def scored(
    scores: PyTree | Callable[[Params], PyTree],
    sparsity: Sparsity | None,
    structure: Structure | None = None,
    *,
    scope: str = "leaf",
    every: int = 1,
) -> Compression:
    """Prune the entries of lowest given score: from `snip`, `grasp`, `synflow` or another source.

    Scores are compared by value. They are part of the state, so a schedule prunes further along the
    same ranking; with a fixed sparsity the mask never changes.

    Args:
      scores: tree of floating-point arrays in the shapes of the params, or ``{path: array}``, or a
        function of the params that returns either. A larger score is more important. Under `at` and
        `rules` the function is called with ``{path: array}`` of the pruned leaves only, so compute
        scores of a whole model beforehand.
      sparsity: as of `magnitude`.
      structure: `n_m`, `block`, `channel` or `head`; None for single weights.
      scope: ``"leaf"`` or ``"global"``.
      every: masks are recomputed at steps divisible by it.

    Returns:
      The Compression. ``fixed[path]`` is ``{"mask": mask, "carried": scores}``.

    Raises:
      ArgumentError: for impossible arguments.
      StateError: in `init`, if a leaf has no scores.
      ShapeError: in `init`, if scores have another shape than their leaf.
      NonFiniteError: in `init`, if a score is NaN or infinite.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> c = cj.prune.scored({"w": jnp.array([0.1, -2.0, 5.0])}, 1 / 3)
      >>> params = {"w": jnp.ones(3)}
      >>> c.view(params, c.init(params))["w"].tolist()
      [1.0, 0.0, 1.0]
    """

    def build(begin: Callable[[ScoreInputs], jax.Array]) -> Compression:
        score = Score(lambda inputs: inputs.carried, begin, signed=True)
        return by_score(score, sparsity, structure, scope=scope, every=every)

    # Everything but `init` needs no scores, and is made before there are any.
    without = build(lambda inputs: _score_of({}, inputs))
    return _with_scores(scores, without, build, None)


def _with_scores(
    scores: PyTree | Callable[[Params], PyTree],
    without: Compression,
    build: Callable[[Callable[[ScoreInputs], jax.Array]], Compression],
    known: Mapping[str, Axes] | None,
) -> Compression:
    """Replace the `init` of a method without scores by one that starts from the given scores."""

    def init(params: Params, *, step: Step = 0) -> CompressionState:
        found = flatten(scores(params) if callable(scores) else scores)[0]
        made = build(lambda inputs: _score_of(found, inputs))
        return begin(bound(made, known) if known else made, params, step)

    def bind(known: Mapping[str, Axes]) -> Compression:
        return _with_scores(scores, bound(without, known), build, known)

    # The stamp tells scores apart: a function by its code, arrays by their values.
    kind = scores if callable(scores) else flatten(scores)[0]
    made = without._replace(init=init, bind=bind)
    return stamped(made, call_of("scored", scores=kind, of=without), known)


def _score_of(scores: Mapping[str, jax.Array], inputs: ScoreInputs) -> jax.Array:
    """Return the given scores of a leaf, checked."""
    path = inputs.path
    if path not in scores or why_not_float(path, scores[path]):
        known = ", ".join(scores) or "none"
        raise StateError(f"leaf {path!r} has no scores; there are floating ones for: {known}")
    score = jnp.asarray(scores[path])
    if score.shape != inputs.x.shape:
        raise ShapeError(f"leaf {path!r} has shape {inputs.x.shape}, its scores have {score.shape}")
    check_finite(f"{path} (its scores)", score)
    return score


def lamp(sparsity: Sparsity, *, every: int = 1) -> Compression:
    r"""Prune the weights of lowest layer-adaptive magnitude, over all leaves together.

    With a layer's weights in ascending order of magnitude, weight u scores
    :math:`w_u^2 / \sum_{v \ge u} w_v^2`: within a layer the order is that of magnitudes, the
    largest weight of each layer scores 1, and no layer vanishes before all have only one weight
    left. `shares` returns the resulting sparsity of each layer, for use with other methods.

    Unlike the other methods this sorts every leaf. To save time set ``every``, or use its `shares`
    with `magnitude`.

    Args:
      sparsity: share of all weights to prune, a number or a schedule.
      every: masks are recomputed at steps divisible by it.

    Returns:
      The Compression. ``fixed[path]`` is the mask.

    Raises:
      ArgumentError: for impossible arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([10.0, 11.0])}
      >>> c = cj.prune.lamp(0.5)
      >>> [x.tolist() for x in c.view(params, c.init(params)).values()]
      [[0.0, 2.0], [0.0, 11.0]]

    References:
      Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021, equation 4.
    """
    return by_score(Score(_lamp), sparsity, scope="global", every=every)


def _lamp(inputs: ScoreInputs) -> jax.Array:
    magnitudes = jnp.abs(inputs.x.astype(jnp.float32)).ravel()  # [n]
    order = jnp.argsort(magnitudes, stable=True)
    # The score is a ratio, so weights relative to the largest give the same, without overflow.
    largest = jnp.maximum(magnitudes.max(), jnp.finfo(jnp.float32).tiny)
    squares = jnp.square(magnitudes / largest)[order]
    left = jnp.cumsum(squares[::-1])[::-1]  # the denominator of equation 4
    # The inner choice keeps 0 / 0 out of the branch that is not taken.
    scores = jnp.where(left > 0, squares / jnp.where(left > 0, left, 1.0), 0.0)
    return jnp.zeros_like(scores).at[order].set(scores).reshape(inputs.x.shape)
