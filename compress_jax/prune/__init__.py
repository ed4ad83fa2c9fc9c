"""Pruning: masks from a score, a sparsity and a schedule; README.md says which method when."""

from collections.abc import Callable
from typing import Any

from compress_jax.core.deprecated import renamed
from compress_jax.layerwise._result import Rewritten as Rewritten
from compress_jax.prune import importance
from compress_jax.prune._at_init import grasp, snip, synflow
from compress_jax.prune._bit_masks import bit_masks
from compress_jax.prune._budgets import for_bytes, for_flops
from compress_jax.prune._channels.judge import Judged
from compress_jax.prune._channels.result import Removal, Shrunk, narrow
from compress_jax.prune._channels.shrink import shrink
from compress_jax.prune._depth import BlockRemoval, BlockRow, Shortened, drop_blocks
from compress_jax.prune._dynamic import Growth, regrowing, rigl, sparse_evolution
from compress_jax.prune._gains import Gain, Gains, gains
from compress_jax.prune._gradient_scores import fisher, movement, saliency
from compress_jax.prune._lottery import nested, rewind, rewinding, rounds
from compress_jax.prune._masks.bit_mask import BitMask
from compress_jax.prune._masks.score import Score, ScoreInputs, by_score, normalized
from compress_jax.prune._masks.structures import block, channel, head, n_m
from compress_jax.prune._oneshot.sparsegpt import sparsegpt
from compress_jax.prune._oneshot.wanda import wanda
from compress_jax.prune._restart import newly_active, reset_moments, restart
from compress_jax.prune._scores import lamp, magnitude, random, scored
from compress_jax.prune._sparsities import cubic, erk, shares
from compress_jax.prune._top_kast import straight_through, top_kast

__all__ = [
    "BitMask",
    "BlockRemoval",
    "BlockRow",
    "Gain",
    "Gains",
    "Growth",
    "Judged",
    "Removal",
    "Score",
    "ScoreInputs",
    "Shortened",
    "Shrunk",
    "bit_masks",
    "block",
    "by_score",
    "channel",
    "cubic",
    "drop_blocks",
    "erk",
    "fisher",
    "for_bytes",
    "for_flops",
    "gains",
    "grasp",
    "head",
    "importance",
    "lamp",
    "magnitude",
    "movement",
    "n_m",
    "narrow",
    "nested",
    "newly_active",
    "normalized",
    "random",
    "regrowing",
    "reset_moments",
    "restart",
    "rewind",
    "rewinding",
    "rigl",
    "rounds",
    "saliency",
    "scored",
    "shares",
    "shrink",
    "snip",
    "sparse_evolution",
    "sparsegpt",
    "straight_through",
    "synflow",
    "top_kast",
    "wanda",
]

__getattr__: Callable[[str], Any] = renamed(
    {
        "Pruned": "Rewritten",
        "Seen": "ScoreInputs",
        "grown": "newly_active",
        "masked": "by_score",
        "set": "sparse_evolution",
        "ste": "straight_through",
    },
    __name__,
)


def __dir__() -> list[str]:
    """List the public names, without the modules that define them."""
    return sorted(__all__)
