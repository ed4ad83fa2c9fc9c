"""From what a loss returns to a sum and a count, and the check that a loss without a mask has no need of one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.core.types import PyTree
from compress_jax.distill import _masks
from compress_jax.distill._losses.tokens import Total, masked_total, takes_mask
from compress_jax.distill._masks import fitted, has_positions, kept, of_examples

TOLD = "let the loss take mask=..., as those of compress_jax.distill do, or return a number for each entry of the mask"


def total_of(name: str, loss: jax.Array | Total, mask: Any, told: bool) -> jax.Array | Total:
    """Return the total of a loss over what counts; where there is no mask, the loss itself.

    Args:
      name: of the term, for errors.
      loss: of each entry that the mask is of; or a scalar of a loss that was told the mask, which
        then weighs as many as there are examples that count.
      mask: or None.
      told: whether the loss took the mask.

    Returns:
      A `Total`, or ``loss``.

    Raises:
      ShapeError: if mask and loss do not fit.

    Example:
      >>> total_of("kl", jnp.array([1.0, 9.0]), jnp.array([1, 0]), False).mean.tolist()
      1.0
    """
    if mask is None or isinstance(loss, Total):
        return loss
    if loss.ndim == 0 and told:
        number = (of_examples(mask, jnp.shape(mask)[0]) > 0).sum().astype(loss.dtype)
        return Total(jnp.where(number > 0, loss, 0) * number, number)
    if loss.ndim == 0:
        raise ShapeError(
            f"the term {name!r} gave one number of a batch with a mask, in which padding may "
            f"count: {TOLD}"
        )
    try:
        return masked_total(loss, mask)
    except ShapeError as error:
        raise ShapeError(
            f"the loss of term {name!r} has shape {tuple(loss.shape)}, and its mask "
            f"{tuple(jnp.shape(mask))} does not fit: "
            f"{TOLD}; or name another mask of the batch by the term's mask=..."
        ) from error


def of_logits(name: str, loss: Any, logits: jax.Array, mask: Any, told: bool) -> jax.Array | Total:
    """Return a loss of logits, over what counts if there is a mask: of tokens, or of examples.

    Example:
      >>> of_logits("kl", jnp.array([1.0, 9.0]), jnp.ones((2, 3)), jnp.array([[1, 1], [0, 0]]), False).mean.tolist()
      1.0
    """
    if mask is None or isinstance(loss, Total) or loss.ndim == 0:
        return total_of(name, loss, mask, told)
    if told and loss.ndim == 1:
        return total_of(name, loss, of_examples(mask, len(loss)), told)
    fits = fitted(mask, logits.shape[:-1], f"the logits of term {name!r}", examples=True)
    return total_of(name, loss, fits, told)


def of_features(
    name: str, loss: Any, features: jax.Array, mask: Any, told: bool
) -> jax.Array | Total:
    """Return a loss of features, over what counts; of each example, if the loss saw to its positions or there are none.

    Example:
      >>> of_features("hint", jnp.array([1.0, 9.0]), jnp.ones((2, 3)), jnp.array([1, 0]), True).mean.tolist()
      1.0
    """
    if (
        mask is None
        or isinstance(loss, Total)
        or loss.ndim != 1
        or not (told or features.ndim == 2)
    ):
        return total_of(name, loss, mask, told)
    return total_of(name, loss, of_examples(mask, features.shape[0]), told)


def shown(feature: jax.Array, of: Callable[..., Any] | None, what: str, mask: Any) -> jax.Array:
    """Return a feature as a loss is to see it, zero where the mask says so, after a function that must not undo it.

    Args:
      feature: ``[batch, *positions, channels]``.
      of: ``feature -> feature``, which is given the mask if it takes one; or None.
      what: whose it is, for errors.
      mask: or None.

    Returns:
      What the loss sees.

    Raises:
      ShapeError: if the mask does not fit, or the function takes none and makes other positions.

    Example:
      >>> shown(jnp.array([[1.0], [jnp.nan]]), jnp.tanh, "x", jnp.array([1, 0])).round(2).tolist()
      [[0.7599999904632568], [0.0]]
    """
    if mask is not None:
        feature = kept(feature, _masks.of_features(mask, feature, what))
    if of is None:
        return feature
    if takes_mask(of):
        return of(feature, mask=mask)
    made = of(feature)
    if (
        mask is not None
        and has_positions(mask)
        and feature.ndim > 2
        and made.shape[:-1] != feature.shape[:-1]
    ):
        raise ShapeError(
            f"{what} was {feature.shape} and is made {made.shape} by a function that does not "
            "know of the mask "
            f"{tuple(jnp.shape(mask))}, so padding would count: let it take mask=..., as "
            "distill.pool does"
        )
    return made


def masked(
    what: str,
    loss: Callable[..., Any],
    given: tuple[Any, ...],
    mask: Any,
    units: int,
    **options: Any,
) -> Any:
    """Return ``loss(*given, **options)``, with the mask if the loss takes one, and else only if it needs none.

    Args:
      what: the term, for errors.
      loss: see `on_logits` and `on_features`.
      given: its arguments; the first one decides which leading axes the entries are on.
      mask: or None.
      units: how many leading axes tell entries apart.
      options: for the loss.

    Returns:
      What the loss returns.

    Raises:
      ArgumentError: if a loss that takes no mask couples the entries.
    """
    if mask is None:
        return loss(*given, **options)
    if takes_mask(loss):
        return loss(*given, mask=mask, **options)
    try:
        coupled = couples(loss, given, units, **options)
    except Exception as error:
        raise ArgumentError(
            f"{what}: whether its loss needs the mask could not be tried ({error}); {TOLD}"
        ) from error
    if coupled:
        raise ArgumentError(
            f"{what}: its loss of one entry depends on others, so that padding would count; {TOLD}"
        )
    return loss(*given, **options)


def couples(loss: Callable[..., Any], given: tuple[Any, ...], units: int, **options: Any) -> bool:
    """Tell whether a loss of one entry depends on the others, by trying it on two random batches that share one entry.

    Args:
      loss: of arrays with the same leading axes.
      given: trees of arrays or shapes.
      units: how many leading axes tell entries apart.
      options: for the loss, tried as 1: temperatures.

    Returns:
      Whether it does.

    Example:
      >>> from compress_jax.distill import kl, similarity
      >>> logits = jnp.ones((4, 3))
      >>> couples(kl, (logits, logits), 1), couples(similarity, (logits, logits), 1)
      (False, True)
    """
    leaves, tree = jax.tree.flatten(given)
    return _couples(
        loss, tuple((x.shape, jnp.dtype(x.dtype)) for x in leaves), tree, units, tuple(options)
    )


@functools.lru_cache(128)
def _couples(
    loss: Callable[..., Any],
    shapes: tuple[Any, ...],
    tree: PyTree,
    units: int,
    options: tuple[str, ...],
) -> bool:
    leaves = [jax.ShapeDtypeStruct(*each) for each in shapes]
    leading = leaves[0].shape[:units]

    @jax.jit
    def tried(seed: jax.Array) -> jax.Array:
        keys = [
            [jax.random.fold_in(key, i) for key in (jax.random.key(0), seed)]
            for i in range(len(leaves))
        ]
        made = [_drawn(leaf, leading, *each) for leaf, each in zip(leaves, keys, strict=True)]
        return loss(*jax.tree.unflatten(tree, made), **dict.fromkeys(options, 1.0))

    with jax.ensure_compile_time_eval():
        one, other = (np.asarray(tried(jax.random.key(seed))) for seed in (1, 2))
    first = (0,) * min(units, one.ndim)
    return not np.allclose(one[first], other[first], rtol=1e-4, atol=1e-6)


def _drawn(x: Any, leading: tuple[int, ...], common: jax.Array, own: jax.Array) -> jax.Array:
    """Return an array of three entries along each leading axis: the first from one key, the others from another.

    What is of several teachers has them in front; what has no such axes is 1 (variances that a part
    gives).
    """
    units = len(leading)
    at = next((i for i in (0, 1) if x.shape[i : i + units] == leading), None)
    if at is None or not jnp.issubdtype(x.dtype, jnp.floating):
        shape = x.shape if at is None else (*x.shape[:at], *(3,) * units, *x.shape[at + units :])
        return jnp.ones(shape, x.dtype) if at is None else jnp.zeros(shape, x.dtype)
    shape = (*x.shape[:at], *(3,) * units, *x.shape[at + units :])
    shared = jnp.zeros(shape, bool).at[(*(slice(None),) * at, *(0,) * units)].set(True)
    first, others = (jax.random.normal(key, shape, jnp.float32) for key in (common, own))
    return jnp.where(shared, first, 3 * others).astype(x.dtype)
