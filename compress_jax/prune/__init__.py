"""Pruning: weights seen as zero, chosen by a score, an amount and a schedule."""

from compress_jax.prune import importance
from compress_jax.prune._cubic import cubic
from compress_jax.prune._erk import erk
from compress_jax.prune._fisher import fisher
from compress_jax.prune._lamp import lamp
from compress_jax.prune._magnitude import magnitude
from compress_jax.prune._movement import movement
from compress_jax.prune._random import random
from compress_jax.prune._rigl import rigl
from compress_jax.prune._saliency import saliency
from compress_jax.prune._scored import scored
from compress_jax.prune._set import set
from compress_jax.prune._shrink import shrink
from compress_jax.prune._sparsegpt import sparsegpt
from compress_jax.prune._ste import ste
from compress_jax.prune._top_kast import top_kast
from compress_jax.prune._wanda import wanda
from compress_jax.prune.at_init import grasp, snip, synflow
from compress_jax.prune.budgets import for_bytes, for_flops
from compress_jax.prune.gains import Gain, Gains, gains
from compress_jax.prune.lottery import nested, rewind, rewinding, rounds
from compress_jax.prune.masked import Score, Seen, masked, normalized
from compress_jax.prune.post_training import Pruned
from compress_jax.prune.regrow import Growth, regrowing
from compress_jax.prune.restart import grown, reset_moments, restart
from compress_jax.prune.shares import shares
from compress_jax.prune.shrunk import Removal, Shrunk, narrow
from compress_jax.prune.structures import block, channel, head, n_m

__all__ = [
    "Gain",
    "Gains",
    "Growth",
    "Pruned",
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
