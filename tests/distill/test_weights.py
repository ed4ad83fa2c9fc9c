import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.core import NoMatchError, ShapeError
from compress_jax.distill import l2_sp
from compress_jax.quantize import uniform

TEACHER = {
    "dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
    "head": {"kernel": jnp.ones((3, 2))},
}
STUDENT = jax.tree.map(lambda x: 1.5 * x, TEACHER)


def test_half_the_squared_distance_over_all_leaves():
    expected = sum(
        0.5 * np.square(0.5 * np.asarray(leaf, np.float64)).sum()
        for leaf in jax.tree.leaves(TEACHER)
    )
    np.testing.assert_allclose(l2_sp(STUDENT, TEACHER), expected, rtol=1e-6)
    assert l2_sp(TEACHER, TEACHER) == 0


def test_the_gradient_is_the_difference_and_the_teacher_has_none():
    to_student, to_teacher = jax.grad(l2_sp, argnums=(0, 1))(STUDENT, TEACHER)
    jax.tree.map(lambda g, s, t: np.testing.assert_allclose(g, s - t), to_student, STUDENT, TEACHER)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(to_teacher))


def test_only_leaves_of_the_pattern_count_and_need_to_match():
    other_head = {**STUDENT, "head": {"kernel": jnp.ones((3, 7))}}
    expected = 0.5 * np.square(0.5 * np.arange(6)).sum()
    np.testing.assert_allclose(l2_sp(other_head, TEACHER, "dense/kernel"), expected)
    np.testing.assert_allclose(l2_sp(other_head, TEACHER, ("dense/*",)), expected + 0.5 * 3 * 0.25)


def test_all_leaves_that_do_not_match_are_listed():
    student = {"dense": {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(3)}, "extra": jnp.ones(1)}
    with pytest.raises(ShapeError) as error:
        l2_sp(student, TEACHER)
    message = str(error.value)
    assert "dense/kernel: student (2, 4), teacher (2, 3)" in message
    assert (
        "extra: student (1,), teacher missing" in message
        and "head/kernel: student missing, teacher (3, 2)" in message
    )
    assert "bias" not in message
    with pytest.raises(NoMatchError, match="conv"):
        l2_sp(STUDENT, TEACHER, "conv/*")


@pytest.mark.slow
def test_packed_teachers_short_students_and_integers():
    compression = uniform(bits=4)
    packed = compression.pack(TEACHER, compression.init(TEACHER))
    short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), STUDENT)
    value = l2_sp({**short, "step": jnp.array(3)}, {**packed, "step": jnp.array(7)})
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(
        value, l2_sp(short, compression.view(TEACHER, compression.init(TEACHER))), rtol=1e-6
    )
