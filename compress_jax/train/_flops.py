"""The FLOPs of a training step, from its trace: whose they are, and those the models need."""

from typing import Any, NamedTuple

import jax
import numpy as np

from compress_jax.core.table import aligned, units
from compress_jax.core.types import Batch, PyTree
from compress_jax.trace import Scoped, products_by_scope

# The names in a step's trace, and what they are called here. The first one in a scope counts.
NAMES = ("teacher", "student", "view", "loss", "resample", "optimizer", "compression_update")
BACKWARD = "transpose("  # how JAX writes a backward pass,
AGAIN = "rematted_computation"  # and what `jax.checkpoint` computes again there
ORDER = (
    "teacher",
    "student forward",
    "student backward",
    "recomputed",
    "loss",
    "view",
    "optimizer",
    "compression update",
    "resample",
    "other",
)


class StepFlops(NamedTuple):
    """The FLOPs of a step: two for each multiply-accumulate of its products of arrays.

    Attributes:
      parts: FLOPs by part: ``"teacher"``, ``"student forward"``, ``"student backward"``,
        ``"recomputed"`` (by `jax.checkpoint`), ``"loss"`` (products over a vocabulary in slices,
        relations between features), ``"view"``, ``"optimizer"``, ``"compression update"``,
        ``"resample"``, ``"other"``; those that have any.
      model: what the models need, whatever way it is computed: ``3 * student + teacher``, each the
        products of its forward pass, heads included, nothing recomputed.
      uncounted: primitives whose products are not counted, such as a hand-written kernel's.

    Example:
      >>> import compress_jax as cj
      >>> found = cj.train.StepFlops({"teacher": 1e9, "student forward": 3e9}, 10e9)
      >>> found.total, found.share("teacher")
      (4000000000.0, 0.25)
    """

    parts: dict[str, float]
    model: float
    uncounted: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """All that the step computes."""
        return sum(self.parts.values())

    def share(self, part: str) -> float:
        """Return a part's share of the whole."""
        return self.parts.get(part, 0.0) / max(self.total, 1.0)

    def __str__(self) -> str:
        """Return a table."""
        rows = [("part", "FLOPs", "share")]
        rows += [(name, units(n), f"{self.share(name):.1%}") for name, n in self.parts.items()]
        rows += [("whole step", units(self.total), ""), ("of the models", units(self.model), "")]
        notes = [f"{name}: its products are not counted" for name in self.uncounted]
        return "\n".join([aligned(rows, left=1), *notes])


def step_flops(step: Any, state: PyTree, batch: Batch, *, teacher: PyTree = None) -> StepFlops:
    """Count the FLOPs of a training step by its parts, from its trace; nothing is run.

    Parts are told apart by the names in the step of `make_step` and the loss of `distillation`,
    which profiles show too. All products of another loss count as the student's.

    Args:
      step: from ``jax.jit(make_step(...))`` or `jit_step`.
      state: its state, or the shapes.
      batch: a batch, or the shapes.
      teacher: its teacher.

    Returns:
      The FLOPs of the whole step, over all devices.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import compress_jax as cj
      >>> model, optimizer = cj.models.LeNet300100(hidden=(6,)), optax.sgd(0.1)
      >>> batch = {"image": jnp.ones((8, 4)), "label": jnp.zeros(8, jnp.int32)}
      >>> variables = model.init(jax.random.key(0), batch["image"])
      >>> state = cj.train.create(variables, cj.identity(), optimizer, jax.random.key(1))
      >>> step = jax.jit(cj.train.make_step(cj.train.supervised(model), optimizer, cj.identity()))
      >>> found = cj.train.step_flops(step, state, batch)
      >>> found.parts["student forward"] == 2 * 8 * (4 * 6 + 6 * 10), found.model
      (True, 4032.0)

    References:
      Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, appendix B: FLOPs of
      the model without what rematerialization computes again.
    """
    # Shapes of the batch: in several processes each holds a batch that is no array of the mesh yet.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), batch)
    return _of_products(products_by_scope(step.trace(state, shapes, teacher=teacher).jaxpr))


def _of_products(products: Scoped) -> StepFlops:
    parts: dict[str, float] = {}
    model = 0.0
    for scope, macs in products.macs.items():
        part = _part(scope)
        parts[part] = parts.get(part, 0.0) + 2.0 * macs
        model += 2.0 * macs * _times_in_model(scope, part)
    ordered = {name: parts[name] for name in sorted(parts, key=ORDER.index)}
    return StepFlops(ordered, model, products.hidden)


def _part(scope: str) -> str:
    """Return the part of a step that a scope is."""
    names = _names(scope)
    first = next((name for name in names if name in NAMES), None)
    if first is None and ("jvp(" in scope or BACKWARD in scope):
        first = "student"  # what is differentiated is a loss without names
    if first != "student":
        return "other" if first is None else first.replace("_", " ")
    if AGAIN in names:
        return "recomputed"
    return "student backward" if BACKWARD in scope else "student forward"


def _times_in_model(scope: str, part: str) -> int:
    """Return how often a product counts: a backward pass takes two for each of the forward's."""
    if part == "student forward":
        return 3
    if part == "teacher":
        return 1
    # Heads over a vocabulary in slices, which the loss multiplies by.
    is_forward = part == "loss" and BACKWARD not in scope
    names = _names(scope) if is_forward else ()
    return 3 * ("student_head" in names) + ("teacher_head" in names)


def _names(scope: str) -> list[str]:
    """Return the names of a scope, outermost first, without the transformations around them."""
    return [part.rsplit("(", 1)[-1].rstrip(")") for part in scope.split("/")]
