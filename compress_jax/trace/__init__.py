"""Seeing inside any function: one interpreter of jaxprs for sites, statistics, rewriting, cost and channel groups."""

from compress_jax.trace._observe import observe
from compress_jax.trace._rewrite import rewrite
from compress_jax.trace._sites import sites, unseen
from compress_jax.trace.site import Site

__all__ = ["Site", "observe", "rewrite", "sites", "unseen"]
