"""What training would need on devices that are not here: bytes, operations, collectives, time.

Each stage's step is compiled ahead of time for emulated devices, from shapes alone: no array is
made, so networks of any size can be planned on a laptop.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core._chain import chain
from compress_jax.core.compression import identity
from compress_jax.core.types import PyTree
from compress_jax.distill import Teacher
from compress_jax.search._candidate import Candidate, Rewrite, Subject
from compress_jax.search._experiment import Experiment, shapes_of
from compress_jax.search._method import bound_to
from compress_jax.search._network import Network, Training, Variables
from compress_jax.search._stage import Stage, prepare
from compress_jax.train import (
    MeshStep,
    Step,
    StepFlops,
    TrainState,
    jit_step,
    shardings,
    step_flops,
)
from compress_jax.train._chips import Chip
from compress_jax.train._parallel import fitting, shardings_like


class Plan(NamedTuple):
    """One stage's training step, as each device will run it.

    Attributes:
      stage: its name.
      arguments: bytes by term: params, optimizer, compression, model state, loss, teacher, batch.
      temporaries: bytes beside them while a step runs.
      flops: operations of a step, of products of arrays.
      collectives: bytes that a step's collectives give each device, by kind.
      numbers: how many collectives there are, by kind.
      parts: FLOPs of the whole step by part, over all devices, and those of the models.

    Example:
      >>> import compress_jax as cj
      >>> plan = Plan("student", {"params": 4_000}, 1_000, 2e9, {"all-reduce": 4_000}, {})
      >>> plan.total, plan.seconds(cj.search.CHIPS["h100"]) > 2e9 / 989e12
      (5000, True)
    """

    stage: str
    arguments: dict[str, int]
    temporaries: int
    flops: float
    collectives: dict[str, int]
    numbers: dict[str, int]
    parts: StepFlops = StepFlops({}, 0.0)

    @property
    def total(self) -> int:
        """Bytes of arguments and temporaries."""
        return sum(self.arguments.values()) + self.temporaries

    def seconds(self, chip: Chip) -> float:
        """Return an estimate: the chip's peaks, and collectives that overlap with nothing."""
        computing = max(self.flops / chip.flops, self.total / chip.bandwidth)
        return computing + sum(self.collectives.values()) / chip.links


def plan(experiment: Experiment) -> Iterator[Plan]:
    """Compile every stage of an experiment for its mesh, from shapes alone.

    What a rewrite makes of a network is not known before it has run: what follows one is planned on
    the network before it. Operations are those of products of arrays, of a device's share of them;
    what devices compute twice, as their rules leave it whole, is not counted twice.

    Args:
      experiment: its mesh may be of emulated devices.

    Yields:
      The plan of each network that is trained: teacher, student, candidates.

    Raises:
      CompressError: if a rule matches nothing, or a step cannot be compiled.

    Example:
      >>> import numpy as np, optax
      >>> import compress_jax as cj
      >>> arrays = {"image": np.ones((80, 4, 4, 1), np.float32), "label": np.arange(80) % 3}
      >>> training = cj.search.Training(optax.sgd(0.1), steps=1, batch_size=8)
      >>> student = cj.search.Network(cj.models.LeNet300100(3, (8, 8)), training)
      >>> int4 = cj.search.Candidate("int4", cj.quantize.uniform(4), training)
      >>> data = cj.data.Data.from_arrays(arrays)
      >>> plans = list(cj.search.plan(cj.search.Experiment("ones", data, student, (int4,))))
      >>> [each.stage for each in plans], plans[0].arguments["params"]
      (['student', 'candidate int4'], 940)
    """
    teacher = None
    if isinstance(experiment.teacher, Network):
        variables = experiment.teacher.shapes(experiment.example)
        yield from _of_network(experiment, "teacher", experiment.teacher, None)
        teacher = _frozen(experiment, experiment.teacher, variables)
    learns_from = teacher if experiment.float32_student == "teacher" else None
    yield from _of_network(experiment, "student", experiment.student, learns_from)
    student = experiment.student.shapes(experiment.example)
    if experiment.teacher == "student":
        teacher = _frozen(experiment, experiment.student, student)
    for candidate in experiment.candidates:
        yield from _of_candidate(experiment, candidate, student, teacher)


def _of_network(
    experiment: Experiment, name: str, network: Network, teacher: Teacher | None
) -> Iterator[Plan]:
    if network.training is None or not network.training.steps:
        return
    stage = Stage(name, network.pure, network.training, teacher, rules=network.rules)
    yield _planned(experiment, stage, network.shapes(experiment.example))


def _of_candidate(
    experiment: Experiment, candidate: Candidate, student: Variables, teacher: Teacher | None
) -> Iterator[Plan]:
    subject = Subject(experiment.student.pure, student)
    rules = experiment.student.rules
    for item in candidate.items:
        if isinstance(item, Network):
            yield from _of_network(experiment, f"candidate {candidate.name}", item, teacher)
            subject = Subject(item.pure, item.shapes(experiment.example))
            rules = item.rules
        elif isinstance(item, Training) and item.steps:
            stage = Stage(
                f"candidate {candidate.name}",
                subject.model,
                item,
                teacher,
                subject.compression or identity(),
                rules=fitting(subject.variables["params"], experiment.devices, rules),
            )
            yield _planned(experiment, stage, subject.variables)
        elif not isinstance(item, Rewrite | Training):
            bound = bound_to(experiment, subject, item)
            whole = bound if subject.compression is None else chain(subject.compression, bound)
            subject = subject._replace(compression=whole)


def _frozen(experiment: Experiment, network: Network, variables: Variables) -> Teacher:
    return jax.eval_shape(lambda v: experiment.freeze(network.pure, v), variables)


def _planned(experiment: Experiment, stage: Stage, variables: Variables) -> Plan:
    """Compile a stage's step for the mesh, and read off what it needs."""
    mesh = experiment.devices
    if experiment.terms is None:
        stage = stage._replace(teacher=None)  # trained on labels alone
    batch = shapes_of(experiment.data.train, stage.training.batch_size)
    made: list[Step] = []

    def begin(variables: Variables, batch: PyTree, teacher: Teacher | None) -> TrainState:
        step, start, aux = prepare(experiment, stage._replace(teacher=teacher), variables, batch)
        made.append(step)
        return start(variables, aux)

    state = jax.eval_shape(begin, variables, batch, stage.teacher)
    where = shardings(state, mesh, stage.rules)
    of_teacher = None
    if stage.teacher is not None:
        params = stage.teacher.variables["params"]
        of_teacher = shardings_like(stage.teacher, params, mesh, experiment.teacher_rules)
    compiled = jit_step(made[0], mesh, state, rules=stage.rules, teacher=of_teacher)
    done = compiled.lower(state, batch, teacher=stage.teacher).compile()
    collectives, numbers = _collectives(done.as_text() or "")
    memory = done.memory_analysis()

    # Of the trace, as the compiler's own count takes the body of a loop once.
    flops = step_flops(compiled, state, batch, teacher=stage.teacher)
    return Plan(
        stage.name,
        _arguments(state, where, compiled, batch, stage.teacher, of_teacher),
        int(memory.temp_size_in_bytes) if memory else 0,
        flops.total / mesh.size,
        collectives,
        numbers,
        flops,
    )


def _arguments(
    state: TrainState,
    where: TrainState,
    step: MeshStep,
    batch: PyTree,
    teacher: PyTree,
    of_teacher: PyTree,
) -> dict[str, int]:
    """Return the bytes that each device holds before a step, by term."""
    terms = {
        "params": (state.params, where.params),
        "optimizer": (state.opt_state, where.opt_state),
        "compression": (state.compression, where.compression),
        "model state": (state.model_state, where.model_state),
        "loss": ((state.parts, state.memory), (where.parts, where.memory)),
        "teacher": (teacher, of_teacher),
        "batch": (batch, jax.tree.map(lambda _: step.batch, batch)),
    }
    return {name: _bytes(tree, shards) for name, (tree, shards) in terms.items() if tree}


def _bytes(tree: PyTree, where: PyTree) -> int:
    """Return the bytes of a tree that one device holds."""

    def own(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize

    return sum(jax.tree.leaves(jax.tree.map(own, tree, where)))


KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
COMMENT = re.compile(r"/\*.*?\*/")  # "/*index=5*/", in tuples of many arrays
# "%x = (f32[8,4]{1,0}, f32[4]{0}) all-reduce(...)": the results, and what computes them.
COLLECTIVE = re.compile(rf"= (\(?[^=]*?\)?) ({KINDS})(?:-start)?\(")
ARRAY = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\]")
# "%body.1 (p: f32[4]) -> f32[4] {" begins a computation, which loops and calls name.
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$", re.M)
CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.-]+)")
TIMES = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def _collectives(text: str) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes and the number of a compiled program's collectives, by kind."""
    sizes: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    pieces = COMPUTATION.split(COMMENT.sub("", text))
    bodies = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    times = _times(bodies)
    for name, body in bodies.items():
        for results, kind in COLLECTIVE.findall(body):
            numbers[kind] += times[name]
            sizes[kind] += times[name] * sum(map(_size, ARRAY.findall(results)))
    return dict(sizes), dict(numbers)


def _size(array: tuple[str, str, str]) -> int:
    """Return the bytes of an array that the program writes as ``f32[8,4]``."""
    name, bits, shape = array
    entries = math.prod(int(size) for size in shape.split(",") if size)
    return entries * (8 if name == "pred" else int(bits or 32)) // 8


def _times(bodies: dict[str, str]) -> Counter[str]:
    """Return how often each computation runs: those of loops once a turn."""
    times: Counter[str] = Counter()
    names = set().union(*(CALLED.findall(body) for body in bodies.values()))

    def count(name: str, number: int) -> None:
        times[name] += number
        for line in bodies.get(name, "").splitlines():
            turns = TIMES.search(line)
            for called in CALLED.findall(line):
                count(called, number * (int(turns[1]) if turns else 1))

    for name in bodies.keys() - names:
        count(name, 1)
    return times
