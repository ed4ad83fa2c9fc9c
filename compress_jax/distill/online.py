"""Sums of a softmax over classes that come slice by slice: the largest so far, and sums relative to it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Softmax(NamedTuple):
    """Of each row, the largest logit and the logarithm of ``sum exp(logit - top)``: two numbers, as their sum is rounded."""

    top: jax.Array
    log_sum: jax.Array

    def log_probs(self, logits: jax.Array) -> jax.Array:
        """Return the log-probabilities of a slice ``[rows, width]`` of the logits."""
        return (logits - self.top[:, None]) - self.log_sum[:, None]


class Running(NamedTuple):
    """Of each row, the largest logit so far and ``sum exp(logit - top)``."""

    top: jax.Array
    sum: jax.Array

    @classmethod
    def none(cls, like: jax.Array) -> "Running":
        """Return the sums before the first slice: below any bounded logit, and yet finite."""
        zero = jnp.zeros_like(like)
        return cls(zero + jnp.finfo(zero.dtype).min / 16, zero)

    def add(self, logits: jax.Array) -> "Running":
        """Return the sums with a slice ``[rows, width]`` of logits added."""
        top = jnp.maximum(self.top, logits.max(axis=-1))
        return Running(top, self.sum * jnp.exp(self.top - top) + jnp.exp(logits - top[:, None]).sum(axis=-1))

    def done(self) -> Softmax:
        """Return the softmax, once every slice was added."""
        return Softmax(self.top, jnp.log(self.sum))


class Cross(NamedTuple):
    """Sums for ``KL(p || q)`` from logits x and y: ``sum`` is of ``exp(x - p.top) * ((x - p.top) - (y - q.top))``."""

    p: Running
    q: Running
    sum: jax.Array

    @classmethod
    def none(cls, like: jax.Array) -> "Cross":
        """Return the sums before the first slice."""
        return cls(Running.none(like), Running.none(like), jnp.zeros_like(like))

    def add(self, x: jax.Array, y: jax.Array) -> "Cross":
        """Return the sums with slices ``[rows, width]`` of both logits added."""
        p, q = self.p.add(x), self.q.add(y)
        raised, raised_q = self.p.top - p.top, self.q.top - q.top
        before = jnp.exp(raised) * (self.sum + self.p.sum * (raised - raised_q))
        x, y = x - p.top[:, None], y - q.top[:, None]
        return Cross(p, q, before + (jnp.exp(x) * (x - y)).sum(axis=-1))

    def divergence(self) -> jax.Array:
        """Return ``KL(p || q)`` of each row, once every slice was added."""
        return self.sum / self.p.sum - self.p.done().log_sum + self.q.done().log_sum
