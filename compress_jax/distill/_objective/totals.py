"""Sums and counts from what a loss returns, and the check that a loss needs no mask."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.core.types import DType, PyTree, Scalar, Shape
from compress_jax.distill import _masks
from compress_jax.distill._losses.tokens import Total, masked_total, takes_mask
from compress_jax.distill._masks import Mask, fitted, has_positions, kept, of_examples

ADVICE = (
    "let the loss take mask=..., as those of compress_jax.distill do, or return a number for each "
    "entry of the mask"
)


def total_of(
    name: str, loss: jax.Array | Total, mask: Mask | None, masked: bool
) -> jax.Array | Total:
    """Return the total of a loss over the mask; without a mask, the loss itself.

    Args:
      name: name of the term, for errors.
      loss: one number per entry of the mask; or a scalar from a loss that was given the mask, which
        is then weighted by the number of examples that count.
      mask: the mask or None.
      masked: whether the loss was given the mask.

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
    # A mean over the examples that count: times their number it is a sum, as totals are added.
    if loss.ndim == 0 and masked:
        number = (of_examples(mask, jnp.shape(mask)[0]) > 0).sum().astype(loss.dtype)
        return Total(jnp.where(number > 0, loss, 0) * number, number)
    if loss.ndim == 0:
        raise ShapeError(
            f"the term {name!r} gave one number of a batch with a mask, in which padding may "
            f"count: {ADVICE}"
        )
    try:
        return masked_total(loss, mask)
    except ShapeError as error:
        raise ShapeError(
            f"the loss of term {name!r} has shape {tuple(loss.shape)}, and its mask "
            f"{tuple(jnp.shape(mask))} does not fit: {ADVICE}; or name another mask "
            "of the batch by the term's mask=..."
        ) from error


def of_logits(
    name: str, loss: jax.Array | Total, logits: jax.Array, mask: Mask | None, masked: bool
) -> jax.Array | Total:
    """Return the total of a loss on logits over a mask of tokens or examples; see `total_of`.

    Example:
      >>> mask = jnp.array([[1, 1], [0, 0]])
      >>> of_logits("kl", jnp.array([1.0, 9.0]), jnp.ones((2, 3)), mask, False).mean.tolist()
      1.0
    """
    if mask is None or isinstance(loss, Total) or loss.ndim == 0:
        return total_of(name, loss, mask, masked)
    # A loss that has applied a mask of tokens may return one number for each example.
    if masked and loss.ndim == 1:
        return total_of(name, loss, of_examples(mask, len(loss)), masked)
    fits = fitted(mask, logits.shape[:-1], f"the logits of term {name!r}", examples=True)
    return total_of(name, loss, fits, masked)


def of_features(
    name: str, loss: jax.Array | Total, features: jax.Array, mask: Mask | None, masked: bool
) -> jax.Array | Total:
    """Return the total of a loss on features over a mask; see `total_of`.

    A loss ``[batch]`` takes the mask of examples, if it has treated positions or there are none.

    Example:
      >>> mask = jnp.array([1, 0])
      >>> of_features("hint", jnp.array([1.0, 9.0]), jnp.ones((2, 3)), mask, True).mean.tolist()
      1.0
    """
    if mask is None or isinstance(loss, Total):
        return total_of(name, loss, mask, masked)
    if loss.ndim == 1 and (masked or features.ndim == 2):
        mask = of_examples(mask, features.shape[0])
    return total_of(name, loss, mask, masked)


def transformed(
    feature: jax.Array, transform: Callable[..., jax.Array] | None, what: str, mask: Mask | None
) -> jax.Array:
    """Return a feature with masked entries zero, transformed.

    Args:
      feature: ``[batch, *positions, channels]``.
      transform: ``feature -> feature``, which receives the mask if it takes one; or None.
      what: description of the feature, for errors.
      mask: the mask or None.

    Returns:
      The feature that the loss is given.

    Raises:
      ShapeError: if the mask does not fit, or the function takes none and makes other positions.

    Example:
      >>> feature = jnp.array([[1.0], [jnp.nan]])
      >>> transformed(feature, jnp.tanh, "x", jnp.array([1, 0])).round(2).tolist()
      [[0.7599999904632568], [0.0]]
    """
    if mask is not None:
        feature = kept(feature, _masks.of_features(mask, feature, what))
    if transform is None:
        return feature
    if takes_mask(transform):
        return transform(feature, mask=mask)
    made = transform(feature)
    # A mask of examples fits whatever is made of them; one of positions needs the same positions.
    if mask is None or not has_positions(mask) or feature.ndim <= 2:
        return made
    if made.shape[:-1] != feature.shape[:-1]:
        raise ShapeError(
            f"{what} was {feature.shape} and is made {made.shape} by a function that does not "
            f"know of the mask {tuple(jnp.shape(mask))}, so padding would count: let it take "
            "mask=..., as distill.pool does"
        )
    return made


def evaluate(
    what: str,
    loss: Callable[..., jax.Array],
    given: tuple[PyTree, ...],
    mask: Mask | None,
    units: int,
    **options: Scalar,
) -> jax.Array:
    """Return ``loss(*given, **options)``, with the mask if the loss takes one.

    Args:
      what: description of the term, for errors.
      loss: see `on_logits` and `on_features`.
      given: its arguments; the leading axes of the first one are those of the entries.
      mask: the mask or None.
      units: number of leading axes that index entries.
      options: options of the loss.

    Returns:
      What the loss returns.

    Raises:
      ArgumentError: if a loss that takes no mask couples the entries, so that padding would count.
    """
    if mask is None:
        return loss(*given, **options)
    if takes_mask(loss):
        return loss(*given, mask=mask, **options)
    # The loss is not told which entries count, so that none may depend on another.
    try:
        coupled = couples(loss, given, units, **options)
    except Exception as error:
        raise ArgumentError(
            f"{what}: whether its loss needs the mask could not be tried ({error}); {ADVICE}"
        ) from error
    if coupled:
        raise ArgumentError(
            f"{what}: its loss of one entry depends on others, so that padding would count; "
            f"{ADVICE}"
        )
    return loss(*given, **options)


def couples(
    loss: Callable[..., jax.Array], given: tuple[PyTree, ...], units: int, **options: Scalar
) -> bool:
    """Return whether the loss of one entry depends on the others.

    It evaluates the loss on two random batches that share one entry.

    Args:
      loss: a function of arrays with the same leading axes.
      given: trees of arrays or shapes.
      units: number of leading axes that index entries.
      options: options of the loss, tried as 1: temperatures.

    Returns:
      Whether it does.

    Example:
      >>> from compress_jax.distill import kl, similarity
      >>> logits = jnp.ones((4, 3))
      >>> couples(kl, (logits, logits), 1), couples(similarity, (logits, logits), 1)
      (False, True)
    """
    leaves, tree = jax.tree.flatten(given)
    # The answer depends on shapes, not on values: it is found once for all steps.
    shapes = tuple((x.shape, jnp.dtype(x.dtype)) for x in leaves)
    return _couples(loss, shapes, tree, units, tuple(options))


@functools.lru_cache(128)
def _couples(
    loss: Callable[..., jax.Array],
    shapes: tuple[tuple[Shape, DType], ...],
    tree: PyTree,
    units: int,
    options: tuple[str, ...],
) -> bool:
    leaves = [jax.ShapeDtypeStruct(*each) for each in shapes]
    leading = leaves[0].shape[:units]

    @jax.jit
    def tried(seed: jax.Array) -> jax.Array:
        made = []
        for i, leaf in enumerate(leaves):
            # The common key is the same in both batches.
            common = jax.random.fold_in(jax.random.key(0), i)
            own = jax.random.fold_in(seed, i)
            made.append(_drawn(leaf, leading, common, own))
        return loss(*jax.tree.unflatten(tree, made), **dict.fromkeys(options, 1.0))

    # Called while a training step is traced, and the answer is needed now.
    with jax.ensure_compile_time_eval():
        one, other = (np.asarray(tried(jax.random.key(seed))) for seed in (1, 2))
    # Both batches share the first entry: if its loss differs, the others were read.
    first = (0,) * min(units, one.ndim)
    return not np.allclose(one[first], other[first], rtol=1e-4, atol=1e-6)


def _drawn(x: jax.ShapeDtypeStruct, leading: Shape, common: jax.Array, own: jax.Array) -> jax.Array:
    """Return an array of three entries along each leading axis, the first shared by all batches.

    The first entry is drawn from the key ``common``, the others from ``own``. Logits of several
    teachers have these axes after the first; an array without them is 1 (an adapter's variances).
    """
    units = len(leading)
    at = next((i for i in (0, 1) if x.shape[i : i + units] == leading), None)
    if at is None or not jnp.issubdtype(x.dtype, jnp.floating):
        shape = x.shape if at is None else (*x.shape[:at], *(3,) * units, *x.shape[at + units :])
        return jnp.ones(shape, x.dtype) if at is None else jnp.zeros(shape, x.dtype)
    shape = (*x.shape[:at], *(3,) * units, *x.shape[at + units :])
    # True at entry 0 of each leading axis, for all teachers and channels.
    shared = jnp.zeros(shape, bool).at[(*(slice(None),) * at, *(0,) * units)].set(True)
    first, others = (jax.random.normal(key, shape, jnp.float32) for key in (common, own))
    # Larger values, so that the others would show in a maximum as well as in a mean.
    return jnp.where(shared, first, 3 * others).astype(x.dtype)
