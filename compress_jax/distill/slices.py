"""Slices: a linear head over a large vocabulary, applied to some of its columns and to some tokens at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from compress_jax.distill.softened import Scalar, bounded

Carry = TypeVar("Carry")


class Head(NamedTuple):
    """A linear head and what it is applied to: hidden states ``[tokens, width]``, kernel ``[width, vocabulary]``."""

    hidden: jax.Array
    kernel: jax.Array

    def columns(self, start: Scalar, width: int) -> jax.Array:
        """Return some columns of the kernel."""
        return jax.lax.dynamic_slice_in_dim(self.kernel, start, width, axis=1)

    def logits(self, start: Scalar, width: int, temperature: Scalar) -> jax.Array:
        """Return the bounded softened logits of some columns, float32 from the matrix product on."""
        return bounded(wide_matmul(self.hidden, self.columns(start, width)), temperature, self.kernel.shape[1])


def wide_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return ``a @ b``, accumulated and returned in float32 at least, whatever short dtypes come in."""
    wide = widest(a, b)
    if a.dtype != b.dtype:
        a, b = a.astype(wide), b.astype(wide)
    return jnp.matmul(a, b, preferred_element_type=wide)


def widest(*arrays: jax.Array) -> jnp.dtype:
    """Return float32, or float64 if one of the arrays is."""
    return jnp.dtype(jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32)


def alongside(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
    """Return the kernel as it is, but under `jax.shard_map` one of each device that has its own hidden states.

    It adds zeros that vary as the hidden states do (XLA drops the addition). The gradient to the kernel is then summed over
    the devices, outside of any custom derivative, as that of every shared array is.
    """
    return kernel + jnp.zeros_like(hidden, kernel.dtype, shape=(1, 1))


def over_columns(step: Callable[[Carry, Any, int], Carry], carry: Carry, columns: int, size: int) -> Carry:
    """Return the carry after ``step(carry, start, width)`` over all columns, ``size`` at a time, the last ones fewer."""
    size = min(size, columns)
    full, rest = divmod(columns, size)
    carry, _ = jax.lax.scan(lambda carry, i: (step(carry, i * size, size), None), carry, jnp.arange(full))
    return step(carry, full * size, rest) if rest else carry


def split(tokens: Any, size: int | None) -> Any:
    """Return arrays ``[tokens, ...]`` as ``[blocks, tokens of a block, ...]``, filled up with zeros.

    A block takes every so-many-th token, so that each holds some of every device's, where devices hold consecutive ones.
    """

    def one(x: jax.Array) -> jax.Array:
        blocks = max(1, -(-len(x) // (size or len(x) or 1)))
        filled = jnp.pad(x, ((0, -len(x) % blocks), *[(0, 0)] * (x.ndim - 1)))
        return filled.reshape(-1, blocks, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(one, tokens)


def join(blocks: Any, tokens: int) -> Any:
    """Return arrays ``[blocks, tokens of a block, ...]``, as `split` made them, as ``[tokens, ...]``."""

    def one(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:tokens]

    return jax.tree.map(one, blocks)
