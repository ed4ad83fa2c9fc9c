import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

from compress_jax.cluster import kmeans
from compress_jax.cluster._kmeans import _in_order, _lloyd, _values, plus_plus, sketch
from compress_jax.core import NonFiniteError, between, chain, leafwise, unpack


def shared(x, clusters, **options):
    c = kmeans(clusters, **options)
    state = c.init({"w": jnp.asarray(x)})
    return c, state, np.asarray(c.view({"w": jnp.asarray(x)}, state)["w"], np.float64)


def distortion(x, seen):
    return float(((np.asarray(x, np.float64) - seen) ** 2).sum())


def lloyd_float64(x, centroids, iterations):
    x, centroids = np.asarray(x, np.float64), np.asarray(centroids, np.float64)
    for _ in range(iterations):
        nearest = np.abs(x[:, None] - centroids[None]).argmin(1)
        centroids = np.array(
            [x[nearest == k].mean() if (nearest == k).any() else c for k, c in enumerate(centroids)]
        )
    return centroids


def optimal_distortion(x, clusters):
    """Exact k-means in one dimension by dynamic programming over the ends of the cells."""
    x = np.sort(np.asarray(x, np.float64))
    s, q, i = np.append(0, x.cumsum()), np.append(0, (x * x).cumsum()), np.arange(len(x) + 1)
    size = i[None] - i[:, None]
    cost = np.where(
        size > 0, q[None] - q[:, None] - (s[None] - s[:, None]) ** 2 / np.maximum(size, 1), 0
    )
    cost = np.where(size < 0, np.inf, cost)
    best = cost[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + cost).min(0)
    return best[-1]


@pytest.mark.wide(1)
@pytest.mark.parametrize("clusters", [4, 16])
@pytest.mark.slow
def test_lloyd_agrees_with_float64(clusters):
    x = np.random.default_rng(clusters).standard_normal(2000).astype(np.float32)
    ordered, count = _in_order(_values(jnp.asarray(x), True))
    start = plus_plus(jax.random.key(1), sketch(ordered, count), clusters)
    for iterations in (1, 10):
        ours = _lloyd(ordered, count, start[None], iterations)[0]
        np.testing.assert_allclose(ours, lloyd_float64(x, start, iterations), atol=1e-6)


@pytest.mark.slow
def test_codebook_is_a_fixed_point_of_lloyd():
    x = np.random.default_rng(0).laplace(size=3000).astype(np.float32)
    _, state, _ = shared(x, 16, iterations=1000)
    codebook, codes = np.asarray(state.learned["w"], np.float64), np.asarray(state.fixed["w"])
    assert (np.abs(x[:, None] - codebook[None]).argmin(1) == codes).all()
    means = [x[codes == k].astype(np.float64).mean() for k in range(16)]
    np.testing.assert_allclose(codebook, means, atol=1e-6)


def samples(rng, n):
    sign_mixture = np.where(rng.random(n) < 0.5, rng.normal(-5, 0.1, n), rng.normal(1, 2, n))
    return [
        rng.standard_normal(n),
        rng.laplace(size=n),
        rng.standard_t(2, n),
        rng.random(n),
        sign_mixture,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [4, 16])
def test_distortion_is_near_the_optimum(clusters):
    for x in samples(np.random.default_rng(0), 1000):
        x = x.astype(np.float32)
        found, best = distortion(x, shared(x, clusters)[2]), optimal_distortion(x, clusters)
        assert best * (1 - 1e-5) <= found <= best * (1.01 if clusters < 16 else 1.08)


@pytest.mark.wide(1)
@pytest.mark.parametrize("clusters", [4, 16, 300])
@pytest.mark.slow
def test_distortion_is_at_most_that_of_a_uniform_grid(clusters):
    for x in samples(np.random.default_rng(1), 4000):
        x = x.astype(np.float32)
        width = (x.max() - x.min()) / clusters
        grid = x.min() + width * (np.clip(np.floor((x - x.min()) / width), 0, clusters - 1) + 0.5)
        assert distortion(x, shared(x, clusters)[2]) <= distortion(x, grid)


@pytest.mark.slow
def test_many_clusters_reach_the_panter_dite_limit():
    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    limit = np.sqrt(3) * np.pi / 2 / 300**2  # of a unit normal
    assert distortion(x, shared(x, 300)[2]) / x.size < 1.02 * limit


@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.integers(-(2**24), 2**24)),
    st.sampled_from([4, 16]),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.slow
def test_any_leaf(x, clusters):
    x = np.resize(
        x * np.float32(1e-3), 40
    )  # one shape, one compilation for each number of clusters
    c, state, seen = shared(x, clusters, iterations=10)
    assert ((seen == 0) == (x == 0)).all() or np.unique(x).size > clusters
    assert (np.asarray(state.fixed["w"]) == clusters).sum() == (x == 0).sum()
    assert x.min() <= seen.min() and seen.max() <= x.max()
    if np.unique(x[x != 0]).size <= clusters:
        np.testing.assert_array_equal(seen, x)


@pytest.mark.wide(1)
@pytest.mark.parametrize(
    "x",
    [
        np.zeros(5),
        np.full((3, 2), 0.1),
        np.array([1.5]),
        np.array([0.0, -3e38, 3e38, 1e-37]),
        np.array([-0.0, 1.0, 1.0]),
        np.float32(2.5),
        np.array([-16777214, -16777216]) * np.float32(1e-3),  # adjacent floats
    ],
    ids=["zeros", "constant", "one entry", "huge", "negative zero", "scalar", "neighbours"],
)
@pytest.mark.parametrize("clusters", [4, 300])
@pytest.mark.slow
def test_leaves_of_few_values_are_exact(x, clusters):
    x = np.asarray(x, np.float32)
    c, state, seen = shared(x, clusters)
    np.testing.assert_array_equal(seen, x)
    packed = c.pack({"w": jnp.asarray(x)}, state)
    np.testing.assert_array_equal(unpack(packed)["w"], x)
    assert jnp.isfinite(state.learned["w"]).all()


@pytest.mark.slow
def test_zeros_are_kept_apart_through_a_chain_and_training():
    prune = leafwise(
        lambda x, learned, mask: x * mask,
        init=lambda x, key: (None, (jnp.abs(x) > 1).astype(x.dtype)),
    )
    both = chain(prune, kmeans(16))
    params = {"w": jax.random.normal(jax.random.key(0), (50, 40))}
    state = both.init(params)
    state = state._replace(learned=jax.tree.map(lambda c: c + 0.25, state.learned))
    seen = both.view(params, state)["w"]
    assert ((seen == 0) == (jnp.abs(params["w"]) <= 1)).all()
    packed = both.pack(params, state)["w"]
    np.testing.assert_array_equal(packed.unpack(), seen)
    assert packed.nbytes <= 4 * 16 + 2000 // 8 + -(-int((seen != 0).sum()) * 4 // 8)


@pytest.mark.slow
def test_zeros_are_ordinary_values_on_request():
    x = np.array([0.0, 0.0, 0.2, 5.0, 5.2, 8.0, 9.0], np.float32)
    _, state, seen = shared(x, 4, keep_zeros=False)
    assert int(state.fixed["w"].max()) == 3
    np.testing.assert_allclose(seen, [0.2 / 3] * 3 + [5.1] * 2 + [8.0, 9.0], rtol=1e-6)


@pytest.mark.slow
def test_codebook_gradient_is_the_sum_over_its_members():
    x = jax.random.normal(jax.random.key(0), (30, 20)).at[::3].set(0)
    c, state, _ = shared(x, 4)
    weights = jax.random.normal(jax.random.key(1), x.shape)

    def loss(params, learned):
        return (weights * c.view(params, state._replace(learned=learned))["w"]).sum()

    to_params, to_learned = jax.grad(loss, argnums=(0, 1))({"w": x}, state.learned)
    codes = np.asarray(state.fixed["w"])
    expected = [np.asarray(weights, np.float64)[codes == k].sum() for k in range(4)]
    np.testing.assert_allclose(to_learned["w"], expected, atol=1e-5)
    assert (to_params["w"] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "clusters"), [(0, 16), (1, 300), ((0, 1), 16)])
def test_sharding_does_not_change_a_bit(axis, clusters):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = {
        0: PartitionSpec(("a", "b")),
        1: PartitionSpec(None, "a"),
        (0, 1): PartitionSpec("a", "b"),
    }[axis]
    x = 0.02 * jax.random.normal(jax.random.key(3), (64, 120)).at[3].set(0)
    split = {"w": jax.device_put(x, NamedSharding(mesh, spec))}
    c = kmeans(clusters)
    one, many = c.init({"w": x}), c.init(split)
    jax.tree.map(np.testing.assert_array_equal, one, many)
    seen = c.view(split, many)["w"]
    np.testing.assert_array_equal(seen, c.view({"w": x}, one)["w"])
    assert seen.sharding.is_equivalent_to(split["w"].sharding, 2)


@pytest.mark.slow
def test_init_is_the_same_under_jit_and_deterministic_in_its_key():
    params = {"w": jax.random.normal(jax.random.key(0), (500,))}
    c = kmeans(16, key=jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, c.init(params), jax.jit(c.init)(params))
    jax.tree.map(
        np.testing.assert_array_equal,
        c.init(params),
        kmeans(16, key=jax.random.key(7)).init(params),
    )


@pytest.mark.slow
def test_starts_in_the_middle_of_training():
    c = between(2, 4, kmeans(4))
    params = {"w": jax.random.normal(jax.random.key(0), (100,))}
    update = jax.jit(lambda params, state, step: c.update(params, state, step=step))
    state = c.init(params)
    trained = {"w": 3 * params["w"]}
    for step in range(4):
        state = update(trained, state, jnp.array(step))
    fresh = kmeans(4).init(trained)
    np.testing.assert_array_equal(state.learned["w"], fresh.learned["w"])
    assert jnp.unique(c.view(trained, state)["w"]).size == 4


@pytest.mark.wide(1)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("clusters", [16, 300])
@pytest.mark.slow
def test_short_floats(dtype, clusters):
    x = jax.random.normal(jax.random.key(0), (64, 32)).astype(dtype).at[0].set(0)
    c = kmeans(clusters)
    state = c.init({"w": x})
    seen = jax.jit(c.view)({"w": x}, state)["w"]
    assert seen.dtype == dtype and state.learned["w"].dtype == jnp.float32
    np.testing.assert_array_equal(unpack(c.pack({"w": x}, state))["w"], seen)


def test_refuses_what_it_cannot_do():
    for clusters in (1, 2**16):
        with pytest.raises(ValueError, match="clusters"):
            kmeans(clusters)
    with pytest.raises(ValueError, match="iterations"):
        kmeans(2, iterations=0)
    with pytest.raises(NonFiniteError, match="dense/kernel"):
        kmeans(2).init({"dense": {"kernel": jnp.array([1.0, jnp.nan])}})


@pytest.mark.slow
def test_memory_does_not_grow_with_clusters():
    init = kmeans(1024).init
    compiled = (
        jax.jit(lambda x: init({"w": x}))
        .lower(jax.ShapeDtypeStruct((2**17,), jnp.float32))
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2**17 * 200  # an [n, clusters] table would take 2**17 * 4096


@pytest.mark.parametrize("count", [1, 7, 4096, 5000, 8191, 2**24 - 1])
def test_sketch_is_evenly_spaced_in_rank(count):
    size = 1 << max(12, (count - 1).bit_length())
    points = np.asarray(
        sketch(jnp.minimum(jnp.arange(size), count - 1).astype(jnp.float32), jnp.array(count))
    )
    assert points[0] == 0 and points[-1] == count - 1
    even = (2 * np.arange(4096) + 1) * count // (2 * 4096)
    np.testing.assert_array_equal(points[1:-1], even[1:-1])
