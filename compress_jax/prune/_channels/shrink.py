"""`shrink` removes whole channels, so that the model is smaller and faster on any hardware."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np

from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.errors import ArgumentError, ConfigError
from compress_jax.core.paths import Patterns, flatten, match
from compress_jax.core.types import Batch, Leaves, ModelFn, Params, PyTree, Scalar
from compress_jax.layerwise._held_out import held_out
from compress_jax.layerwise._problem import listed
from compress_jax.prune._channels.choice import (
    Ratio,
    Width,
    choose,
    multiples_of,
    one_of_each,
    pools,
    ratios,
    widths,
)
from compress_jax.prune._channels.judge import Distance, criteria, distances, nearest
from compress_jax.prune._channels.result import Shrunk, narrowed
from compress_jax.prune._channels.scores import Importance, channel_scores, magnitude
from compress_jax.trace import Group, Groups, Site, cost, groups, resize, sites

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
    importance: Importance | Mapping[str, Importance] | None = None,
    batches: Iterable[Batch] | None = None,
    loss: Callable[..., Scalar] | None = None,
    distance: Distance | None = None,
    hold_out: float = 0.25,
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

    With ``batches`` the criterion is chosen by data: magnitude, activation, activation weighted
    (and taylor, if there is a loss) each choose channels, and those are removed without which the
    function stays nearest to itself on batches that none has seen. A language model that magnitude
    destroys may lose a fifth of its hidden features by activation and still speak.

    One call is one step: train the result, then shrink ``(small.fn, small.params)`` again.

    Args:
      fn: a pure function of ``(params, *inputs)``; params may be variables with batch statistics,
        which fn may return updated.
      params: tree of arrays.
      inputs: trees of arrays or ``ShapeDtypeStruct``; only their shapes matter. With ``batches``
        they may be left out.
      ratio: the share of each width to remove, 0 to 1, or ``{glob over names of groups: share}``;
        the first glob that matches counts. If groups multiply to one width (heads and the features
        of each), only one of them loses channels: the one that comes closest to the ratio, the
        outer one first. Groups with globs of their own all lose channels. With ``macs`` these are
        proportions between groups; by default all are equal.
      macs: the largest share of multiply-accumulates to keep, above 0 and below 1. The smallest
        removal that reaches it is found by bisection.
      importance: the criterion, see `compress_jax.prune.importance`; by default the one that is
        nearest on ``batches``, or without them the squared L2 norm of kernels. With ``batches`` it
        may be several by name.
      batches: arguments of ``fn`` after params; a tuple is several; all of one shape.
      loss: ``(params, *batch) -> scalar``, for the criterion `importance.taylor`.
      distance: ``(outputs of the smaller function, outputs of fn) -> distances``, such as
        `distill.kl`, of which the mean is taken; by default the squared error of the outputs
        relative to their power.
      hold_out: the share of batches that criteria are judged by, and do not see; 0 judges by all.
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
      NonFiniteError: if an importance, or the distance of every criterion, is not finite.
      ArgumentError: if a loss or several criteria are given without batches.
      DataError: if there are too few batches.

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
      >>> batches = [jnp.array([[1.0]]), jnp.array([[2.0]])]
      >>> by_data = cj.prune.shrink(fn, params, ratio=0.5, batches=batches)
      >>> [each.name for each in by_data.table.judged if each.taken]
      ['magnitude']

    References:
      Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023. Fang et al., Isomorphic
      Pruning for Vision Models, ECCV 2024 (the scope).
    """
    rules = _Rules(ratio, macs, reduction, normalize, scope, exclude, round_to, max_ratio)
    rules.check()
    if batches is None:
        if isinstance(importance, Mapping) or loss is not None:
            raise ArgumentError("a loss, or several importances, need batches to choose by")
        model = _Model(fn, params, inputs)
        choice = _chosen(model, rules, importance or magnitude())
        return narrowed(fn, params, inputs, model.found, choice.kept, choice.reasons, numbers)
    made, judges = held_out(batches, hold_out)
    model = _Model(fn, params, inputs or made[0])
    if importance is None:
        # Where a criterion has no score for a group magnitude stands in, so that all remove alike.
        named, fill = criteria(fn, params, made, loss), magnitude()
    else:
        named = importance if isinstance(importance, Mapping) else {"importance": importance}
        fill = None
    choices = {name: _chosen(model, rules, each, fill) for name, each in named.items()}
    kept = {name: choice.kept for name, choice in choices.items()}
    errors = distances(fn, params, model.found, kept, judges or made, distance, numbers)
    judged = nearest(errors, {name: choice.note for name, choice in choices.items()})
    best = choices[next(each.name for each in judged if each.taken)]
    small = narrowed(fn, params, model.inputs, model.found, best.kept, best.reasons, numbers)
    return small._replace(table=small.table._replace(judged=judged))


@dataclass(frozen=True)
class _Rules:
    """How much is removed, and where; each attribute is an argument of `shrink`."""

    ratio: Ratio | None
    macs: float | None
    reduction: str
    normalize: str
    scope: str
    exclude: Patterns
    round_to: int
    max_ratio: float

    def check(self) -> None:
        """Raise ConfigError for impossible arguments."""
        if self.ratio is None and self.macs is None:
            raise ConfigError(
                "say how much to remove: ratio=0.5 of the channels, or macs=0.5 of the "
                "multiply-accumulates to keep"
            )
        if self.macs is not None and not 0 < self.macs < 1:
            raise ConfigError(
                f"macs={self.macs}: the share of multiply-accumulates to keep lies above 0 and "
                "below 1"
            )
        if self.round_to < 1 or not 0 <= self.max_ratio <= 1:
            raise ConfigError(
                f"round_to={self.round_to} must be at least 1 and max_ratio={self.max_ratio} lie "
                "between 0 and 1"
            )


class _Model:
    """A function and what is found in it once, whichever criterion chooses."""

    def __init__(self, fn: ModelFn, params: Params, inputs: tuple[PyTree, ...]) -> None:
        self.fn = fn
        self.params = params
        self.inputs = inputs
        self.found = groups(fn, params, *inputs)
        self.sites = sites(fn, params, *inputs)
        self.leaves = flatten(params)[0]
        self.widths: tuple[Width, ...] = widths(self.found, self.sites, self.leaves)
        self._macs: dict[tuple[tuple[str, int], ...], int] = {}

    @cached_property
    def full_macs(self) -> int:
        """The multiply-accumulates of the whole function."""
        return cost(self.fn, self.params, *self.inputs).macs

    def macs(self, chosen: Kept) -> int:
        """Return the multiply-accumulates when some channels stay."""
        # They depend on the sizes alone, and neighboring factors often give the same ones.
        sizes = tuple((name, len(left)) for name, left in chosen.items())
        if sizes not in self._macs:
            shorter = jax.eval_shape(lambda params: self.found.keep(params, chosen), self.params)
            small = resize(self.fn, self.params, self.found, chosen)
            self._macs[sizes] = cost(small, shorter, *self.inputs).macs
        return self._macs[sizes]

    def scores(
        self, rules: _Rules, importance: Importance, only: Sequence[Group] | None = None
    ) -> dict[str, np.ndarray]:
        """Return the scores of the channels of all groups, or of some."""
        # Factors of products: what is only added or scaled has no score by magnitude.
        kernels = {path for site in self.sites for path in (site.param, *site.also) if path}
        return channel_scores(
            self.found if only is None else only,
            self.leaves,
            kernels,
            importance,
            rules.reduction,
            rules.normalize,
            _summed(self.sites, self.leaves),
        )


def _summed(products: Iterable[Site], leaves: Leaves) -> set[tuple[str, int]]:
    """Return the axes of kernels that products sum over, or may sum over where it is unknown."""
    found: set[tuple[str, int]] = set()
    for site in products:
        for path in (site.param, *site.also):
            if path is not None:
                is_known = site.param_axes is not None and not site.also
                axes = site.param_axes if is_known else range(np.ndim(leaves[path]))
                found |= {(path, axis) for axis in axes or ()}
    return found


class _Choice(NamedTuple):
    """The channels that stay, why groups stay whole, and what is to be said of the scores."""

    kept: Kept
    reasons: dict[str, str]
    note: str = ""


def _chosen(
    model: _Model, rules: _Rules, importance: Importance, fill: Importance | None = None
) -> _Choice:
    """Choose channels by a criterion; `fill` scores the groups that it has no score for."""
    found = model.found
    names = [group.name for group in found]
    share = ratios(1.0 if rules.ratio is None else rules.ratio, names)
    # `match` raises where a glob matches no group, so it is asked only if there are groups.
    excluded = set(match(rules.exclude, names)) if rules.exclude and names else set()
    scores = model.scores(rules, importance)
    note = ""
    if fill is not None:
        rest = [group for group in found if group.name not in scores]
        added = model.scores(rules, fill, rest)
        scores |= added
        note = f"by magnitude: {listed(list(added))}" if added else ""

    # Groups that stay whole, with the reason; the others may lose channels.
    reasons = _reasons(found, share, excluded, scores)
    taking = [group for group in found if group.name not in reasons]
    reasons |= one_of_each(taking, model.widths, share, rules.ratio, rules.max_ratio)
    taking = [group for group in taking if group.name not in reasons]
    multiples = multiples_of(taking, model.widths, rules.round_to)
    for group in taking:
        if group.size <= multiples[group.name]:
            reasons[group.name] = f"not wider than the multiple {rules.round_to}"
    taking = [group for group in taking if group.name not in reasons]
    if not taking and rules.ratio != 0:
        whole = "".join(f"\n  {name}: {why}" for name, why in reasons.items())
        raise ConfigError(f"nothing in this model can be removed:{whole}\n{found}")

    def kept(factor: float) -> Kept:
        """Return the channels that stay when all shares are multiplied by a factor."""
        chosen = {}
        for pool in pools(taking, share, rules.scope):
            # All groups of a pool have the same ratio.
            lost = min(factor * share[pool[0].name], 1.0)
            chosen |= choose(pool, scores, lost, multiples, rules.max_ratio)
        return chosen

    if rules.macs is None:
        chosen = kept(1.0)
    else:
        # At the factor 1 / max(share) the largest proportion has become 1.
        chosen = _bisect(model, kept, rules.macs, 1 / max(share.values()))
    if rules.ratio != 0 and all(len(chosen[group.name]) == group.size for group in taking):
        sizes = ", ".join(f"{group.name} has {group.size}" for group in taking)
        raise ConfigError(
            f"nothing is removed at ratio={rules.ratio}, round_to={rules.round_to}, "
            f"max_ratio={rules.max_ratio}: {sizes} channels"
        )
    return _Choice(chosen, reasons, note)


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


def _bisect(model: _Model, kept: Callable[[float], Kept], macs: float, highest: float) -> Kept:
    """Return what stays at the smallest factor that leaves at most a share of the operations."""
    target = macs * model.full_macs
    # The upper end meets the target throughout.
    low = 0.0
    high = highest
    if model.macs(kept(high)) > target:
        least = model.macs(kept(high)) / max(model.full_macs, 1)
        raise ConfigError(
            f"macs={macs} cannot be reached: {least:.3g} of them are left when everything that may "
            "be removed is removed"
        )
    for _ in range(ITERATIONS):
        middle = (low + high) / 2
        if model.macs(kept(middle)) <= target:
            high = middle
        else:
            low = middle
    return kept(high)
