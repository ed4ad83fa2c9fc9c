"""Compression and distillation of Flax models as pure functions over parameter pytrees.

The core: `Compression` and its combinators `chain`, `at`, `rules`, `every`, `between`; `leafwise`
to write your own; `bind` to read leaves' layouts from a function; `coverage` to see what is done to
each leaf; `unpack` to get arrays back from packed ones; `save` and `load` for files. The methods:
`quantize`, `prune`, `cluster`, `lowrank`, `distill`, and `layerwise` with the result of their
solvers. The laboratory: `data`, `models`, `tasks`, `train`, `search`, `report`, which are imported
when first used.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

# The other packages load data pipelines, optimizers and plots; they are imported when first used.
from compress_jax import cluster, core, distill, export, layerwise, lowrank, prune, quantize, trace
from compress_jax.core import (
    Compression,
    CompressionState,
    as_optax,
    at,
    between,
    chain,
    coverage,
    every,
    identity,
    leafwise,
    nbytes,
    rules,
    straight_through,
    unpack,
)
from compress_jax.export import load, save
from compress_jax.trace import bind

# Type checkers do not run `__getattr__`.
if TYPE_CHECKING:
    from compress_jax import data, models, report, search, tasks, train

__version__ = "0.1.0"
__all__ = [
    "Compression",
    "CompressionState",
    "as_optax",
    "at",
    "between",
    "bind",
    "chain",
    "cluster",
    "core",
    "coverage",
    "data",
    "distill",
    "every",
    "export",
    "identity",
    "layerwise",
    "leafwise",
    "load",
    "lowrank",
    "models",
    "nbytes",
    "prune",
    "quantize",
    "report",
    "rules",
    "save",
    "search",
    "straight_through",
    "tasks",
    "trace",
    "train",
    "unpack",
]


def __getattr__(name: str) -> ModuleType:
    """Import data, models, report, search, tasks, train on first use: they take seconds to load."""
    if name in ("data", "models", "report", "search", "tasks", "train"):
        # The import also makes the module an attribute of this one, so that the next use does not
        # come here.
        return importlib.import_module(f"compress_jax.{name}")
    raise AttributeError(f"module 'compress_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Show what may be called, packages that are not imported yet too."""
    return sorted(__all__)
