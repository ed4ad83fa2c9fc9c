"""Groups of runs side by side: mean, deviation, and the paired difference from the first."""

import csv
import io
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from compress_jax.core.errors import ConfigError
from compress_jax.core.types import JsonObject
from compress_jax.report._groups import FinishedRun, Group, grouped
from compress_jax.report._paired import EXACT, sign_flip_p, smallest_p
from compress_jax.report._rows import ACCURACY
from compress_jax.report._tables import Table

BYTES = "bytes"
RATIO = "ratio"
LEVEL = 0.05  # of significance, which a note compares the smallest possible p with

Values = dict[object, float]  # by the argument that tells the runs of a group apart


class Sample(NamedTuple):
    """One network of a group of runs.

    Attributes:
      group: the group's label.
      row: the name of the row of ``results.json``; None for the chosen one.
      network: what is shown: the name, or the names that were chosen.
      measures: values by measure.
    """

    group: str
    row: str | None
    network: str
    measures: dict[str, Values]


class Difference(NamedTuple):
    """The paired difference of a measure from the reference group.

    Attributes:
      values: of each pair.
      p: of `sign_flip_p`.
    """

    values: list[float]
    p: float


class Comparison(NamedTuple):
    """Samples, the first group of which is the reference.

    Attributes:
      samples: in the order of the groups.
      by: the argument that pairs runs.
      metric: of ``results.json``.
    """

    samples: list[Sample]
    by: str
    metric: JsonObject

    @classmethod
    def of(cls, runs: Sequence[FinishedRun], by: str, *, every_row: bool) -> "Comparison":
        """Group runs, and take the measures of the chosen rows or of every row.

        Raises:
          ConfigError: if runs measure different metrics, or two are the same.
        """
        metrics = [run.results.get("metric") or ACCURACY for run in runs]
        for run, metric in zip(runs, metrics, strict=True):
            if metric != metrics[0]:
                raise ConfigError(
                    f"{runs[0].directory} measures {metrics[0]['name']} and {run.directory} "
                    f"{metric['name']}; compare runs of one task"
                )
        samples = [
            sample
            for group in grouped(runs, by)
            for sample in _samples(group, metrics[0], every_row=every_row)
        ]
        return cls(samples, by, metrics[0])

    def difference(self, sample: Sample, measure: str) -> Difference | None:
        """Return the difference from the reference; None without pairs, or of itself."""
        reference = self._reference(sample)
        if reference is None:
            return None
        base = reference.measures.get(measure, {})
        own = sample.measures.get(measure, {})
        values = [own[pair] - base[pair] for pair in own if pair in base]
        return Difference(values, sign_flip_p(values)) if values else None

    def _reference(self, sample: Sample) -> Sample | None:
        """Return the same network of the first group."""
        first = self.samples[0].group
        if sample.group == first:
            return None
        same = [each for each in self.samples if (each.group, each.row) == (first, sample.row)]
        return same[0] if same else None

    @property
    def measures(self) -> list[str]:
        """All measures, in order."""
        return list(dict.fromkeys(name for each in self.samples for name in each.measures))

    def tables(self) -> list[Table]:
        """Return the table of means, and that of differences if there are pairs."""
        means = Table(
            f"Mean ± standard deviation over {self.by}",
            ("group", "network", "n", *self.measures),
            tuple(self._means(each) for each in self.samples),
        )
        differences = [row for each in self.samples for row in self._differences(each)]
        title = f"Differences from {self.samples[0].group}, paired over {self.by}"
        head = ("group", "network", "measure", "pairs", "difference", "p")
        return [means, Table(title, head, tuple(differences))] if differences else [means]

    def _means(self, sample: Sample) -> tuple[str, ...]:
        number = max(len(values) for values in sample.measures.values())
        cells = [
            self._text(measure, list(sample.measures.get(measure, {}).values()))
            for measure in self.measures
        ]
        return (sample.group, sample.network, str(number), *cells)

    def _differences(self, sample: Sample) -> list[tuple[str, ...]]:
        rows = []
        for measure in self.measures:
            found = self.difference(sample, measure)
            if found is not None:
                text = self._text(measure, found.values, signed=True)
                pairs = str(len(found.values))
                rows.append((sample.group, sample.network, measure, pairs, text, f"{found.p:.4g}"))
        return rows

    def _text(self, measure: str, values: Sequence[float], *, signed: bool = False) -> str:
        """Return the mean and the deviation of values as text."""
        if not values:
            return "-"
        sign = "+" if signed else ""
        form, spread, factor, unit = f"{sign}.4g", ".2g", 1.0, ""
        if measure == BYTES:
            form, spread = f"{sign},.0f", ",.0f"
        elif measure == RATIO:
            form, spread, unit = f"{sign}.1f", ".1f", "x"
        elif self.metric["percent"] and self._is_main(measure):
            form, spread, factor = f"{sign}.2f", ".2f", 100.0
            unit = "" if signed else " %"  # the difference of two shares is in points
        text = f"{factor * statistics.fmean(values):{form}}"
        if len(values) > 1:
            text += f" ± {factor * statistics.stdev(values):{spread}}"
        return text + unit

    def _is_main(self, measure: str) -> bool:
        return measure in (f"test {self.metric['name']}", f"validation {self.metric['name']}")

    def notes(self) -> list[str]:
        """Return what must be known to read the tables."""
        found = [
            difference
            for sample in self.samples
            for measure in self.measures
            if (difference := self.difference(sample, measure))
        ]
        if not found:
            return [f"no group shares a value of {self.by} with another one, so nothing is tested"]
        pairs = [len(each.values) for each in found]
        least = smallest_p(min(pairs))
        hopeless = f": no difference can be significant at {LEVEL}" if least > LEVEL else ""
        kind = "exact" if max(pairs) <= EXACT else "random beyond 20 pairs"
        notes = [
            f"p: two-sided paired sign-flip permutation test ({kind}) over {self.by}; with "
            f"{min(pairs)} pairs the smallest possible p is {least:.3g}{hopeless}",
        ]
        if self.metric["percent"]:
            notes.append(f"differences of {self.metric['name']} are in points")
        if len(found) > 1:
            notes.append(f"p values are not corrected for the {len(found)} comparisons")
        return notes

    def csv(self) -> str:
        """Return all numbers, one line a network and measure, in the units of ``results.json``."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            ("group", "network", "measure", "n", "mean", "deviation")
            + ("pairs", "difference", "difference_deviation", "p")
        )
        for sample in self.samples:
            for measure, values in sample.measures.items():
                found = self.difference(sample, measure)
                paired = ("", "", "", "")
                if found is not None:
                    paired = (len(found.values), *_moments(found.values), found.p)
                own = list(values.values())
                writer.writerow(
                    (sample.group, sample.network, measure, len(own), *_moments(own), *paired)
                )
        return text.getvalue()


def _moments(values: Sequence[float]) -> tuple[float, float | str]:
    """Return mean and standard deviation; the latter is empty for one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else ""
    return statistics.fmean(values), deviation


def _samples(group: Group, metric: JsonObject, *, every_row: bool) -> list[Sample]:
    """Return the networks of a group: what each run chose, or every row."""
    results = {pair: run.results for pair, run in group.runs.items()}
    if not every_row:
        names = Counter(each["chosen"] for each in results.values())
        network = next(iter(names))
        if len(names) > 1:
            network = ", ".join(f"{name} ({times})" for name, times in names.most_common())
        rows = {pair: _row(each, each["chosen"]) for pair, each in results.items()}
        return [Sample(group.label, None, network, _measures(rows, results, metric))]
    names = dict.fromkeys(row["name"] for each in results.values() for row in each["rows"])
    samples = []
    for name in names:
        rows = {pair: row for pair, each in results.items() if (row := _row(each, name))}
        samples.append(Sample(group.label, name, name, _measures(rows, results, metric)))
    return samples


def _row(results: JsonObject, name: str) -> JsonObject | None:
    return next((row for row in results["rows"] if row["name"] == name), None)


def _measures(
    rows: Mapping[object, JsonObject | None],
    results: Mapping[object, JsonObject],
    metric: JsonObject,
) -> dict[str, Values]:
    """Return the values of each measure, by run."""
    main = metric["name"]
    found: dict[str, Values] = {}
    for pair, row in rows.items():
        assert row is not None
        tests = (row.get("metrics") or {}).get("test") or {}
        values: dict[str, float | None] = {f"test {main}": row["test"]}
        values |= {f"test {name}": value for name, value in tests.items() if name != main}
        values |= {f"validation {main}": row["validation"], BYTES: row["nbytes"]}
        if student := _row(results[pair], "student"):
            values[RATIO] = student["nbytes"] / row["nbytes"]
        for measure, value in values.items():
            if value is not None:
                found.setdefault(measure, {})[pair] = value
    return found
