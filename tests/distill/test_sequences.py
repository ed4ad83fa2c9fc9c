"""Generated sequences: what is drawn, what counts, and a student corrected on its own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flax import linen as nn

import compress_jax as cj
from compress_jax import distill as d
from compress_jax.train import create, distillation, make_step

VOCABULARY, KEY = 5, jax.random.key(0)
TABLE = jax.random.normal(jax.random.key(1), (VOCABULARY, VOCABULARY))


def bigram(tokens):
    return TABLE[tokens]


def test_draws_have_the_models_distribution_and_prompts_stay():
    tokens = jnp.tile(jnp.array([[3, 1, 0, 0]]), (20_000, 1))
    drawn, mask = jax.jit(partial(d.generate, bigram, temperature=2.0))(
        tokens, jnp.full(20_000, 2), KEY
    )
    assert (drawn[:, :2] == jnp.array([[3, 1]])).all()
    assert (mask == jnp.array([[False, True, True, False]])).all()
    first = np.exp(np.asarray(jax.nn.log_softmax(TABLE / 2), np.float64))
    for at, p in ((2, first[1]), (3, first[1] @ first)):
        counts = np.bincount(np.asarray(drawn[:, at]), minlength=VOCABULARY)
        assert scipy.stats.chisquare(counts, 20_000 * p / p.sum()).pvalue > 1e-3


def test_the_likeliest_token_comes_without_noise_and_an_end_ends():
    follow = lambda tokens: jax.nn.one_hot((tokens + 1) % 5, 5)  # noqa: E731
    tokens, lengths = jnp.array([[1, 9, 9, 9, 9], [0, 1, 1, 9, 9]]), jnp.array([1, 3])
    drawn, mask = d.generate(follow, tokens, lengths, KEY, temperature=0.0, end=3)
    assert drawn.tolist() == [[1, 2, 3, 3, 3], [0, 1, 1, 2, 3]]
    assert mask.tolist() == [[True, True, False, False, False], [False, False, True, True, False]]


@pytest.mark.slow
def test_the_fraction_of_answers_that_are_the_students_own():
    n = 400
    batch = {
        "tokens": jnp.full((n, 6), 4),
        "length": jnp.full(n, 2),
        "mask": jnp.zeros((n, 6), bool),
    }
    zeros = lambda tokens: 99.0 * jax.nn.one_hot(0 * tokens, 5)  # noqa: E731
    for fraction, low, high in ((0.0, 0.0, 0.0), (0.3, 0.2, 0.4), (1.0, 1.0, 1.0)):
        new = jax.jit(lambda batch, f=fraction: d.on_policy(f)(KEY, batch, zeros))(batch)
        own = (new["tokens"][:, 2:] == 0).all(axis=1)
        assert low <= own.mean() <= high and (new["tokens"][:, :2] == 4).all()
        np.testing.assert_array_equal(new["mask"].any(axis=1), own)
        np.testing.assert_array_equal(new["label"][:, :-1], new["tokens"][:, 1:])


class Bigram(nn.Module):
    @nn.compact
    def __call__(self, tokens, train=False):
        return nn.Embed(VOCABULARY, VOCABULARY)(tokens)


@pytest.mark.slow
def test_a_student_learns_its_teacher_on_its_own_samples_or_the_teachers():
    model, optimizer, teacher = (
        Bigram(),
        optax.adam(0.1),
        d.Teacher(lambda v, tokens: v["table"][tokens], {"table": TABLE}),
    )
    tokens = jax.random.randint(jax.random.key(2), (32, 8), 0, VOCABULARY)
    batch = {"tokens": tokens, "length": jnp.ones(32, jnp.int32), "mask": jnp.ones((32, 8), bool)}
    batch["label"] = d.next_tokens(tokens)
    own = distillation(
        model, [d.on_logits(partial(d.jsd, beta=0.5))], resample=d.on_policy(0.5), inputs="tokens"
    )  # fmt: skip
    theirs = distillation(model, [d.on_labels()], inputs="tokens")
    written, mask = d.generate(teacher, jnp.tile(tokens, (8, 1)), jnp.ones(256, jnp.int32), KEY)
    copied = {"tokens": written, "label": d.next_tokens(written), "mask": mask}
    for loss, given, distance in ((own, batch, 0.01), (theirs, copied, 0.05)):
        variables = model.init(KEY, tokens)
        state = create(
            variables, cj.identity(), optimizer, KEY, loss.init(KEY, variables, given, teacher)
        )
        step = jax.jit(make_step(loss, optimizer, cj.identity()))
        for _ in range(80):
            state, metrics = step(state, given, teacher=teacher)
        every = jnp.arange(VOCABULARY)
        assert d.kl(model.apply(state.variables(), every), bigram(every)).mean() < distance
    assert 0 < metrics["teacher_accuracy"] <= 1


@pytest.mark.slow
def test_padding_teaches_nothing():
    model = Bigram()
    loss = distillation(model, [d.on_logits(d.reverse_kl)], inputs="tokens")
    variables = model.init(KEY, jnp.zeros((1, 1), jnp.int32))
    mask = jnp.array([[True, True, False, False]])

    def value(tokens):
        batch = {"tokens": tokens, "label": tokens, "mask": mask}
        teacher = d.Teacher(lambda v, tokens: v["table"][tokens], {"table": TABLE})
        return loss.loss(
            variables["params"], {}, {}, {}, batch, KEY, teacher, jnp.zeros((), jnp.int32)
        )[0]

    assert float(value(jnp.array([[1, 2, 3, 4]]))) == float(value(jnp.array([[1, 2, 0, 0]])))
