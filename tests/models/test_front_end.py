import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import compress_jax as cj
from compress_jax.data import LogMel
from compress_jax.models import DSCNN, WithFrontEnd

WAVES = np.random.default_rng(0).normal(size=(4, 4000)).astype(np.float32)
FRONT_END = LogMel(bands=16)


@pytest.mark.slow
def test_it_is_the_model_of_the_features_and_has_its_variables():
    inner = DSCNN(classes=3, width=4, blocks=1)
    model = WithFrontEnd(inner, FRONT_END)
    variables = jax.jit(model.init)(jax.random.key(0), WAVES)
    own = {name: each["model"] for name, each in variables.items()}
    assert set(own) == {"params", "batch_stats"}
    np.testing.assert_allclose(
        jax.jit(model.apply)(variables, WAVES),
        jax.jit(lambda v, x: inner.apply(v, FRONT_END(x)[..., None]))(own, WAVES),
        rtol=1e-5,
    )


@pytest.mark.slow
def test_training_masks_features_and_moves_statistics_and_evaluation_does_neither():
    def silent(key, batch):
        return {"features": jnp.zeros_like(batch["features"])}

    inner = DSCNN(classes=3, width=4, blocks=1)
    model = cj.tasks.pure(WithFrontEnd(inner, FRONT_END, augment=silent))
    variables = jax.jit(model.init)(jax.random.key(0), WAVES)
    params = variables.pop("params")
    out, _, state = model.train(params, variables, (WAVES,), jax.random.key(1), None)
    np.testing.assert_allclose(out, jnp.broadcast_to(out[:1], out.shape), atol=1e-6)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state, variables)
    assert any(jax.tree.leaves(changed))
    heard = model.apply({"params": params, **variables}, WAVES)
    assert (heard[0] != heard[1]).any()


@pytest.mark.slow
def test_masks_are_drawn_from_the_steps_key():
    class Mean(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x.mean((1, 2))

    def noisy(key, batch):
        return {"features": batch["features"] + jax.random.normal(key, batch["features"].shape)}

    model = cj.tasks.pure(WithFrontEnd(Mean(), FRONT_END, augment=noisy))
    one, again, other = (
        model.train({}, {}, (WAVES,), jax.random.key(seed), None)[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).all()


@pytest.mark.parametrize(("name", "training"), [("deterministic", False), ("training", True)])
def test_the_mode_is_passed_by_the_name_that_the_model_has_for_it(name, training):
    class Told(nn.Module):
        if name == "deterministic":

            def __call__(self, x, deterministic):
                return jnp.full((len(x), 1), deterministic)
        else:

            def __call__(self, x, training=False):
                return jnp.full((len(x), 1), training)

    model = WithFrontEnd(Told(), FRONT_END, channel=False)
    assert (model.apply({}, WAVES, train=True) == training).all()
    assert (model.apply({}, WAVES) != training).all()
