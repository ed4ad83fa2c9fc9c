"""Metrics against scikit-learn, NumPy and a plain table of edits; batches of any size agree."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from sklearn.metrics import accuracy_score, f1_score

import compress_jax as cj
from compress_jax.tasks import Metric, classification, measure, regression
from compress_jax.tasks._metrics import collapsed, edit_distance

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(137, 5)).astype(np.float32)
LABELS = RNG.integers(0, 5, 137).astype(np.int32)


def identity(scale, x):
    return x * scale


def values(metrics, logits=LOGITS, labels=LABELS, size=None, **entries):
    task = classification("x", "y", metrics=metrics)
    split = {"x": logits, "y": labels, **entries}
    return measure(task, identity, jnp.float32(1), split, batch_size=size).values


@pytest.mark.parametrize("size", [137, 50, 7])
def test_accuracy_and_f1_are_those_of_scikit_learn_in_batches_of_any_size(size):
    found = values((cj.tasks.accuracy(), cj.tasks.f1()), size=size)
    predicted = LOGITS.argmax(-1)
    assert found["accuracy"] == pytest.approx(accuracy_score(LABELS, predicted), abs=1e-12)
    assert found["F1"] == pytest.approx(f1_score(LABELS, predicted, average="macro"), abs=1e-9)


def test_f1_of_one_class():
    wanted = f1_score(LABELS == 2, LOGITS.argmax(-1) == 2)
    assert values((cj.tasks.f1(positive=2),))["F1"] == pytest.approx(wanted, abs=1e-9)


def test_top_k_and_perplexity():
    found = values((cj.tasks.accuracy(3), cj.tasks.perplexity()), size=20)
    ranks = (LOGITS > LOGITS[np.arange(137), LABELS][:, None]).sum(1)
    wide = LOGITS.astype(np.float64)
    nll = np.log(np.exp(wide).sum(1)) - wide[np.arange(137), LABELS]
    assert found["top-3 accuracy"] == pytest.approx((ranks < 3).mean())
    assert found["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-5)


def test_what_is_masked_counts_nowhere_even_if_it_is_nan():
    mask = RNG.random(137) < 0.6
    logits = np.where(mask[:, None], LOGITS, np.float32("nan"))
    metrics = (cj.tasks.perplexity(), cj.tasks.accuracy(), cj.tasks.f1())
    own = values(metrics, logits, mask=mask, size=40)
    assert own == pytest.approx(values(metrics, LOGITS[mask], LABELS[mask]), rel=1e-5)


def test_numbers_are_measured_by_squares_and_directions():
    x, y = RNG.normal(size=(2, 33, 4)).astype(np.float32)
    task = regression()._replace(metrics=(cj.tasks.mean_squared_error(), cj.tasks.cosine()))
    found = measure(task, identity, jnp.float32(1), {"x": x, "y": y}, batch_size=8).values
    wide = x.astype(np.float64), y.astype(np.float64)
    cosines = (wide[0] * wide[1]).sum(1) / np.prod([np.linalg.norm(w, axis=1) for w in wide], 0)
    assert found["mean squared error"] == pytest.approx(((wide[0] - wide[1]) ** 2).mean(), rel=1e-5)
    assert found["cosine"] == pytest.approx(cosines.mean(), rel=1e-5)


def table_of_edits(a, b) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i in range(len(a)):
        for j in range(len(b)):
            changed = table[i, j] + (a[i] != b[j])
            table[i + 1, j + 1] = min(changed, table[i, j + 1] + 1, table[i + 1, j] + 1)
    return table[-1, -1]


sequences = st.lists(st.integers(1, 3), max_size=9)


@settings(max_examples=60, deadline=None)
@given(sequences, sequences)
def test_edits_are_those_of_the_plain_table(a, b):
    assert edit_distance(np.array(a, int), np.array(b, int)) == table_of_edits(a, b)


def test_the_error_rate_decodes_as_ctc_does():
    assert collapsed(np.array([0, 2, 2, 0, 2, 1, 1])).tolist() == [2, 2, 1]
    task = cj.tasks.transcription("x", "y")
    frames = np.eye(3, dtype=np.float32)[[[1, 1, 0, 2], [2, 0, 0, 0]]]
    split = {"x": frames, "y": np.array([[1, 2], [1, 0]], np.int32)}
    found = measure(task, identity, jnp.float32(1), split, batch_size=8)
    assert found.values == {"label error rate": pytest.approx(1 / 3)}  # one change, three labels


def test_a_metric_may_be_any_function():
    largest = Metric("largest", lambda y, t, n: jnp.where(n > 0, y.max(-1), 0.0).sum()[None], sum)
    assert values((largest,), size=50)["largest"] == pytest.approx(LOGITS.max(-1).sum(), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 136), st.integers(0, 4), st.integers(0, 31))
def test_one_bit_of_one_output_changes_the_digest(row, column, bit):
    task = classification("x", "y")
    other = LOGITS.copy()
    other.view(np.uint32)[row, column] ^= np.uint32(1) << np.uint32(bit)
    digests = [
        measure(task, identity, jnp.float32(1), {"x": x, "y": LABELS}, batch_size=64).digest
        for x in (LOGITS, LOGITS.copy(), other)
    ]
    # A product with 1 is exact but for subnormal numbers, which may be flushed to zero.
    assert digests[0] == digests[1]
    assert (
        digests[2] != digests[0]
        or not np.isfinite(other).all()
        or np.abs(other[row, column]) < 1e-37
    )
