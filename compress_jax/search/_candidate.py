"""One way to make the student smaller: what is done to it, in which order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from compress_jax.core.compression import Compression, CompressionState
from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.errors import ConfigError
from compress_jax.core.types import Batch, JsonObject, Params, PyTree
from compress_jax.search._network import Network, Training, Variables, fields_of, require
from compress_jax.tasks import PureModel, Task

LONGER = "student-longer"
"""The row of the float32 student that was trained on as the chosen candidate was."""


@dataclass(frozen=True)
class Candidate:
    """One way to make the student smaller.

    The items of ``method`` are done one after the other, beginning with the trained student:

    * a `Network` takes the student's place: a smaller one, trained from scratch;
    * a `Rewrite` changes the weights, or the architecture: `rewrite` (of `quantize.gptq` and the
      like), `shrink`, `quantize_activations`;
    * a `Training` trains what there is by then;
    * a Compression is what the weights are seen through from then on, and packed by in the end.

    Attributes:
      name: short; it names a directory, and may be neither ``"teacher"`` nor ``"student"``.
      method: an item, or a tuple of them; ``chain`` makes one Compression of several.
      training: the last item, if it is given.

    Example:
      >>> import optax
      >>> import compress_jax as cj
      >>> training = cj.search.Training(optax.adam(1e-3), steps=100)
      >>> cj.search.Candidate("int4", cj.quantize.uniform(4), training).name
      'int4'
      >>> rounded = cj.search.rewrite(cj.quantize.gptq, cj.quantize.uniform(4))
      >>> cj.search.Candidate("halved", (cj.search.shrink(ratio=0.5), training, rounded)).training
    """

    name: str
    method: "Method | tuple[Method, ...]"
    training: Training | None = None

    def __post_init__(self) -> None:
        """Check types, and that the name can be that of a directory and of a row."""
        with fields_of("Candidate"):
            require(isinstance(self.name, str), "name", "text", self.name)
        with fields_of(f"candidate {self.name!r}"):
            for item in self._given():
                require(isinstance(item, ITEMS), "method", _wanted(item), item)
            fits = self.training is None or isinstance(self.training, Training)
            require(fits, "training", "a Training, or None", self.training)
            require(bool(self.items), "method", "at least one way to get smaller", self.method)
            self._check_order()
        if self.name in RESERVED or {"/", "\0"} & set(self.name):
            raise ConfigError(
                f"a candidate cannot be called {self.name!r}; its name is that of a directory and "
                "of a row"
            )

    def _check_order(self) -> None:
        """Check that no second training begins a compression's schedule anew."""
        kinds = [type(item) for item in self.items]
        # Schedules are functions of the step, which each training counts from 0.
        after = kinds[kinds.index(Compression) :] if Compression in kinds else []
        if after.count(Training) > 1:
            raise ConfigError(
                "there are two trainings after a Compression, and the second would begin its "
                "schedules anew; put all compressions into one chain(...) before one Training"
            )
        if Network in kinds[1:]:
            raise ConfigError(
                "a Network takes the student's place, so it comes first, or not at all"
            )

    def _given(self) -> "tuple[Method, ...]":
        # A Compression is a tuple too.
        if isinstance(self.method, tuple) and not isinstance(self.method, ITEMS):
            return self.method
        return (self.method,)

    @property
    def items(self) -> "tuple[Method, ...]":
        """The method's items in order, the training last."""
        return (*self._given(), *((self.training,) if self.training else ()))

    @property
    def steps(self) -> int:
        """Training steps in all."""
        return sum(item.steps for item in self.items if isinstance(item, Training))


class Subject(NamedTuple):
    """What a candidate's method works on: a network, and what its weights are seen through.

    Attributes:
      model: as pure functions.
      variables: its own.
      compression: what the params are seen through, and packed by; None for nothing yet.
      state: of the compression; None for that of ``init``.
      before: the params before a solver compressed them; None if none did.
      records: what was done, as JSON takes it; stored in the artifact.
      notes: sentences on what was out of the ordinary.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> model = cj.tasks.pure((lambda key, x: jnp.ones(2), lambda w, x: x @ w))
      >>> cj.search.Subject(model, {"params": jnp.ones(2)}).records
      ()
    """

    model: PureModel
    variables: Variables
    compression: Compression | None = None
    state: CompressionState | None = None
    before: Params | None = None
    records: tuple[JsonObject, ...] = ()
    notes: tuple[str, ...] = ()


class Rewrite(NamedTuple):
    """A change of a trained network, without training: an item of `Candidate.method`.

    Attributes:
      name: what it does, in a few words.
      run: ``(subject, task, split) -> subject``; the split is the training data.
      rebuild: ``(model, record, example) -> model``, the model that a record of `Subject` belongs
        to, where it is another than before; example has the shapes of the inputs.
      compression: what it solves for, so that it can be checked ahead; None for nothing.

    Example:
      >>> import compress_jax as cj
      >>> cj.search.rewrite(cj.quantize.fold_batch_norm).name
      'fold_batch_norm'
    """

    name: str
    run: Callable[[Subject, Task, Batch], Subject]
    rebuild: Callable[[PureModel, JsonObject, tuple[PyTree, ...]], PureModel] = (
        lambda model, record, example: model
    )
    compression: Compression | None = None


Method: TypeAlias = Compression | Rewrite | Network | Training
ITEMS = (Compression, Rewrite, Network, Training)
RESERVED = ("", ".", "..", "teacher", "student", LONGER)


def _wanted(item: object) -> str:
    """Return what an item must be; a function that makes one was not called, or not wrapped."""
    wanted = (
        "a Compression such as quantize.uniform(4), a Rewrite such as search.shrink(ratio=0.5) or "
        "search.rewrite(quantize.gptq, quantize.uniform(4)), a Network, a Training, or a tuple of "
        "these"
    )
    name = getattr(item, "__name__", "")
    if name == "shrink":
        return f"{wanted}; prune.shrink as a candidate is search.shrink(ratio=0.5)"
    return f"{wanted}; call {name} or wrap it: search.rewrite({name})" if name else wanted


# The field `method` was called `compression`, and could be nothing else.
Candidate.__init__ = renamed_arguments(compression="method")(Candidate.__init__)
