"""`drop_blocks` removes whole blocks of layers: those that change least, or are missed least."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.amount import amount_exact
from compress_jax.core.arguments import number, one_of, whole
from compress_jax.core.errors import ConfigError, NonFiniteError
from compress_jax.core.paths import Patterns, match
from compress_jax.core.table import aligned
from compress_jax.core.types import Batch, ModelFn, Params, PyTree
from compress_jax.layerwise._held_out import Arguments, held_out
from compress_jax.prune._channels.judge import Distance, Judged, nearest, relative_error
from compress_jax.trace import Blocks, Cost, blocks, cost

COSINE, SKIPPED = "cosine", "distance"


class BlockRow(NamedTuple):
    """One row of the table of `BlockRemoval`.

    Attributes:
      block: its name.
      influence: by criterion; none for a block that cannot be skipped.
      kept: whether it stays.
      reason: why it must stay, if so.
    """

    block: str
    influence: dict[str, float]
    kept: bool
    reason: str = ""


class BlockRemoval(NamedTuple):
    """What `drop_blocks` removed, and why; prints as a table.

    Attributes:
      rows: one for each block.
      before: the cost of the full model.
      after: the cost of the smaller model.
      judged: the criteria, with their distances on held-out batches.

    Example:
      >>> import compress_jax as cj
      >>> row = cj.prune.BlockRow("layer_0", {"cosine": 0.25}, True)
      >>> print(row)
      BlockRow(block='layer_0', influence={'cosine': 0.25}, kept=True, reason='')
    """

    rows: tuple[BlockRow, ...]
    before: Cost
    after: Cost
    judged: tuple[Judged, ...]

    def __str__(self) -> str:
        """Return the table."""
        names = [each.name for each in self.judged]
        lines = [("block", *names, "kept", "")]
        for row in self.rows:
            found = [f"{row.influence[name]:.4g}" if row.influence else "" for name in names]
            lines.append((row.block, *found, "yes" if row.kept else "no", row.reason))
        table = aligned(lines, right=range(1, len(names) + 1)).splitlines()
        table += map(str, self.judged)
        for name in ("macs", "params"):
            old = getattr(self.before, name)
            new = getattr(self.after, name)
            table.append(f"{name}: {old:,} -> {new:,} ({old / max(new, 1):.2f}x fewer)")
        return "\n".join(table)


class Shortened(NamedTuple):
    """A model of fewer blocks, from `drop_blocks`.

    Attributes:
      params: the smaller parameters: stacked leaves are shorter, other leaves left the tree.
      fn: ``fn(params, *inputs)``, compiled; differentiate it, quantize its params, shrink it.
      kept: the numbers of the blocks that stayed, from 0 in the order in which they run.
      table: what was removed, and why.

    Example:
      >>> import compress_jax as cj
      >>> cj.prune.Shortened._fields
      ('params', 'fn', 'kept', 'table')
    """

    params: Params
    fn: ModelFn
    kept: tuple[int, ...]
    table: BlockRemoval


def drop_blocks(
    fn: ModelFn,
    params: Params,
    *inputs: PyTree,
    batches: Iterable[Batch],
    count: int | None = None,
    ratio: float | None = None,
    by: str | None = None,
    patterns: Sequence[Patterns] | None = None,
    exclude: Patterns = (),
    distance: Distance | None = None,
    hold_out: float = 0.25,
) -> Shortened:
    r"""Remove the blocks of layers that a function misses least.

    The blocks are found in the function's trace, see `compress_jax.trace.blocks`: iterations of a
    scan over stacked leaves, or leaves of a common name, that take a value to one of the same
    shape. Their influence is measured on calibration data, by one of two criteria:

    * ``"cosine"``: :math:`1 - \cos(x, y)` between what goes into a block and what comes out, the
      mean over vectors (ShortGPT's block influence): one pass.
    * ``"distance"``: how far the outputs move when that block alone is skipped: one pass a block.

    The blocks of least influence are removed. One program serves all choices of blocks.

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays.
      inputs: trees of arrays or shapes for the trace; by default the first batch.
      batches: arguments of ``fn`` after params; a tuple is several; all of one shape.
      count: how many blocks to remove.
      ratio: or which share of those that can be skipped, a half rounded up.
      by: ``"cosine"`` or ``"distance"``; None for the one that stays nearer on held-out batches.
      patterns: a glob, or several, over the leaves of each block outside loops; by default leaves
        that share a path up to its first number.
      exclude: globs over names of blocks that stay.
      distance: as of `shrink`.
      hold_out: the share of batches that criteria are judged by, and do not see; 0 judges by all.

    Returns:
      ``Shortened(params, fn, kept, table)``; ``print(small.table)``.

    Raises:
      ConfigError: if not exactly one of count and ratio is given, or fewer blocks can be removed.
      NoMatchError: if a glob matches no block.
      NonFiniteError: if an influence, or the distance of every criterion, is not finite.
      DataError: if there are too few batches.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {f"layer_{i}": {"w": jnp.eye(2) * c} for i, c in enumerate([1.0, 0.1, -3.0])}
      >>> def fn(p, x):
      ...     for layer in sorted(p):
      ...         x = x + jnp.tanh(x @ p[layer]["w"])
      ...     return x
      >>> batches = [jnp.array([[1.0, -2.0]]), jnp.array([[0.5, 1.0]])]
      >>> small = cj.prune.drop_blocks(fn, params, batches=batches, count=1, by="distance")
      >>> small.kept, sorted(small.params)
      ((0, 2), ['layer_0', 'layer_2'])

    References:
      Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
      2024. Kim et al., "Shortened LLaMA", 2024 (what the outputs lose).
    """
    if (count is None) == (ratio is None):
        raise ConfigError("say how much to remove: count=2 blocks, or ratio=0.25 of them")
    names = (COSINE, SKIPPED) if by is None else (one_of("by", by, (COSINE, SKIPPED)),)
    made, judges = held_out(batches, hold_out)
    inputs = inputs or made[0]
    found = blocks(fn, params, *inputs, patterns=patterns)
    staying = _staying(found, exclude)
    free = [i for i in range(len(found.found)) if i not in staying]
    able = [block for block in found.found if not block.reason]
    if count is None:
        count = amount_exact(number("ratio", ratio, 0, 1), len(able))
    if not whole("count", count, 0) < max(len(able), 1) or count > len(free):
        whole_ones = "".join(f"\n  {found.found[i].name}: {why}" for i, why in staying.items())
        raise ConfigError(
            f"{count} blocks cannot be removed: {len(able)} can be skipped, of which one stays at "
            f"least, and {len(free)} are not excluded{whole_ones}"
        )
    measure = _measure(fn, params, found, distance or relative_error)
    influence = {name: _influence(measure, free, len(found.found), made, name) for name in names}
    gone = {name: sorted(free, key=each.__getitem__)[:count] for name, each in influence.items()}
    kept = {name: _mask(len(found.found), each) for name, each in gone.items()}
    errors = measure(list(kept.values()), judges or made)[0]
    judged = nearest(dict(zip(names, errors, strict=True)), {})
    best = gone[next(each.name for each in judged if each.taken)]
    return _shortened(found, params, inputs, influence, staying, best, judged)


def _staying(found: Blocks, exclude: Patterns) -> dict[int, str]:
    """Return why blocks must stay, by their number."""
    names = [block.name for block in found.found]
    excluded = set(match(exclude, names)) if exclude else set()
    reasons = {}
    for i, block in enumerate(found.found):
        if reason := block.reason or ("excluded" if block.name in excluded else ""):
            reasons[i] = reason
    return reasons


def _mask(size: int, gone: Iterable[int]) -> np.ndarray:
    """Return which blocks run, bool ``[blocks]``."""
    kept = np.ones(size, bool)
    kept[list(gone)] = False
    return kept


Measure: TypeAlias = Callable[
    [Sequence[np.ndarray], Sequence[Arguments]], tuple[np.ndarray, np.ndarray]
]
"""``(masks, batches) -> (distance of each mask, influence of blocks)``, means over batches."""


def _measure(fn: ModelFn, params: Params, found: Blocks, distance: Distance) -> Measure:
    """Return what runs the function without some blocks; one program for all masks."""
    full = jax.jit(fn)

    @jax.jit
    def run(
        kept: jax.Array, params: Params, outputs: PyTree, batch: Arguments
    ) -> tuple[jax.Array, jax.Array]:
        own, influence = found.masked(kept, params, *batch)
        return jnp.mean(distance(own, outputs)), influence

    def measure(
        masks: Sequence[np.ndarray], batches: Sequence[Arguments]
    ) -> tuple[np.ndarray, np.ndarray]:
        totals = np.zeros(len(masks))
        moved = np.zeros(len(found.found))
        for batch in batches:
            outputs = full(params, *batch)
            for i, mask in enumerate(masks):
                error, influence = run(jnp.asarray(mask), params, outputs, batch)
                totals[i] += float(error)
                moved += np.asarray(influence, float) / len(masks)
        return totals / len(batches), moved / len(batches)

    return measure


def _influence(
    measure: Measure, free: Sequence[int], size: int, batches: Sequence[Arguments], name: str
) -> dict[int, float]:
    """Return the influence of the blocks that can be skipped, by their number."""
    if name == COSINE:
        moved = measure([_mask(size, ())], batches)[1]
        found = {i: float(moved[i]) for i in free}
    else:
        errors = measure([_mask(size, [i]) for i in free], batches)[0]
        found = dict(zip(free, map(float, errors), strict=True))
    if not np.isfinite(list(found.values())).all():
        raise NonFiniteError(f"the influence of blocks by {name} is NaN or infinite: {found}")
    return found


def _shortened(
    found: Blocks,
    params: Params,
    inputs: Sequence[PyTree],
    influence: dict[str, dict[int, float]],
    staying: dict[int, str],
    gone: Sequence[int],
    judged: tuple[Judged, ...],
) -> Shortened:
    smaller, run = found.without(params, [found.found[i].name for i in gone])
    rows = []
    for i, block in enumerate(found.found):
        own = {} if i in staying else {name: each[i] for name, each in influence.items()}
        rows.append(BlockRow(block.name, own, i not in gone, staying.get(i, "")))
    before = cost(found.fn, params, *inputs)
    after = cost(run, smaller, *inputs)
    kept = tuple(i for i in range(len(rows)) if i not in gone)
    return Shortened(smaller, run, kept, BlockRemoval(tuple(rows), before, after, judged))
