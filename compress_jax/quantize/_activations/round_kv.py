"""Keys and values on a grid in any function's attention, found by the names of its sites."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from compress_jax.core.arguments import one_of
from compress_jax.core.errors import ShapeError
from compress_jax.core.paths import match, matches
from compress_jax.core.types import ModelFn, Params, PyTree
from compress_jax.quantize._activations.kv_grid import EntryLevels, KVGrid
from compress_jax.trace._jaxpr.find_sites import sites
from compress_jax.trace._jaxpr.rewrite import rewrite
from compress_jax.trace._jaxpr.site import Site

Operand = tuple[str, Literal["lhs", "rhs"]]
"""A glob over names of sites, and which operand of theirs is meant."""


def round_kv(fn: ModelFn, grid: KVGrid, keys: Operand, values: Operand) -> ModelFn:
    """Return a function whose attention sees keys and values on a grid.

    Keys are an operand of the product that gives scores, values one of the product that mixes them
    (`trace.sites` has their names and shapes; operands are in the order of the name). All queries
    see each full block on the grid and the tokens behind the last full block as they are; in a
    cache (`models.with_cache`) the queries of a block see its own tokens as they are. Derivatives
    are those of the identity.

    Args:
      fn: a pure function of params and inputs.
      grid: of keys and values.
      keys: ``(glob over sites of scores, operand)``.
      values: ``(glob over sites of mixes, operand)``; what it matches is no site of scores.

    Returns:
      ``(params, *inputs) -> out``.

    Raises:
      NoMatchError: when called, if a glob matches no site.
      ShapeError: when called, if an operand has not one axis of tokens and one of features.

    Example:
      >>> import compress_jax as cj
      >>> def fn(p, x):
      ...     return jax.nn.softmax(x @ p["query"] @ (x @ p["key"]).T) @ (x @ p["value"])
      >>> p = {name: jnp.eye(2) for name in ("query", "key", "value")}
      >>> x = jnp.array([[1.0, 0.0], [0.4, 1.0]])
      >>> [site.name for site in cj.trace.sites(fn, p, x) if site.param is None]
      ['query@key', 'query@key@value']
      >>> grid = cj.quantize.KVGrid(2, 2, keys="token", block=1)
      >>> rounded = cj.quantize.round_kv(fn, grid, ("query@key", "rhs"), ("*@value", "rhs"))
      >>> rounded(p, x).shape
      (2, 2)
    """
    for name, (_, operand) in (("keys", keys), ("values", values)):
        one_of(f"the operand of {name}", operand, ("lhs", "rhs"))

    def rule(site: Site, lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
        operands = [lhs, rhs]
        is_mix = matches(values[0], site.name)
        index = int((values if is_mix else keys)[1] == "rhs")
        free = _free(site, index)
        if is_mix:
            order = _order(site, index, site.contracting[index], free)
            rounded = partial(_rounded, grid.value_levels)
        else:
            order = _order(site, index, free, site.contracting[index])
            rounded = partial(_rounded_keys, grid)
        operands[index] = _in_order(order, operands[index], rounded)
        return operands[0], operands[1]

    run = rewrite(fn, rule, where=(keys[0], values[0]))

    def checked(params: Params, *inputs: PyTree) -> PyTree:
        names = [site.name for site in sites(fn, params, *inputs)]
        match(keys[0], names)
        match(values[0], names)
        return run(params, *inputs)

    return checked


Axes = tuple[int, ...]


def _order(site: Site, index: int, tokens: Axes, features: Axes) -> Axes:
    """Return the axes of an operand, batch and heads first, then tokens, then features."""
    if len(tokens) != 1 or len(features) != 1:
        raise ShapeError(
            f"operand {('lhs', 'rhs')[index]!r} of site {site.name!r} has the axes {tokens} of "
            f"tokens and {features} of features, but needs one of each; name its other operand"
        )
    return (*site.batch[index], *tokens, *features)


def _in_order(order: Axes, x: jax.Array, fn: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Apply a function of ``[*batch, tokens, 1, features]``: each head is on its own."""
    y = fn(jnp.expand_dims(jnp.transpose(x, order), -2)).squeeze(-2)
    return jnp.transpose(y, [order.index(axis) for axis in range(x.ndim)])


def _rounded_keys(grid: KVGrid, x: jax.Array) -> jax.Array:
    return grid.unrotated(_rounded(grid.key_levels, grid.rotated(x)))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rounded(levels: EntryLevels, x: jax.Array) -> jax.Array:
    return levels.round(x)


@_rounded.defjvp
def _(levels: EntryLevels, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return levels.round(primals[0]), tangents[0]


def _free(site: Site, index: int) -> Axes:
    """Return the axes of an operand that are neither contracted nor batch."""
    rank = len((site.lhs_shape, site.rhs_shape)[index])
    used = {*site.contracting[index], *site.batch[index]}
    return tuple(axis for axis in range(rank) if axis not in used)
