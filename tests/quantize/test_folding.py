"""Folding norms into kernels: the function stays what it was, on random graphs with shared values,
in every spelling."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.quantize import fold_batch_norm

N = 4
X = jax.random.normal(jax.random.key(0), (3, N))
NAMES = ("mean", "var", "gain", "beta", "bias")


def params(*kernels, n=N, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 5 + len(kernels)))
    found = {name: 0.5 + jax.random.uniform(next(keys), (n,)) for name in NAMES}
    return found | {name: jax.random.normal(next(keys), shape) for name, shape in kernels}


def rel(fn, old, new, x):
    a, b = (jax.tree.leaves(fn(p, x)) for p in (old, new))
    return max(
        float(jnp.abs(i - j).max() / (jnp.abs(i).max() + 1e-6)) for i, j in zip(a, b, strict=True)
    )


def row(x):
    return x[None, :]


def scale(p, eps=1e-3):
    return p["gain"] * jax.lax.rsqrt(p["var"] + eps)


SPELLINGS = {
    "flax": lambda p, y: (y - row(p["mean"])) * row(scale(p)) + row(p["beta"]),
    "keras": lambda p, y: y * row(scale(p)) + row(p["beta"] - p["mean"] * scale(p)),
    "keras 3": lambda p, y: y * row(scale(p)) + row(-p["mean"] * scale(p) + p["beta"]),
    "division": lambda p, y: (
        (y - row(p["mean"])) / row(jnp.sqrt(p["var"] + 1e-3)) * row(p["gain"]) + row(p["beta"])
    ),
    "division last": lambda p, y: (
        row(p["gain"]) * (y - row(p["mean"])) / row(jnp.sqrt(1e-3 + p["var"])) + row(p["beta"])
    ),
    "power": lambda p, y: (
        row(p["beta"]) + row(p["gain"] * (p["var"] + 1e-3) ** -0.5) * (y - row(p["mean"]))
    ),
    "negated": lambda p, y: row(p["beta"]) - (row(p["mean"]) - y) * row(scale(p)),
    "one plus gain": lambda p, y: (
        (y - row(p["mean"])) * row((1 + p["gain"]) * jax.lax.rsqrt(p["var"] + 1e-3))
        + row(p["beta"])
    ),
    "deviation": lambda p, y: (
        (y - row(p["mean"])) / row(jnp.sqrt(p["var"]) + 1e-3) * row(p["gain"]) + row(p["beta"])
    ),
    "no gain": lambda p, y: (
        (y - row(p["mean"])) * row(jax.lax.rsqrt(p["var"] + 1e-3)) + row(p["beta"])
    ),
    "no offset": lambda p, y: (y - row(p["mean"])) * row(scale(p)),
    "no mean": lambda p, y: y * row(scale(p)) + row(p["beta"]),
    "biased": lambda p, y: (y + row(p["bias"]) - row(p["mean"])) * row(scale(p)) + row(p["beta"]),
    "biased, no offset": lambda p, y: (y + row(p["bias"]) - row(p["mean"])) * row(scale(p)),
    "in two": lambda p, y: (
        ((y * 2.0 - row(p["mean"])) / 3.0) * row(scale(p)) * 0.5 + row(p["beta"])
    ),
    "inner function": lambda p, y: jax.jit(
        lambda p, y: (y - row(p["mean"])) * row(scale(p)) + row(p["beta"])
    )(p, y),
    "captured": lambda p, y: (
        (y - row(p["mean"])) * row(scale(p) * np.arange(1.0, N + 1, dtype=np.float32))
        + row(p["beta"])
    ),
    "clipped variance": lambda p, y: (
        (y - row(p["mean"])) * row(p["gain"] / jnp.sqrt(jnp.maximum(p["var"], 0) + 1e-3))
    ),
}


@pytest.mark.wide(3)
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_folded_and_the_function_stays(name):
    p = params(("kernel", (N, N)))
    fn = lambda p, x: jnp.tanh(SPELLINGS[name](p, x @ p["kernel"]))  # noqa: E731
    result = fold_batch_norm(fn, p, X)
    assert set(result.changed) == {"kernel"} and not result.skipped
    assert rel(fn, p, result.params, X) < 3e-6
    # what is left is no scale: outputs differ from those of the new kernel by a constant
    left = SPELLINGS[name](result.params, X) - X
    if name not in ("captured", "in two"):
        np.testing.assert_allclose(left, np.broadcast_to(left[:1], left.shape), atol=1e-5)


@pytest.mark.wide(1)
@pytest.mark.parametrize("spelling", ["flax", "keras", "biased"])
def test_a_parameter_with_any_other_use_stays_the_same_function(spelling):
    p = params(("kernel", (N, N)))
    later = {
        "returned": lambda p, z, each: (z, p[each]),
        "penalized": lambda p, z, each: z + (p[each] ** 2).sum(),
        "behind relu": lambda p, z, each: jax.nn.relu(z) * row(p[each]),
        "at an index": lambda p, z, each: z + p[each][0],
        "decides": lambda p, z, each: jax.lax.cond(
            p[each].sum() > 3.0, lambda z: z, lambda z: -z, z
        ),
        "a loop's end": lambda p, z, each: jax.lax.while_loop(
            lambda s: s.sum() < p[each].sum(), lambda s: 2 * s, abs(z)
        ),
        "added": lambda p, z, each: z + row(p[each]),
        "twice": lambda p, z, each: z * row(p[each]),
    }
    for each, (how, then) in itertools.product(
        ["mean", "var", "gain", "beta", "bias"], later.items()
    ):
        fn = lambda p, x, each=each, then=then: then(
            p, SPELLINGS[spelling](p, x @ p["kernel"]), each
        )  # noqa: E731
        result = fold_batch_norm(fn, p, X)
        assert rel(fn, p, result.params, X) < 1e-5, (each, how)
        needed = each in ("mean", "var", "gain") or (each, spelling) == ("bias", "biased")
        if needed and how not in ("added", "twice"):
            assert each in result.skipped["kernel"], (each, how)


@pytest.mark.wide(6)
@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: SPELLINGS["flax"](p, x @ p["kernel"]) + (p["kernel"] ** 2).sum(),
        lambda p, x: SPELLINGS["flax"](p, p["kernel"][jnp.array([0, 3])] @ p["kernel"]),
        lambda p, x: (SPELLINGS["flax"](p, x @ p["kernel"]), p["kernel"]),
        lambda p, x: SPELLINGS["flax"](p, x @ p["kernel"]) + x @ p["kernel"].T,
        lambda p, x: SPELLINGS["flax"](p, x @ (p["kernel"] / jnp.linalg.norm(p["kernel"]))),
        lambda p, x: SPELLINGS["flax"](p, x @ jnp.sign(p["kernel"])),
        lambda p, x: SPELLINGS["flax"](p, x @ p["kernel"]) + SPELLINGS["keras"](p, x @ p["other"]),
        lambda p, x: (
            lambda y: jnp.tanh(SPELLINGS["flax"](p, y)) + jnp.sin(SPELLINGS["no mean"](p, y))
        )(x @ p["kernel"]),
        lambda p, x: jnp.tanh(x @ p["kernel"]) * row(scale(p)) + row(p["beta"]),
        lambda p, x: SPELLINGS["flax"](p, x @ p["kernel"] + x),
        lambda p, x: (
            ((x[:1] + jnp.zeros((N, N))) @ p["kernel"] - p["mean"][:, None]) * scale(p)[:, None]
        ),  # along the batch
    ],
)
def test_what_must_not_be_folded_is_listed(fn):
    p = params(("kernel", (N, N)), ("other", (N, N)))
    result = fold_batch_norm(fn, p, X)
    assert rel(fn, p, result.params, X) < 1e-6
    assert (
        "kernel" in result.skipped and "kernel" not in result.changed and result.skipped["kernel"]
    )


def test_a_norm_inside_a_longer_chain_is_folded_as_far_as_it_goes():
    p = params(("kernel", (N, N))) | {"film": jnp.arange(1.0, N + 1)}

    def fn(p, x):
        z = SPELLINGS["no gain"](p, x @ p["kernel"])
        return z + z * row(p["film"])

    result = fold_batch_norm(fn, p, X)
    assert (
        result.changed == {"kernel": ("mean", "var", "beta")}
        and rel(fn, p, result.params, X) < 1e-6
    )
    assert (result.params["film"] == p["film"]).all()


def conv(x, k, spec=("NHWC", "HWIO", "NHWC"), groups=1):
    return jax.lax.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=spec, feature_group_count=groups
    )


def norm(p, y, axis):
    shape = [1] * y.ndim
    shape[axis] = -1
    at = {name: p[name].reshape(shape) for name in ("mean", "var", "gain", "beta")}
    return (y - at["mean"]) * (at["gain"] * jax.lax.rsqrt(at["var"] + 1e-3)) + at["beta"]


IMAGE = jax.random.normal(jax.random.key(1), (2, 5, 5, 4))
LAYERS = {
    "conv": (lambda p, x: norm(p, conv(x, p["k"]), -1), (3, 3, 4, 6), 6),
    "channels first": (
        lambda p, x: norm(p, conv(x.transpose(0, 3, 1, 2), p["k"], ("NCHW", "OIHW", "NCHW")), 1),
        (6, 4, 3, 3),
        6,
    ),
    "transposed back": (
        lambda p, x: norm(p, conv(x, p["k"]).transpose(0, 3, 1, 2), 1),
        (3, 3, 4, 6),
        6,
    ),
    "depthwise": (lambda p, x: norm(p, conv(x, p["k"], groups=4), -1), (3, 3, 1, 8), 8),
    "keras depthwise": (
        lambda p, x: norm(p, conv(x, p["k"].reshape(3, 3, 1, 8), groups=4), -1),
        (3, 3, 4, 2),
        8,
    ),
    "grouped": (lambda p, x: norm(p, conv(x, p["k"], groups=2), -1), (3, 3, 2, 6), 6),
    "transposed kernel": (lambda p, x: norm(p, x @ p["k"].T, -1), (6, 4), 6),
    "conv transpose": (
        lambda p, x: norm(p, jax.lax.conv_transpose(x, p["k"], (2, 2), "SAME"), -1),
        (3, 3, 4, 6),
        6,
    ),
    "its kernel transposed": (
        lambda p, x: norm(
            p, jax.lax.conv_transpose(x, p["k"], (2, 2), "SAME", transpose_kernel=True), -1
        ),
        (3, 3, 6, 4),
        6,
    ),
    "heads": (
        lambda p, x: norm(p, jnp.einsum("bhwc,cnd->bhwnd", x, p["k"]).reshape(2, 5, 5, 6), -1),
        (4, 2, 3),
        6,
    ),
    "kernel first": (lambda p, x: norm(p, jnp.einsum("cn,bhwc->nbhw", p["k"], x), 0), (4, 6), 6),
}


@pytest.mark.wide(2)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_all_kinds(name):
    fn, shape, n = LAYERS[name]
    p = params(("k", shape), n=n)
    result = fold_batch_norm(fn, p, IMAGE)
    assert set(result.changed) == {"k"} and not result.skipped
    assert rel(jax.jit(fn), p, result.params, IMAGE) < 5e-6
    assert (result.params["gain"] == 1).all() and (result.params["mean"] == 0).all()


def test_layers_in_a_scan_are_folded_each_with_its_own_norm():
    one = [params(("kernel", (N, N)), seed=i) for i in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *one)

    def layer(x, p):
        return jnp.tanh(SPELLINGS["keras"](p, x @ p["kernel"])), None

    fn = lambda p, x: jax.lax.scan(layer, x, p)[0]  # noqa: E731
    result = fold_batch_norm(fn, stacked, X)
    assert set(result.changed) == {"kernel"} and rel(fn, stacked, result.params, X) < 5e-6
    for i, p in enumerate(one):
        alone = fold_batch_norm(lambda p, x: layer(x, p)[0], p, X).params
        np.testing.assert_allclose(result.params["kernel"][i], alone["kernel"], rtol=1e-6)

    def shared(p, x):  # one kernel, a norm for each turn
        kernel = p["kernel"][0]
        return jax.lax.scan(
            lambda x, q: layer(x, {**q, "kernel": kernel}), x, {k: p[k] for k in NAMES}
        )[0]

    result = fold_batch_norm(shared, stacked, X)
    assert (
        not result.changed
        and result.skipped["kernel"]
        and rel(shared, stacked, result.params, X) == 0
    )


def test_averages_corrected_by_a_counter_are_folded_but_not_by_what_would_change():
    p = params(("kernel", (N, N))) | {"steps": jnp.int32(7)}

    def fn(p, x, by="steps"):
        count = jnp.where(p[by].sum() == 0, 1.0, 1 - 0.9 ** p[by].sum().astype(jnp.float32))
        y = x @ p["kernel"]
        return (y - row(p["mean"] / count)) / row(jnp.sqrt(p["var"] / count + 1e-3)) * row(
            p["gain"]
        ) + row(p["beta"])

    result = fold_batch_norm(fn, p, X)
    assert (
        result.changed == {"kernel": ("mean", "var", "gain", "beta")}
        and int(result.params["steps"]) == 7
    )
    assert rel(fn, p, result.params, X) < 1e-5
    for by in NAMES:
        result = fold_batch_norm(lambda p, x, by=by: fn(p, x, by), p, X)
        assert rel(lambda p, x, by=by: fn(p, x, by), p, result.params, X) < 1e-5
    uniform = {**p, "gain": jnp.ones(1)}  # one entry, that is looked at and a factor too
    result = fold_batch_norm(lambda p, x: fn(p, x, "gain"), uniform, X)
    assert rel(lambda p, x: fn(p, x, "gain"), uniform, result.params, X) < 1e-5


def test_what_would_not_be_finite_is_not_folded():
    p = params(("kernel", (N, N))) | {"gain": jnp.full(N, 1e4)}
    p = {name: x.astype(jnp.float16) for name, x in p.items()}
    fn = lambda p, x: x.astype(jnp.float16) @ p["kernel"] * row(p["gain"]) * row(p["gain"])  # noqa: E731
    result = fold_batch_norm(fn, p, X)
    assert not result.changed and "finite" in result.skipped["kernel"]


STEPS = (
    lambda p, a, b, v: a + v,
    lambda p, a, b, v: a - v,
    lambda p, a, b, v: a * v,
    lambda p, a, b, v: a * jax.lax.rsqrt(v + 0.1),
    lambda p, a, b, v: a / jnp.sqrt(v),
    lambda p, a, b, v: a * (v * row(p["gain"])) + (row(p["beta"]) - v),
    lambda p, a, b, v: a + b,
    lambda p, a, b, v: jnp.tanh(a),
    lambda p, a, b, v: a @ p["kernel"],
    lambda p, a, b, v: a * 0.5 + v.sum(),
)
NODES = st.lists(st.tuples(*(st.integers(0, n) for n in (9, 9, 9, 4))), min_size=3, max_size=9)


def graph(nodes):
    """A random function of two kernels and five vectors: every node reads earlier nodes and any
    vector, in any way."""

    def fn(p, x):
        values = [x, x @ p["kernel"], x @ p["other"]]
        for kind, i, j, k in nodes:
            a, b = values[-1 - i % min(len(values), 3)], values[j % len(values)]
            values.append(STEPS[kind](p, a, b, row(p[NAMES[k]])))
        return values[-1], values[-2]

    return fn


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(NODES)
def test_random_graphs_stay_the_same_function(nodes):
    fn, p = graph(nodes), params(("kernel", (N, N)), ("other", (N, N)))
    result = fold_batch_norm(fn, p, X)
    assert rel(fn, p, result.params, X) < 2e-4  # float32, chains of quotients
    for path in ("kernel", "other"):
        assert path in result.changed or result.skipped.get(path, "never used")


def test_some_random_graphs_are_folded():
    """The generator above does meet norms: of a dozen chains some."""
    rng, found = np.random.default_rng(0), 0
    p = params(("kernel", (N, N)), ("other", (N, N)))
    for _ in range(12):
        nodes = [tuple(int(i) for i in rng.integers(0, [6, 1, 10, 5])) for _ in range(3)]
        result = fold_batch_norm(graph(nodes), p, X)
        found += bool(result.changed)
        assert rel(graph(nodes), p, result.params, X) < 2e-4
    assert found >= 3
