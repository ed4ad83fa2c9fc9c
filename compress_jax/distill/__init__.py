"""Distillation: a student learns from a teacher's logits, seen by losses over arrays and given by a frozen teacher.

Losses on logits and tokens are of each example, in float32, and give the teacher no gradient. Their weights and temperatures
may be arrays: schedules are optax's, as in ``cross_entropy(s, y) + warmup(step) * dkd(s, t, y, temperature=cooling(step))``
with ``warmup = optax.linear_schedule(0.0, 1.0, 1000)``.
"""

from compress_jax.distill._capture import capture
from compress_jax.distill._contrast import contrast
from compress_jax.distill._dist import dist
from compress_jax.distill._fusion import fusion
from compress_jax.distill._resize import pool, resize
from compress_jax.distill._top_k import TopK, buckets, top_k, top_k_kl
from compress_jax.distill.cache import Cache, CachedFeed, by_example, open_cache, write_cache
from compress_jax.distill.chunked import chunked_hinton, chunked_kl
from compress_jax.distill.contrastive import Bank, crd, crd_bank, crd_negatives, crd_update
from compress_jax.distill.convolutions import conv, deconv, linear
from compress_jax.distill.correlations import cc, cka_loss, ickd, pkt
from compress_jax.distill.decoupled import dkd
from compress_jax.distill.divergences import jsd, reverse_kl, total_variation
from compress_jax.distill.feature_statistics import attention, fsp, ft, nst
from compress_jax.distill.features import hint, mgd, review, vid
from compress_jax.distill.fidelity import Calibration, agreement, calibration, calibration_error, cka
from compress_jax.distill.heads import embedding, gaussian, generator, paraphraser, projector, translator
from compress_jax.distill.logits import Objective, cross_entropy, hard_label, hinton, kl, mse
from compress_jax.distill.margins import ab, ofd, ofd_margin
from compress_jax.distill.parts import Part, activation, norm, sequential
from compress_jax.distill.relations import rkd, rkd_angle, rkd_distance, similarity
from compress_jax.distill.sequences import generate, next_tokens, on_policy
from compress_jax.distill.teacher import Teacher, cast
from compress_jax.distill.teachers import Drift, Teachers, drift, fingerprint, hexadecimal, require_same
from compress_jax.distill.terms import Schedule, Seen, Term, on_features, on_labels, on_logits, on_weights
from compress_jax.distill.tokens import Total, masked_mean, masked_total, token_total
from compress_jax.distill.transforms import averaged, ensemble, ensembled, standardize, virtual_teacher
from compress_jax.distill.weights import l2_sp

__all__ = [
    "Bank",
    "Cache",
    "CachedFeed",
    "Calibration",
    "Drift",
    "Objective",
    "Part",
    "Schedule",
    "Seen",
    "Teacher",
    "Teachers",
    "Term",
    "TopK",
    "Total",
    "ab",
    "activation",
    "agreement",
    "attention",
    "averaged",
    "buckets",
    "by_example",
    "calibration",
    "calibration_error",
    "capture",
    "cast",
    "cc",
    "chunked_hinton",
    "chunked_kl",
    "cka",
    "cka_loss",
    "contrast",
    "conv",
    "crd",
    "crd_bank",
    "crd_negatives",
    "crd_update",
    "cross_entropy",
    "deconv",
    "dist",
    "dkd",
    "drift",
    "embedding",
    "ensemble",
    "ensembled",
    "fingerprint",
    "fsp",
    "ft",
    "fusion",
    "gaussian",
    "generate",
    "generator",
    "hard_label",
    "hexadecimal",
    "hint",
    "hinton",
    "ickd",
    "jsd",
    "kl",
    "l2_sp",
    "linear",
    "masked_mean",
    "masked_total",
    "mgd",
    "mse",
    "next_tokens",
    "norm",
    "nst",
    "ofd",
    "ofd_margin",
    "on_features",
    "on_labels",
    "on_logits",
    "on_policy",
    "on_weights",
    "open_cache",
    "paraphraser",
    "pkt",
    "pool",
    "projector",
    "require_same",
    "resize",
    "reverse_kl",
    "review",
    "rkd",
    "rkd_angle",
    "rkd_distance",
    "sequential",
    "similarity",
    "standardize",
    "token_total",
    "top_k",
    "top_k_kl",
    "total_variation",
    "translator",
    "vid",
    "virtual_teacher",
    "write_cache",
]
