"""A function of one leaf over many leaves, compiled once for those that are alike.

XLA compiles a function anew for every leaf of a program: 500 equal kernels take 500 times as long
as one. Leaves that are alike are put into one array and gone through by one loop, whose body is
compiled once. A short function is called leaf by leaf: it compiles in no time, and the loop's array
would be a second copy of the weights.
"""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Jaxpr, jaxprs_in_params

from compress_jax.core.types import PyTree

R = TypeVar("R")

FEWEST = 8  # alike leaves that are worth a loop
# One equation of these is a hundred instructions.
RANDOM = ("random_bits", "threefry2x32")
LONG = 100  # equations of a function that is worth a loop; a scale by absmax has 20, by mse 250


def map_leaves(
    fn: Callable[..., R],
    inputs: Mapping[str, tuple[PyTree, ...]],
    static: Mapping[str, Hashable] | None = None,
) -> dict[str, R]:
    """Call a function for each leaf; while it is traced, leaves that are alike are one loop.

    Alike are leaves whose names differ in numbers alone (the same kernel of each layer, which is
    sharded in one way) and whose inputs have the same types. The results are those of the calls,
    bit for bit.

    Args:
      fn: ``(path, *inputs) -> result``. Of the path it may use only what the names and `static` of
        alike leaves have in common.
      inputs: trees of arrays by path: the leaf, its state, its key. What all leaves share belongs
        into ``fn``.
      static: by path what else must be equal for leaves to be alike.

    Returns:
      The results by path, in order.

    Example:
      >>> inputs = {f"layer_{i}": (jnp.float32(i),) for i in range(3)}
      >>> {path: float(y) for path, y in map_leaves(lambda path, x: 2 * x, inputs).items()}
      {'layer_0': 0.0, 'layer_1': 2.0, 'layer_2': 4.0}
    """
    found = {}
    for paths in _alike(inputs, static or {}):
        rows = [inputs[path] for path in paths]
        one = partial(fn, paths[0])
        if len(paths) >= FEWEST and _equations(jax.make_jaxpr(one)(*rows[0]).jaxpr) >= LONG:
            results = _loop(one, rows)
        else:
            results = [fn(path, *row) for path, row in zip(paths, rows, strict=True)]
        found.update(zip(paths, results, strict=True))
    return {path: found[path] for path in inputs}


def _alike(
    inputs: Mapping[str, tuple[PyTree, ...]], static: Mapping[str, Hashable]
) -> list[list[str]]:
    """Return the paths in groups of alike leaves; outside a trace every leaf is one by itself."""
    groups: dict[Hashable, list[str]] = {}
    for path, row in inputs.items():
        leaves, structure = jax.tree.flatten(row)
        kind: Hashable = path
        traced = any(isinstance(x, Tracer) for x in leaves)
        # A Python number in an array would lose its weak type, and with it the result's dtype.
        if traced and not any(jax.typeof(x).weak_type for x in leaves):
            role = re.sub(r"\d+", "0", path)
            kind = role, static.get(path), structure, tuple(jax.typeof(x) for x in leaves)
        groups.setdefault(kind, []).append(path)
    return list(groups.values())


def _equations(jaxpr: Jaxpr) -> int:
    """Return how many equations a jaxpr has, those of nested ones included."""
    found = 0
    for eqn in jaxpr.eqns:
        found += LONG if eqn.primitive.name in RANDOM else 1
        found += sum(map(_equations, jaxprs_in_params(eqn.params)))
    return found


def _loop(fn: Callable[..., R], rows: Sequence[tuple[PyTree, ...]]) -> list[R]:
    """Return the results of a function of each row, by a loop over the rows."""

    def body(start: jax.Array, row: tuple[PyTree, ...]) -> tuple[jax.Array, R]:
        return start + 1, fn(*row)

    stacked = jax.tree.map(_stack, *rows)  # [rows, ...]
    # Zero at the end, which the compiler does not find out: see `_one_by_one`.
    start, results = jax.lax.scan(body, jnp.int32(-len(rows)), stacked)
    split = partial(_sliced, len(rows))
    one_by_one = partial(_one_by_one, len(rows))
    return jax.lax.platform_dependent(start, results, cpu=one_by_one, default=split)


def _stack(*xs: Any) -> jax.Array | np.ndarray:
    # Known numbers stay known: a program would build an array of them one at a time.
    return np.stack(xs) if all(isinstance(x, np.generic) for x in xs) else jnp.stack(xs)


def _sliced(rows: int, start: jax.Array, stacked: Any) -> list[Any]:
    """Return the rows of stacked arrays."""
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(rows)]


def _one_by_one(rows: int, start: jax.Array, stacked: Any) -> list[Any]:
    """Return the rows of stacked arrays, all read by one kernel.

    On a CPU, XLA compiles equal kernels once, and a slice at a known index is a kernel of its own,
    25 ms each. So the index is counted where the compiler cannot see it, from ``start``, zero.
    """
    found = []
    for _ in range(rows):
        found.append(jax.tree.map(partial(_row, start), stacked))
        # The condition holds always; without it the sum would become part of the next kernel.
        start = jax.lax.cond(start >= 0, lambda i: i + 1, lambda i: i, start)
    return found


def _row(index: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
