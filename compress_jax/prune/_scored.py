"""Pruning by scores that were computed elsewhere: at initialisation, from a data set, by another library."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression, CompressionState, Params, bound, stamped
from compress_jax.core.describe import call_of
from compress_jax.core.errors import ShapeError, StateError
from compress_jax.core.leafwise import check_finite, why_not_float
from compress_jax.core.paths import flatten
from compress_jax.prune.masked import Score, Seen, masked
from compress_jax.prune.structures import Structure
from compress_jax.prune.target import Sparsity


def scored(
    scores: Any | Callable[[Params], Any],
    sparsity: Sparsity | None,
    structure: Structure | None = None,
    *,
    scope: str = "leaf",
    every: int = 1,
) -> Compression:
    """Prune the entries of lowest given score, compared by value: one-shot, from `snip`, `grasp`, `synflow` or anywhere.

    Scores are kept in the state, so a schedule prunes further along the same ranking; with a fixed sparsity the mask never
    changes.

    Args:
      scores: tree of floating arrays in the shapes of the params, or ``{path: array}``, larger where an entry matters more;
        or a function of the params that returns one. Under `at` and `rules` the function is given ``{path: array}`` of the
        leaves that are pruned, so compute scores of a whole model beforehand.
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
    return _with_scores(scores, ranked, lambda found: masked(found, sparsity, structure, scope=scope, every=every), None)


def _with_scores(scores: Any, ranked: Compression, build: Callable[[Score], Compression], known: Any) -> Compression:
    """Replace the `init` of a method that has no scores yet by one that begins with those given."""

    def init(params: Params) -> CompressionState:
        found = flatten(scores(params) if callable(scores) else scores)[0]
        begun = build(Score(lambda seen: seen.carried, lambda seen: _own(found, seen), signed=True))
        return (bound(begun, known) if known else begun).init(params)

    def bind(known: Any) -> Compression:
        return _with_scores(scores, bound(ranked, known), build, known)

    kind = scores if callable(scores) else flatten(scores)[0]
    made = ranked._replace(init=init, bind=bind)
    return stamped(made, call_of("scored", scores=kind, of=ranked), known)


def _own(scores: dict[str, jax.Array], seen: Seen) -> jax.Array:
    if seen.path not in scores or why_not_float(seen.path, scores[seen.path]):
        raise StateError(f"leaf {seen.path!r} has no scores; there are floating ones for: {', '.join(scores) or 'none'}")
    score = jnp.asarray(scores[seen.path])
    if score.shape != seen.x.shape:
        raise ShapeError(f"leaf {seen.path!r} has shape {seen.x.shape}, its scores have {score.shape}")
    check_finite(f"{seen.path} (its scores)", score)
    return score
