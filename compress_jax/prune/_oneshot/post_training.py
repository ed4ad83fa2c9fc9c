"""One-shot pruning: prune every calibrated leaf, and hold the masks in a compression."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from compress_jax.core import chain
from compress_jax.core._leafwise import check_finite, why_not_float
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
from compress_jax.core.paths import Patterns, flatten, match
from compress_jax.core.stamp import seal
from compress_jax.core.types import Params
from compress_jax.layerwise._problem import Problem, problems
from compress_jax.layerwise._result import Rewritten
from compress_jax.prune._masks.score import Leaves, mask_compression
from compress_jax.prune._masks.structures import NofM, Structure
from compress_jax.prune._masks.target import Sparsity, Target
from compress_jax.prune._oneshot.layer import UNCHANGED, Leaf, Method, pruned_leaf
from compress_jax.trace._jaxpr.site import layouts_of_sites
from compress_jax.trace._statistics.calibration import Calibration


def prune(
    params: Params,
    calibration: Calibration,
    sparsity: Sparsity | None,
    structure: Structure | None,
    pattern: Patterns,
    quantizer: Compression | None,
    method: Method,
    held_out: Calibration | None = None,
) -> Rewritten:
    """Prune every calibrated leaf that a pattern matches; round the others that a quantizer covers.

    Args:
      params: tree of arrays.
      calibration: from ``calibrate(fn, gram(), ...)``.
      sparsity: a fraction, or ``{glob: fraction}``; None with `n_m`.
      structure: `n_m` or None.
      pattern: globs of the leaves to prune.
      quantizer: rounds the remaining weights; or None.
      method: the solver.
      held_out: statistics of other batches, by which layers are compared with pruning by magnitude.

    Returns:
      The result.

    Raises:
      ConfigError: for another structure than n:m, or a quantizer that does not round weights entry
        by entry.
      NoMatchError: if a glob matches no leaf.
      NonFiniteError: if a leaf or the statistics are not finite.
    """
    if structure is not None and not isinstance(structure, NofM):
        raise ConfigError(
            f"layer-wise pruning supports single weights and n_m groups, not {structure}; use "
            "prune.magnitude"
        )
    target = Target.of(sparsity, structure)
    leaves, rebuild = flatten(params)
    tasks, reasons = problems(calibration, leaves)
    judges = problems(held_out, leaves)[0] if held_out is not None else {}
    wanted = match(pattern, [path for path, x in leaves.items() if why_not_float(path, x) is None])
    target.check(wanted)
    skipped = {
        path: why
        for path, x in leaves.items()
        if (why := _why_not(path, x, wanted, target, tasks, reasons))
    }
    # The sites tell the axes of each kernel, by which a quantizer finds its channels.
    rounding = bound(quantizer or identity(), layouts_of_sites(calibration.sites.values(), leaves))
    state = rounding.init(params)
    pointwise = _pointwise(rounding, params, state)
    new = dict(leaves)
    masks: dict[str, jax.Array] = {}
    notes: dict[str, str] = {}
    for path, x in leaves.items():
        # A calibrated leaf that is not pruned is rounded by the same solver, with nothing to prune.
        only_rounded = path in skipped
        if only_rounded and not (path in pointwise and path in tasks):
            continue
        check_finite(path, x)
        # n:m groups fix the share; schedules count by their value at step 0.
        fraction = 0.0 if only_rounded or structure else float(target.share(path, 0))
        groups = None if only_rounded else structure
        leaf = Leaf(x, tasks[path][0], fraction, groups, pointwise.get(path, UNCHANGED))
        instead = "rounded to nearest" if only_rounded else "pruned by magnitude"
        others = judges.get(path, ())
        new[path], mask, note = pruned_leaf(path, leaf, tasks[path], others, method, instead)
        if not only_rounded:
            masks[path] = mask
        if note:
            notes[path] = note
    held = _holding(masks, target, skipped)
    return _viewed(rebuild(new), masks, held, quantizer and rounding, state, skipped, notes)


def _holding(masks: dict[str, jax.Array], target: Target, skipped: dict[str, str]) -> Compression:
    """Return the compression that holds masks, whatever `update` is called with."""
    # Masks come from the solver: `init` returns them, and no `update` may choose others.
    state = CompressionState({}, masks)
    held = mask_compression(Leaves(lambda path, x, axes: skipped.get(path)))
    held = held._replace(init=lambda params: state, update=lambda params, state, **_: state)
    return stamped(held, call_of("solved_masks", sparsity=target, leaves=sorted(masks)))


def _viewed(
    new: Params,
    masks: dict[str, jax.Array],
    held: Compression,
    quantizer: Compression | None,
    state: CompressionState,
    skipped: dict[str, str],
    notes: dict[str, str],
) -> Rewritten:
    """Return the result under its compression: masked, then rounded if there is a quantizer."""
    changed = dict.fromkeys(masks, ())
    own = held.init(new)
    if quantizer is None:
        return Rewritten(held.view(new, own), own, changed, skipped, notes, held)
    both = chain(held, quantizer)
    state = seal(both.call, None, new, joined([own, state]))
    # Leaves that were solved lie on the grid already; the view rounds the others to nearest.
    rounded = both.view(new, state)
    _check_zeros(flatten(rounded)[0], masks)
    return Rewritten(rounded, state, changed, skipped, notes, both)


def _why_not(
    path: str,
    x: jax.Array,
    wanted: list[str],
    target: Target,
    tasks: Mapping[str, Sequence[Problem]],
    reasons: Mapping[str, str],
) -> str | None:
    """Say why a leaf is not pruned; None if it is."""
    if reason := why_not_float(path, x):
        return reason
    if path not in wanted:
        return "`pattern` does not match it"
    # Which n:m groups fit is for the site to say, not for the convention: see `input_order`.
    if target.structure is None and (reason := target.why_not(path, x)):
        return reason
    return None if path in tasks else reasons.get(path, "no calibrated site uses it")


def _pointwise(
    quantizer: Compression, params: Params, state: CompressionState
) -> dict[str, Pointwise]:
    """Return the rounding of each leaf's entries; refuse a quantizer that has none."""
    pointwise = quantizer.pointwise(params, state)
    skipped = quantizer.skipped(params)
    for path in flatten(params)[0]:
        if path not in pointwise and path not in skipped:
            raise ConfigError(
                f"the quantizer does not round {path!r} entry by entry, so nothing can be rounded "
                "while pruning; give a grid or a floating format, or compress again afterwards"
            )
    return pointwise


def _check_zeros(leaves: Mapping[str, jax.Array], masks: Mapping[str, jax.Array]) -> None:
    """Refuse a grid without zero."""
    # Seen after rounding: a binary grid, for one, has no level at 0.
    for path, mask in masks.items():
        if bool(jnp.any(jnp.where(mask, 0, leaves[path]) != 0)):
            raise ConfigError(
                f"the quantizer's grid has no zero for {path!r}, so its weights cannot be pruned "
                "under it"
            )
