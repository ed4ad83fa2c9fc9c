"""The same step on many devices: jit over a mesh, or pmap."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from compress_jax.core.errors import ShapeError
from compress_jax.core.paths import flatten, match
from compress_jax.core.types import Batch, PyTree
from compress_jax.train._state import TrainState
from compress_jax.train._step import Metrics, Step

Rules = Sequence[tuple[str, PartitionSpec]]
CompiledStep = Callable[..., tuple[TrainState, Metrics]]

REPLICATED = PartitionSpec()
DATA = PartitionSpec("data")


def shardings(state: TrainState, mesh: Mesh, rules: Rules = ()) -> Any:
    """Return where each array of a state lives on a mesh.

    Whatever shadows a parameter (optimizer moments, masks: same path within it, same shape) lives
    where the parameter does; everything else is replicated.

    Args:
      state: the state, or its shapes.
      mesh: the devices.
      rules: ``[(glob of parameter paths, PartitionSpec), ...]``, first match wins; a parameter
        without one is replicated.

    Returns:
      A tree of NamedSharding with the state's structure.

    Raises:
      NoMatchError: if a glob matches no parameter.
      ShapeError: if a matched parameter cannot be divided as its PartitionSpec says.

    Example:
      >>> import optax
      >>> import compress_jax as cj
      >>> optimizer = optax.sgd(0.1, momentum=0.9)
      >>> variables = {"params": {"kernel": jnp.ones((4, 8))}}
      >>> state = cj.train.create(variables, cj.identity(), optimizer, jax.random.key(0))
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
      >>> where = cj.train.shardings(state, mesh, [("kernel", PartitionSpec(None, "data"))])
      >>> spec = where.params["kernel"].spec
      >>> spec == where.opt_state[0].trace["params"]["kernel"].spec == PartitionSpec(None, "data")
      True
    """
    params = flatten(state.params)[0]
    specs: dict[str, PartitionSpec] = {}
    for pattern, spec in rules:
        for path in match(pattern, params):
            specs.setdefault(path, spec)
    for path, spec in specs.items():
        _check_divides(path, params[path].shape, spec, mesh)

    def choose(key_path: tuple[Any, ...], leaf: PyTree) -> NamedSharding:
        name = f"/{jax.tree_util.keystr(key_path, simple=True, separator='/')}/"
        follows = [
            path for path in specs if f"/{path}/" in name and params[path].shape == leaf.shape
        ]
        return NamedSharding(mesh, specs[max(follows, key=len)] if follows else REPLICATED)

    return jax.tree_util.tree_map_with_path(choose, state)


def place(state: TrainState, mesh: Mesh, rules: Rules = ()) -> TrainState:
    """Copy a state onto a mesh, as `jit_step` with the same rules wants it.

    Args:
      state: the state.
      mesh: the devices.
      rules: see `shardings`.

    Returns:
      A copy that shares no memory with the original, so that donating one leaves the other alive.

    Example:
      >>> import optax
      >>> import compress_jax as cj
      >>> variables = {"params": {"w": jnp.zeros(3)}}
      >>> state = cj.train.create(variables, cj.identity(), optax.sgd(0.5), jax.random.key(0))
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
      >>> len(cj.train.place(state, mesh).params["w"].devices()) == jax.device_count()
      True
    """
    copied = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
    return jax.device_put(copied, shardings(state, mesh, rules))


def jit_step(
    step: Step,
    mesh: Mesh,
    state: TrainState,
    *,
    rules: Rules = (),
    batch: PartitionSpec = DATA,
    teacher: Any = REPLICATED,
) -> CompiledStep:
    """Compile a step over a mesh; results are those of one device, whatever the sharding.

    Args:
      step: from `make_step`.
      mesh: the devices, say ``jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))``.
      state: a state, for its structure and shapes.
      rules: where parameters live, see `shardings`; all replicated by default.
      batch: how every array of a batch is divided: the leading axis over ``"data"`` by default.
      teacher: PartitionSpec of the teacher's arrays, or a tree of them; replicated by default.

    Returns:
      ``(state, batch, *, teacher=None) -> (state, metrics)``. It donates the state: give it one
      from `place` (or its own last), and do not use that again. The teacher is not donated; put it
      where it belongs once, by ``jax.device_put``.

    Raises:
      NoMatchError: if a rule matches no parameter.
      ShapeError: if a parameter, or later a batch, cannot be divided evenly.

    Example:
      >>> import optax
      >>> import compress_jax as cj
      >>> def loss(params, model_state, batch, key, teacher, train=True):
      ...     return jnp.square(params["w"] - batch).mean(), (model_state, {})
      >>> variables = {"params": {"w": jnp.zeros(())}}
      >>> state = cj.train.create(variables, cj.identity(), optax.sgd(0.5), jax.random.key(0))
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
      >>> step = cj.train.make_step(loss, optax.sgd(0.5), cj.identity())
      >>> step = cj.train.jit_step(step, mesh, state)
      >>> state, metrics = step(place(state, mesh), jnp.full((jax.device_count(),), 3.0))
      >>> float(state.params["w"])
      3.0
    """
    where = shardings(state, mesh, rules)
    batch_where = NamedSharding(mesh, batch)
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    teacher_where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), teacher, is_leaf=is_spec)

    def run(state: TrainState, batch: Batch, teacher: Any) -> tuple[TrainState, Metrics]:
        return step(state, batch, teacher=teacher)

    compiled = jax.jit(
        run,
        in_shardings=(where, batch_where, teacher_where),
        out_shardings=(where, NamedSharding(mesh, REPLICATED)),
        donate_argnums=0,
    )

    def call(state: TrainState, batch: Batch, *, teacher: Any = None) -> tuple[TrainState, Metrics]:
        for name, leaf in flatten(batch)[0].items():
            _check_divides(f"batch entry {name!r}", jnp.shape(leaf), batch_where.spec, mesh)
        return compiled(state, batch, teacher)

    return call


def replicate(tree: PyTree, devices: Sequence[Any] | None = None, axis_name: str = "data") -> Any:
    """Return a copy of a tree for each device, as `pmap_step` wants state and teacher.

    Args:
      tree: arrays.
      devices: the local devices by default.
      axis_name: that of `pmap_step`; with another one pmap would compile twice.

    Returns:
      The tree with a leading axis over devices.

    Example:
      >>> copies = replicate({"w": jnp.ones(3)})
      >>> copies["w"].shape == (jax.local_device_count(), 3), unreplicate(copies)["w"].tolist()
      (True, [1.0, 1.0, 1.0])
    """
    devices = devices or jax.local_devices()
    mesh = Mesh(devices, (axis_name,), axis_types=(AxisType.Auto,))
    stacked = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (len(devices), *jnp.shape(leaf))), tree
    )
    return jax.device_put(stacked, NamedSharding(mesh, PartitionSpec(axis_name)))


def unreplicate(tree: PyTree) -> Any:
    """Return the first device's copy of a replicated tree.

    Args:
      tree: from `replicate`, or what a step of `pmap_step` returned.

    Returns:
      The tree without its leading axis.

    Example:
      >>> unreplicate(replicate({"w": jnp.ones(2)}))["w"].tolist()
      [1.0, 1.0]
    """
    return jax.tree.map(lambda leaf: leaf[0], tree)


def pmap_step(
    step: Step, devices: Sequence[Any] | None = None, axis_name: str = "data"
) -> CompiledStep:
    """Compile a step by ``jax.pmap``, for code built around it; use `jit_step` in new code.

    The step sums gradients and counts over devices, so that means are over all that counts, and
    averages model state. Batch norm must average its statistics too:
    ``ResNet(..., axis_name="data")``. Random augmentation is drawn by each device for itself, so
    with it results equal those of one device in distribution only.

    Args:
      step: from `make_step`.
      devices: the local devices by default.
      axis_name: name of the mapped axis.

    Returns:
      ``(state, batch, *, teacher=None) -> (state, metrics)``, state and teacher from `replicate`,
      the batch whole: its leading axis is divided here. It donates the state. Metrics come once a
      device, all equal.

    Raises:
      ShapeError: when called with a batch that cannot be divided evenly.

    Example:
      >>> import optax
      >>> import compress_jax as cj
      >>> def loss(params, model_state, batch, key, teacher, train=True):
      ...     return jnp.square(params["w"] - batch).mean(), (model_state, {})
      >>> variables = {"params": {"w": jnp.zeros(())}}
      >>> state = cj.train.create(variables, cj.identity(), optax.sgd(0.5), jax.random.key(0))
      >>> step = cj.train.pmap_step(cj.train.make_step(loss, optax.sgd(0.5), cj.identity()))
      >>> state, metrics = step(replicate(state), jnp.full((jax.device_count(),), 3.0))
      >>> float(unreplicate(state).params["w"])
      3.0
    """
    count = len(devices or jax.local_devices())

    def run(state: TrainState, batch: Batch, teacher: Any) -> tuple[TrainState, Metrics]:
        return step(state, batch, teacher=teacher, axis_name=axis_name)

    mapped = jax.pmap(run, axis_name=axis_name, devices=devices, donate_argnums=0)

    def divide(leaf: PyTree) -> Any:
        if leaf.shape[0] % count:
            raise ShapeError(
                f"a batch of {leaf.shape[0]} cannot be divided evenly over {count} devices"
            )
        return leaf.reshape(count, leaf.shape[0] // count, *leaf.shape[1:])

    def call(state: TrainState, batch: Batch, *, teacher: Any = None) -> tuple[TrainState, Metrics]:
        return mapped(state, jax.tree.map(divide, batch), teacher)

    return call


def _check_divides(what: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    """Raise ShapeError unless an array of this shape can be divided as the spec says."""
    if len(spec) > len(shape):
        raise ShapeError(f"{what} has shape {shape}, too few axes for {spec}")
    for size, names in zip(shape, spec, strict=False):
        parts = math.prod(
            mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ())
        )
        if size % parts:
            raise ShapeError(
                f"{what} has shape {shape}; {size} cannot be divided evenly over {parts} devices "
                f"({spec})"
            )
