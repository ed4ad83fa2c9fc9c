"""Perplexity and agreement against sums in float64, whatever the windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

import compress_jax as cj
from compress_jax.core.errors import ArgumentError, DataError, NonFiniteError, ShapeError

VOCABULARY = 7
measure = cj.train.evaluate


def mixed(params, tokens):
    """Predict from the sum of all tokens that are seen: what a window shows decides."""
    sums = jnp.cumsum(params[tokens], axis=1)
    return sums / 3


def table(seed):
    return np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)


def direct(params, texts, context, stride):
    """Return log-probabilities of each predicted token's distribution, and the tokens."""
    logs, targets = [], []
    for text in texts:
        for t in range(1, len(text)):
            # The first window that reaches token t: windows begin at multiples of the stride.
            start = 0
            while start + context < t:
                start += stride
            seen = text[start:t]
            logs.append(log_softmax(params[seen].astype(np.float64).sum(0) / 3))
            targets.append(text[t])
    return np.array(logs), np.array(targets)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(lambda n: max(n) > 1),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 3),
)
def test_every_token_is_predicted_once_from_the_first_window_that_has_it(
    lengths, context, stride, batch_size
):
    stride = min(stride, context)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, VOCABULARY, n) for n in lengths]
    options = {"context": context, "stride": stride, "batch_size": batch_size}
    found = measure.perplexity(mixed, table(0), texts, nbytes=100, **options)
    logs, targets = direct(table(0), texts, context, stride)
    nats = -logs[np.arange(len(targets)), targets]
    assert found.tokens == len(targets)
    assert found.nats == pytest.approx(nats.mean(), rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(nats.mean()), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats.sum() / np.log(2) / 100, rel=1e-5)


def test_agreement_is_the_divergence_from_the_reference():
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, VOCABULARY, n) for n in (40, 3, 17)]
    options = {"context": 8, "stride": 5, "batch_size": 2}
    found = measure.agreement(mixed, table(0), mixed, table(1), texts, k=3, **options)
    p, targets = direct(table(0), texts, 8, 5)
    q, _ = direct(table(1), texts, 8, 5)
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-5)
    assert found.top_1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    first, other = np.argsort(-p)[:, :3], np.argsort(-q)[:, :3]
    common = [len(set(a) & set(b)) / 3 for a, b in zip(first, other, strict=True)]
    assert found.top_k == pytest.approx(np.mean(common), rel=1e-6)
    assert found.reference == measure.perplexity(mixed, table(0), texts, **options)
    assert found.model == measure.perplexity(mixed, table(1), texts, **options)
    same = measure.agreement(mixed, table(0), mixed, table(0), texts, **options)
    assert abs(same.kl) < 1e-7 and (same.top_1, same.top_k) == (1.0, 1.0)


def test_a_text_and_a_list_of_it_are_the_same():
    text = np.arange(20) % VOCABULARY
    one = measure.perplexity(mixed, table(0), text, context=6)
    for same in ([text], text.tolist(), jnp.asarray(text), text[None]):
        assert measure.perplexity(mixed, table(0), same, context=6) == one


def test_what_cannot_be_measured_is_said():
    text = np.arange(9) % VOCABULARY
    for tokens, options, error, said in (
        (text, {"context": 4, "stride": 5}, ArgumentError, "stride=5 skips tokens"),
        (text[:1], {"context": 4}, DataError, "a text needs two tokens"),
        ([], {"context": 4}, DataError, "a text needs two tokens"),
        (text / 2, {"context": 4}, ShapeError, "integers"),
        (text, {"context": 0}, ArgumentError, "context"),
    ):
        with pytest.raises(error, match=said):
            measure.perplexity(mixed, table(0), tokens, **options)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        measure.perplexity(mixed, np.full((7, 7), np.nan, np.float32), text, context=4)

    with pytest.raises(ArgumentError, match="k=8 is more than the vocabulary of 7"):
        measure.agreement(mixed, table(0), mixed, table(0), text, context=4, k=8)

    def wider(params, tokens):
        return jnp.zeros((*tokens.shape, 9))

    with pytest.raises(ShapeError, match="cannot be compared token by token"):
        measure.agreement(mixed, table(0), wider, table(0), text, context=4)


def test_a_model_of_the_next_token_is_measured_as_its_task_measures_it():
    """The same number as that of the language-modelling task on rows of one window."""
    config = cj.models.DecoderConfig(7, 8, 1, heads=2, kv_heads=1, head_width=4, hidden=8)
    model = cj.models.Decoder(config)
    rows = np.random.default_rng(0).integers(0, 7, (6, 12)).astype(np.int32)
    variables = jax.jit(model.init)(jax.random.key(0), rows)
    task = cj.tasks.language_modelling()
    theirs = cj.tasks.measure(task, model.apply, variables, {"tokens": rows}).values["perplexity"]
    ours = measure.perplexity(model.apply, variables, rows, context=11, batch_size=4)
    assert ours.perplexity == pytest.approx(theirs, rel=1e-5) and ours.tokens == 66
