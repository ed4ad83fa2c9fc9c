"""Distillation: train a student on the logits and features of a frozen teacher.

Losses are functions of arrays. Those on logits and tokens return one float32 number per example or
token, and pass no gradient to the teacher. Weights and temperatures may be arrays, such as an optax
schedule's value at a step:
``cross_entropy(s, y) + warmup(step) * dkd(s, t, y, temperature=cooling(step))`` with
``warmup = optax.linear_schedule(0.0, 1.0, 1000)``.
"""

from compress_jax.core.deprecated import renamed
from compress_jax.distill._adapters.adapter import (
    Adapter,
    activation,
    conv,
    deconv,
    linear,
    norm,
    sequential,
)
from compress_jax.distill._adapters.fusion import fusion, pool, resize_features
from compress_jax.distill._adapters.heads import (
    embedding,
    gaussian,
    generator,
    paraphraser,
    projector,
    translator,
)
from compress_jax.distill._chunked import chunked_hinton, chunked_kl
from compress_jax.distill._losses.contrastive import Bank, crd, crd_bank, crd_negatives, crd_update
from compress_jax.distill._losses.correlations import cc, cka_loss, ickd, pkt
from compress_jax.distill._losses.dist import dist
from compress_jax.distill._losses.features import attention, fsp, ft, hint, mgd, nst, review, vid
from compress_jax.distill._losses.logits import (
    Objective,
    cross_entropy,
    dkd,
    hard_label,
    hinton,
    jsd,
    kl,
    mse,
    reverse_kl,
    total_variation,
)
from compress_jax.distill._losses.margins import ab, ofd, ofd_margin
from compress_jax.distill._losses.relations import rkd, rkd_angle, rkd_distance, similarity
from compress_jax.distill._losses.sequences import generate, next_tokens, on_policy
from compress_jax.distill._losses.tokens import Total, masked_mean, masked_total, token_total
from compress_jax.distill._losses.transforms import (
    averaged,
    ensemble,
    ensembled,
    standardize,
    virtual_teacher,
)
from compress_jax.distill._objective.terms import (
    LossContext,
    Schedule,
    Term,
    contrast,
    on_features,
    on_labels,
    on_logits,
    on_vocabulary,
    on_weights,
)
from compress_jax.distill._objective.weights import l2_sp
from compress_jax.distill._teachers.cache import (
    Cache,
    CachedFeed,
    by_example,
    open_cache,
    write_cache,
)
from compress_jax.distill._teachers.capture import capture
from compress_jax.distill._teachers.ensemble import (
    Drift,
    Teachers,
    drift,
    fingerprint,
    hexadecimal,
    require_same,
)
from compress_jax.distill._teachers.fidelity import (
    CalibrationBins,
    agreement,
    calibration,
    calibration_error,
    cka,
)
from compress_jax.distill._teachers.teacher import Teacher, cast
from compress_jax.distill._teachers.top_k import TopK, buckets, top_k, top_k_kl

__all__ = [
    "Bank",
    "Cache",
    "CachedFeed",
    "CalibrationBins",
    "Drift",
    "Objective",
    "Adapter",
    "Schedule",
    "LossContext",
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
    "on_vocabulary",
    "on_policy",
    "on_weights",
    "open_cache",
    "paraphraser",
    "pkt",
    "pool",
    "projector",
    "require_same",
    "resize_features",
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

__getattr__ = renamed(
    {
        "Calibration": "CalibrationBins",
        "Part": "Adapter",
        "Seen": "LossContext",
        "resize": "resize_features",
    },
    __name__,
)


def __dir__() -> list[str]:
    """List the public names only, not the modules that define them."""
    return sorted(__all__)
