"""Distillation: a student learns from a teacher's logits, seen by losses over arrays and given by a frozen teacher."""

from compress_jax.distill.logits import Objective, cross_entropy, hinton, kl, mse
from compress_jax.distill.teacher import Teacher, cast

__all__ = ["Objective", "Teacher", "cast", "cross_entropy", "hinton", "kl", "mse"]
