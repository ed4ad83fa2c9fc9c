"""`shrink` removes whole channels, so that the model is smaller and faster on any hardware."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.errors import ConfigError
from compress_jax.core.paths import Patterns, flatten, match
from compress_jax.core.types import ModelFn, Params, PyTree
from compress_jax.prune._channels.choice import (
    Ratio,
    choose,
    multiples_of,
    one_of_each,
    pools,
    ratios,
    widths,
)
from compress_jax.prune._channels.result import Shrunk, narrowed
from compress_jax.prune._channels.scores import Importance, channel_scores, magnitude
from compress_jax.trace import Groups, cost, groups, resize, sites

Kept = dict[str, np.ndarray]
"""The channels that stay by name of a group, ascending."""

ITERATIONS = 12  # of the bisection for ``macs``


@renamed_arguments(most="max_ratio", normalise="normalize")
def shrink(
    fn: ModelFn,
    params: Params,
    *inputs: PyTree,
    ratio: Ratio | None = None,
    macs: float | None = None,
    importance: Importance | None = None,
    reduction: str = "mean",
    normalize: str = "mean",
    scope: str = "local",
    exclude: Patterns = (),
    round_to: int = 1,
    max_ratio: float = 1.0,
    numbers: Mapping[str, bool] | None = None,
) -> Shrunk:
    r"""Remove the least important channels, heads and hidden features of a model for good.

    The function's jaxpr shows which parameter axes belong together (through residuals, norms,
    reshapes); they lose the same channels. ``print(cj.trace.groups(fn, params, *inputs))`` lists
    them by name. The smaller model is the function itself with shorter axes, so the model's
    code needs no change: a module made with the new widths gives the same outputs for the same
    parameters. Means, variances and norms are over the channels that stay.

    Other numbers in the code are recomputed at the new width where the code computes them from its
    parameters. Where it does not they stay: attention scores are still divided by the root of the
    old head dimension. The table lists every number that counts, or seems to count, a shortened
    axis. Channels of zeros can be removed without a change of the outputs, except for means over
    them.

    One call is one step: train the result, then shrink ``(small.fn, small.params)`` again.

    Args:
      fn: a pure function of ``(params, *inputs)``; params may be variables with batch statistics,
        which fn may return updated.
      params: tree of arrays.
      inputs: trees of arrays or ``ShapeDtypeStruct``; only their shapes matter.
      ratio: the share of each width to remove, 0 to 1, or ``{glob over names of groups: share}``;
        the first glob that matches counts. If groups multiply to one width (heads and the features
        of each), only one of them loses channels: the one that comes closest to the ratio, the
        outer one first. Groups with globs of their own all lose channels. With ``macs`` these are
        proportions between groups; by default all are equal.
      macs: the largest share of multiply-accumulates to keep, above 0 and below 1. The smallest
        removal that reaches it is found by bisection.
      importance: the criterion, see `compress_jax.prune.importance`; by default the squared L2 norm
        of kernels.
      reduction: how the scores of a group's members are combined: ``"mean"``, ``"sum"`` or
        ``"max"``.
      normalize: the norm of a group that its scores are divided by, for comparison with other
        groups: ``"mean"``, ``"sum"``, ``"max"``, ``"l2"`` or ``"none"``.
      scope: ``"local"``: each group loses its ratio; ``"global"``: all channels compete;
        ``"isomorphic"``: channels of groups with alike members compete.
      exclude: globs over names of groups that stay whole.
      round_to: the widths that stay (inputs or outputs of a kernel: heads times their features) are
        rounded up to a multiple (128 for matrix units).
      max_ratio: the largest share that one group may lose, 0 to 1.
      numbers: ``{glob over names of numbers in the table: whether they follow the width}``, to
        correct numbers that are wrongly taken for a count, or not; first match wins.

    Returns:
      ``Shrunk(params, fn, kept, table, cuts)``; ``print(small.table)``.

    Raises:
      ConfigError: for impossible arguments; if nothing is or can be removed (unless ratio is 0); if
        macs cannot be reached.
      NoMatchError: if a glob matches no group, or no number.
      NonFiniteError: if an importance is not finite.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"w": jnp.array([[1.0, 0.0, 2.0, 0.1]]), "v": jnp.ones((4, 3))}
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["w"]) @ params["v"]
      >>> small = cj.prune.shrink(fn, params, jnp.ones((1, 1)), ratio=0.5)
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
    _check(ratio, macs, round_to, max_ratio)
    found = groups(fn, params, *inputs)
    names = [group.name for group in found]
    share = ratios(1.0 if ratio is None else ratio, names)
    # `match` raises where a glob matches no group, so it is asked only if there are groups.
    excluded = set(match(exclude, names)) if exclude and names else set()
    leaves = flatten(params)[0]
    products = sites(fn, params, *inputs)
    # Factors of products: what is only added or scaled has no score by magnitude.
    kernels = {site.param for site in products if site.param is not None}
    kernels.update(*(site.also for site in products))
    criterion = importance or magnitude()
    scores = channel_scores(found, leaves, kernels, criterion, reduction, normalize)
    every = widths(found, products, leaves)

    # Groups that stay whole, with the reason; the others may lose channels.
    reasons = _reasons(found, share, excluded, scores)
    taking = [group for group in found if group.name not in reasons]
    reasons |= one_of_each(taking, every, share, ratio, max_ratio)
    taking = [group for group in taking if group.name not in reasons]
    multiples = multiples_of(taking, every, round_to)
    for group in taking:
        if group.size <= multiples[group.name]:
            reasons[group.name] = f"not wider than the multiple {round_to}"
    taking = [group for group in taking if group.name not in reasons]
    if not taking and ratio != 0:
        whole = "".join(f"\n  {name}: {why}" for name, why in reasons.items())
        raise ConfigError(f"nothing in this model can be removed:{whole}\n{found}")

    def kept(factor: float) -> Kept:
        """Return the channels that stay when all shares are multiplied by a factor."""
        chosen = {}
        for pool in pools(taking, share, scope):
            # All groups of a pool have the same ratio.
            lost = min(factor * share[pool[0].name], 1.0)
            chosen |= choose(pool, scores, lost, multiples, max_ratio)
        return chosen

    if macs is None:
        chosen = kept(1.0)
    else:
        # At the factor 1 / max(share) the largest proportion has become 1.
        chosen = _bisect(fn, params, inputs, found, kept, macs, 1 / max(share.values()))
    if ratio != 0 and all(len(chosen[group.name]) == group.size for group in taking):
        sizes = ", ".join(f"{group.name} has {group.size}" for group in taking)
        raise ConfigError(
            f"nothing is removed at ratio={ratio}, round_to={round_to}, max_ratio={max_ratio}: "
            f"{sizes} channels"
        )
    return narrowed(fn, params, inputs, found, chosen, reasons, numbers)


def _check(ratio: Ratio | None, macs: float | None, round_to: int, max_ratio: float) -> None:
    if ratio is None and macs is None:
        raise ConfigError(
            "say how much to remove: ratio=0.5 of the channels, or macs=0.5 of the "
            "multiply-accumulates to keep"
        )
    if macs is not None and not 0 < macs < 1:
        raise ConfigError(
            f"macs={macs}: the share of multiply-accumulates to keep lies above 0 and below 1"
        )
    if round_to < 1 or not 0 <= max_ratio <= 1:
        raise ConfigError(
            f"round_to={round_to} must be at least 1 and max_ratio={max_ratio} lie between 0 and 1"
        )


def _reasons(
    found: Groups, share: dict[str, float], excluded: set[str], scores: dict[str, np.ndarray]
) -> dict[str, str]:
    """Return the groups that stay whole by the arguments, with the reason."""
    reasons = {}
    for group in found:
        if group.name in excluded:
            reasons[group.name] = "excluded"
        elif not share[group.name]:
            reasons[group.name] = "ratio 0"
        elif group.name not in scores:
            reasons[group.name] = "the importance has no score for it"
    return reasons


def _bisect(
    fn: ModelFn,
    params: Params,
    inputs: tuple[PyTree, ...],
    found: Groups,
    kept: Callable[[float], Kept],
    macs: float,
    highest: float,
) -> Kept:
    """Return what stays at the smallest factor that leaves at most a share of the operations."""
    target = macs * cost(fn, params, *inputs).macs
    known: dict[tuple[int, ...], int] = {}

    def left(chosen: Kept) -> int:
        # The cost depends on the sizes alone, and neighboring factors often give the same ones.
        sizes = tuple(map(len, chosen.values()))
        if sizes not in known:
            shorter = jax.eval_shape(lambda params: found.keep(params, chosen), params)
            known[sizes] = cost(resize(fn, params, found, chosen), shorter, *inputs).macs
        return known[sizes]

    # The upper end meets the target throughout.
    low = 0.0
    high = highest
    if left(kept(high)) > target:
        least = left(kept(high)) / max(target / macs, 1)
        raise ConfigError(
            f"macs={macs} cannot be reached: {least:.3g} of them are left when everything that may "
            "be removed is removed"
        )
    for _ in range(ITERATIONS):
        middle = (low + high) / 2
        if left(kept(middle)) <= target:
            high = middle
        else:
            low = middle
    return kept(high)
