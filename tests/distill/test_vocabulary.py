"""A loss over a vocabulary without whole logits, against the same loss with them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compress_jax as cj
from compress_jax import distill, train
from compress_jax.core.errors import ArgumentError, ConfigError
from compress_jax.models import GPT

CLASSES = 96
TOKENS = jax.random.randint(jax.random.key(0), (3, 8), 0, CLASSES)
MASK = jnp.ones((3, 8), bool).at[1, 5:].set(False).at[2].set(False)
BATCH = {"tokens": TOKENS, "label": jnp.roll(TOKENS, 1), "mask": MASK}


def gpt(width: int, **options) -> GPT:
    return GPT(vocabulary=CLASSES, width=width, depth=1, heads=2, positions=8, **options)


STUDENT, LARGE = gpt(8), gpt(16)


def teacher(model=LARGE) -> distill.Teacher:
    variables = model.init(jax.random.key(2), TOKENS)
    return distill.Teacher(model.apply, jax.tree.map(lambda x: 8 * x, variables))  # sure of itself


def value_and_metrics(terms, model=STUDENT, other=None, batch=None):
    loss = train.distillation(model, terms, inputs="tokens")
    variables = model.init(jax.random.key(1), TOKENS)
    other = other or teacher()

    def run(params):
        value, (_, metrics) = loss(params, {}, batch or BATCH, jax.random.key(3), other)
        return value, metrics

    return jax.jit(jax.value_and_grad(run, has_aux=True))(variables["params"])


WHOLE = {
    "forward": distill.on_logits(distill.kl, temperature=2.0, name="v"),
    "reverse": distill.on_logits(distill.reverse_kl, temperature=2.0, name="v"),
    "with labels": distill.on_logits(distill.hinton(0.3, 2.0), labels=True, name="v"),
}
SLICED = {
    "forward": distill.on_vocabulary(temperature=2.0, chunk=20, name="v"),
    "reverse": distill.on_vocabulary(temperature=2.0, chunk=96, direction="reverse", name="v"),
    "with labels": distill.on_vocabulary(temperature=2.0, alpha=0.3, chunk=20, block=5, name="v"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_values_gradients_and_fidelity_are_those_of_whole_logits(name):
    (value, metrics), grads = value_and_metrics([SLICED[name]])
    (wanted, others), wanted_grads = value_and_metrics([WHOLE[name]])
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, wanted_grads
    )
    assert set(metrics) == set(others) >= {"accuracy", "teacher_accuracy", "agreement"}
    for key in metrics:
        np.testing.assert_allclose(metrics[key], others[key], rtol=1e-5)


def test_no_array_of_tokens_by_vocabulary_is_made():
    loss = train.distillation(STUDENT, [distill.on_vocabulary(chunk=16)], inputs="tokens")
    c = cj.at("**/kernel", cj.prune.magnitude(0.5))
    optimizer = optax.sgd(0.1)
    other = teacher()
    variables = STUDENT.init(jax.random.key(1), TOKENS)
    aux = loss.init(jax.random.key(4), variables, BATCH, other)
    state = train.create(variables, c, optimizer, jax.random.key(5), aux)
    step = jax.jit(train.make_step(loss, optimizer, c))
    text = step.lower(state, BATCH, teacher=other).compile().as_text()
    assert "f32[24,16]" in text  # a slice of the logits
    assert not any(shape in text for shape in ("[24,96]", "[3,8,96]", "[96,24]"))


class Biased(nn.Module):
    """A head with a bias."""

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(CLASSES)(nn.Embed(CLASSES, 8)(tokens))


class Capped(nn.Module):
    """Logits that are bounded by a tanh."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(CLASSES, 8)(tokens)
        return 30 * jnp.tanh(nn.Dense(CLASSES, use_bias=False)(x) / 30)


class Flat(nn.Module):
    """A head that is jitted, applied to flattened tokens, in bfloat16, without a bias."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(CLASSES, 8)(tokens).reshape(-1, 8)
        kernel = self.param("kernel", nn.initializers.normal(), (CLASSES, 8))
        head = jax.jit(lambda x, kernel: jnp.einsum("tw,vw->tv", x, kernel))
        logits = head(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
        return logits.reshape(*tokens.shape, CLASSES)


@pytest.mark.parametrize(("model", "what"), [(Biased(), "'add'"), (Capped(), "'mul'")])
def test_logits_that_are_no_product_are_refused_by_what_changes_them(model, what):
    with pytest.raises(ArgumentError, match=f"logits of the student.*{what}"):
        value_and_metrics([distill.on_vocabulary()], model)
    with pytest.raises(ArgumentError, match=f"logits of the teacher.*{what}"):
        value_and_metrics([distill.on_vocabulary()], other=teacher(model))


class KernelFirst(nn.Module):
    """A head that is stored [outputs, width] and comes first, as in Equinox: out of a vmap."""

    @nn.compact
    def __call__(self, tokens):
        kernel = self.param("kernel", nn.initializers.normal(), (CLASSES, 8))
        return jax.vmap(jax.vmap(lambda x: kernel @ x))(nn.Embed(CLASSES, 8)(tokens))


@pytest.mark.parametrize(("model", "rtol"), [(Flat(), 2e-2), (KernelFirst(), 1e-5)])
def test_heads_of_other_models_are_found(model, rtol):
    (value, _), grads = value_and_metrics([distill.on_vocabulary(chunk=50)], model)
    (wanted, _), wanted_grads = value_and_metrics([distill.on_logits(distill.kl)], model)
    np.testing.assert_allclose(value, wanted, rtol=rtol)  # the first rounds logits to bfloat16
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=5 * rtol * float(jnp.abs(b).max()))


def test_cached_logits_and_several_teachers_are_refused():
    cached = {**BATCH, "teacher": jnp.zeros((3, 8, CLASSES))}
    with pytest.raises(ConfigError, match="top_k_kl"):
        value_and_metrics([distill.on_vocabulary()], batch=cached)
    several = distill.Teachers([teacher(), teacher()])
    with pytest.raises(ConfigError, match="one Teacher"):
        value_and_metrics([distill.on_vocabulary()], other=several)


@pytest.mark.parametrize("wrong", [{"chunk": 0}, {"direction": "up"}, {"beta": 2.0}])
def test_wrong_options_are_refused_when_the_term_is_made(wrong):
    with pytest.raises(ArgumentError):
        distill.on_vocabulary(**wrong)
