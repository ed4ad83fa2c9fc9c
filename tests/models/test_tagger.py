import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compress_jax.core.errors import ArgumentError
from compress_jax.models import Tagger
from compress_jax.models._tagger import _windows


def small(**options):
    return Tagger(vocabulary=30, classes=5, width=8, depth=1, heads=2, **options)


@pytest.fixture
def batch():
    tokens = jax.random.randint(jax.random.key(1), (3, 12), 1, 30)
    mask = jnp.arange(12)[None] < jnp.array([[12], [7], [3]])
    return tokens, mask


def test_a_window_is_a_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 9, 4))
    kernel = jax.random.normal(jax.random.key(1), (5, 4, 6))
    found = _windows(x, 5) @ kernel.reshape(20, 6)
    wanted = np.stack(
        [
            np.stack(
                [np.convolve(x[n, :, i], kernel[::-1, i, o], "same") for o in range(6)], axis=-1
            )
            for n in range(2)
            for i in range(4)
        ]
    )
    wanted = wanted.reshape(2, 4, 9, 6).sum(1)
    assert np.allclose(found, wanted, atol=1e-5)


@pytest.mark.slow
def test_padding_changes_nothing(batch):
    tokens, mask = batch
    model = small()
    variables = jax.jit(model.init)(jax.random.key(0), tokens, mask)
    apply = jax.jit(model.apply)
    out = apply(variables, tokens, mask)
    other = jnp.where(mask, tokens, 7)
    assert np.array_equal(out[mask], apply(variables, other, mask)[mask])
    longer = apply(variables, jnp.pad(tokens, ((0, 0), (0, 5))), jnp.pad(mask, ((0, 0), (0, 5))))
    assert np.allclose(out[mask], longer[:, :12][mask], atol=1e-5)
    alone = apply(variables, tokens[2:, :3])
    assert np.allclose(out[2:, :3], alone, atol=1e-5)


@pytest.mark.slow
def test_logits_see_the_whole_row(batch):
    tokens, mask = batch
    model = small()
    variables = jax.jit(model.init)(jax.random.key(0), tokens, mask)

    def at_the_beginning(table):
        params = {**variables["params"], "tokens": {"embedding": table}}
        return model.apply({"params": params}, tokens[:1], mask[:1])[0, 0].sum()

    gradient = jax.jit(jax.grad(at_the_beginning))(variables["params"]["tokens"]["embedding"])
    seen = np.flatnonzero(np.abs(gradient).max(1))
    assert set(seen) == set(np.unique(tokens[0]))


@pytest.mark.slow
def test_logits_are_float32_and_gradients_finite(batch):
    tokens, mask = batch
    with jax.numpy_dtype_promotion("standard"):  # Flax's norm needs it below float32
        half = small(dtype=jnp.bfloat16)
        shapes = jax.eval_shape(half.init, jax.random.key(0), tokens, mask)
        assert jax.eval_shape(half.apply, shapes, tokens, mask).dtype == jnp.float32
    variables = jax.jit(small().init)(jax.random.key(0), tokens, mask)
    empty = jnp.zeros_like(mask)
    gradient = jax.jit(jax.grad(lambda v: small().apply(v, tokens, empty).sum()))(variables)
    assert all(np.isfinite(each).all() for each in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_it_learns_a_tag_that_depends_on_the_word_before():
    tokens = jax.random.randint(jax.random.key(1), (64, 16), 1, 6)
    labels = jnp.roll(tokens, 1, axis=1).at[:, 0].set(0) % 5
    model = Tagger(vocabulary=6, classes=5, width=16, depth=1, heads=2, window=3)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    optimizer = optax.sgd(0.5, momentum=0.9)

    @jax.jit
    def step(variables, state):
        def loss(v):
            logits = model.apply(v, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        gradient = jax.grad(loss)(variables)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(variables, updates), state

    state = optimizer.init(variables)
    for _ in range(60):
        variables, state = step(variables, state)
    assert (model.apply(variables, tokens).argmax(-1) == labels).mean() > 0.98


def test_an_even_window_is_refused(batch):
    with pytest.raises(ArgumentError, match="window must be odd"):
        small(window=4).init(jax.random.key(0), *batch)
