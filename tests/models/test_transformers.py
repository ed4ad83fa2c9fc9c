"""ViT, BERT and GPT are the published networks, and DS-CNN too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from compress_jax.models import DSCNN, GPT, Bert, BertClassifier, ViT
from compress_jax.models._attention import Attention

TOKENS = jnp.array([[5, 17, 9, 3], [7, 2, 0, 0]])
TINY = {"vocabulary": 20, "width": 8, "heads": 2, "positions": 6}
IMAGENET = {"classes": 1000, "patch": 16, "depth": 12, "pool": "token"}


def count(model, x):
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.wide(3)
@pytest.mark.parametrize(
    ("model", "x", "parameters"),
    [
        (
            ViT(width=192, heads=3, **IMAGENET),
            jnp.zeros((1, 224, 224, 3)),
            5_717_416,
        ),  # Touvron et al., table 1: 5M
        (ViT(width=384, heads=6, **IMAGENET), jnp.zeros((1, 224, 224, 3)), 22_050_664),  # 22M
        (
            ViT(width=768, heads=12, **IMAGENET),
            jnp.zeros((1, 224, 224, 3)),
            86_567_656,
        ),  # Dosovitskiy et al.: 86M
        (
            BertClassifier(Bert(width=128, depth=2, heads=2)),
            TOKENS,
            4_385_920 + 258,
        ),  # Turc et al., table 1: 4.4M; the head
        (BertClassifier(Bert()), TOKENS, 109_482_240 + 1_538),  # Devlin et al.: 110M
        (
            BertClassifier(Bert(width=384, depth=6)),
            TOKENS,
            22_713_216 + 770,
        ),  # MiniLM-L6-H384: 22.7M
        (GPT(), TOKENS, 124_439_808),  # Radford et al.: 124M (117M as first printed)
        (GPT(scan=True, remat=True), TOKENS, 124_439_808),
        (DSCNN(), jnp.zeros((1, 49, 10, 1)), 23_756),  # MLPerf Tiny
        (DSCNN(depthwise="shifts"), jnp.zeros((1, 49, 10, 1)), 23_756),
    ],
)
def test_parameter_counts_are_the_published_ones(model, x, parameters):
    assert count(model, x) == parameters


MODELS = {
    "vit": (ViT(7, width=8, depth=1, heads=2), jnp.ones((2, 8, 12, 1)), (2, 7)),
    "vit-token": (
        ViT(7, width=8, depth=1, heads=2, pool="token", gelu="exact"),
        jnp.ones((2, 8, 12, 1)),
        (2, 7),
    ),
    "bert": (BertClassifier(Bert(depth=1, **TINY), 3), TOKENS, (2, 3)),
    "gpt": (GPT(depth=2, **TINY), TOKENS, (2, 4, 20)),
    "gpt-scan": (GPT(depth=2, scan=True, **TINY), TOKENS, (2, 4, 20)),
    "ds-cnn": (DSCNN(width=8, blocks=1), jnp.ones((2, 9, 7, 1)), (2, 12)),
    "ds-cnn-shifts": (
        DSCNN(width=8, blocks=1, depthwise="shifts"),
        jnp.ones((2, 9, 7, 1)),
        (2, 12),
    ),
}


def run(model, x):
    variables = model.init(jax.random.key(0), x)
    trained = model.apply(variables, x, train=True, mutable=["batch_stats"])[0]
    return variables, model.apply(variables, x), trained


@pytest.mark.wide(2)
@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_finite_numbers(name):
    model, x, shape = MODELS[name]
    _, *answers = jax.jit(run, static_argnums=0)(model, x)
    assert [(y.shape, bool(jnp.isfinite(y).all())) for y in answers] == 2 * [(shape, True)]


@pytest.mark.wide(5)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_parameters_are_float32_under_bfloat16(name):
    model, x, _ = MODELS[name]
    if isinstance(model, BertClassifier):
        model = model.clone(encoder=model.encoder.clone(dtype=jnp.bfloat16))
    model = model.clone(dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # flax's norms promote
        shapes = jax.eval_shape(lambda x: run(model, x), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_attention_is_the_formula_in_float64():
    x = np.random.default_rng(0).normal(size=(2, 3, 8))
    mask = np.array([[1, 1, 0], [1, 1, 1]], bool)[:, None, None, :]
    model = Attention(heads=2)
    params = model.init(jax.random.key(0), jnp.asarray(x, jnp.float32))["params"]
    q, k, v = (x @ np.asarray(params[n]["kernel"], np.float64) for n in ("query", "key", "value"))
    q, k, v = (a.reshape(2, 3, 2, 4).transpose(0, 2, 1, 3) for a in (q, k, v))
    scores = np.where(mask, q @ k.transpose(0, 1, 3, 2) / 2, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    wanted = (weights @ v).transpose(0, 2, 1, 3).reshape(2, 3, 8) @ np.asarray(
        params["out"]["kernel"], np.float64
    )
    got = model.apply({"params": params}, jnp.asarray(x, jnp.float32), jnp.asarray(mask))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_flax_attention_agrees():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    ours, theirs = Attention(heads=2), nn.MultiHeadDotProductAttention(num_heads=2)
    params = ours.init(jax.random.key(1), x)["params"]
    split = {
        n: {"kernel": params[n]["kernel"].reshape(8, 2, 4), "bias": params[n]["bias"].reshape(2, 4)}
        for n in params
    }
    split["out"] = {
        "kernel": params["out"]["kernel"].reshape(2, 4, 8),
        "bias": params["out"]["bias"],
    }
    np.testing.assert_allclose(
        ours.apply({"params": params}, x), theirs.apply({"params": split}, x), rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_scanned_layers_are_the_unrolled_ones():
    model = GPT(depth=3, **TINY)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    layers = [params[f"layer_{i}"] for i in range(3)]
    stacked = {name: value for name, value in params.items() if "layer_" not in name}
    stacked["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)

    def loss(params, model):
        return jnp.square(model.apply({"params": params}, TOKENS)).mean()

    value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, model)
    scanned = jax.jit(jax.value_and_grad(loss), static_argnums=1)(
        stacked, model.clone(scan=True, remat=True)
    )
    np.testing.assert_allclose(scanned[0], value, rtol=1e-5)
    for i in range(3):
        got = jax.tree.map(lambda x, i=i: x[i], scanned[1]["layers"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
            got,
            grads[f"layer_{i}"],
        )


@pytest.mark.slow
def test_gpt_does_not_see_the_future_and_sees_the_past():
    model = GPT(depth=2, **TINY)
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    apply = jax.jit(model.apply)
    before, after = apply(variables, TOKENS), apply(variables, TOKENS.at[0, 2].set(11))
    np.testing.assert_array_equal(before[0, :2], after[0, :2])
    assert (jnp.abs(before[0, 2:] - after[0, 2:]).max(-1) > 1e-4).all()


@pytest.mark.slow
def test_bert_does_not_see_padding():
    model = Bert(depth=2, **TINY)
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    padded = jax.jit(model.apply)(variables, TOKENS)
    alone = jax.jit(model.apply)(variables, TOKENS[1:, :2])
    np.testing.assert_allclose(padded[1:, :2], alone, rtol=1e-5, atol=1e-6)
    seen = jax.jit(model.apply)(variables, TOKENS, jnp.ones_like(TOKENS))
    assert jnp.abs(seen[1, :2] - padded[1, :2]).max() > 1e-4


@pytest.mark.slow
def test_shifted_products_are_the_grouped_convolution():
    model, x = DSCNN(width=8, blocks=2), jax.random.normal(jax.random.key(0), (2, 9, 7, 1))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    shifted = jax.jit(model.clone(depthwise="shifts").apply)(variables, x)
    np.testing.assert_allclose(shifted, jax.jit(model.apply)(variables, x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "x", "words"),
    [
        (ViT(patch=5), jnp.zeros((1, 32, 32, 3)), "patches of 5 pixels"),
        (ViT(heads=5), jnp.zeros((1, 32, 32, 3)), "heads=5 do not divide"),
        (Bert(depth=1, **TINY), jnp.zeros((1, 7), int), "7 tokens.*positions=6"),
        (GPT(depth=1, **TINY), jnp.zeros((1, 7), int), "7 tokens.*positions=6"),
    ],
)
def test_what_does_not_fit_is_refused(model, x, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(model.init, jax.random.key(0), x)
