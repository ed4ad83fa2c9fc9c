"""Names for what functions take and return."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

# Any class can be registered as a node of a tree, so no type of Python says what a tree holds.
# These names say what a function expects of it.

PyTree: TypeAlias = Any
"""A nest of dicts, lists, tuples and registered classes with arrays as leaves."""

Params: TypeAlias = PyTree
"""A tree of parameter arrays: a Linen dict, an NNX state, an Equinox module, a plain dict."""

Leaf: TypeAlias = Any
"""A leaf of params: an array, traced or not, its `jax.ShapeDtypeStruct`, or a packed node."""

Leaves: TypeAlias = Mapping[str, Leaf]
"""Arrays, or what stands for them, by path."""

Variables: TypeAlias = PyTree
"""What a model's `apply` takes first: params, or params with batch statistics beside them."""

Batch: TypeAlias = PyTree
"""A tree of arrays whose leading axis counts examples."""

Array: TypeAlias = jax.Array | np.ndarray
"""An array on a device or on the host."""

Scalar: TypeAlias = float | jax.Array
"""A Python number, or an array of rank 0, traced or not."""

Step: TypeAlias = int | jax.Array
"""A training step: a Python integer, or an int32 scalar inside jit."""

Shape: TypeAlias = tuple[int, ...]
"""The shape of an array."""

DType: TypeAlias = jax.typing.DTypeLike
"""Whatever NumPy takes for a dtype: `jnp.float32`, ``"int8"``, a `numpy.dtype`."""

Patterns: TypeAlias = str | tuple[str, ...] | list[str]
"""A glob over paths, or several: ``"**/kernel"``."""

Model: TypeAlias = Any
"""A Flax Linen module, the graphdef of an NNX module, or another object that holds a model."""

Aval: TypeAlias = Any
"""The abstract value of a variable of a jaxpr: its shape and dtype."""

Key: TypeAlias = jax.Array | None
"""A typed PRNG key, or None where nothing is random."""

ModelFn: TypeAlias = Callable[..., PyTree]
"""A pure function ``(params, *inputs) -> outputs``: what is traced, calibrated and exported."""

Schedule: TypeAlias = Callable[[Step], Scalar]
"""A function of the training step, as optax has them."""

JsonObject: TypeAlias = dict[str, Any]
"""An object of a JSON file: text to null, flags, numbers, text, lists and objects."""
