"""Files of an earlier version are read bit for bit.

If these tests change, old files are lost.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core.bits import Bits, Gaps
from compress_jax.core.layout import Layout
from compress_jax.core.levels import Float, Table
from compress_jax.core.packed import Clustered, LowRank, Quantized, Sparse, Tabled

# plain and coded are of the commit "Add ArgumentError, ..." of 2026-11-28, versions 1 and 2; the
# compact ones, of version 3, of 2026-11-29.
OLD = Path(__file__).parent / "old"
METADATA = {"model": "old", "accuracy": 0.5, "none": None}


def tree() -> dict[str, Any]:
    """Return a node of every kind and nesting, of whole numbers, equal on every machine."""
    grid = jnp.arange(120).reshape(12, 10)
    mask, few = grid % 3 == 0, grid % 40 == 7
    float32, bfloat16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
    channel, groups = Layout.of((12, 10), "channel"), Layout.of((12, 10), 5, pad=True)
    scale, zero = (
        jnp.arange(1.0, 11).reshape(1, 10) / 8,
        (jnp.arange(10) % 16).astype(jnp.uint8).reshape(1, 10),
    )
    quantized = Quantized(Bits.pack(grid % 16, 4), scale, zero, channel)
    kept = Quantized(Sparse.pack(grid % 8, mask, bits=3), scale, jnp.uint8(4), channel, bfloat16)
    block = Tabled(
        Bits.pack(grid % 16, 4),
        jnp.full((3, 1, 10), 0.5, jnp.float8_e4m3fn),
        jnp.float32(2),
        Float(2, 1),
        groups,
    )
    shared = Clustered(Bits.pack(grid % 6, 3), jnp.arange(6.0) - 3)
    return {
        "bits": Bits.pack(grid * 500, 16),
        "gaps": Gaps.pack(few, 4),
        "sparse": [
            Sparse.pack(grid.astype(jnp.float32), mask),
            Sparse.pack(grid.astype(jnp.bfloat16), few, fill=-0.0),
        ],
        "quantized": (
            quantized,
            kept,
            Quantized(Bits.pack(grid % 4, 2), jnp.ones((3, 1, 10)), jnp.uint8(2), groups),
        ),
        "tabled": [
            block,
            Tabled(
                Bits.pack(grid % 3, 2),
                jnp.ones((1, 1)),
                None,
                Table((-1.0, 0.0, 0.5)),
                Layout((12, 10)),
            ),
        ],
        "clustered": [
            shared,
            Clustered(Sparse.pack(grid % 4, few, fill=4, bits=2), jnp.arange(4.0), float32),
        ],
        "low rank": [
            LowRank(jnp.ones((12, 2)), jnp.ones((2, 10)), (3, 4, 10)),
            LowRank(quantized, jnp.eye(10), (12, 10)),
        ],
        "arrays": [
            jnp.arange(4.0),
            jnp.ones(3, bfloat16),
            jnp.arange(5).astype(jnp.int4),
            jnp.array([True]),
            None,
        ],
        "numbers": {7: jnp.zeros((0, 3)), 8: np.arange(3) * 2.0**40},
    }


@pytest.mark.wide(1)
@pytest.mark.parametrize("name", ["plain", "coded", "compact", "compact_coded"])
@pytest.mark.slow
def test_an_old_file_is_read_bit_for_bit_and_written_again(name, tmp_path):
    packed, metadata = cj.load(OLD / f"{name}.safetensors")
    assert metadata == METADATA and jax.tree.structure(packed) == jax.tree.structure(tree())
    for x, y in zip(jax.tree.leaves(packed), jax.tree.leaves(tree()), strict=True):
        assert (x.dtype, x.shape, np.asarray(x).tobytes()) == (
            y.dtype,
            y.shape,
            np.asarray(y).tobytes(),
        )
    for coded in (False, True):
        cj.save(tmp_path / "again", packed, metadata, coded=coded)
        assert jax.tree.structure(cj.load(tmp_path / "again")[0]) == jax.tree.structure(packed)
    assert (
        dict(cj.export.stream(OLD / f"{name}.safetensors")).keys()
        == dict(cj.export.stream(tmp_path / "again")).keys()
    )
