"""Pruning: weights seen as zero, chosen by a score, an amount and a schedule."""

from compress_jax.prune._cubic import cubic
from compress_jax.prune._fisher import fisher
from compress_jax.prune._magnitude import magnitude
from compress_jax.prune._movement import movement
from compress_jax.prune._random import random
from compress_jax.prune._saliency import saliency
from compress_jax.prune._scored import scored
from compress_jax.prune.at_init import grasp, snip, synflow
from compress_jax.prune.masked import Score, Seen, masked
from compress_jax.prune.structures import block, channel, head, n_m

__all__ = [
    "Score",
    "Seen",
    "block",
    "channel",
    "cubic",
    "fisher",
    "grasp",
    "head",
    "magnitude",
    "masked",
    "movement",
    "n_m",
    "random",
    "saliency",
    "scored",
    "snip",
    "synflow",
]
