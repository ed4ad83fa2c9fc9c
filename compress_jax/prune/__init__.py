"""Pruning: weights seen as zero, chosen by a score, an amount and a schedule."""

from compress_jax.core.deprecated import renamed
from compress_jax.layerwise._result import Rewritten as Rewritten
from compress_jax.prune import importance
from compress_jax.prune._at_init import grasp, snip, synflow
from compress_jax.prune._budgets import for_bytes, for_flops
from compress_jax.prune._channels.result import Removal, Shrunk, narrow
from compress_jax.prune._channels.shrink import shrink
from compress_jax.prune._dynamic import Growth, regrowing, rigl, set
from compress_jax.prune._gains import Gain, Gains, gains
from compress_jax.prune._gradient_scores import fisher, movement, saliency
from compress_jax.prune._lottery import nested, rewind, rewinding, rounds
from compress_jax.prune._masks.score import Score, Seen, masked, normalized
from compress_jax.prune._masks.structures import block, channel, head, n_m
from compress_jax.prune._oneshot.sparsegpt import sparsegpt
from compress_jax.prune._oneshot.wanda import wanda
from compress_jax.prune._restart import grown, reset_moments, restart
from compress_jax.prune._scores import lamp, magnitude, random, scored
from compress_jax.prune._sparsities import cubic, erk, shares
from compress_jax.prune._top_kast import ste, top_kast

__all__ = [
    "Gain",
    "Gains",
    "Growth",
    "Removal",
    "Score",
    "Seen",
    "Shrunk",
    "block",
    "channel",
    "cubic",
    "erk",
    "fisher",
    "for_bytes",
    "for_flops",
    "gains",
    "grasp",
    "grown",
    "head",
    "importance",
    "lamp",
    "magnitude",
    "masked",
    "movement",
    "n_m",
    "narrow",
    "nested",
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
    "set",
    "shares",
    "shrink",
    "snip",
    "sparsegpt",
    "ste",
    "synflow",
    "top_kast",
    "wanda",
]

__getattr__ = renamed({"Pruned": "Rewritten"}, __name__)


def __dir__() -> list[str]:
    """Show what may be called, and no module that holds it."""
    return sorted(__all__)
