"""Checksums of arrays: the same in any sharding, other after any change."""

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.types import Array, DType

FEW = 2**16  # entries; the checksum of fewer is computed by NumPy, which has nothing to compile

SEEDS = (0, 0x7F4A7C15)


def checksum(array: jax.Array) -> Array:
    """Return two sums of an array's bits, uint32 ``[2]``, the same in any sharding.

    Each word is mixed with its place in the array, so that exchanged entries change the sums, and
    the sums are modulo 2**32, so that their order does not matter: every device adds up its own.
    """
    if array.is_fully_addressable and array.size < FEW:
        return _sums(np.asarray(array))
    return _sums_on_devices(array)


def begun(array: jax.Array) -> Array:
    """Return the checksum of an array, not waited for, or the array to compute it of later.

    CPUs compute before a call returns. There a view, which keeps the memory from being donated, is
    summed up in the background. What processes share they must add up in one order, so now.
    """
    alone = len(array.devices()) == 1 and array.is_fully_addressable
    if array.size >= FEW and alone and jax.default_backend() == "cpu":
        return np.asarray(array)
    return checksum(array)


def ended(started: Array) -> Array:
    """Return the checksum that `begun` began."""
    later = isinstance(started, np.ndarray) and started.size >= FEW
    return _sums_on_devices(jnp.asarray(started)) if later else started


@jax.jit
def _sums_on_devices(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    words = array.astype(_whole_bytes(array.dtype))
    bits = jnp.dtype(f"uint{8 * min(words.dtype.itemsize, 4)}")
    words = jax.lax.bitcast_convert_type(words, bits).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)  # where each word is, in C order
    for axis, size in enumerate(words.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.stack([_mixed(words, place, seed).sum(dtype=jnp.uint32) for seed in SEEDS])


def _sums(array: np.ndarray) -> np.ndarray:
    """Return what `_sums_on_devices` does, by NumPy."""
    words = np.ravel(array.astype(_whole_bytes(array.dtype)))
    words = words.view(f"uint{8 * min(words.dtype.itemsize, 4)}").astype(np.uint32)
    place = np.arange(len(words), dtype=np.uint32)
    return np.stack([_mixed(words, place, seed).sum(dtype=np.uint32) for seed in SEEDS])


def _whole_bytes(dtype: DType) -> DType:
    """Return a dtype of whole bytes that holds the values of another; mostly itself."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return jnp.dtype(jnp.uint8)
    if jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8:
        return jnp.dtype(jnp.int8)
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 8:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(dtype)


def _mixed(words: Array, place: Array, seed: int) -> Array:
    """Mix words with their places; another word at a place always gives another result."""
    x = words ^ (place * np.uint32(0x9E3779B1) + np.uint32(seed))
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
