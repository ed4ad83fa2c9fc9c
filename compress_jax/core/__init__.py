"""Compressions and their combinators, leaf paths, packed nodes and coverage."""

from compress_jax.core._chain import chain
from compress_jax.core._coverage import Coverage, Row, coverage
from compress_jax.core._leafwise import leafwise
from compress_jax.core._straight_through import straight_through
from compress_jax.core.combine import at, between, every, rules
from compress_jax.core.compression import (
    ByLeaf,
    Compression,
    CompressionState,
    LeafView,
    identity,
    leaf_views,
)
from compress_jax.core.errors import (
    ArgumentError,
    ArtifactError,
    CheckpointError,
    CompressError,
    ConfigError,
    DataError,
    ExportError,
    NoMatchError,
    NonFiniteError,
    OtherProcessError,
    ShapeError,
    StateError,
    WeightsError,
)
from compress_jax.core.optax_adapter import as_optax
from compress_jax.core.packed import (
    Clustered,
    LowRank,
    Quantized,
    Sparse,
    Sum,
    Tabled,
    nbytes,
    unpack,
)

__all__ = [
    "ArgumentError",
    "ArtifactError",
    "ByLeaf",
    "CheckpointError",
    "Clustered",
    "CompressError",
    "Compression",
    "CompressionState",
    "ConfigError",
    "Coverage",
    "DataError",
    "ExportError",
    "LeafView",
    "LowRank",
    "NoMatchError",
    "NonFiniteError",
    "OtherProcessError",
    "Quantized",
    "Row",
    "ShapeError",
    "Sparse",
    "StateError",
    "Sum",
    "Tabled",
    "WeightsError",
    "as_optax",
    "at",
    "between",
    "chain",
    "coverage",
    "every",
    "identity",
    "leaf_views",
    "leafwise",
    "nbytes",
    "rules",
    "straight_through",
    "unpack",
]


def __dir__() -> list[str]:
    """Show what may be called, and no module that holds it."""
    return sorted(__all__)
