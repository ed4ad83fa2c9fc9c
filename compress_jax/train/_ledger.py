"""Time and FLOPs of a distillation step: the teacher's forward, the student's step, the losses."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import optax

from compress_jax.core.compression import Compression, identity
from compress_jax.core.types import Batch, Model, PyTree, Variables
from compress_jax.distill import Teacher, Teachers, Term, on_labels
from compress_jax.train._distillation import TEACHER, distillation
from compress_jax.train._state import create
from compress_jax.train._step import StatefulLoss, make_step


class Ledger(NamedTuple):
    """The cost of a distillation step, by its pieces.

    Attributes:
      seconds: seconds of the ``"teacher"``, the ``"student"`` (a step on the labels alone), the
        ``"loss"`` (what the terms add), and the ``"whole"``.
      flops: likewise, as XLA counts them in the compiled programs.
      examples_per_second: throughput of the whole step.

    Example:
      >>> import compress_jax as cj
      >>> pieces = {"teacher": 3.0, "student": 5.0, "loss": 2.0, "whole": 10.0}
      >>> cj.train.Ledger(pieces, pieces, examples_per_second=12.8).share("loss")
      (0.2, 0.2)
    """

    seconds: dict[str, float]
    flops: dict[str, float]
    examples_per_second: float

    def share(self, of: str) -> tuple[float, float]:
        """Return an entry's share of the whole, of time and of FLOPs."""
        return self.seconds[of] / self.seconds["whole"], self.flops[of] / self.flops["whole"]

    def __str__(self) -> str:
        """Return a table."""
        lines = ["| | ms | MFLOP | of the time | of the FLOPs |", "|---|--:|--:|--:|--:|"]
        for name, seconds in self.seconds.items():
            time_share, flop_share = self.share(name)
            numbers = f"{1e3 * seconds:.2f} | {self.flops[name] / 1e6:.1f}"
            lines.append(f"| {name} | {numbers} | {time_share:.0%} | {flop_share:.0%} |")
        return "\n".join(lines)


def ledger(
    model: Model,
    terms: Sequence[Term],
    variables: Variables,
    batch: Batch,
    teacher: Teacher | Teachers,
    optimizer: optax.GradientTransformation,
    compression: Compression | None = None,
    *,
    repeats: int = 5,
    inputs: str = "image",
    labels: str = "label",
) -> Ledger:
    """Measure a step of distillation and its pieces, side by side on this device.

    Three programs are compiled: the teacher's forward, the step with the teacher's outputs given,
    and the step on labels alone. Each is run in turn, ``repeats`` times, and its fastest run
    counts. The cost of the loss is a difference of two measurements, and may be below zero where it
    is small.

    Args:
      model: the student, as `distillation` takes it.
      terms: the objective.
      variables: the student's.
      batch: one batch.
      teacher: a `Teacher` or `Teachers`.
      optimizer: of the step.
      compression: of the step; None for none.
      repeats: runs of each program after the first.
      inputs: the batch's entry that both models are given.
      labels: the batch's entry with labels.

    Returns:
      A `Ledger`.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> model = cj.models.LeNet300100(hidden=(4,))
      >>> batch = {"image": jnp.ones((8, 4)), "label": jnp.zeros(8, jnp.int32)}
      >>> variables = model.init(jax.random.key(0), batch["image"])
      >>> teacher = cj.distill.Teacher(model.apply, variables)
      >>> terms, optimizer = [cj.distill.on_logits(cj.distill.kl)], optax.sgd(0.1)
      >>> found = cj.train.ledger(model, terms, variables, batch, teacher, optimizer, repeats=1)
      >>> sorted(found.seconds)
      ['loss', 'student', 'teacher', 'whole']
    """
    compression = compression or identity()
    key = jax.random.key(0)
    # With the teacher's outputs in the batch, the step is timed without the teacher's forward.
    logits, features = jax.jit(teacher.forward)(batch[inputs])
    cached = {f"{TEACHER}{path}": feature for path, feature in features.items()}
    batch_with_teacher = {**batch, "teacher": logits, **cached}
    distilled = distillation(model, terms, inputs=inputs, labels=labels)
    supervised = distillation(model, [on_labels()], inputs=inputs, labels=labels)

    def program(loss: StatefulLoss, batch: Batch) -> tuple[jax.stages.Compiled, tuple[PyTree, ...]]:
        aux = loss.init(key, variables, batch, None)
        state = create(variables, compression, optimizer, key, aux)
        step = jax.jit(make_step(loss, optimizer, compression))
        return step.lower(state, batch).compile(), (state, batch)

    # Compiled ahead: the time of a run holds no compilation, and XLA tells each program's FLOPs.
    programs = {
        "teacher": (
            jax.jit(lambda teacher, x: teacher.forward(x)).lower(teacher, batch[inputs]).compile(),
            (teacher, batch[inputs]),
        ),
        "student": program(supervised, batch),
        "distilled": program(distilled, batch_with_teacher),
    }
    seconds = _fastest(
        {name: lambda run=run, given=given: run(*given) for name, (run, given) in programs.items()},
        repeats,
    )
    flops = {name: float(run.cost_analysis()["flops"]) for name, (run, _) in programs.items()}
    whole = seconds["teacher"] + seconds["distilled"]
    return Ledger(_pieces(seconds), _pieces(flops), len(jax.tree.leaves(batch[labels])[0]) / whole)


def _pieces(measured: dict[str, float]) -> dict[str, float]:
    teacher = measured["teacher"]
    student = measured["student"]
    distilled = measured["distilled"]
    # A difference of two programs: XLA fuses the losses with the rest of the step.
    return {
        "teacher": teacher,
        "student": student,
        "loss": distilled - student,
        "whole": teacher + distilled,
    }


def _fastest(runs: dict[str, Callable[[], PyTree]], repeats: int) -> dict[str, float]:
    """Return the fastest time of each, run in turn, so that a busy moment hits all of them."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats + 1):  # the first run of each may still allocate memory
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())  # JAX returns before the device is done
            best[name] = min(best[name], time.perf_counter() - start)
    return best
