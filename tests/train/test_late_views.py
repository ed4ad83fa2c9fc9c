"""A step of a model that loops over its layers, against the same step written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compress_jax as cj
from compress_jax import prune, quantize, train
from compress_jax.core.compression import leaf_views
from compress_jax.core.paths import flatten
from compress_jax.models import GPT
from compress_jax.trace._jaxpr.view_inside import used_inside

TOKENS = jax.random.randint(jax.random.key(3), (4, 8), 0, 32)
BATCH = {"tokens": TOKENS, "label": TOKENS}
MODEL = GPT(vocabulary=32, width=16, depth=3, heads=2, positions=8, scan=True, remat=True)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)

METHODS = {
    "masks and learned steps": cj.chain(
        prune.magnitude(0.5), quantize.lsq(4, granularity="channel")
    ),
    "masks that grow by gradients": prune.rigl(0.5, steps=40, every=1, key=jax.random.key(5)),
    "from the second step": cj.between(1, None, quantize.nf4(8)),
}


def variables():
    return MODEL.init(jax.random.key(0), TOKENS)


def bound(c: cj.Compression) -> cj.Compression:
    params = variables()["params"]
    return cj.bind(cj.at("layers/**/kernel", c), apply, params, TOKENS)


def apply(params, tokens):
    return MODEL.apply({"params": params}, tokens)


def by_hand(c: cj.Compression, steps: int):
    """The params and state after some steps, the view taken before the model."""
    params = variables()["params"]
    state = c.init(params)
    opt_state = OPTIMIZER.init({"params": params, "learned": state.learned})

    @jax.jit
    def step(number, params, state, opt_state):
        def loss(viewed):
            logits = apply(viewed, TOKENS)
            return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()

        def view(trainable):
            return c.view(trainable["params"], state._replace(learned=trainable["learned"]))

        trainable = {"params": params, "learned": state.learned}
        viewed, pull_back = jax.vjp(view, trainable)
        at_view = jax.grad(loss)(viewed)
        updates, opt_state = OPTIMIZER.update(pull_back(at_view)[0], opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        state = c.update(
            trainable["params"],
            state._replace(learned=trainable["learned"]),
            step=number,
            grads=at_view,
            key=jax.random.split(jax.random.fold_in(jax.random.key(1), number))[1],
        )
        return trainable["params"], state, opt_state

    for number in range(steps):
        params, state, opt_state = step(jnp.int32(number), params, state, opt_state)
    return params, state


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name in METHODS if "grow" not in name])
def test_steps_are_those_of_a_view_taken_before(name, microbatches):
    c = bound(METHODS[name])
    loss = train.supervised(MODEL, inputs="tokens")
    state = train.create(variables(), c, OPTIMIZER, jax.random.key(1))
    late = used_inside(apply, state.params, TOKENS)
    assert set(late) >= set(leaf_views(c, state.params, state.compression))
    step = jax.jit(train.make_step(loss, OPTIMIZER, c, microbatches=microbatches))
    for _ in range(3):
        state, _ = step(state, BATCH)
    params, own = by_hand(c, 3)
    for path, x in flatten(params)[0].items():
        np.testing.assert_allclose(flatten(state.params)[0][path], x, atol=2e-6, err_msg=path)
    for found, wanted in zip(jax.tree.leaves(state.compression), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_growing_masks_get_the_gradient_at_the_view():
    """Weights grow where the gradient of a pruned weight is large: it must be there."""
    c = bound(METHODS["masks that grow by gradients"])
    state = train.create(variables(), c, OPTIMIZER, jax.random.key(1))
    loss = train.supervised(MODEL, inputs="tokens")
    state, _ = jax.jit(train.make_step(loss, OPTIMIZER, c))(state, BATCH)
    _, own = by_hand(c, 1)
    for found, wanted in zip(jax.tree.leaves(state.compression), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(found, wanted)


def temporaries(c: cj.Compression, model: GPT) -> tuple[int, int]:
    """The bytes of temporaries of a compiled step, and the number of params."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    own = cj.bind(c, lambda p, x: model.apply({"params": p}, x), shapes["params"], tokens)
    state = jax.eval_shape(lambda v: train.create(v, own, OPTIMIZER, jax.random.key(1)), shapes)
    step = train.make_step(train.supervised(model, inputs="tokens"), OPTIMIZER, own)
    lowered = jax.jit(step, donate_argnums=0).lower(state, {"tokens": tokens, "label": tokens})
    size = sum(x.size for x in jax.tree.leaves(shapes))
    return lowered.compile().memory_analysis().temp_size_in_bytes, size


def test_a_step_holds_no_second_copy_of_the_weights():
    model = GPT(vocabulary=32, width=64, depth=24, heads=2, positions=8, scan=True, remat=True)
    kernels = "layers/**/kernel"
    c = cj.at(kernels, quantize.uniform(4, granularity="channel"))
    whole = c._replace(view=lambda params, state: c.view(params, state))  # nothing by leaf
    whole = whole._replace(bind=None)
    inside, size = temporaries(c, model)
    before, _ = temporaries(whole, model)
    assert inside < before - 3 * size  # bytes: a copy has four for each weight
