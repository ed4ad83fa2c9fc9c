import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from compress_jax.core import ShapeError
from compress_jax.distill import (
    chunked_hinton,
    chunked_kl,
    cross_entropy,
    jsd,
    kl,
    masked_mean,
    reverse_kl,
)

TOKENS, VOCABULARY = 24, 103
PLAIN = {"forward": kl, "reverse": reverse_kl, "jsd": lambda s, t, T: jsd(s, t, T, 0.3)}
every_direction = pytest.mark.parametrize("direction", PLAIN)


def inputs(dtype=jnp.float32, tokens=TOKENS):
    """Return the student's hidden states and head and the teacher's, whose width is another."""
    shapes = ((tokens, 8), (8, VOCABULARY), (tokens, 12), (12, VOCABULARY))
    return tuple(
        jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)
    )


WEIGHTS = jax.random.uniform(
    jax.random.key(9), (TOKENS,)
)  # cotangents that differ from token to token
LABELS = jnp.arange(TOKENS) * 31 % VOCABULARY


def differentiate(loss, *arrays):
    """Return token losses, and gradients of their weighted sum to hidden states and head."""

    def total(hidden, head, *teacher):
        losses = loss(hidden, head, *teacher)
        return (losses * WEIGHTS.astype(losses.dtype)).sum(), losses

    gradients, losses = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(*arrays)
    return losses, *gradients


def naive(loss):
    return lambda hidden, head, teacher_hidden, teacher_head: loss(
        hidden @ head, teacher_hidden @ teacher_head
    )


def assert_close(found, expected, relative=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=relative * float(jnp.abs(b).max()))


@pytest.mark.wide(1)
@every_direction
@pytest.mark.parametrize(
    "chunk, block", [(16, None), (103, None), (500, None), (10, 5), (1, 24), (103, 100)]
)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.slow
def test_values_and_gradients_are_those_of_the_naive_form(direction, chunk, block, temperature):
    def loss(*arrays):
        return chunked_kl(*arrays, temperature, chunk, direction=direction, beta=0.3, block=block)

    plain = naive(lambda s, t: PLAIN[direction](s, t, temperature))
    assert_close(differentiate(loss, *inputs()), differentiate(plain, *inputs()))


@pytest.mark.slow
@every_direction
def test_in_float64_they_are_equal_to_twelve_digits(direction):
    with jax.enable_x64(True):
        loss = lambda *arrays: chunked_kl(*arrays, 2.0, 16, direction=direction, beta=0.3, block=7)  # noqa: E731
        plain = naive(lambda s, t: PLAIN[direction](s, t, 2.0))
        arrays = inputs(jnp.float64)
        assert_close(differentiate(loss, *arrays), differentiate(plain, *arrays), 1e-12)


@pytest.mark.wide(1)
@pytest.mark.parametrize("block", [None, 7])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.slow
def test_hinton_shares_the_pass_with_the_labels(alpha, block):
    def loss(*arrays):
        return chunked_hinton(*arrays, LABELS, alpha, 4.0, 16, block=block)

    plain = naive(lambda s, t: alpha * cross_entropy(s, LABELS) + (1 - alpha) * kl(s, t, 4.0))
    assert_close(differentiate(loss, *inputs()), differentiate(plain, *inputs()))


@pytest.mark.wide(1)
@every_direction
@given(
    st.integers(0, 99),
    st.sampled_from([1.0, 30.0, 1e3, 1e5, 1e15]),
    st.booleans(),
    st.sampled_from([1.0, 4.0]),
)
@settings(deadline=None, max_examples=25)
@pytest.mark.slow
def test_values_and_gradients_are_finite_at_huge_logits_of_any_order(
    direction, seed, scale, rising, temperature
):
    hidden, head, teacher_hidden, teacher_head = inputs()
    head = scale * jax.random.permutation(jax.random.key(seed), head, axis=1)
    head = (
        jnp.sort(head, axis=1) if rising else head
    )  # the running maximum then rises with every slice
    found = FINITE(direction, temperature, hidden, head, teacher_hidden, teacher_head * scale)
    assert all(jnp.isfinite(x).all() for x in found)
    expected = PLAIN[direction](hidden @ head, teacher_hidden @ (teacher_head * scale), temperature)
    np.testing.assert_allclose(
        found[0], expected, rtol=1e-3, atol=1e-5 * scale
    )  # logits themselves are rounded


def _finite(direction, temperature, *arrays):
    return differentiate(
        lambda *a: chunked_kl(*a, temperature, 10, direction=direction, beta=0.3), *arrays
    )


FINITE = jax.jit(_finite, static_argnums=(0, 1))


@pytest.mark.slow
def test_a_common_shift_of_the_logits_costs_no_precision():
    hidden, head, teacher_hidden, teacher_head = inputs()
    raised = (
        jnp.concatenate([hidden, jnp.ones((TOKENS, 1))], 1),
        jnp.concatenate([head, jnp.full((1, VOCABULARY), 512.0)]),
    )
    found = chunked_kl(*raised, teacher_hidden, teacher_head, 1.0, 16)
    plain = kl(raised[0] @ raised[1], teacher_hidden @ teacher_head)
    np.testing.assert_allclose(found, plain, rtol=1e-5)
    np.testing.assert_allclose(
        found, chunked_kl(hidden, head, teacher_hidden, teacher_head, 1.0, 16), rtol=1e-4, atol=1e-3
    )


@pytest.mark.wide(1)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.slow
def test_short_heads_give_float32_logits_and_short_gradients(dtype):
    short = inputs(dtype)
    found = differentiate(lambda *a: chunked_kl(*a, 2.0, 16, block=10), *short)
    wide = differentiate(naive(lambda s, t: kl(s, t, 2.0)), *(x.astype(jnp.float32) for x in short))
    assert found[0].dtype == jnp.float32 and found[1].dtype == found[2].dtype == dtype
    np.testing.assert_allclose(found[0], wide[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(found[1:], wide[1:], strict=True):  # rounded once, at the end
        epsilon = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            a.astype(jnp.float32), b, rtol=epsilon, atol=1e-5 * float(jnp.abs(b).max())
        )


def test_a_student_in_float32_learns_from_a_teacher_in_bfloat16():
    hidden, head, teacher_hidden, teacher_head = inputs()
    short = [x.astype(jnp.bfloat16) for x in (teacher_hidden, teacher_head)]
    found = differentiate(lambda *a: chunked_kl(*a, 1.0, 16), hidden, head, *short)
    plain = differentiate(naive(kl), hidden, head, *(x.astype(jnp.float32) for x in short))
    assert_close(found, plain)


@pytest.mark.wide(1)
@pytest.mark.parametrize("padding", [jnp.nan, jnp.inf])
def test_masked_tokens_are_not_seen_and_the_rest_is_as_without_them(padding):
    hidden, head, teacher_hidden, teacher_head = inputs()
    mask = jnp.arange(TOKENS) % 3 > 0
    hidden, teacher_hidden = (
        jnp.where(mask[:, None], x, padding) for x in (hidden, teacher_hidden)
    )
    labels = jnp.where(mask, LABELS, -1)

    def loss(*arrays):
        return chunked_hinton(*arrays, labels, 0.3, 2.0, 16, mask)

    plain = naive(
        lambda s, t: jnp.where(mask, 0.3 * cross_entropy(s, LABELS) + 0.7 * kl(s, t, 2.0), 0.0)
    )
    assert_close(
        differentiate(loss, hidden, head, teacher_hidden, teacher_head),
        differentiate(plain, *inputs()),
    )


@pytest.mark.slow
def test_all_masked_is_zero_and_so_is_its_gradient():
    nothing = jnp.zeros(TOKENS)

    def mean(hidden, head, *teacher):
        return masked_mean(chunked_kl(hidden, head, *teacher, 1.0, 16, nothing), nothing)

    value, gradients = jax.value_and_grad(mean, argnums=(0, 1))(*inputs())
    assert value == 0 and all((g == 0).all() for g in gradients)


def test_leading_axes_stay():
    hidden, head, teacher_hidden, teacher_head = inputs()
    mask = jnp.arange(TOKENS) % 3 > 0
    flat = chunked_kl(hidden, head, teacher_hidden, teacher_head, 1.0, 16, mask)
    cube = chunked_kl(
        hidden.reshape(4, 6, 8),
        head,
        teacher_hidden.reshape(4, 6, 12),
        teacher_head,
        1.0,
        16,
        mask.reshape(4, 6),
    )
    np.testing.assert_array_equal(cube.reshape(-1), flat)


def test_neither_teacher_nor_temperature_gets_a_gradient():
    hidden, head, *teacher = inputs()
    gradients = jax.grad(
        lambda teacher, T: chunked_kl(hidden, head, *teacher, T, 16).sum(), argnums=(0, 1)
    )(teacher, 2.0)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.wide(1)
@pytest.mark.parametrize("block", [8, None])
@pytest.mark.slow
def test_sharded_tokens_give_the_same(block):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tokens, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    placed = [
        jax.device_put(x, where)
        for x, where in zip(inputs(), [tokens, everywhere] * 2, strict=True)
    ]
    loss = lambda *arrays: chunked_kl(*arrays, 2.0, 16, block=block)  # noqa: E731
    found = differentiate(loss, *placed)
    assert not found[0].sharding.is_fully_replicated and not found[1].sharding.is_fully_replicated
    assert_close(found, differentiate(loss, *inputs()))


@pytest.mark.slow
def test_under_shard_map_the_gradient_of_a_shared_head_is_summed():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, all_of_it = PartitionSpec("data"), PartitionSpec()

    def gradient(hidden, head, teacher_hidden, teacher_head):
        return jax.grad(
            lambda head: chunked_kl(hidden, head, teacher_hidden, teacher_head, 2.0, 16).sum()
        )(head)

    spread = jax.shard_map(
        gradient, mesh=mesh, in_specs=(data, all_of_it, data, all_of_it), out_specs=all_of_it
    )
    hidden, head, *teacher = inputs()
    expected = jax.grad(lambda head: chunked_kl(hidden, head, *teacher, 2.0, 16).sum())(head)
    np.testing.assert_allclose(jax.jit(spread)(hidden, head, *teacher), expected, atol=1e-5)


@every_direction
def test_no_array_of_all_tokens_and_all_the_vocabulary_exists(direction):
    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (tuple(var.aval.shape) for var in equation.outvars)
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from shapes(getattr(inner, "jaxpr", inner))

    step = jax.grad(
        lambda *a: chunked_kl(*a, 1.0, 16, direction=direction, block=6).sum(), argnums=(0, 1)
    )
    seen = set(shapes(jax.make_jaxpr(step)(*inputs()).jaxpr))
    assert (6, 16) in seen
    assert max(np.prod(shape) for shape in seen) <= 12 * VOCABULARY < TOKENS * VOCABULARY


def test_memory_grows_with_the_chunk_and_not_with_the_vocabulary():
    def temporary(vocabulary, loss):
        shapes = ((256, 4), (4, vocabulary), (256, 4), (4, vocabulary))
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        step = jax.jit(jax.grad(lambda *a: loss(*a).sum(), argnums=(0, 1)))
        return step.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    small, large = (
        temporary(vocabulary, lambda *a: chunked_kl(*a, 1.0, 256)) for vocabulary in (4096, 16384)
    )
    whole = temporary(16384, naive(kl))
    logits = 256 * 16384 * 4
    assert whole > logits > 4 * large
    assert (
        large - small < 0.1 * logits * 3 / 4
    )  # three quarters of the logits would be the growth of one such array


@pytest.mark.parametrize(
    "change, message",
    [
        ({"student_head": jnp.ones((7, 5))}, "student's head must be"),
        ({"teacher_head": jnp.ones((12, 5))}, "vocabularies differ"),
        ({"teacher_hidden": jnp.ones((3, 12))}, "tokens"),
        ({"mask": jnp.ones(3)}, "tokens"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    with pytest.raises(ShapeError, match=message):
        chunked_kl(**{**dict(zip(names, inputs(), strict=True)), **change})
    with pytest.raises(ShapeError, match="labels"):
        chunked_hinton(*inputs(), jnp.zeros(3, jnp.int32))


@pytest.mark.parametrize(
    "change", [{"chunk": 0}, {"block": 0}, {"direction": "sideways"}, {"beta": 2.0}]
)
def test_arguments_that_make_no_sense(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        chunked_kl(*inputs(), **change)
