"""Constants that a function closes over: what is told of them if a caller's jit traces them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.quantize._integer.packed_operand import Lost, routes
from compress_jax.trace import calibrate, groups, layouts, resize, resized_numbers, sites
from compress_jax.trace._jaxpr.find_sites import trace
from compress_jax.trace._jaxpr.interpret import ConstantValue, uniform_value
from compress_jax.trace._symmetry import affine
from compress_jax.trace._symmetry.rotation import rotations
from compress_jax.trace._symmetry.scaling import scalings
from compress_jax.trace.reducers import absmax
from tests.trace.zoo_entry import randomise

P = randomise({"w": np.empty((3, 4)), "v": np.empty((4, 5)), "u": np.empty((5, 2))})
X = randomise({"x": np.empty((2, 3))})["x"]
S = jnp.array([[1.0, -2.0, 3.0, 0.5]])
KEY = jax.random.key(3)


def scaled(s):
    return lambda p, x: jax.nn.relu(jax.nn.relu((x @ p["w"]) * s) @ p["v"]) @ p["u"]


def noisy(key):
    return lambda p, x: jax.nn.relu((x @ p["w"] + jax.random.normal(key, (1, 4))) @ p["v"]) @ p["u"]


def traced(run, *args):
    """Return what a function returns in Python while JAX traces it."""
    found = []
    jax.make_jaxpr(lambda *args: found.append(run(*args)))(*args)
    return found[0]


def test_what_is_known_of_a_constant():
    assert not traced(lambda s: ConstantValue(s).known, S)
    assert traced(lambda s: (ConstantValue(s).entries, ConstantValue(s).zero), 0 * S) == (
        None,
        False,
    )
    assert ConstantValue(KEY).known and ConstantValue(KEY).entries is None
    assert not ConstantValue(object()).known
    np.testing.assert_array_equal(ConstantValue(S).entries, S)
    assert ConstantValue(0 * S).zero and not ConstantValue(S).zero
    assert not ConstantValue(np.zeros(2, bool)).zero  # truth values


@pytest.mark.parametrize("value, number", [
    (2, 2.0), (np.full(3, 0.5), 0.5), (jnp.full(2, 3, jnp.bfloat16), 3.0), (1j, None),
    (np.full(2, 2j), None), (jnp.zeros(0), None), (S, None), (np.ones(2, bool), None), (KEY, None),
])  # fmt: skip
def test_the_number_that_all_entries_are(value, number):
    assert uniform_value(value) == number


def test_empty_constants_may_be_permuted():
    fn = lambda p, x: jnp.concatenate([x @ p["w"], np.ones((0, 4), np.float32)]) @ p["v"]  # noqa: E731
    assert [group.name for group in groups(fn, P, X)] == ["w:1"]


def test_axes_along_which_a_constant_may_vary_are_frozen():
    found = traced(lambda s: groups(scaled(s), P, X), S)
    assert [group.name for group in found] == ["v:1"]
    assert found.frozen[("w", 1)] == found.frozen[("v", 0)] == "constant"
    assert len(groups(scaled(jnp.ones((1, 4))), P, X)) == 2


@pytest.mark.parametrize("make, constant", [(scaled, S), (noisy, KEY)])
def test_a_function_is_resized_while_what_it_captures_is_traced(make, constant):
    kept = {"v:1": [0, 3]}
    names = []

    @jax.jit
    def run(constant):
        fn = make(constant)
        found = groups(fn, P, X)
        names.extend(resized_numbers(fn, P, X, groups=found, kept=kept))
        short = found.keep(P, kept)
        return resize(fn, P, found, kept)(short, X), fn(short, X)

    np.testing.assert_allclose(*run(constant), rtol=1e-5, atol=1e-6)
    assert not names


def test_rewrites_find_what_they_may_change():
    assert [each.size for each in traced(lambda s: scalings(scaled(s), P, X)[0], S)] == [4, 5]
    found, _ = traced(lambda s: rotations(lambda p, x: (x @ p["w"] * s) @ p["v"], P, X), S)
    assert not found
    affine_in = lambda s: trace(lambda p, x: x @ p["w"] * s + s, P, X)  # noqa: E731
    assert traced(lambda s: affine.walk(affine_in(s)).arrays, S) == {}


def test_gains_that_are_not_known_may_differ():
    fn = lambda p, x: ((x @ p["w"]) * p["s"][None]) @ p["v"]  # noqa: E731
    values = {**{name: P[name] for name in "wv"}, "s": S[0]}
    found, _ = traced(lambda s: rotations(fn, {**values, "s": s}, X), S[0])
    assert not found["w:1"].unrotated and len(found["w:1"].gains) == 1


def test_masked_statistics_while_a_scale_is_traced():
    def largest(s):
        fn = lambda p, x: (x @ p["w"] * s) @ p["v"]  # noqa: E731
        return calibrate(fn, absmax(), P, [X], mask=[jnp.array([True, False])])["v"]["input"]

    np.testing.assert_allclose(jax.jit(largest)(S), jnp.abs(X[:1] @ P["w"] * S).max(), rtol=1e-6)


STACKED = {"w": jnp.ones((2, 3, 4))}
SLICES = {
    "numpy": lambda i: lambda p, x: x @ p["w"][i],
    "dynamic": lambda i: lambda p, x: x @ jax.lax.dynamic_index_in_dim(p["w"], i, 0, False),
    "computed": lambda i: lambda p, x: x @ p["w"][jnp.abs(i) - 1],
}


@pytest.mark.parametrize("way", SLICES)
def test_an_index_that_is_traced_decides_like_data(way):
    fn = SLICES[way]
    (site,) = traced(lambda i: sites(fn(i), STACKED, X), jnp.int32(1))
    assert site.param == "w" and "data" in site.lost and "decide which" in site.lost
    assert traced(lambda i: layouts(fn(i), STACKED, X), jnp.int32(1))["w"].stack == (0,)
    _, right = traced(lambda i: next(iter(routes(trace(fn(i), STACKED, X)).values())), jnp.int32(1))
    assert isinstance(right, Lost) and "data decide which" in right.reason


def test_what_stands_beside_a_parameter_or_multiplies_it_may_be_traced():
    params = {"w": jnp.ones((2, 4)), "s": jnp.float32(0.0)}
    beside = lambda s: lambda p, x: x @ jnp.concatenate([p["w"], s])  # noqa: E731
    padded = lambda s: lambda p, x: x @ jax.lax.pad(p["w"], s, [(1, 0, 0), (0, 0, 0)])  # noqa: E731
    times = lambda s: lambda p, x: x[:, :2] @ (p["w"] * s)  # noqa: E731
    for make, value, start in (
        (beside, S, 0), (padded, jnp.float32(2.0), 1), (times, S, 0)
    ):  # fmt: skip
        (site,) = traced(lambda s, make=make: sites(make(s), params, X), value)
        (piece,) = site.pieces
        assert (piece.path, piece.sizes, piece.starts) == ("w", (2, 4), (start, 0))


def test_a_parameter_padded_by_another_is_refused():
    """A shift by padding and cropping keeps the shape, but not the places."""
    params = {"w": jnp.ones((3, 4)), "s": jnp.float32(2.0)}
    (site,) = sites(
        lambda p, x: x @ jax.lax.pad(p["w"], p["s"], [(1, -1, 0), (0, 0, 0)]), params, X
    )
    assert not site.pieces and "padded with data or a parameter" in site.lost
