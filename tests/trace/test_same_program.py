"""Jaxprs that are one program, and functions computed output by output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.trace._jaxpr.outputs import Outputs
from compress_jax.trace._jaxpr.same_program import same_program

X = jnp.arange(6.0).reshape(2, 3)
TABLE = np.arange(9.0, dtype=np.float32).reshape(3, 3)


def scanned(turns, factor):
    def fn(x):
        return jax.lax.scan(lambda carry, _: (carry * factor, None), x, None, length=turns)[0]

    return fn


def selected(x, axis):
    return jax.lax.cond(x.sum() > 0, lambda x: x.sum(axis), lambda x: x.max(axis), x)


ALIKE = {
    "calls": lambda: lambda x: jax.nn.relu(x) + jax.nn.gelu(x),  # a derivative rule of its own
    "scan": lambda: scanned(3, 2.0),
    "cond": lambda: lambda x: selected(x, 0),
    "constants": lambda: lambda x: x @ jnp.asarray(TABLE.copy()),
    "remat": lambda: jax.checkpoint(lambda x: jnp.sin(x)),
}
OTHER = {
    "length": (scanned(3, 2.0), scanned(4, 2.0)),
    "factor": (scanned(3, 2.0), scanned(3, 2.5)),
    "axis": (lambda x: selected(x, 0), lambda x: selected(x, 1)),
    "constants": (lambda x: x @ jnp.asarray(TABLE), lambda x: x @ jnp.asarray(TABLE + 1)),
    "operands": (lambda x: x - 2 * x, lambda x: 2 * x - x),
    "outputs": (lambda x: (x, 2 * x), lambda x: (2 * x, x)),
    "callback": tuple(
        lambda x, n=n: jax.pure_callback(lambda y: y * np.float32(n), x, x) for n in (1, 2)
    ),
    "type": (lambda x: x.astype(jnp.float16), lambda x: x.astype(jnp.bfloat16)),
}


@pytest.mark.parametrize("name", ALIKE)
def test_the_same_function_made_twice_is_one_program(name):
    made = [jax.make_jaxpr(ALIKE[name]())(X) for _ in range(2)]
    assert same_program(*made)


@pytest.mark.parametrize("name", OTHER)
def test_any_difference_in_values_is_seen(name):
    made = [jax.make_jaxpr(fn)(X) for fn in OTHER[name]]
    assert same_program(made[0], made[0])
    assert not same_program(*made)


def test_outputs_need_and_compute_their_own_part_alone():
    def fn(leaves, scale):
        return {name: jnp.tanh(x) * scale for name, x in leaves.items()}

    leaves = {f"l{i}": X + i for i in range(3)}
    made = Outputs(fn, leaves, jnp.float32(2.0))
    assert [made.needed([i]) for i in range(3)] == [[0, 3], [1, 3], [2, 3]]
    (second,) = made.run([1], {1: X, 3: jnp.float32(4.0)})
    np.testing.assert_allclose(second, np.tanh(X) * 4, rtol=1e-6)
    made.run([2], {2: X, 3: jnp.float32(4.0)})
    assert len(made.known) == 1  # one program for both
    made.run([1, 2], {1: X, 2: X, 3: jnp.float32(4.0)})
    assert len(made.known) == 2
