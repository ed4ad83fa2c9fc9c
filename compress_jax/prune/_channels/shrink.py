"""`shrink`: remove whole channels, so that the model that is left is smaller and faster wherever it runs."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from compress_jax.core.errors import ConfigError
from compress_jax.core.paths import Patterns, flatten, match
from compress_jax.core.types import ModelFn, Params, PyTree
from compress_jax.prune._channels.choice import (
    Ratio,
    choose,
    one_of_each,
    pools,
    ratios,
    steps,
    widths,
)
from compress_jax.prune._channels.result import Shrunk, narrowed
from compress_jax.prune.importance import Importance, channel_scores, magnitude
from compress_jax.trace import Groups, cost, groups, resize, sites

Kept = dict[str, np.ndarray]
STEPS = 12


def shrink(
    fn: ModelFn,
    params: Params,
    *inputs: PyTree,
    ratio: Ratio | None = None,
    macs: float | None = None,
    importance: Importance | None = None,
    reduction: str = "mean",
    normalise: str = "mean",
    scope: str = "local",
    exclude: Patterns = (),
    round_to: int = 1,
    most: float = 1.0,
    numbers: Mapping[str, bool] | None = None,
) -> Shrunk:
    r"""Remove the least important channels, heads and hidden features of a model for good.

    Parameter axes that belong together (through residuals, norms, reshapes) are found in the
    function's jaxpr, and lose the same channels:
    ``print(compress_jax.trace.groups(fn, params, *inputs))`` shows them by name. The smaller model
    is the function itself with shorter axes, so the model's code need not know: where its widths
    are arguments, a module made with the new widths gives the same outputs for the same parameters.
    Means, variances and norms are over what is left. Other numbers are what the code itself says at
    the new width where it runs there (its widths are read from its parameters); where it does not,
    they stay: attention scores are still divided by the root of the old head dimension. The table
    lists every number that counts, or seems to count, what got shorter. Channels that hold only
    zeros go without a change, but for what is a mean over them.

    One call is one step: train what it returns, then shrink ``(small.fn, small.params)`` again.

    Args:
      fn: a pure function of ``(params, *inputs)``; params may be variables with batch statistics,
        fn may return them anew.
      params: tree of arrays.
      inputs: trees of arrays or ``ShapeDtypeStruct``; only their shapes matter.
      ratio: share of every width to remove, 0 to 1, or ``{glob over names of groups: share}`` of
        which the first that matches counts. Of groups that multiply to one width (heads and the
        features of each, groups of a norm and the channels of each) one loses channels: the one
        that comes closest, the outer one first; globs of their own take from each. With ``macs``
        the proportions between groups; by default all alike.
      macs: share of multiply-accumulates to keep at most, above 0 and below 1: the smallest removal
        that gets there, by bisection.
      importance: what is important, see `compress_jax.prune.importance`; by default the squared L2
        norm of kernels.
      reduction: of what the members of a group say: ``"mean"``, ``"sum"`` or ``"max"``.
      normalise: what scores of a group are divided by, for comparison with others: their
        ``"mean"``, ``"sum"``, ``"max"``, ``"l2"`` or ``"none"``.
      scope: ``"local"``: every group loses its ratio; ``"global"``: all channels compete;
        ``"isomorphic"``: those of groups built alike do.
      exclude: globs over names of groups that stay whole.
      round_to: widths that are left (what a kernel takes or gives: heads times their features) are
        rounded up to a multiple (128 for matrix units).
      most: largest share that one group may lose, 0 to 1.
      numbers: ``{glob over names of numbers in the table: whether they follow the width}`` for
        those that are taken for a count and are none, or the other way round; first match wins.

    Returns:
      ``Shrunk(params, fn, kept, table, cuts)``; ``print(small.table)``.

    Raises:
      ConfigError: for impossible arguments, if nothing is or can be removed (unless ratio is 0), if
        macs is out of reach.
      NoMatchError: if a glob matches no group, or no number.
      NonFiniteError: if an importance is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.array([[1.0, 0.0, 2.0, 0.1]]), "v": jnp.ones((4, 3))}
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["w"]) @ params["v"]
      >>> small = shrink(fn, params, jnp.ones((1, 1)), ratio=0.5)
      >>> print(small.table)
      group   size   kept
      w:1      4      2
      frozen (output): v:1
      macs: 16 -> 8 (2.00x fewer)
      params: 16 -> 8 (2.00x fewer)
      >>> small.fn(small.params, jnp.ones((1, 1))).tolist()
      [[3.0, 3.0, 3.0]]

    References:
      Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023. Fang et al., Isomorphic
      Pruning for Vision Models, ECCV 2024 (the scope).
    """
    _check(ratio, macs, round_to, most)
    found = groups(fn, params, *inputs)
    names = [group.name for group in found]
    share = ratios(1.0 if ratio is None else ratio, names)
    excluded = set(match(exclude, names)) if exclude and names else set()
    leaves = flatten(params)[0]
    products = sites(fn, params, *inputs)
    kernels = {path for site in products for path in (site.param, *site.also) if path is not None}
    scores, every = (
        channel_scores(found, leaves, kernels, importance or magnitude(), reduction, normalise),
        widths(found, products, leaves),
    )
    reasons = _reasons(found, share, excluded, scores)
    taking = [group for group in found if group.name not in reasons]
    reasons |= one_of_each(taking, every, share, ratio, most)
    taking = [group for group in taking if group.name not in reasons]
    multiples = steps(taking, every, round_to)
    reasons |= {
        group.name: f"not wider than the multiple {round_to}"
        for group in taking
        if group.size <= multiples[group.name]
    }
    taking = [group for group in taking if group.name not in reasons]
    if not taking and ratio != 0:
        whole = "".join(f"\n  {name}: {why}" for name, why in reasons.items())
        raise ConfigError(f"nothing in this model can be removed:{whole}\n{found}")

    def kept(factor: float) -> Kept:
        lost = {name: min(factor * own, 1.0) for name, own in share.items()}
        parts = (
            choose(pool, scores, lost[pool[0].name], multiples, most)
            for pool in pools(taking, share, scope)
        )
        return {name: left for part in parts for name, left in part.items()}

    chosen = (
        kept(1.0)
        if macs is None
        else _bisect(fn, params, inputs, found, kept, macs, 1 / max(share.values()))
    )
    if ratio != 0 and all(len(chosen[group.name]) == group.size for group in taking):
        sizes = ", ".join(f"{group.name} has {group.size}" for group in taking)
        raise ConfigError(
            f"nothing is removed at ratio={ratio}, round_to={round_to}, most={most}: {sizes} "
            "channels"
        )
    return narrowed(fn, params, inputs, found, chosen, reasons, numbers)


def _check(ratio: Ratio | None, macs: float | None, round_to: int, most: float) -> None:
    if ratio is None and macs is None:
        raise ConfigError(
            "say how much to remove: ratio=0.5 of the channels, or macs=0.5 of the "
            "multiply-accumulates to keep"
        )
    if macs is not None and not 0 < macs < 1:
        raise ConfigError(
            f"macs={macs}: the share of multiply-accumulates to keep lies above 0 and below 1"
        )
    if round_to < 1 or not 0 <= most <= 1:
        raise ConfigError(
            f"round_to={round_to} must be at least 1 and most={most} lie between 0 and 1"
        )


def _reasons(
    found: Groups, share: dict[str, float], excluded: set[str], scores: dict[str, np.ndarray]
) -> dict[str, str]:
    """Return why groups stay whole."""
    reasons = {}
    for group in found:
        if group.name in excluded:
            reasons[group.name] = "excluded"
        elif not share[group.name]:
            reasons[group.name] = "ratio 0"
        elif group.name not in scores:
            reasons[group.name] = "the importance says nothing about it"
    return reasons


def _bisect(
    fn: ModelFn,
    params: Params,
    inputs: tuple[Any, ...],
    found: Groups,
    kept: Callable[[float], Kept],
    macs: float,
    most: float,
) -> Kept:
    """Return what is kept by the smallest factor that leaves no more than a share of the multiply-accumulates."""
    target = macs * cost(fn, params, *inputs).macs
    known: dict[tuple[int, ...], int] = {}

    def left(chosen: Kept) -> int:
        sizes = tuple(map(len, chosen.values()))
        if sizes not in known:
            shorter = jax.eval_shape(lambda params: found.keep(params, chosen), params)
            known[sizes] = cost(resize(fn, params, found, chosen), shorter, *inputs).macs
        return known[sizes]

    low, high = 0.0, most
    if left(kept(high)) > target:
        least = left(kept(high)) / max(target / macs, 1)
        raise ConfigError(
            f"macs={macs} is out of reach: {least:.3g} of them are left when all that may be "
            "removed is"
        )
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if left(kept(middle)) <= target else (middle, high)
    return kept(high)
