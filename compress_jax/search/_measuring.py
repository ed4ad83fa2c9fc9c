"""What a search measures once and keeps: options of leaves, cuts of widths and depth."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError, ConfigError
from compress_jax.core.record import ANYTHING, TEXT, Kind, mapping, read_record, sealed
from compress_jax.core.types import Array, JsonObject, Params, PyTree
from compress_jax.export import write_atomically
from compress_jax.search._candidate import Rewrite, Subject
from compress_jax.search._cuts import DEPTH, Cut, Shares, left_of
from compress_jax.search._experiment import Experiment
from compress_jax.search._ingredients import ingredients
from compress_jax.search._rewrites import calibration_batches, groups_of
from compress_jax.search._sensitivity import (
    Measure,
    Sensitivities,
    divergence,
    sensitivities,
    squared_error,
)
from compress_jax.search._space import WHOLE, Search
from compress_jax.tasks import PureModel
from compress_jax.train._processes import once

MADE_OF = {
    "version": Kind("1, the version that is read here", lambda value: value == 1),
    "made_of": mapping(TEXT),
}
TABLE = {**MADE_OF, **{each.name: ANYTHING for each in fields(Sensitivities)}}
CUTS = {**MADE_OF, "cuts": ANYTHING}


@dataclass(frozen=True)
class Measuring:
    """Measures on training data; the first process does, or reads what it kept.

    Attributes:
      experiment: with its `Search`.
      folder: for the records.
      log_fn: called with one line for each table.
    """

    experiment: Experiment
    folder: Path
    log_fn: Callable[[str], None]

    @property
    def search(self) -> Search:
        """The space."""
        assert self.experiment.search is not None
        return self.experiment.search

    @property
    def kind(self) -> Measure:
        """How far outputs moved is measured."""
        return self.search.measure or ("kl" if self.experiment.task.logits else "mse")

    def table(self, start: str, subject: Subject) -> Sensitivities:
        """Return the scores and sizes of every option of a start's leaves."""
        search = self.search
        own = "" if start == WHOLE else f"-{start}"
        made_of = self._made_of(subject, options=dict(search.options), how=[search.where])

        def make() -> JsonObject:
            self.log_fn(f"{start}: measuring {len(search.options)} options of every leaf, once")
            return asdict(self._sensitivities(subject))

        record = once(lambda: self._kept(f"sensitivities{own}.json", TABLE, made_of, make))
        return Sensitivities(**{each.name: record[each.name] for each in fields(Sensitivities)})

    def cuts(self, subject: Subject) -> list[Cut]:
        """Return what removing each share of each width, and of the blocks, does to a network."""
        split = self.experiment.data.train
        example = next(calibration_batches(subject, self.experiment.task, split, 1))
        names = [each.name for each in groups_of(subject, example)]
        ratios = {**dict.fromkeys(names, self.search.width_ratios), DEPTH: self.search.depth_ratios}
        made_of = self._made_of(subject, ratios=ratios)

        def make() -> JsonObject:
            pairs = [(unit, ratio) for unit, own in ratios.items() for ratio in own]
            self.log_fn(f"{WHOLE}: measuring {len(pairs)} cuts of widths and depth, once")
            found = [self._cut(subject, unit, ratio) for unit, ratio in pairs]
            return {"cuts": [each._asdict() for each in found if each is not None]}

        record = once(lambda: self._kept("cuts.json", CUTS, made_of, make))
        return [Cut(**each) for each in record["cuts"]]

    def _cut(self, subject: Subject, unit: str, ratio: float) -> Cut | None:
        """Return what one cut does; None, with a line that says why, if it cannot be made."""
        try:
            small = self._without(subject, {unit: ratio})
            self._trainable(small)
        except (ArgumentError, ConfigError) as error:  # nothing can be removed, or trained then
            self._said(unit, ratio, str(error))
            return None
        left, score = left_of(subject, small), self.distance(subject, small)
        if left and math.isfinite(score):
            return Cut(unit, ratio, score, left)
        too_few = "no block can be skipped" if unit == DEPTH else "it has too few channels"
        self._said(unit, ratio, f"the outputs would move by {score}" if left else too_few)
        return None

    def _said(self, unit: str, ratio: float, why: str) -> None:
        self.log_fn(f"{unit}: {ratio:.0%} of it cannot be removed: {why}")

    def _without(self, subject: Subject, shares: Shares) -> Subject:
        """Return a network without shares of widths and depth, untrained."""
        for method in self.search.cut(shares):
            assert isinstance(method, Rewrite)
            subject = method.run(subject, self.experiment.task, self.experiment.data.train)
        return subject

    def _trainable(self, small: Subject) -> None:
        """Trace a smaller network's training mode, where it will be trained.

        Raises:
          ArgumentError: if that cannot be made smaller.
        """
        if self.search.training is None:
            return
        split, variables = self.experiment.data.train, small.variables
        inputs = next(calibration_batches(small, self.experiment.task, split, 1))
        rest = {name: each for name, each in variables.items() if name != "params"}
        key = jax.random.key(0)
        jax.eval_shape(small.model.train, variables["params"], rest, inputs, key, None)

    def distance(self, before: Subject, after: Subject) -> float:
        """Return how far a network's outputs are from another's."""
        distance = divergence if self.kind == "kl" else squared_error
        task, split = self.experiment.task, self.experiment.data.train
        each = [
            float(distance(*(_run(own.model, own.variables, x) for own in (before, after))))
            for x in calibration_batches(before, task, split, self.search.examples)
        ]
        return sum(each) / len(each)

    def _sensitivities(self, subject: Subject) -> Sensitivities:
        experiment, search = self.experiment, self.search
        if self.kind in ("fisher", "hutchinson"):
            raise ConfigError(
                f"Search: measure={self.kind!r} needs a loss; the search compares outputs: 'kl', "
                "'mse'"
            )
        limit = experiment.requirement.max_bitops
        # Smaller networks may meet what no option of this one can.
        alone = math.isfinite(limit) and not (search.starts or search.narrows)
        return sensitivities(
            _function(subject),
            subject.variables["params"],
            calibration_batches(subject, experiment.task, experiment.data.train, search.examples),
            search.options,
            self.kind,
            where=search.where,
            max_bitops=limit if alone else None,
        )

    def _made_of(self, subject: Subject, **further: object) -> dict[str, str]:
        """Return what decides how far a network's outputs move."""
        return ingredients(
            variables=subject.variables,
            model=subject.model.source,
            data=self.experiment.data.train,
            measured=[self.kind, self.search.examples, self.experiment.seed],
            **further,
        )

    def _kept(
        self,
        name: str,
        form: dict[str, Kind],
        made_of: dict[str, str],
        make: Callable[[], JsonObject],
    ) -> JsonObject:
        """Return the record on disk if it was made of the same; else make one and keep it."""
        file = self.folder / name
        if file.is_file():
            record = read_record(file, form, f"delete {file} to measure anew", ConfigError)
            if record["made_of"] == made_of:
                return record
        made = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, sealed({"version": 1, "made_of": made_of, **made}))
        return made


def _function(subject: Subject) -> Callable[..., PyTree]:
    """Return a network in eval mode as a function of its params."""
    rest = {name: each for name, each in subject.variables.items() if name != "params"}

    def fn(params: Params, *inputs: PyTree) -> PyTree:
        return subject.model.apply({"params": params, **rest}, *inputs)

    return fn


def _run_model(model: PureModel, variables: PyTree, inputs: Sequence[PyTree]) -> Array:
    return jnp.asarray(model.apply(variables, *inputs))


_run = jax.jit(_run_model, static_argnums=0)
