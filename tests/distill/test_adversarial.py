"""Every loss on logits at the logits nobody expects: huge, equal, far apart, in any dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress_jax import distill
from compress_jax.core import ShapeError

LABELS = jnp.array([0, 5, 2])
LOSSES = {
    "kl": distill.kl,
    "reverse_kl": distill.reverse_kl,
    "jsd": distill.jsd,
    "jsd_0.1": lambda s, t, temperature: distill.jsd(s, t, temperature, 0.1),
    "dkd": lambda s, t, temperature: distill.dkd(s, t, LABELS, temperature=temperature),
    "dist": lambda s, t, temperature: distill.dist(s, t, temperature=temperature),
    "hard_label": lambda s, t, temperature: distill.hard_label(s, t, 0.1),
    "total_variation": lambda s, t, temperature: distill.total_variation(s, t),
    "standardize": lambda s, t, temperature: distill.kl(
        distill.standardize(s), distill.standardize(t), temperature
    ),
    "ensemble": lambda s, t, temperature: distill.kl(
        s, distill.ensemble([t, -t], [3, 1], temperature), temperature
    ),
    "averaged": lambda s, t, temperature: distill.averaged(distill.kl)(s, [t, -t]),
    "hinton": lambda s, t, temperature: distill.hinton(0.5, temperature)(s, t, LABELS),
    "top_k_2": lambda s, t, temperature: distill.top_k_kl(s, distill.top_k(t, 2, temperature)),
    "top_k_all": lambda s, t, temperature: distill.top_k_kl(s, distill.top_k(t, 6, temperature)),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def value_and_gradient(name, s, t, temperature):
    loss = lambda s: LOSSES[name](s, t, temperature)  # noqa: E731
    value, pull = jax.vjp(loss, s)
    return value, pull(jnp.ones_like(value))[0]


GRADIENTS = jax.jit(value_and_gradient, static_argnums=(0, 3))
EXTREMES = [-1e30, -1e4, -131.0, -1.0, -1e-30, 0.0, 1e-30, 1.0, 131.0, 1e4, 3e4, 1e30]
LOGITS = hnp.arrays(np.float32, (3, 6), elements=st.sampled_from([np.float32(x) for x in EXTREMES]))


@pytest.mark.wide(1)
@every_loss
@given(
    LOGITS,
    LOGITS,
    st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    st.sampled_from([1.0, 4.0]),
)
@settings(deadline=None, max_examples=60)
@pytest.mark.slow
def test_values_and_gradients_are_finite(name, s, t, dtype, temperature):
    largest = min(float(jnp.finfo(dtype).max), 1e30)
    s, t = (jnp.clip(jnp.asarray(x), -largest, largest).astype(dtype) for x in (s, t))
    value, gradient = GRADIENTS(name, s, t, temperature)
    assert value.dtype == jnp.float32 and value.shape == (3,) and gradient.dtype == dtype
    assert jnp.isfinite(value).all() and jnp.isfinite(gradient).all()
    assert (value > -1e-4 * (1 + abs(value))).all()


@pytest.mark.wide(4)
@every_loss
@pytest.mark.parametrize(
    "logits",
    [np.zeros((3, 6)), np.full((3, 6), 3333.3), np.full((3, 6), 1e30), np.eye(6)[:3] * 1e4],
)
def test_equal_logits_of_both_cost_nothing_but_constants(name, logits):
    logits = jnp.asarray(logits, jnp.float32)
    value, gradient = GRADIENTS(name, logits, logits, 4.0)
    assert jnp.isfinite(value).all() and jnp.isfinite(gradient).all()
    if name not in (
        "hard_label",
        "hinton",
        "dist",
        "ensemble",
        "averaged",
    ):  # whose minimum is elsewhere or not zero
        np.testing.assert_allclose(value, 0, atol=1e-5)
        np.testing.assert_allclose(gradient, 0, atol=1e-5)


@pytest.mark.wide(3)
@every_loss
def test_shifts_do_not_matter(name):
    s, t = (3 * jax.random.normal(jax.random.key(i), (3, 6)) for i in range(2))
    value, gradient = GRADIENTS(name, s, t, 2.0)
    shifted, shifted_gradient = GRADIENTS(name, s + 100, t, 2.0)
    np.testing.assert_allclose(shifted, value, atol=2e-3, rtol=1e-3)
    np.testing.assert_allclose(shifted_gradient, gradient, atol=2e-3, rtol=1e-3)
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-4)


@pytest.mark.wide(3)
@every_loss
def test_the_teacher_gets_no_gradient(name):
    s, t = (3 * jax.random.normal(jax.random.key(i), (3, 6)) for i in range(2))
    to_teacher = jax.grad(lambda t: LOSSES[name](s, t, 2.0).sum())(t)
    np.testing.assert_array_equal(to_teacher, 0)


@pytest.mark.wide(2)
@every_loss
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_logits_are_reduced_in_float32(name, dtype):
    s, t = (3 * jax.random.normal(jax.random.key(i), (3, 6)).astype(dtype) for i in range(2))
    value, _ = GRADIENTS(name, s, t, 2.0)
    wide, _ = GRADIENTS(name, s.astype(jnp.float32), t.astype(jnp.float32), 2.0)
    np.testing.assert_allclose(
        value, wide, rtol=3e-7
    )  # two roundings of float32; float16's would be 1e-3


@pytest.mark.wide(2)
@every_loss
def test_gradients_are_those_of_finite_differences(name):
    with jax.enable_x64(True):
        s, t = (2 * jax.random.normal(jax.random.key(i), (3, 6), jnp.float64) for i in range(2))
        value, gradient = GRADIENTS(name, s, t, 2.0)
        assert value.dtype == jnp.float64
        direction = jax.random.normal(jax.random.key(7), s.shape, jnp.float64)
        after, before = (
            GRADIENTS(name, s + sign * 1e-5 * direction, t, 2.0)[0].sum() for sign in (1, -1)
        )
        np.testing.assert_allclose(
            (gradient * direction).sum(), (after - before) / 2e-5, rtol=1e-7, atol=1e-8
        )


@pytest.mark.parametrize(
    "name", [name for name in LOSSES if name not in ("top_k_2", "top_k_all", "averaged")]
)
def test_other_numbers_of_classes_are_an_error(name):
    with pytest.raises(ShapeError, match=r"\(3, 6\).*\(3, 5\)"):
        LOSSES[name](jnp.zeros((3, 6)), jnp.zeros((3, 5)), 1.0)
