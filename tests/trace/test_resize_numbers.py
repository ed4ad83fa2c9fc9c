"""Which numbers count a shortened axis: the code at the new width decides, else the value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from compress_jax.core.errors import NoMatchError
from compress_jax.trace import groups, resize, resized_numbers

MEANS = {  # of h over its last axis of d entries: whatever becomes of d, these are what they say
    "mean": lambda h, d: h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True)),
    "sum / d": lambda h, d: h * jax.lax.rsqrt((h * h).sum(-1, keepdims=True) / d),
    "norm * root": lambda h, d: h / jnp.linalg.norm(h, axis=-1, keepdims=True) * d**0.5,
    "norm / root": lambda h, d: h / (jnp.linalg.norm(h, axis=-1, keepdims=True) * d**-0.5),
    "guarded norm": lambda h, d: (
        h * d**0.5 / jnp.maximum(jnp.linalg.norm(h, axis=-1, keepdims=True), 1e-6)
    ),
    "epsilon": lambda h, d: h * (jax.lax.rsqrt((h * h).sum(-1, keepdims=True) + 1e-6) * d**0.5),
    "einsum": lambda h, d: h * jax.lax.rsqrt(jnp.einsum("...d,...d->...", h, h)[..., None] / d),
    "ones": lambda h, d: h - h @ jnp.ones((h.shape[-1], 1)) / d,
    "averages": lambda h, d: h - h @ jnp.full((h.shape[-1], 1), 1 / d),
    "before": lambda h, d: h * jax.lax.rsqrt((h * h / d).sum(-1, keepdims=True)),
    "root before": lambda h, d: h * jax.lax.rsqrt(((h / d**0.5) ** 2).sum(-1, keepdims=True)),
    "two means": lambda h, d: (
        h - h.mean(-1, keepdims=True) * (jnp.square(h).sum(-1, keepdims=True) * (1 / d))
    ),
    "unbiased": lambda h, d: h / h.std(-1, keepdims=True, ddof=1),
    "unbiased by hand": lambda h, d: (
        h / jnp.sqrt(jnp.square(h - h.mean(-1, keepdims=True)).sum(-1, keepdims=True) / (d - 1))
    ),
    "traced root": lambda h, d: (
        h / jnp.linalg.norm(h, axis=-1, keepdims=True) * jnp.sqrt(jnp.float32(d))
    ),
}
RNG = np.random.default_rng(0)
P = {
    "a": jnp.asarray(RNG.normal(size=(5, 16)), jnp.float32),
    "o": jnp.asarray(RNG.normal(size=(16, 2)), jnp.float32),
}
X = jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32)
LEFT = {"a:1": [0, 2, 3, 7, 11, 12]}


def network(form, width=None):
    """A function that reads its width from its parameters, or one that has it written down."""

    def fn(p, x):
        h = x @ p["a"]
        if width is not None and h.shape[-1] != width:
            raise ValueError("made for another width")
        return form(h, h.shape[-1]) @ p["o"]

    return fn


@pytest.mark.wide(3)
@pytest.mark.parametrize("written_down", [False, True])
@pytest.mark.parametrize("name", MEANS)
def test_means_in_any_spelling_are_those_of_the_same_code_at_the_new_width(name, written_down):
    fn = network(MEANS[name], 16 if written_down else None)
    found = groups(fn, P, X)
    short = found.keep(P, LEFT)
    expected = network(MEANS[name])(short, X)
    np.testing.assert_allclose(resize(fn, P, found, LEFT)(short, X), expected, rtol=2e-5, atol=1e-6)
    listed = resized_numbers(fn, P, X, groups=found, kept=LEFT)
    assert listed and all(number.follows for number in listed)
    assert ("does not run" in listed[0].reason) == written_down


def energy(scale):
    return lambda p, x: (
        (x @ p["a"]) @ p["o"] + scale * jnp.sum((x @ p["a"]) ** 2, -1, keepdims=True)
    )


@pytest.mark.wide(1)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 11])
@pytest.mark.parametrize(
    "count",
    [lambda n: n, lambda n: n - 1, lambda n: 1 / n, lambda n: 1 / (n - 1), lambda n: n**-0.5],
)
@pytest.mark.slow
def test_a_scale_that_looks_like_a_count_stays(width, count):
    """If a function reads its width from its parameters, resizing equals zeroing channels."""
    n = max(2, width)
    p = {"a": P["a"][:, :n], "o": P["o"][:n]}
    left = list(range(0, n, 2)) if n > 2 else [1]
    fn, gone = energy(float(count(n))), jnp.isin(jnp.arange(n), jnp.array(left)).astype("float32")
    found = groups(fn, p, X)
    got = resize(fn, p, found, {"a:1": left})(found.keep(p, {"a:1": left}), X)
    expected = fn({"a": p["a"] * gone[None], "o": p["o"] * gone[:, None]}, X)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "number, follows", [(1 / 16, True), (1 / 15, False), (0.25, False), (0.7, False)]
)
def test_of_what_runs_at_one_width_only_a_count_beside_its_sum_follows(number, follows):
    """``1 / (n - 1)`` follows only after a mean was subtracted; ``n ** -.5`` never on a sum."""
    fn = network(lambda h, d: h + number * h.sum(-1, keepdims=True), 16)
    found = groups(fn, P, X)
    got = resize(fn, P, found, LEFT)(found.keep(P, LEFT), X)
    h = np.asarray(X, np.float64) @ np.asarray(P["a"], np.float64)[:, LEFT["a:1"]]
    scale = 1 / 6 if follows else number
    expected = (h + scale * h.sum(1, keepdims=True)) @ np.asarray(P["o"], np.float64)[LEFT["a:1"]]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.MultiHeadDotProductAttention(2, qkv_features=8)(x))


@pytest.mark.slow
def test_a_scale_beside_a_product_stays_is_listed_and_can_be_overruled():
    x = jnp.ones((1, 3, 4))
    v = Attention().init(jax.random.key(0), x)
    found = groups(Attention().apply, v, x)
    name = "params/MultiHeadDotProductAttention_0/query/kernel:2"
    (number,) = resized_numbers(Attention().apply, v, x, groups=found, kept={name: [0]})
    assert (number.old, number.new, number.follows, number.counts) == (
        2,
        2,
        False,
        (name,),
    ) and "scale" in str(number)
    said = {number.name: True}
    (number,) = resized_numbers(
        Attention().apply, v, x, groups=found, kept={name: [0]}, numbers=said
    )
    assert number.follows and number.new == 1
    with pytest.raises(NoMatchError, match="stays"):
        resized_numbers(
            Attention().apply, v, x, groups=found, kept={name: [0]}, numbers={"norm/div": True}
        )


def test_what_is_said_is_what_is_done():
    fn = network(MEANS["sum / d"])
    found = groups(fn, P, X)
    short = found.keep(P, LEFT)
    kept = resize(fn, P, found, LEFT, numbers={"**": False})(short, X)
    np.testing.assert_allclose(
        kept, network(lambda h, d: MEANS["sum / d"](h, 16))(short, X), rtol=1e-5
    )


@pytest.mark.slow
def test_the_gradient_is_that_of_the_same_code_and_so_is_a_second_step():
    fn = network(MEANS["unbiased"])
    found = groups(fn, P, X)
    once, short = resize(fn, P, found, LEFT), found.keep(P, LEFT)
    loss = lambda f: jax.grad(lambda p: jnp.sin(f(p, X)).sum())  # noqa: E731
    for name, slope in loss(fn)(short).items():
        np.testing.assert_allclose(loss(once)(short)[name], slope, rtol=1e-4, atol=1e-5)
    again = groups(once, short, X)
    fewer = {"a:1": [1, 2, 4]}
    assert {
        number.reason for number in resized_numbers(once, short, X, groups=again, kept=fewer)
    } == {"as in the same code at the new width"}
    twice = again.keep(short, fewer)
    np.testing.assert_allclose(resize(once, short, again, fewer)(twice, X), fn(twice, X), rtol=1e-5)
