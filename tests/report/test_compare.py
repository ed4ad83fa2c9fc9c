"""Groups of runs: means and deviations are those of NumPy, p values those of SciPy and Fisher."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from compress_jax.core.errors import ConfigError
from compress_jax.report import rich_table
from compress_jax.report._compare import Comparison
from compress_jax.report._groups import found_runs, grouped
from compress_jax.report._paired import DRAWS, sign_flip_p, smallest_p

RNG = np.random.default_rng(0)
# Heights of crossed against self-fertilized Zea mays, in eighths of an inch: The Design of
# Experiments, section 17. In section 21 Fisher counts 863 of the 32,768 sums that are as large.
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]


def test_fishers_own_example():
    assert sign_flip_p(DARWIN) == 2 * 863 / 32768


@pytest.mark.parametrize("pairs", [1, 2, 5, 9])
def test_the_exact_test_is_scipys(pairs: int):
    values = RNG.normal(0.3, 1, pairs)
    expected = stats.permutation_test(
        (values, np.zeros(pairs)), lambda x, y: np.mean(x - y), permutation_type="samples"
    ) if pairs > 1 else None  # fmt: skip
    assert sign_flip_p(values) == pytest.approx(1.0 if expected is None else expected.pvalue)


def test_ties_count_and_the_smallest_p_is_reached():
    # Of 0.1 + 0.2 - 0.3 and its like, rounding must not decide.
    assert sign_flip_p([0.1, 0.2, -0.3]) == 1.0
    assert sign_flip_p([0.0, 0.0]) == 1.0
    for pairs in (1, 2, 5, 20):
        assert sign_flip_p([0.1] * pairs) == smallest_p(pairs)


def test_many_pairs_are_drawn_close_to_the_exact_answer():
    values = RNG.normal(0.5, 1, 21)
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    exact = np.mean(np.abs(sums) >= abs(values.sum()) - 1e-9)
    assert sign_flip_p(values) == pytest.approx(exact, abs=5 * np.sqrt(exact / DRAWS))
    assert sign_flip_p([1.0] * 60) == smallest_p(60)


def write(folder: Path, test: float, nbytes: int = 100, metric: str = "accuracy", **arguments):
    folder.mkdir(parents=True)
    row = {"name": "small", "nbytes": nbytes, "validation": test / 2, "test": test, "bits": 4}
    row |= {"accepted": True, "reason": "", "metrics": {"test": {metric: test, "loss": 2.5}}}
    student = row | {"name": "student", "nbytes": 1000}
    results = {"experiment": "x", "chosen": "small", "met": True, "rows": [student, row]}
    results["metric"] = {"name": metric, "percent": True, "higher_is_better": True}
    record = {"version": 2, "config": "configs/x.py", "config_sha256": "0" * 64}
    record |= {"arguments": arguments, "flags": [], "versions": {}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "run.json").write_text(json.dumps(record))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three groups of five seeds, the last of which misses two."""
    for bits in (2, 3, 10):
        for seed in range(5 if bits < 10 else 3):
            test = (0.5, 0.6, 0.65)[(2, 3, 10).index(bits)] + 0.01 * seed * bits
            write(tmp_path / f"bits={bits},seed={seed}", test, 100 * bits, bits=bits, seed=seed)
    return tmp_path


def comparison(folder: Path, **options) -> Comparison:
    runs, notes = found_runs([folder])
    assert notes == []
    return Comparison.of(runs, "seed", **({"every_row": False} | options))


def test_groups_come_in_the_order_of_numbers(folder: Path):
    groups = grouped(found_runs([folder])[0], "seed")
    assert [group.label for group in groups] == ["bits=2", "bits=3", "bits=10"]
    assert [len(group.runs) for group in groups] == [5, 5, 3]
    # Paired over bits instead, seeds are the groups.
    assert [group.label for group in grouped(found_runs([folder])[0], "bits")][:2] == [
        "seed=0",
        "seed=1",
    ]


def test_means_deviations_and_differences_are_numpys(folder: Path):
    rows = list(csv.DictReader(io.StringIO(comparison(folder).csv())))
    of = {(row["group"], row["measure"]): row for row in rows}
    two, three = 0.5 + 0.02 * np.arange(5), 0.6 + 0.03 * np.arange(5)
    row = of["bits=3", "test accuracy"]
    for name, expected in {
        "mean": three.mean(),
        "deviation": three.std(ddof=1),
        "difference": (three - two).mean(),
        "difference_deviation": (three - two).std(ddof=1),
        "p": 0.0625,
    }.items():
        assert float(row[name]) == pytest.approx(expected), name
    assert of["bits=2", "test accuracy"]["p"] == ""  # the reference
    assert of["bits=10", "test accuracy"]["pairs"] == "3"  # the seeds that both have
    assert of["bits=10", "test accuracy"]["p"] == "0.25"
    assert float(of["bits=2", "ratio"]["mean"]) == 5 and of["bits=3", "test loss"]["p"] == "1.0"


def test_tables_fit_80_columns_and_say_what_was_tested(folder: Path):
    compared = comparison(folder)
    console = Console(width=80, record=True, file=io.StringIO())
    for table in compared.tables():
        console.print(rich_table(table))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    assert "54.00 ± 3.16 %" in shown and "+12.00 ± 1.58" in shown
    notes = " ".join(compared.notes())
    assert "with 3 pairs the smallest possible p is 0.25: no difference can be" in notes
    assert "in points" in notes and "not corrected for the 10 comparisons" in notes


def test_every_row_is_compared_with_that_of_its_name(folder: Path):
    compared = comparison(folder, every_row=True)
    assert [(each.group, each.row) for each in compared.samples][:3] == [
        ("bits=2", "student"),
        ("bits=2", "small"),
        ("bits=3", "student"),
    ]
    found = compared.difference(compared.samples[3], "bytes")
    assert found is not None and found.values == [100.0] * 5


def test_one_group_alone_and_runs_without_seeds_have_no_test(tmp_path: Path):
    write(tmp_path / "a", 0.5, bits=2)
    write(tmp_path / "b", 0.6, bits=3)
    compared = Comparison.of(found_runs([tmp_path])[0], "seed", every_row=False)
    # Neither has a seed: they are a pair.
    assert compared.tables()[1].rows[0][3] == "1"
    compared = Comparison.of(found_runs([tmp_path / "a"])[0], "seed", every_row=False)
    assert len(compared.tables()) == 1 and "nothing is tested" in compared.notes()[0]
    assert compared.tables()[0].rows[0][:4] == ("x", "small", "1", "50.00 %")


def test_what_cannot_be_compared_is_refused_by_name(tmp_path: Path):
    write(tmp_path / "a", 0.5, seed=0)
    write(tmp_path / "b", 0.5, seed=0)
    with pytest.raises(ConfigError, match="a and .*b have the same config and arguments"):
        comparison(tmp_path)
    write(tmp_path / "c/d", 0.5, metric="F1", seed=1)
    runs = found_runs([tmp_path / "a", tmp_path / "c"])[0]
    with pytest.raises(ConfigError, match="a measures accuracy and .*d F1"):
        Comparison.of(runs, "seed", every_row=False)
    (tmp_path / "a/run.json").unlink()
    with pytest.raises(ConfigError, match="a has no run.json"):
        found_runs([tmp_path / "a"])
    with pytest.raises(ConfigError, match="none has no results.json"):
        found_runs([tmp_path / "none"])


def test_what_has_not_finished_is_named(folder: Path):
    (folder / "bits=2,seed=0/results.json").unlink()
    runs, notes = found_runs([folder, folder / "bits=2,seed=1"])
    assert len(runs) == 12  # one given twice is one
    assert notes == [f"{folder / 'bits=2,seed=0'} has not finished, and is left out"]
