"""What post-training pruners share: which leaves have a layer-wise problem, and the compression that holds the masks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core import chain
from compress_jax.core.compression import (
    Compression,
    CompressionState,
    Pointwise,
    bound,
    identity,
    joined,
    stamped,
)
from compress_jax.core.describe import call_of
from compress_jax.core.errors import ConfigError
from compress_jax.core.leafwise import check_finite, why_not_float
from compress_jax.core.paths import Patterns, flatten, match
from compress_jax.core.stamp import seal
from compress_jax.core.types import Params
from compress_jax.layerwise._problem import Problem, problems
from compress_jax.prune._masks.score import Leaves, mask_compression
from compress_jax.prune._masks.structures import NofM, Structure
from compress_jax.prune._masks.target import Sparsity, Target
from compress_jax.prune._oneshot.layer import AS_IT_IS, Leaf, Method, pruned_leaf
from compress_jax.trace import Calibration
from compress_jax.trace._jaxpr.site import layouts_of_sites


class Pruned(NamedTuple):
    """New params that their own compression shows as they are: ``compression.view(params, state) == params``, bit for bit.

    Attributes:
      params: plain arrays; pruned entries are zero, and the others may have moved to make up for
        them.
      state: of the compression: the masks, and the quantizer's where there is one.
      compression: holds these masks, whatever `update` is called with: fine-tune under it, pack
        with it. ``coverage`` shows it, with the reasons for what was left alone.
      skipped: ``{path: reason}``: leaves that were not pruned.
      notes: ``{path: what was out of the ordinary}``.
    """

    params: Params
    state: CompressionState
    compression: Compression
    skipped: dict[str, str]
    notes: dict[str, str]


def prune(
    params: Params,
    calibration: Calibration,
    sparsity: Sparsity | None,
    structure: Structure | None,
    where: Patterns,
    quantizer: Compression | None,
    method: Method,
    held_out: Calibration | None = None,
) -> Pruned:
    """Solve every leaf that is to be pruned and has calibration.

    Args:
      params: tree of arrays.
      calibration: from ``calibrate(fn, gram(), ...)``.
      sparsity: a share, or ``{glob: share}``; None with `n_m`.
      structure: `n_m` or None.
      where: globs of the leaves to prune.
      quantizer: what the kept weights are rounded with, or None.
      method: how.
      held_out: statistics of other batches, by which layers are compared with pruning by magnitude.

    Returns:
      The result.

    Raises:
      ConfigError: for another structure than n:m, or a quantizer that does not see weights entry by
        entry.
      NoMatchError: if a glob matches no leaf.
      NonFiniteError: if a leaf or the statistics are not finite.
    """
    if structure is not None and not isinstance(structure, NofM):
        raise ConfigError(
            f"layer-wise pruning knows single weights and n_m groups, not {structure}; use "
            "prune.magnitude"
        )
    target, (leaves, rebuild) = Target.of(sparsity, structure), flatten(params)
    tasks, reasons = problems(calibration, leaves)
    judges = problems(held_out, leaves)[0] if held_out is not None else {}
    wanted = match(where, [path for path, x in leaves.items() if why_not_float(path, x) is None])
    target.check(wanted)
    skipped = {
        path: why
        for path, x in leaves.items()
        if (why := _why_not(path, x, wanted, target, tasks, reasons))
    }
    rounding = bound(quantizer or identity(), layouts_of_sites(calibration.sites.values(), leaves))
    state = rounding.init(params)
    seen = _pointwise(rounding, params, state)
    new, masks, notes = dict(leaves), {}, {}
    for path, x in leaves.items():
        left = path in skipped
        if left and not (path in seen and path in tasks):
            continue
        check_finite(path, x)
        share = 0.0 if left or structure else float(target.share(path, 0))
        given = Leaf(
            x, tasks[path][0], share, None if left else structure, seen.get(path, AS_IT_IS)
        )
        instead = "rounded to nearest" if left else "pruned by magnitude"
        new[path], mask, note = pruned_leaf(
            path, given, tasks[path], judges.get(path, ()), method, instead
        )
        masks |= {} if left else {path: mask}
        notes |= {path: note} if note else {}
    return _held(rebuild(new), masks, target, quantizer and rounding, state, skipped, notes)


def _held(
    new: Params,
    masks: dict[str, jax.Array],
    target: Target,
    quantizer: Compression | None,
    state: CompressionState,
    skipped: dict[str, str],
    notes: dict[str, str],
) -> Pruned:
    """Return new params with the compression that holds their masks, and rounds if a quantizer does."""
    fixed = CompressionState({}, masks)
    held = mask_compression(Leaves(lambda path, x, axes: skipped.get(path)))
    held = held._replace(init=lambda params: fixed, update=lambda params, state, **_: state)
    held = stamped(held, call_of("solved_masks", sparsity=target, leaves=sorted(masks)))
    own = held.init(new)
    if quantizer is None:
        return Pruned(held.view(new, own), own, held, skipped, notes)
    both = chain(held, quantizer)
    state = seal(both.call, None, new, joined([own, state]))
    rounded = both.view(new, state)
    _check_zeros(flatten(rounded)[0], masks)
    return Pruned(rounded, state, both, skipped, notes)


def _why_not(
    path: str,
    x: Any,
    wanted: list[str],
    target: Target,
    tasks: Mapping[str, Sequence[Problem]],
    reasons: Mapping[str, str],
) -> str | None:
    if reason := why_not_float(path, x):
        return reason
    if path not in wanted:
        return "`where` does not name it"
    if target.structure is None and (reason := target.why_not(path, x)):
        return reason
    return None if path in tasks else reasons.get(path, "no calibrated site uses it")


def _pointwise(
    quantizer: Compression, params: Params, state: CompressionState
) -> dict[str, Pointwise]:
    """Return how a quantizer sees each leaf that it does not leave alone."""
    seen, left = quantizer.pointwise(params, state), quantizer.skipped(params)
    if other := [path for path in flatten(params)[0] if path not in seen and path not in left]:
        raise ConfigError(
            f"the quantizer does not see {other[0]!r} entry by entry, so nothing can be rounded "
            "while pruning; give a "
            "grid or a floating format, or compress again afterwards"
        )
    return seen


def _check_zeros(leaves: Mapping[str, jax.Array], masks: Mapping[str, jax.Array]) -> None:
    for path, mask in masks.items():
        if bool(jnp.any(jnp.where(mask, 0, leaves[path]) != 0)):
            raise ConfigError(
                f"the quantizer's grid has no zero for {path!r}, so its weights cannot be pruned "
                "under it"
            )
