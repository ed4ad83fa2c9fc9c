"""Accepted or refused, go on or stop, and which one: from numbers alone."""

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_jax.search import Assessment, Requirement, choose, finished, judge

STUDENT = 12_000  # bytes
REFERENCE = 0.95


def row(nbytes: int = 1000, validation: float = 0.95, **known) -> Assessment:
    return Assessment("row", 3000, nbytes, validation, **known)


@pytest.mark.parametrize(
    ("accurate", "small", "fits"), list(itertools.product([True, False], repeat=3))
)
def test_accepted_is_every_part_of_the_requirement(accurate, small, fits):
    wanted = Requirement(
        max_drop=0.01 if accurate else 0.0,
        min_ratio=12 if small else 12.1,
        max_bytes=1000 if fits else 999,
    )
    judged = judge(row(validation=0.94), STUDENT, REFERENCE, wanted)
    assert (judged.accurate, judged.accepted) == (accurate, accurate and small and fits)
    failures = {"below 95.00 %": accurate, "not 12.1x": small, "more than 999": fits}
    assert all((text not in judged.reason) == met for text, met in failures.items())
    assert judged.accepted == all(
        text in judged.reason for text in ("at least 94.00 %", "12.0x smaller", "1,000 bytes")
    )


def test_without_limits_anything_as_accurate_is_accepted():
    assert judge(row(nbytes=STUDENT), STUDENT, REFERENCE, Requirement()).accepted
    assert Requirement().max_bytes == math.inf


@given(st.integers(1, 10_000), st.integers(0, 10_000), st.integers(0, 99))
def test_the_floor_itself_is_accurate_and_one_example_less_is_not(n, correct, points):
    correct, wanted = min(correct, n), Requirement(max_drop=points / 100)
    reference = correct / n
    lost = points * n // 100  # whole examples that may be lost
    assert judge(row(validation=(correct - lost) / n), STUDENT, reference, wanted).accurate
    assert not judge(row(validation=(correct - lost - 1) / n), STUDENT, reference, wanted).accurate


@pytest.mark.parametrize(
    ("order", "accurate", "stop"),
    [
        ("mild_first", True, False),
        ("mild_first", False, True),
        ("strong_first", True, True),
        ("strong_first", False, False),
        ("all", True, False),
        ("all", False, False),
    ],
)
def test_when_to_stop(order, accurate, stop):
    other = row(accurate=not accurate)
    for accepted in (True, False):  # too large or not: what is stronger may be small enough
        assert finished(order, [other, row(accurate=accurate, accepted=accepted)]) is stop
    assert finished(order, []) is False


rows = st.lists(
    st.builds(row, st.integers(1, 9), st.sampled_from([0.5, 0.6, 0.7]), accepted=st.booleans()),
    min_size=1,
    max_size=8,
)


@given(rows)
def test_the_chosen_one_is_the_smallest_accepted_or_else_the_most_accurate(rows):
    chosen, accepted = choose(rows), [row for row in rows if row.accepted]
    assert any(chosen is row for row in rows)
    if accepted:
        assert chosen.accepted and chosen.nbytes == min(row.nbytes for row in accepted)
    else:
        best = max(row.validation for row in rows)
        assert chosen.validation == best
        assert chosen.nbytes == min(row.nbytes for row in rows if row.validation == best)


def test_a_row_goes_to_json_with_its_bits():
    written = json.loads(json.dumps(row(nbytes=1500).as_dict()))
    assert written["bits"] == 4.0 and Assessment(
        **{k: v for k, v in written.items() if k != "bits"}
    ) == row(nbytes=1500)
