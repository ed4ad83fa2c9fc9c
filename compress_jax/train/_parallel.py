"""The same step on many devices: jit over a mesh, or pmap."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from compress_jax.core.errors import ArgumentError, NoMatchError, ShapeError
from compress_jax.core.paths import flatten, match
from compress_jax.core.types import Array, Batch, Leaf, Params, PyTree, Shape
from compress_jax.data._feed import Part
from compress_jax.train._processes import spread
from compress_jax.train._state import TrainState
from compress_jax.train._step import Metrics, Step

Rules = Sequence[tuple[str, PartitionSpec]]
CompiledStep = Callable[..., tuple[TrainState, Metrics]]

REPLICATED = PartitionSpec()


def make_mesh(data: int = -1, **axes: int) -> Mesh:
    """Return a mesh over all devices of all processes, from the sizes of its axes.

    Args:
      data: parts that a batch is divided into; -1 for as many as the other axes leave devices.
      **axes: sizes of further axes: ``fsdp`` divides batches and, by rules, params; any other one,
        such as ``tensor`` or ``expert``, divides what rules say.

    Returns:
      The mesh, its axes in this order.

    Raises:
      ArgumentError: if the sizes do not multiply to the number of devices.

    Example:
      >>> import compress_jax as cj
      >>> dict(cj.train.make_mesh(fsdp=1).shape) == {"data": jax.device_count(), "fsdp": 1}
      True
    """
    sizes = {"data": data, **axes}
    count = jax.device_count()
    left = count // math.prod(max(size, 1) for size in sizes.values())
    sizes = {name: left if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != count:
        text = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ArgumentError(f"a mesh of {text} does not fill {count} devices; choose other sizes")
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """Return the axes of a mesh that the leading axis of batches is divided over.

    Args:
      mesh: the devices.

    Returns:
      ``"data"`` and ``"fsdp"``, as far as it has them.

    Example:
      >>> batch_axes(make_mesh(fsdp=1))
      ('data', 'fsdp')
    """
    return tuple(name for name in ("data", "fsdp") if name in mesh.axis_names)


def shardings(state: TrainState, mesh: Mesh, rules: Rules = ()) -> PyTree:
    """Return where each array of a state lives on a mesh.

    Whatever belongs to a parameter (its path is a part of theirs: optimizer moments, masks, scales
    of channels and groups, factors, averages) is divided as the parameter is, along the axes that
    it shares with it. Everything else is replicated.

    Args:
      state: the state, or its shapes.
      mesh: the devices.
      rules: ``[(glob of parameter paths, PartitionSpec), ...]``, first match wins; a parameter
        without one is replicated. Of data, fsdp, tensor and expert, axes that the mesh lacks divide
        nothing.

    Returns:
      A tree of NamedSharding with the state's structure.

    Raises:
      NoMatchError: if a glob matches no parameter.
      ArgumentError: if a spec names an axis that the mesh lacks.
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
    return shardings_like(state, state.params, mesh, rules)


def shardings_like(tree: PyTree, params: Params, mesh: Mesh, rules: Rules = ()) -> PyTree:
    """Return where each array of any tree lives, as `shardings` does.

    Args:
      tree: arrays or shapes, of which some belong to params: a teacher, say.
      params: what the rules are about.
      mesh: the devices.
      rules: see `shardings`.

    Returns:
      A tree of NamedSharding with the structure of ``tree``.

    Example:
      >>> params = {"kernel": jnp.ones((4, 8))}
      >>> mesh = make_mesh()
      >>> shardings_like({"ema": params}, params, mesh)["ema"]["kernel"].is_fully_replicated
      True
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(params)[0].items()}
    specs = _specs(shapes, mesh, rules)
    mesh = automatic(mesh)

    # Optimizers nest the tree of params at other places: a moment of the kernel is at
    # ".../trace/params/dense/kernel". Of the params whose path is part of that one, the longest
    # is meant.
    def choose(key_path: jax.tree_util.KeyPath, leaf: Leaf) -> NamedSharding:
        name = f"/{jax.tree_util.keystr(key_path, simple=True, separator='/')}/"
        owner = max((path for path in shapes if f"/{path}/" in name), key=len, default=None)
        if owner not in specs:
            return NamedSharding(mesh, REPLICATED)
        spec = _shared(shapes[owner], specs[owner], tuple(leaf.shape), mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(choose, tree)


def unmatched(params: Params, rules: Rules) -> list[str]:
    """Return the paths of the params that no rule matches, which every device holds whole.

    Args:
      params: arrays or shapes.
      rules: see `shardings`.

    Returns:
      Paths.

    Example:
      >>> unmatched({"kernel": jnp.ones(2), "bias": jnp.ones(2)}, [("kernel", PartitionSpec())])
      ['bias']
    """
    flat = flatten(params)[0]
    matched = {path for pattern, _ in rules for path in match(pattern, flat)}
    return [path for path in flat if path not in matched]


def fitting(params: Params, mesh: Mesh, rules: Rules) -> Rules:
    """Return rules for params that have changed since the rules were written.

    Args:
      params: arrays or shapes, after `prune.shrink`, say: some are gone or have other sizes.
      mesh: the devices.
      rules: see `shardings`.

    Returns:
      Those rules that still match and divide evenly.

    Example:
      >>> mesh, rules = make_mesh(), [("kernel", PartitionSpec()), ("gone", PartitionSpec())]
      >>> [pattern for pattern, _ in fitting({"kernel": jnp.ones(3)}, mesh, rules)]
      ['kernel']
    """
    kept: list[tuple[str, PartitionSpec]] = []
    for rule in rules:
        try:
            shardings_like(params, params, mesh, [rule])
        except (NoMatchError, ShapeError):
            continue
        kept.append(rule)
    return tuple(kept)


def automatic(mesh: Mesh) -> Mesh:
    """Return a mesh whose axes the compiler divides arrays over.

    Those of ``jax.make_mesh`` are explicit by default, where every operation of a model has to say
    how its result is divided: few models do.

    Args:
      mesh: of any kind of axes.

    Returns:
      One of the same devices.

    Example:
      >>> automatic(jax.make_mesh((1,), ("data",))).axis_types == (AxisType.Auto,)
      True
    """
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    if mesh.axis_types == kinds:
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def _specs(shapes: dict[str, Shape], mesh: Mesh, rules: Rules) -> dict[str, PartitionSpec]:
    """Return how each param that a rule matches is divided."""
    specs: dict[str, PartitionSpec] = {}
    for pattern, spec in rules:
        for path in match(pattern, shapes):
            specs.setdefault(path, _known(spec, mesh))  # the first match wins
    for path, spec in specs.items():
        _check_divides(path, shapes[path], spec, mesh)
    return specs


AXES = ("data", "fsdp", "tensor", "expert")


def _known(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """Return a spec without the usual axes that a mesh lacks: they divide nothing there."""

    def known(names: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        each = (names,) if isinstance(names, str) else names or ()
        strange = [name for name in each if name not in (*mesh.axis_names, *AXES)]
        if strange:
            raise ArgumentError(
                f"{spec} names {strange[0]!r}, and the mesh has {', '.join(mesh.axis_names)}"
            )
        own = tuple(name for name in each if name in mesh.axis_names)
        return own[0] if len(own) == 1 else own or None

    return PartitionSpec(*map(known, spec))


def _shared(shape: Shape, spec: PartitionSpec, own: Shape, mesh: Mesh) -> PartitionSpec:
    """Return how an array that belongs to a param is divided: along the axes that both have.

    Args:
      shape: of the param.
      spec: how it is divided.
      own: shape of the array: the param's; that with 1, or fewer entries, on some axes (scales,
        factors); without one axis (factored moments); ``[..., groups, 1, channels]``.
      mesh: the devices.

    Returns:
      A PartitionSpec; empty where nothing is known to be shared.
    """
    entries = (*spec, *(None,) * (len(shape) - len(spec)))
    if own == shape:
        return spec
    layers = len(own) - 3
    if len(shape) == layers + 2 and own[:layers] == shape[:layers] and own[-2] == 1:
        # Groups along one contracted axis: [layers..., groups, 1, channels].
        entries = (*entries[:-1], None, entries[-1])
        shape = (*shape[:-1], 1, shape[-1])
    elif len(own) == len(shape) - 1:
        without = [(*shape[:i], *shape[i + 1 :]) for i in range(len(shape))]
        if own not in without:
            return REPLICATED
        axis = without.index(own)  # of equal axes the first: that may cost a copy, and no number
        entries = (*entries[:axis], *entries[axis + 1 :])
        shape = own
    if len(own) != len(shape):
        return REPLICATED
    return PartitionSpec(
        *(
            entry if size > 1 and full % size == 0 and size % _parts(entry, mesh) == 0 else None
            for size, full, entry in zip(own, shape, entries, strict=True)
        )
    )


def place(state: TrainState, mesh: Mesh, rules: Rules = ()) -> TrainState:
    """Copy a state onto a mesh, as `jit_step` with the same rules wants it.

    Args:
      state: the state; of several processes, each holds the same.
      mesh: the devices, those of all processes.
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
    where = shardings(state, mesh, rules)
    if jax.process_count() > 1:
        return spread(state, where)
    # device_put may share memory where a leaf is in place already.
    copied = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
    return jax.device_put(copied, where)


class MeshStep(NamedTuple):
    """A step compiled over a mesh, see `jit_step`.

    Attributes:
      compiled: ``(state, batch, teacher) -> (state, metrics)``, from ``jax.jit``.
      batch: where the arrays of a batch live.
      mesh: the devices.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
      >>> compiled = jax.jit(lambda state, batch, teacher: (state, {}))
      >>> step = MeshStep(compiled, NamedSharding(mesh, PartitionSpec()), mesh)
      >>> step.lower(1, jnp.ones(2)).compile()(1, jnp.ones(2), None)[1]
      {}
    """

    compiled: Any
    batch: NamedSharding
    mesh: Mesh

    def __call__(
        self, state: TrainState, batch: Batch, *, teacher: PyTree = None
    ) -> tuple[TrainState, Metrics]:
        """Take a step; see `jit_step`."""
        self._check(batch)
        if jax.process_count() > 1:
            batch = spread(batch, self.batch)
        return self.compiled(state, batch, teacher)

    def lower(
        self, state: TrainState, batch: Batch, *, teacher: PyTree = None
    ) -> jax.stages.Lowered:
        """Return the step for arguments of these shapes, lowered and not compiled yet."""
        self._check(batch)
        return self.compiled.lower(state, batch, teacher)

    def rows(self, batch_size: int) -> np.ndarray:
        """Return which rows of a batch the devices of this process hold, int64 ``[rows]``."""
        where = self.batch.addressable_devices_indices_map((batch_size,))
        parts = [np.arange(batch_size)[index[0]] for index in where.values() if index is not None]
        return np.unique(np.concatenate(parts))

    def trace(
        self, state: TrainState, batch: Batch, *, teacher: PyTree = None
    ) -> jax.stages.Traced:
        """Return the step for arguments of these shapes, traced and not lowered yet."""
        self._check(batch)
        return self.compiled.trace(state, batch, teacher)

    def _check(self, batch: Batch) -> None:
        # Here, so that a batch that cannot be divided is a ShapeError that names the entry.
        for name, leaf in flatten(batch)[0].items():
            shape = leaf.shape if isinstance(leaf, Part) else jnp.shape(leaf)
            _check_divides(f"batch entry {name!r}", shape, self.batch.spec, self.mesh)


def jit_step(
    step: Step,
    mesh: Mesh,
    state: TrainState,
    *,
    rules: Rules = (),
    batch: PartitionSpec | None = None,
    teacher: PyTree = REPLICATED,
) -> MeshStep:
    """Compile a step over a mesh; results are those of one device, whatever the sharding.

    Args:
      step: from `make_step`.
      mesh: the devices, say ``jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))``.
      state: a state, for its structure and shapes.
      rules: where parameters live, see `shardings`; all replicated by default.
      batch: how every array of a batch is divided: by default the leading axis over ``"data"`` and
        ``"fsdp"``, as far as the mesh has them.
      teacher: PartitionSpec of the teacher's arrays, or a tree of them or of shardings; replicated
        by default.

    Returns:
      ``(state, batch, *, teacher=None) -> (state, metrics)``. It donates the state: give it one
      from `place` (or its own last), and do not use that again. The teacher is not donated; put it
      where it belongs once, by ``jax.device_put``. A batch of NumPy arrays is the whole batch, the
      same in every process; each device is given its rows. ``lower`` takes the same arguments, or
      their shapes, and compiles nothing.

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
    mesh = automatic(mesh)
    batch_where = NamedSharding(mesh, PartitionSpec(batch_axes(mesh)) if batch is None else batch)
    # In older versions of JAX a PartitionSpec is a tuple, which a tree map takes apart.
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    teacher_where = jax.tree.map(
        lambda each: NamedSharding(mesh, each) if is_spec(each) else each, teacher, is_leaf=is_spec
    )

    def run(state: TrainState, batch: Batch, teacher: PyTree) -> tuple[TrainState, Metrics]:
        return step(state, batch, teacher=teacher)

    compiled = jax.jit(
        run,
        in_shardings=(where, batch_where, teacher_where),
        out_shardings=(where, NamedSharding(mesh, REPLICATED)),
        donate_argnums=0,
    )

    return MeshStep(compiled, batch_where, mesh)


def replicate(
    tree: PyTree, devices: Sequence[Any] | None = None, axis_name: str = "data"
) -> PyTree:
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
    stacked = jax.tree.map(  # [devices, ...]
        lambda leaf: jnp.broadcast_to(leaf, (len(devices), *jnp.shape(leaf))), tree
    )
    return jax.device_put(stacked, NamedSharding(mesh, PartitionSpec(axis_name)))


def unreplicate(tree: PyTree) -> PyTree:
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

    def run(state: TrainState, batch: Batch, teacher: PyTree) -> tuple[TrainState, Metrics]:
        return step(state, batch, teacher=teacher, axis_name=axis_name)

    mapped = jax.pmap(run, axis_name=axis_name, devices=devices, donate_argnums=0)

    def divide(leaf: Array) -> Array:
        if leaf.shape[0] % count:
            raise ShapeError(
                f"a batch of {leaf.shape[0]} cannot be divided evenly over {count} devices"
            )
        return leaf.reshape(count, leaf.shape[0] // count, *leaf.shape[1:])  # [devices, rows, ...]

    def call(
        state: TrainState, batch: Batch, *, teacher: PyTree = None
    ) -> tuple[TrainState, Metrics]:
        return mapped(state, jax.tree.map(divide, batch), teacher)

    return call


def _check_divides(what: str, shape: Shape, spec: PartitionSpec, mesh: Mesh) -> None:
    """Raise ShapeError unless an array of this shape can be divided as the spec says."""
    if len(spec) > len(shape):
        raise ShapeError(f"{what} has shape {shape}, too few axes for {spec}")
    # A spec may be shorter than the shape; the axes that it leaves out are not divided.
    for size, names in zip(shape, spec, strict=False):
        parts = _parts(names, mesh)
        if size % parts:
            raise ShapeError(
                f"{what} has shape {shape}; {size} cannot be divided evenly over {parts} devices "
                f"({spec})"
            )


def _parts(names: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    """Return into how many parts an entry of a PartitionSpec divides an axis."""
    return math.prod(
        mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ())
    )
