import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.prune import cubic


@pytest.mark.wide(2)
@pytest.mark.parametrize(
    ("initial", "final", "begin", "end"),
    [(0.0, 0.9, 0, 100), (0.25, 0.8, 10, 17), (0.9, 0.1, 3, 50)],
)
def test_it_is_equation_1_of_zhu_and_gupta(initial, final, begin, end):
    steps = np.arange(end + 20)
    t = np.clip((steps - begin) / (end - begin), 0, 1)
    expected = final + (initial - final) * (1 - t) ** 3
    np.testing.assert_allclose(
        jax.vmap(cubic(final, begin, end, initial))(jnp.asarray(steps)), expected, atol=1e-6
    )


@pytest.mark.parametrize(
    "arguments", [(1.1, 0, 5), (0.5, 0, 5, -0.1), (0.5, 5, 5), (0.5, -1, 5), (float("nan"), 0, 5)]
)
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="got"):
        cubic(*arguments)
