"""Several processes as one: what the first does alone, what all must agree on, and whose is what.

All processes run the same program and reach every function here in the same order. Where the first
one raises inside `once` or `in_order`, all raise, so that none waits for one that has ended.
"""

import json
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from compress_jax.core.errors import OtherProcessError
from compress_jax.core.types import JsonObject, PyTree
from compress_jax.data._feed import Part

T = TypeVar("T")
LAG = 2  # steps after which a vote is read: the device has finished those, so nobody waits


def is_first() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def once(fn: Callable[[], T]) -> T:
    """Call a function in the first process alone; the others wait for its result.

    Args:
      fn: writes files, say, and returns a value that JSON has a form for.

    Returns:
      Its result, in every process.

    Raises:
      OtherProcessError: in the other processes, if the function raises.

    Example:
      >>> once(lambda: 2 + 3)
      5
    """
    if jax.process_count() == 1:
        return fn()
    if not is_first():
        return _received(None)
    try:
        result = fn()
    except BaseException as error:
        _received({"error": f"process 0: {type(error).__name__}: {error}"})
        raise
    return _received({"result": result})


def in_order(fn: Callable[[], T]) -> T:
    """Call a function in the first process, and then in the others.

    What the first makes on disk, such as a prepared data set, is there when the others look.

    Args:
      fn: any function.

    Returns:
      Its result, of this process.

    Raises:
      OtherProcessError: in the other processes, if the first one's call raises.

    Example:
      >>> in_order(lambda: "made")
      'made'
    """
    kept: list[T] = []
    once(lambda: kept.append(fn()))
    return kept[0] if kept else fn()


def _received(sent: JsonObject | None) -> Any:
    """Send a value from the first process to all, and return its result or raise its error."""
    data = np.frombuffer(json.dumps(sent).encode(), np.uint8)
    # Arrays must have one shape in all processes, so the length goes ahead.
    length = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    own = data if is_first() else np.zeros(length, np.uint8)
    message = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(own))))
    if "error" in message:
        if is_first():
            return None  # which raises the error itself
        raise OtherProcessError(message["error"])
    return message["result"]


def is_loss(error: BaseException) -> bool:
    """Return whether an error means that another process is gone.

    Args:
      error: what JAX raised, or a library on top of it.

    Returns:
      True for errors of the runtime, and of Gloo, which joins CPUs, in a run of several processes.

    Example:
      >>> is_loss(RuntimeError("Gloo all-reduce failed: Connection closed by peer"))
      False
    """
    broken = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    return broken and jax.distributed.is_initialized()


class Votes:
    """Lets all processes learn at the same step that one of them was asked to stop.

    Each process casts a number a step. Their maximum is computed on the devices, beside the steps,
    and read two steps later, when it is there: nobody waits for it.

    Example:
      >>> votes = Votes()
      >>> [votes.cast(number) for number in (0, 15, 0, 0)], votes.last(2)
      ([0, 15, 0, 0], 2)
    """

    def __init__(self) -> None:
        """Put one device of each process on a mesh."""
        self._ahead: deque[jax.Array] = deque()
        self._alone = jax.process_count() == 1
        by_process = {device.process_index: device for device in jax.devices()}
        devices = [by_process[index] for index in sorted(by_process)]
        self._mesh = Mesh(devices, ("process",), axis_types=(AxisType.Auto,))
        where = NamedSharding(self._mesh, PartitionSpec())
        self._largest = jax.jit(jnp.max, out_shardings=where)

    def cast(self, number: int) -> int:
        """Cast the vote of a step; return the largest of an earlier step, 0 if it was none."""
        if self._alone:
            return number
        self._begin(number)
        return int(self._ahead.popleft()) if len(self._ahead) > LAG else 0

    def last(self, number: int) -> int:
        """Cast the last vote, and return the largest of all that were not read yet."""
        if self._alone:
            return number
        self._begin(number)
        return max(int(vote) for vote in self._ahead)

    def _begin(self, number: int) -> None:
        where = NamedSharding(self._mesh, PartitionSpec("process"))
        own = np.array([number], np.int32)
        vote = self._largest(jax.make_array_from_process_local_data(where, own))
        self._ahead.append(settle(vote))


def settle(tree: PyTree) -> PyTree:
    """Wait for arrays, where the next program might otherwise run beside the one that makes them.

    On CPUs programs that do not need each other's results run at once, and Gloo mixes up what they
    send where two processes run them in another order. Other devices keep the order of the calls.

    Args:
      tree: arrays.

    Returns:
      The tree.

    Example:
      >>> settle(jnp.ones(2)).tolist()
      [1.0, 1.0]
    """
    wait = jax.process_count() > 1 and jax.default_backend() == "cpu"
    return jax.block_until_ready(tree) if wait else tree


def spread(tree: PyTree, shardings: PyTree) -> PyTree:
    """Return arrays that every process holds whole as arrays over the devices of all.

    Args:
      tree: arrays with the same values in every process, or the `Part` of each.
      shardings: a sharding for all of them, or a tree of shardings.

    Returns:
      The tree; each process has made the shards of its own devices alone.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
      >>> spread({"w": np.ones(2)}, NamedSharding(mesh, PartitionSpec()))["w"].tolist()
      [1.0, 1.0]
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, jax.sharding.Sharding):
        where = shardings
        return jax.tree.map(lambda leaf: _spread(leaf, where), tree)
    return jax.tree.map(_spread, tree, shardings)


def _spread(leaf: jax.Array | np.ndarray | Part, sharding: jax.sharding.Sharding) -> jax.Array:
    if isinstance(leaf, Part):
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)  # it is over all devices already
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
    words = np.asarray(jax.random.key_data(leaf))  # uint32 [..., words]
    impl = jax.random.key_impl(leaf)
    # A key has no NumPy form. NumPy's arrays are taken as whole on every device.
    return jax.jit(lambda w: jax.random.wrap_key_data(w, impl=impl), out_shardings=sharding)(words)


def gathered(tree: PyTree) -> PyTree:
    """Return arrays as ones of a single device, each whole, in every process.

    Args:
      tree: arrays, over any devices.

    Returns:
      The tree. Leaves that other processes hold a part of are gathered one after the other.

    Example:
      >>> len(gathered({"w": jnp.ones(2)})["w"].devices())
      1
    """

    def local(leaf: jax.Array) -> jax.Array:
        # By way of the host, so that it is bound to no device: a mesh may take it again.
        return leaf if len(leaf.devices()) == 1 else jnp.asarray(_in_host_memory(leaf))

    return jax.tree.map(local, tree)


def hosted(tree: PyTree) -> PyTree:
    """Return arrays in host memory, each whole, in every process.

    Args:
      tree: arrays, over any devices.

    Returns:
      The tree of NumPy arrays, gathered one after the other: no device holds all of them.

    Example:
      >>> type(hosted({"w": jnp.ones(2)})["w"]) is np.ndarray
      True
    """
    return jax.tree.map(_in_host_memory, tree)


def _in_host_memory(leaf: jax.Array) -> np.ndarray:
    if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)
