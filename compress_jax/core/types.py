"""Names for what functions take and return. A checker sees through most of them; a reader need not."""

from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np

PyTree: TypeAlias = Any
"""A nest of dicts, lists, tuples and registered classes with arrays as leaves."""

Params: TypeAlias = Any
"""A tree of parameter arrays: a Linen dict, an NNX state, an Equinox module's arrays, a plain dict."""

Variables: TypeAlias = Any
"""What a model's `apply` takes first: params, or params with batch statistics beside them."""

Batch: TypeAlias = Any
"""A tree of arrays whose leading axis counts examples."""

Array: TypeAlias = jax.Array | np.ndarray
"""An array on a device or on the host."""

Scalar: TypeAlias = float | jax.Array
"""A Python number, or an array of rank 0, traced or not."""

Step: TypeAlias = int | jax.Array
"""A training step: a Python integer, or an int32 scalar inside jit."""

Shape: TypeAlias = tuple[int, ...]
"""The shape of an array."""

DType: TypeAlias = Any
"""Whatever NumPy takes for a dtype: `jnp.float32`, ``"int8"``, a `numpy.dtype`."""

Patterns: TypeAlias = str | tuple[str, ...] | list[str]
"""A glob over paths, or several: ``"**/kernel"``."""


@runtime_checkable
class ModelFn(Protocol):
    """A pure function of params and inputs: what is traced, calibrated, rewritten and exported."""

    def __call__(self, params: Params, /, *inputs: Any) -> PyTree:
        """Return the outputs."""
        ...


@runtime_checkable
class Schedule(Protocol):
    """A function of the training step, as optax has them."""

    def __call__(self, step: Step, /) -> Scalar:
        """Return the value at a step."""
        ...
