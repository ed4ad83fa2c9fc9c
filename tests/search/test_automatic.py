"""The automated search on a task whose answer is known."""

import json
import math

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compress_jax as cj
from compress_jax.core.errors import ConfigError
from compress_jax.search import Experiment, Network, Requirement, Search, Sensitivities, Training
from compress_jax.search._proposals import Overhead, budgets, corrected, restricted
from compress_jax.search._space import Proposal

BITS = {f"int{bits}": cj.quantize.uniform(bits, granularity="channel") for bits in (2, 4, 8)}


def training(steps):
    return Training(optax.adam(3e-3), steps, 32)


def split(seed, n):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 16)).astype(np.float32)
    return {"x": x, "y": (x @ np.random.default_rng(9).normal(size=(16, 4))).argmax(-1)}


def experiment(search, **required):
    return Experiment(
        "searched",
        cj.data.Data.from_arrays(split(0, 400), split(1, 200), split(2, 200)),
        Network(cj.models.LeNet300100(4, (32, 16)), training(150)),
        requirement=Requirement(**required),
        task=cj.tasks.classification("x", "y"),
        search=search,
        longer_student=False,
    )


def run(searched, folder):
    lines = []
    return cj.search.compress(searched, folder, log_fn=lines.append), lines


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A search for the smallest file within three points, with its folder and its log."""
    search = Search(
        BITS, training, 40, proposals=4, baselines={"four bits alone": ("int4",)}, examples=128
    )
    searched = experiment(search, max_drop=0.03, max_bytes=2000)
    folder = tmp_path_factory.mktemp("searched")
    return searched, folder, *run(searched, folder)


def test_the_result_is_the_smallest_that_meets_the_requirement(found):
    _, folder, result, _ = found
    tried = {row.name: row for row in result.rows if row.accepted is not None}
    accepted = [row.nbytes for row in tried.values() if row.accepted]
    assert result.met and result.chosen.nbytes == min(accepted) <= 2000
    assert result.artifact.stat().st_size == result.chosen.nbytes
    # Each option for all leaves alike stands beside it.
    assert {"int2-0", "int4-0", "int8-0"} <= set(tried)
    # Half a dozen bytes of header apart, the proposals keep to the budget.
    mixed = [row.nbytes for name, row in tried.items() if name.startswith("mixed")]
    assert mixed and min(mixed) < tried["int8-0"].nbytes
    # What a row says is what the file is.
    packed = cj.load(folder / "candidates" / result.chosen.name / "artifact.safetensors")[0]
    assert packed.keys() == {"params"}


def test_costs_are_those_of_the_trace(found):
    _, _, result, _ = found
    rows = {row.name: row for row in result.rows}
    macs = 16 * 32 + 32 * 16 + 16 * 4
    assert rows["student"].costs["macs"] == macs
    assert rows["int2-0"].costs["bitops"] == macs * 2 * 32
    assert rows["int8-0"].costs["bitops"] == macs * 8 * 32


def test_another_requirement_measures_and_trains_nothing_again(found, monkeypatch):
    searched, folder, first, _ = found
    from compress_jax.search import _loop

    measured = []
    carried = _loop.carry_out

    def counted(*args, **options):
        measured.append(args[1].name)
        return carried(*args, **options)

    monkeypatch.setattr(_loop, "carry_out", counted)
    again, _ = run(searched, folder)
    assert not measured and again.rows == first.rows
    # A looser one may try what it had not: but nothing that is known.
    import dataclasses

    loose = dataclasses.replace(searched, requirement=Requirement(max_drop=0.3, max_bytes=2000))
    looser, _ = run(loose, folder)
    assert not {row.name for row in first.rows} & set(measured)
    assert looser.chosen.nbytes <= first.chosen.nbytes


def test_a_search_that_is_stopped_ends_with_the_same_result(found, tmp_path, monkeypatch):
    searched, _, first, _ = found
    from compress_jax.search import _automatic

    measure = _automatic.Automatic._measure
    for stop in (3, 9):
        count = iter(range(100))

        def stopped(self, proposal, count=count, stop=stop):
            if next(count) == stop:
                raise KeyboardInterrupt
            return measure(self, proposal)

        monkeypatch.setattr(_automatic.Automatic, "_measure", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(searched, tmp_path)
    monkeypatch.setattr(_automatic.Automatic, "_measure", measure)
    again, _ = run(searched, tmp_path)
    assert again.rows == first.rows


def test_a_finished_search_is_read_and_measured_again(found):
    searched, folder, _, _ = found
    from compress_jax.search._automatic import read_proposals
    from compress_jax.search._loop import with_proposals
    from compress_jax.search._method import rebuilt_model

    results = json.loads((folder / "results.json").read_text())
    known = with_proposals(searched, read_proposals(results))
    file = folder / "artifact.safetensors"
    model = rebuilt_model(known, file, results["chosen"])
    variables = cj.unpack(cj.load(file)[0])
    measured = cj.tasks.measure(searched.task, model.apply, variables, searched.data.test)
    row = next(row for row in results["rows"] if row["name"] == results["chosen"])
    assert measured.values["accuracy"] == row["test"]


@pytest.mark.parametrize(
    "required, said",
    [
        ({"max_bytes": 100}, "max_bytes=100 cannot be met: the least that the options reach is"),
        ({"max_bitops": 1000}, "max_bitops=1000 cannot be met"),
        ({"max_macs": 10}, "max_macs=10 cannot be met: the least is 1,088"),
        ({"max_drops": {"f1": 0.1}}, "max_drops names 'f1', and the task measures accuracy"),
        ({"max_latency_ms": 0}, "max_latency_ms must be a number of milliseconds above 0"),
    ],
)
def test_what_cannot_be_reached_is_refused_before_training(tmp_path, required, said):
    with pytest.raises(ConfigError, match=said):
        run(experiment(Search(BITS), **required), tmp_path)
    assert not list(tmp_path.iterdir())


def test_time_and_memory_are_measured_where_they_are_required(tmp_path):
    search = Search({"int8": BITS["int8"]}, proposals=1, examples=64)
    wanted = {"max_latency_ms": 1e4, "max_memory": 1e9, "min_throughput": 1e-3, "batch": 2}
    result, _ = run(experiment(search, max_drop=0.5, **wanted), tmp_path / "loose")
    costs = result.chosen.costs
    assert result.met and 0 < costs["latency_ms"] < 1e4
    # At least the codes and the inputs, at most all in float32 many times over.
    assert 1088 < costs["memory"] < 1e5
    assert "milliseconds" in result.chosen.reason and "examples a second" in result.chosen.reason
    result, _ = run(experiment(search, max_drop=0.5, max_memory=10), tmp_path / "strict")
    assert not result.met and "more than 10" in result.chosen.reason


@pytest.mark.slow
def test_narrower_networks_are_searched_with_their_own_sensitivities(tmp_path):
    half = (cj.search.shrink(ratio=0.5), training(40))
    search = Search(BITS, training, 40, starts={"half": half}, proposals=3, trained=2, examples=64)
    result, _ = run(experiment(search, max_drop=0.2, max_macs=800), tmp_path)
    # Only with fewer channels are there so few products.
    assert result.met and result.chosen.name.startswith("half-")
    assert result.chosen.costs["macs"] <= 800
    whole = [row for row in result.rows if row.name.startswith("int")]
    assert whole and not any(row.fits for row in whole)


@pytest.mark.slow
def test_other_methods_stand_beside_the_result_at_what_it_takes(tmp_path):
    """A narrower network of the result's bytes, one of its work, and bits of the whole student."""
    asked = []

    def width(result):
        asked.append(result)
        return cj.search.shrink(ratio=0.75)

    def small(result):
        return (Network(cj.models.LeNet300100(4, (8, 8)), training(60)),)

    half = (cj.search.shrink(ratio=0.5), training(40))
    search = Search(
        BITS,
        training,
        40,
        starts={"half": half},
        baselines={"width alone": width, "a small network": small, "eight bits": ("int8",)},
        proposals=2,
        trained=1,
        refinements=0,
        examples=64,
    )
    searched = experiment(search, max_drop=0.4, max_macs=800)
    result, lines = run(searched, tmp_path)
    rows = {row.name: row for row in result.rows}
    best = asked[-1]
    own = [row for row in result.rows if row.nbytes == best["nbytes"]]
    assert [row.costs["macs"] for row in own] == [best["macs"]]
    narrow = rows[f"width-alone-{best['nbytes']}-bytes-40"]
    assert narrow.costs["macs"] == 16 * 8 + 8 * 4 + 4 * 4
    assert rows[f"a-small-network-{best['nbytes']}-bytes-40"].costs["macs"] == 16 * 8 + 8 * 8 + 32
    # Half the width in few bits is smaller than the whole student in eight.
    assert any("eight bits: its options cannot reach" in line for line in lines)
    again, _ = run(searched, tmp_path)
    assert again.rows == result.rows


# The pieces.


def table(scores, nbytes=None):
    sizes = nbytes or {path: dict.fromkeys(own, 1) for path, own in scores.items()}
    return Sensitivities("kl", scores, sizes, sizes, dict.fromkeys(scores, 1), {}, {}, 0, 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.2, 5.0), min_size=2, max_size=4), st.integers(0, 2**16))
def test_corrected_scores_add_up_to_what_was_measured(factors, seed):
    """Where scores are off by a factor an option, measured sums tell it."""
    rng = np.random.default_rng(seed)
    names = [f"o{i}" for i in range(len(factors))]
    draws = [rng.uniform(1, 2, len(names)) for _ in range(9)]
    scores = {f"p{i}": dict(zip(names, own, strict=True)) for i, own in enumerate(draws)}
    truth = dict(zip(names, factors, strict=True))
    measured = []
    for _ in range(200):
        options = {path: names[rng.integers(len(names))] for path in scores}
        measured.append((options, sum(truth[o] * scores[p][o] for p, o in options.items())))
    better = corrected(table(scores), measured)
    told = [sum(better.scores[p][o] for p, o in options.items()) for options, _ in measured]
    errors = np.abs(np.array(told) / [score for _, score in measured] - 1)
    assert errors.mean() < 0.1


@given(st.lists(st.tuples(st.integers(100, 10**6), st.integers(0, 5000)), min_size=1, max_size=6))
def test_a_budget_for_leaves_keeps_every_known_file_within_its_bytes(pairs):
    files = [(leaves, leaves + extra) for leaves, extra in pairs]
    overhead = Overhead.of(files)
    for leaves, file in files:
        assert overhead.leaves(file) <= leaves + 1


def test_budgets_and_restrictions():
    own = table(
        {"a": {"x": 1.0, "y": 2.0}, "b": {"y": 1.0}}, {"a": {"x": 10, "y": 90}, "b": {"y": 10}}
    )
    assert budgets(own, 3, math.inf) == [20, 44, 100] and budgets(own, 3, 5) == [20]
    with pytest.raises(ConfigError, match="b can take none of x"):
        restricted(own, ["x"])


def test_names_tell_proposals_apart():
    a = Proposal("whole", {"p": "int2", "q": "int4"}, 10)
    assert a.name == Proposal("whole", {"q": "int4", "p": "int2"}, 10).name
    others = [a.trained(20), Proposal("half", a.options, 10), a._replace(options={"p": "int2"})]
    assert len({a.name, *(each.name for each in others)}) == 4


def test_wrong_spaces_are_refused():
    for options, said in (({}, "options"), ({"a": 3}, "a Compression")):
        with pytest.raises(ConfigError, match=said):
            Search(options)
    with pytest.raises(
        ConfigError, match=r"baselines\['b'\] must be a function or a tuple of options: int2"
    ):
        Search(BITS, baselines={"b": ("int3",)})
    with pytest.raises(ConfigError, match="names other than 'whole'"):
        Search(BITS, baselines={"whole": ("int2",)})
    wrong = experiment(Search(BITS, baselines={"b": lambda result: cj.search.shrink}))
    with pytest.raises(ConfigError, match=r"baselines\['b'\]\(...\) must be a method"):
        cj.search.compress(wrong, "/nowhere", log_fn=lambda line: None)
    with pytest.raises(ConfigError, match="no Compression: those are options"):
        Search(BITS, starts={"s": (BITS["int2"],)})
    with pytest.raises(ConfigError, match=r"search=Search"):
        Experiment("e", experiment(Search(BITS)).data, experiment(Search(BITS)).student)
