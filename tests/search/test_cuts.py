"""Widths and depth in the integer program: against enumeration, and in a search."""

import dataclasses
import itertools
import math

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compress_jax as cj
from compress_jax.core.errors import ConfigError
from compress_jax.search import Experiment, Network, Requirement, Search, Sensitivities, Training
from compress_jax.search._allocate import Link, assign
from compress_jax.search._cuts import Cut, jointly
from compress_jax.search._space import Proposal

PATHS, UNITS, OPTIONS = ("a", "b", "c"), ("a:1", "b:1"), ("int2", "int4", "int8")
BITS = {f"int{bits}": cj.quantize.uniform(bits, granularity="channel") for bits in (2, 4, 8)}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_links_make_the_best_choice_among_those_that_agree(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    number = st.integers(0, 50)
    values = [data.draw(st.lists(number, min_size=n, max_size=n)) for n in sizes]
    weights = [data.draw(st.lists(number, min_size=n, max_size=n)) for n in sizes]
    labels = [data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)) for n in sizes]
    links = [Link((0, i), (labels[0], labels[i])) for i in range(1, len(sizes))]
    limit = data.draw(st.integers(0, 150))
    found = assign(values, [weights], [limit], links)
    choices = [
        each
        for each in itertools.product(*map(range, sizes))
        if sum(w[i] for w, i in zip(weights, each, strict=True)) <= limit
        and len({own[i] for own, i in zip(labels, each, strict=True)}) == 1
    ]
    totals = {each: sum(v[i] for v, i in zip(values, each, strict=True)) for each in choices}
    if found is None:
        assert not choices
    else:
        assert totals[tuple(found)] == min(totals.values())


def drawn(seed):
    """Return a table of three leaves and cuts of two widths, the second leaf between both."""
    rng = np.random.default_rng(seed)
    scores, sizes = {}, {}
    for path in PATHS:
        worst = rng.exponential()
        scores[path] = {"int2": worst, "int4": worst / 8, "int8": 0.0}
        base = int(rng.integers(20, 200))
        sizes[path] = {"int2": base, "int4": 2 * base, "int8": 4 * base}
    own = {"a:1": ("a", "b"), "b:1": ("b", "c")}
    cuts = [
        Cut(unit, ratio, float(rng.exponential() * ratio), dict.fromkeys(own[unit], 1 - ratio))
        for unit in UNITS
        for ratio in (0.25, 0.5)
    ]
    return Sensitivities("kl", scores, sizes, sizes, dict.fromkeys(PATHS, 1), {}, {}, 7, 7), cuts


@pytest.mark.parametrize("seed", range(6))
def test_the_program_is_enumeration(seed):
    table, cuts = drawn(seed)
    by = {(cut.unit, cut.ratio): cut for cut in cuts}
    for unit in UNITS:
        by[unit, 0.0] = Cut(unit, 0.0, 0.0, {})
    most = 7 + sum(max(own.values()) for own in table.nbytes.values())
    for budget in np.linspace(most / 12, most, 8):
        best = math.inf
        for ratios in itertools.product((0.0, 0.25, 0.5), repeat=2):
            chosen = [by[each] for each in zip(UNITS, ratios, strict=True)]
            for options in itertools.product(OPTIONS, repeat=3):
                pairs = list(zip(PATHS, options, strict=True))
                size = 7 + sum(
                    math.ceil(
                        table.nbytes[p][o] * math.prod(c.left.get(p, 1.0) for c in chosen) - 1e-9
                    )
                    for p, o in pairs
                )
                if size <= math.floor(budget):
                    score = sum(table.scores[p][o] for p, o in pairs)
                    best = min(best, score + sum(c.score for c in chosen))
        found = jointly(table, cuts, budget, math.inf)
        if found is None:
            assert best == math.inf
            continue
        shares, options = found
        reached = sum(by[u, shares.get(u, 0.0)].score for u in UNITS)
        reached += sum(table.scores[p][o] for p, o in options.items())
        assert reached == pytest.approx(best, rel=1e-6)


def training(steps):
    return Training(optax.adam(3e-3), steps, 32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(16, name="out")(nn.relu(nn.Dense(64, name="in")(x)))


class Residual(nn.Module):
    """Two blocks between two products: more than a linear answer needs."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(16, name="first")(x)
        for i in range(2):
            x = Block(name=f"block_{i}")(x)
        return nn.Dense(4, name="head")(x)


def split(seed, n):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 8)).astype(np.float32)
    return {"x": x, "y": (x @ np.random.default_rng(9).normal(size=(8, 4))).argmax(-1)}


def experiment(search, **required):
    data = cj.data.Data.from_arrays(split(0, 400), split(1, 200), split(2, 200))
    return Experiment(
        "cut",
        data,
        Network(Residual(), training(150)),
        requirement=Requirement(**required),
        task=cj.tasks.classification("x", "y"),
        search=search,
        longer_student=False,
    )


def run(searched, folder):
    lines = []
    return cj.search.compress(searched, folder, log_fn=lines.append), lines


SEARCH = Search(
    BITS,
    training,
    40,
    width_ratios=(0.5,),
    depth_ratios=(0.5,),
    proposals=3,
    examples=64,
    trained=2,
    refinements=1,
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A search in bits, widths and depth, with its folder and its log."""
    searched = experiment(SEARCH, max_drop=0.05)
    folder = tmp_path_factory.mktemp("cut")
    return searched, folder, *run(searched, folder)


@pytest.mark.slow
def test_a_linear_answer_needs_neither_width_nor_depth(found):
    _, folder, result, lines = found
    assert result.met and result.chosen.name.startswith("cut-")
    whole = [row.nbytes for row in result.rows if row.accepted and "cut" not in row.name]
    assert result.chosen.nbytes < 0.8 * min(whole)
    # Each width alone, all of them, and depth were measured.
    cuts = cj.core.record.json.loads((folder / "search" / "cuts.json").read_text())["cuts"]
    units = {each["unit"] for each in cuts}
    assert "depth" in units and len(units) == 4
    assert any("without 50% of depth" in line for line in lines)


@pytest.mark.slow
def test_the_smaller_file_is_the_smaller_network(found):
    searched, folder, result, _ = found
    packed = cj.load(folder / "candidates" / result.chosen.name / "artifact.safetensors")[0]
    student = cj.load(folder / "student.safetensors")[0]
    sizes = [sum(map(np.size, jax.tree.leaves(cj.unpack(x)))) for x in (packed, student)]
    assert sizes[0] < 0.6 * sizes[1]
    # Read back by name, it is the same row.
    from compress_jax.search._automatic import read_proposals
    from compress_jax.search._loop import with_proposals
    from compress_jax.search._method import rebuilt_model

    results = cj.core.record.json.loads((folder / "results.json").read_text())
    again = with_proposals(searched, read_proposals(results))
    model = rebuilt_model(again, result.artifact, result.chosen.name)
    split_ = searched.data.test
    said = model.apply(cj.unpack(packed), split_["x"]).argmax(-1)
    assert (said == split_["y"]).mean() == pytest.approx(result.chosen.test)


@pytest.mark.slow
def test_nothing_is_measured_twice(found, monkeypatch):
    searched, folder, first, _ = found
    from compress_jax.search import _loop

    carried = []
    original = _loop.carry_out

    def counted(*args, **options):
        carried.append(options.get("name") or args[1].name)
        return original(*args, **options)

    monkeypatch.setattr(_loop, "carry_out", counted)
    again, lines = run(searched, folder)
    # Starts are read back from where they stand.
    assert all(name.startswith("start ") for name in carried)
    assert again.rows == first.rows and not any("measuring" in line for line in lines)


@pytest.mark.slow
def test_a_width_too_small_to_cut_is_said(tmp_path):
    search = Search(BITS, training, 8, width_ratios=(0.02,), proposals=2, examples=32, trained=1)
    _, lines = run(experiment(search, max_drop=0.9), tmp_path)
    assert any(
        line.startswith("params/first/kernel:1: 2% of it cannot be removed: ") for line in lines
    )


class Reversed(nn.Module):
    """In training its hidden units take other places, so that its width cannot be cut there."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.Dense(16, name="hidden")(x))
        return nn.Dense(4, name="head")(x.at[:, 3].set(0.0) if train else x)


def test_what_cannot_be_trained_smaller_stays_whole(tmp_path):
    search = Search(
        {"int8": BITS["int8"]}, training, 8, width_ratios=(0.5,), proposals=1, examples=32
    )
    searched = experiment(search, max_drop=0.9)
    searched = dataclasses.replace(searched, student=Network(Reversed(), training(20)))
    result, lines = run(searched, tmp_path)
    assert result.met and "cut-" not in result.chosen.name
    assert any(
        "hidden/kernel:1: 50% of it cannot be removed: in training mode" in line for line in lines
    )


def test_limits_that_no_cut_and_no_option_meet_are_refused_before_training(tmp_path):
    search = Search(BITS, training, 8, width_ratios=(0.5,), depth_ratios=(0.5,))
    with pytest.raises(ConfigError, match="the least that the options reach is") as refused:
        run(experiment(search, max_bytes=400), tmp_path)
    assert not (tmp_path / "student").exists()
    least = int(str(refused.value).split("reach is ")[1].split()[0])
    # Below what the whole network can reach: half of each width and one block of two.
    with pytest.raises(ConfigError, match="the least that the options reach is") as alone:
        run(experiment(Search(BITS, training, 8), max_bytes=400), tmp_path / "alone")
    whole = int(str(alone.value).split("reach is ")[1].split()[0])
    assert 400 < least < 0.4 * whole


@pytest.mark.parametrize("given", [(0.0,), (1.0,), (1,), ("half",), 0.5, None])
def test_shares_are_checked(given):
    with pytest.raises(ConfigError, match="width_ratios"):
        Search(BITS, width_ratios=given)


def test_a_start_cannot_take_the_name_of_a_cut():
    with pytest.raises(ConfigError, match="cut-"):
        Search(BITS, starts={"cut-half": (cj.search.shrink(ratio=0.5),)})


def test_a_proposal_tells_what_was_cut():
    proposal = Proposal("cut-0.5-abc", {"a": "int4"}, 10, cut={"a:1": 0.5})
    assert Proposal(**proposal.record()) == proposal
    names = [type(item).__name__ for item in proposal.begin(SEARCH)]
    assert names == ["Rewrite", "Training"]
