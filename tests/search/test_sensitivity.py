"""Sensitivities against the definitions in float64, and what they are good for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import compress_jax as cj
from compress_jax.core import (
    ConfigError,
    DataError,
    NoMatchError,
    NonFiniteError,
    ShapeError,
    identity,
)
from compress_jax.quantize import uniform
from compress_jax.search._allocate import allocate
from compress_jax.search._sensitivity import Sensitivities, divergence, sensitivities
from compress_jax.trace import cost

OPTIONS = {
    "int2": uniform(2, granularity="channel"),
    "int4": uniform(4, granularity="channel"),
    "float32": identity(),
}


def params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"one": (6, 5), "two": (5, 3), "bias": (1, 3)}
    return {
        path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()
    }


def logits(p, x):
    return jnp.tanh(x @ p["one"]) @ p["two"] + p["bias"]


def loss(p, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(p, x), y).mean()


def batches(n=3, seed=1):
    rng = np.random.default_rng(seed)
    return [
        (jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), jnp.asarray(rng.integers(3, size=4)))
        for _ in range(n)
    ]


def compressed(p, path, option):
    one = cj.at(path, OPTIONS[option])
    return one.view(p, one.init(p))


def in_float64(p, x):
    p = {path: np.asarray(leaf, np.float64) for path, leaf in p.items()}
    return np.tanh(np.asarray(x, np.float64) @ p["one"]) @ p["two"] + p["bias"]


def log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["kl", "mse"])
def test_outputs_are_compared_with_one_leaf_compressed(measure):
    p, data = params(), [x for x, _ in batches()]
    table = sensitivities(logits, p, data, OPTIONS, measure)
    for path in ("one", "two"):
        assert table.scores[path]["float32"] == 0
        for option in ("int2", "int4"):
            expected = 0.0
            for x in data:
                full, got = in_float64(p, x), in_float64(compressed(p, path, option), x)
                if measure == "kl":
                    full, got = log_softmax(full), log_softmax(got)
                    expected += (np.exp(full) * (full - got)).sum(-1).mean() / len(data)
                else:
                    expected += ((got - full) ** 2).mean() / len(data)
            assert table.scores[path][option] == pytest.approx(expected, rel=1e-3)


def test_fisher_is_the_mean_squared_gradient_times_the_squared_change():
    p, data = params(), batches()
    table = sensitivities(loss, p, data, OPTIONS, "fisher")
    step = 1e-6  # numerical derivatives in float64

    def cross_entropy(p, x, y):
        return -log_softmax(in_float64(p, x))[np.arange(len(y)), np.asarray(y)].mean()

    for path in ("one", "two"):
        change = np.asarray(compressed(p, path, "int4")[path], np.float64) - np.asarray(
            p[path], np.float64
        )
        expected = 0.0
        for x, y in data:
            for index in np.ndindex(p[path].shape):
                ends = []
                for sign in (-1, 1):
                    moved = {key: np.array(leaf, np.float64) for key, leaf in p.items()}
                    moved[path][index] += sign * step
                    ends.append(cross_entropy(moved, x, y))
                expected += ((ends[1] - ends[0]) / (2 * step) * change[index]) ** 2 / len(data)
        assert table.scores[path]["int4"] == pytest.approx(expected, rel=1e-3)
    assert table.scores["one"]["float32"] == 0


def test_hutchinson_estimates_the_trace_of_each_leafs_block():
    p, data = params(), batches()
    table = sensitivities(loss, p, data, OPTIONS, "hutchinson", key=jax.random.key(0), probes=300)
    blocks = {
        path: jax.jit(jax.hessian(lambda w, x, y, path=path: loss({**p, path: w}, x, y)))
        for path in ("one", "two")
    }
    for path in blocks:
        n, trace = p[path].size, 0.0
        for x, y in data:
            hessian = blocks[path](p[path], x, y).reshape(n, n)
            trace += np.trace(np.asarray(hessian, np.float64)) / len(data)
        change = np.asarray(compressed(p, path, "int4")[path] - p[path], np.float64)
        assert table.scores[path]["int4"] == pytest.approx(trace / n * (change**2).sum(), rel=0.1)
    again = sensitivities(loss, p, data, OPTIONS, "hutchinson", key=jax.random.key(0), probes=300)
    assert again == table
    other = sensitivities(loss, p, data, OPTIONS, "hutchinson", key=jax.random.key(1), probes=300)
    assert other.scores != table.scores


def test_bytes_work_and_what_stays():
    p, (x, _) = params(), batches()[0]
    options = {**OPTIONS, "groups": uniform(4, granularity=3), "int8": uniform(8)}
    table = sensitivities(
        logits, {**p, "steps": jnp.arange(3)}, [x], options, "mse", activation_bits=4
    )
    assert table.left == {
        "bias": "no product and no lookup uses it",
        "steps": "no product and no lookup uses it",
    }
    assert table.left_nbytes == 12 + p["bias"].nbytes
    assert list(table.scores["two"]) == ["int2", "int4", "float32", "int8"]
    assert "do not divide" in table.refused["two"]["groups"]
    c = cj.at("one", options["groups"])
    assert table.nbytes["one"]["groups"] == cj.coverage(c, p)["one"].nbytes
    assert table.macs == {"one": 4 * 6 * 5, "two": 4 * 5 * 3}
    assert table.bitops["one"] == {
        "int2": 960,
        "int4": 1920,
        "float32": 15360,
        "groups": 1920,
        "int8": 3840,
    }
    text = str(table)
    assert (
        "two cannot be groups: " in text
        and "bias stays: no product" in text
        and "int4: mse" in text
    )


def test_the_table_survives_json():
    table = sensitivities(logits, params(), [x for x, _ in batches()], OPTIONS, "kl")
    again = Sensitivities.from_json(table.to_json())
    assert again == table and allocate(again, max_bytes=120) == allocate(table, max_bytes=120)
    for text in ("{", "[]", '{"measure": "kl"}'):
        with pytest.raises(DataError, match="not a table of sensitivities"):
            Sensitivities.from_json(text)


def test_parameters_in_one_product_share_its_work():
    p = {"a": jnp.ones((4, 2)), "b": jnp.ones((4, 6))}

    def fn(p, x):
        return x @ jnp.concatenate([p["a"], p["b"]], 1)

    table = sensitivities(
        fn, p, [jnp.ones((3, 4))], {"int2": uniform(2), "float32": identity()}, "mse"
    )
    assert table.macs == {"a": 24, "b": 72}
    for choice in ({"a": "int2", "b": "float32"}, {"a": "int2", "b": "int2"}):
        c = cj.rules([(path, uniform(2)) for path, option in choice.items() if option == "int2"])
        total = cost(fn, p, jnp.ones((3, 4)), compression=c).bit_operations
        assert sum(table.bitops[path][option] for path, option in choice.items()) == total


def test_a_lookup_table_is_a_candidate_and_products_of_activations_count():
    p = {"embed": jnp.ones((9, 8)), "head": jnp.ones((8, 9))}

    def fn(p, tokens):
        x = p["embed"][tokens]
        return (x @ x.T) @ x @ p["head"]

    table = sensitivities(fn, p, [jnp.arange(5)], {"int2": uniform(2)}, "mse")
    assert set(table.scores) == {"embed", "head"} and table.left == {}
    assert table.macs["embed"] == 0 and table.left_bitops == 2 * 5 * 5 * 8 * 32 * 32


def test_wrong_arguments_are_said():
    p, data = params(), [x for x, _ in batches()]
    with pytest.raises(ConfigError, match="no option"):
        sensitivities(logits, p, data, {}, "kl")
    with pytest.raises(ConfigError, match="'hutchinson', got 'hessian'"):
        sensitivities(logits, p, data, OPTIONS, "hessian")  # pyright: ignore
    with pytest.raises(ConfigError, match="jax.random.key"):
        sensitivities(loss, p, batches(), OPTIONS, "hutchinson")
    with pytest.raises(ShapeError, match="must return a scalar"):
        sensitivities(logits, p, data, OPTIONS, "fisher")
    with pytest.raises(ShapeError, match="not a tuple"):
        sensitivities(lambda p, x: (logits(p, x), 0), p, data, OPTIONS, "kl")
    with pytest.raises(DataError, match="no batch"):
        sensitivities(logits, p, [], OPTIONS, "kl")
    with pytest.raises(NoMatchError):
        sensitivities(logits, p, data, OPTIONS, "kl", where="three")
    with pytest.raises(NonFiniteError, match="of 'one' to 'int2'"):
        sensitivities(logits, p, [data[0].at[0, 0].set(jnp.nan)], OPTIONS, "kl")


@pytest.fixture(scope="module")
def digits():
    """An MLP of six layers trained on half of scikit-learn's digits, and the other images."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
    rng, sizes = np.random.default_rng(0), (64, 40, 40, 40, 40, 40, 10)
    kernels = [
        rng.normal(size=shape) * (2 / shape[0]) ** 0.5
        for shape in zip(sizes, sizes[1:], strict=False)
    ]
    start = {f"w{i}": jnp.asarray(kernel, jnp.float32) for i, kernel in enumerate(kernels)}

    def fn(p, x):
        for i in range(5):
            x = jax.nn.relu(x @ p[f"w{i}"])
        return x @ p["w5"]

    def objective(p, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(fn(p, x), y).mean()

    optimizer = optax.sgd(0.05, momentum=0.9)

    def step(i, carry):
        p, state = carry
        rows = (64 * i + jnp.arange(64)) % 900
        updates, state = optimizer.update(jax.grad(objective)(p, x[rows], y[rows]), state)
        return optax.apply_updates(p, updates), state

    trained, _ = jax.jit(lambda p: jax.lax.fori_loop(0, 400, step, (p, optimizer.init(p))))(start)
    assert (fn(trained, x[900:]).argmax(-1) == y[900:]).mean() > 0.9
    # The same function with a scale that one unit spoils for a whole layer: whether bits go there
    # is no matter of chance.
    trained["w2"], trained["w3"] = trained["w2"].at[:, 0].mul(8), trained["w3"].at[0].divide(8)
    return fn, objective, trained, x, y


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["kl", "fisher", "hutchinson"])
def test_at_equal_bytes_the_mixed_assignment_beats_the_uniform_one(digits, measure):
    fn, objective, p, x, y = digits
    options = {f"int{n}": uniform(n) for n in (3, 4, 5, 6)}
    data = [
        (x[i : i + 100], y[i : i + 100])[: 1 if measure == "kl" else 2] for i in range(0, 900, 100)
    ]
    table = sensitivities(
        fn if measure == "kl" else objective, p, data, options, measure, key=jax.random.key(0)
    )

    def moved(c):
        """How far the distributions on images that were not seen move."""
        return float(divergence(fn(p, x[900:]), fn(c.view(p, c.init(p)), x[900:])))

    for bits in (4, 5):
        plain = options[f"int{bits}"]
        budget = cj.coverage(plain, p).nbytes
        mixed = allocate(table, max_bytes=budget)
        assert mixed.nbytes <= budget and moved(mixed.compression(options)) < moved(plain)


@pytest.mark.wide(1)
@pytest.mark.parametrize("measure", ["fisher", "mse"])
def test_a_leaf_that_no_batch_reached_counts_as_an_average_one(measure):
    """A branch that never ran scores 0 for all options, but is not quantized first."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        name: jax.random.normal(key, (6, 6))
        for name, key in zip(("seen", "never"), keys, strict=False)
    }
    x = jax.random.normal(keys[2], (8, 6))

    def fn(p, x):
        y = jax.lax.cond(x.mean() < 1e6, lambda: x @ p["seen"], lambda: x @ p["never"])
        return jnp.square(y).mean() if measure == "fisher" else y

    table = sensitivities(fn, params, [x], {"int2": uniform(2), "int8": uniform(8)}, measure)
    change = {
        path: float(jnp.square(uniform(2).view(w, uniform(2).init(w)) - w).sum())
        for path, w in params.items()
    }
    assert table.scores["never"]["int2"] > table.scores["never"]["int8"] > 0
    rates = [table.scores[path]["int2"] / change[path] for path in ("never", "seen")]
    assert 0.2 < rates[0] / rates[1] < 5
    assert (
        set(table.notes) == {"never"}
        and "say nothing" in str(table)
        and Sensitivities.from_json(table.to_json()) == table
    )
