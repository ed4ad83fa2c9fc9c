"""Adapters: what was trained is what is merged, bit for bit; the base gets no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compress_jax as cj
from compress_jax.core import (
    ArgumentError,
    Clustered,
    LowRank,
    Quantized,
    Sparse,
    Sum,
    coverage,
    unpack,
)
from compress_jax.core.axes import Axes
from compress_jax.core.compression import bound
from compress_jax.core.packed import nbytes
from compress_jax.lowrank import adapter

INT4 = cj.quantize.uniform(4, granularity=16)
INT2 = cj.quantize.uniform(2, granularity=16)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def bits(x) -> bytes:
    return np.asarray(x).tobytes()


def moved(state, seed: int = 9):
    """Return a state whose factors are as after training: neither of them zero."""
    leaves, treedef = jax.tree.flatten(state.learned)
    rng = np.random.default_rng(seed)
    drawn = [x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype) for x in leaves]
    return state._replace(learned=treedef.unflatten(drawn))


def followed(optimizer, grads, opt_state, trained):
    """Return what is trained and the optimizer's state after one update."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and floats
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state


# The mathematics.


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_the_view_is_the_base_and_the_scaled_product(alpha):
    params = {"w": normal(0, 48, 32)}
    c = adapter(4, alpha=alpha)
    state = moved(c.init(params))
    left, right = (np.asarray(state.learned["w"][k], np.float64) for k in ("left", "right"))
    assert left.shape == (48, 4) and right.shape == (4, 32)
    wanted = np.asarray(params["w"], np.float64) + left @ right * ((alpha or 4) / 4)
    np.testing.assert_allclose(c.view(params, state)["w"], wanted, atol=2e-6)


@pytest.mark.parametrize("key", [None, jax.random.key(3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_at_the_start_the_view_is_the_base_exactly(key, dtype):
    params = {"w": normal(0, 48, 32).astype(dtype)}
    c = adapter(4, alpha=7.0, key=key)
    assert bits(c.view(params, c.init(params))["w"]) == bits(params["w"])
    chained = cj.chain(INT4, adapter(4, key=key))
    seen = chained.view(params, chained.init(params))["w"]
    assert bits(seen) == bits(INT4.view(params, INT4.init(params))["w"])


def test_the_left_factor_is_orthonormal_or_drawn_by_leaf():
    params = {"a": normal(0, 48, 32), "b": normal(0, 48, 32)}
    plain = adapter(4).init(params).learned
    left = plain["a"]["left"]
    np.testing.assert_allclose(left.T @ left, np.eye(4), atol=1e-5)
    drawn = adapter(4, key=jax.random.key(0)).init({"a": normal(0, 400, 32), "b": normal(1, 9, 9)})
    np.testing.assert_allclose(float(drawn.learned["a"]["left"].std()), 0.05, rtol=0.1)
    assert "b" in drawn.learned and bits(plain["a"]["left"]) == bits(plain["b"]["left"])
    again = adapter(4, key=jax.random.key(0)).init(params).learned
    assert bits(again["a"]["left"]) != bits(again["b"]["left"])


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_from_the_error_the_view_is_as_near_as_the_rank_allows(alpha):
    """Eckart and Young: what is left are the singular values of the error behind the rank."""
    params = {"w": normal(0, 48, 32)}
    c = adapter(4, alpha=alpha, base=INT2, init="error")
    state = c.init(params)
    w = np.asarray(params["w"], np.float64)
    lost = w - np.asarray(INT2.view(params, INT2.init(params))["w"], np.float64)
    tail = np.linalg.svd(lost, compute_uv=False)[4:]
    found = np.linalg.norm(w - np.asarray(c.view(params, state)["w"], np.float64))
    np.testing.assert_allclose(found, np.linalg.norm(tail), rtol=1e-5)


def test_where_nothing_is_lost_an_adapter_from_the_error_still_learns():
    params = {"w": normal(0, 48, 32)}
    c = adapter(4, base=cj.identity(), init="error")
    state = c.init(params)

    def loss(learned):
        return jnp.square(c.view(params, state._replace(learned=learned))["w"] - 1.0).sum()

    slope = jax.grad(loss)(state.learned)["1"]["w"]
    assert float(jnp.abs(slope["right"]).max()) > 0.1
    assert bits(c.view(params, state)["w"]) == bits(params["w"])


# Gradients: factors alone.

ORDERS = {
    "lora": adapter(4, alpha=2.0),
    "quantized base": cj.chain(INT4, adapter(4)),
    "from the error": adapter(4, base=INT2, init="error"),
    "merged, then quantized": cj.chain(adapter(4), INT4),
    "merged, then pruned": cj.chain(adapter(4), cj.prune.magnitude(0.5)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_base_gets_no_gradient_and_the_factors_theirs(name):
    c, params = ORDERS[name], {"w": normal(0, 48, 32)}
    state, weight = moved(c.init(params)), normal(1, 48, 32)

    @jax.jit
    def slopes(params, learned):
        def loss(params, learned):
            return (c.view(params, state._replace(learned=learned))["w"] * weight).sum()

        return jax.grad(loss, (0, 1))(params, learned)

    params_slope, learned_slope = slopes(params, state.learned)
    assert not np.asarray(params_slope["w"]).any()
    (left, right), (down, up) = (
        [x for x in jax.tree.leaves(tree) if x.ndim == 2] for tree in (learned_slope, state.learned)
    )
    if "pruned" in name:
        return
    scale = 0.5 if name == "lora" else 1.0
    np.testing.assert_allclose(left, scale * weight @ up.T, atol=1e-4)
    np.testing.assert_allclose(right, scale * down.T @ weight, atol=1e-4)


def test_what_the_base_has_learned_is_frozen_too():
    c, params = cj.chain(cj.quantize.lsq(4), adapter(4)), {"w": normal(0, 48, 32)}
    state = c.init(params)
    slopes = jax.grad(lambda own: c.view(params, state._replace(learned=own))["w"].sum())
    found = slopes(state.learned)
    assert not np.asarray(found["0"]["w"]["scale"]).any() and found["1"]["w"]["right"].any()


# Train = ship.


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_trains_is_what_is_merged_packed_saved_and_loaded(name, dtype, tmp_path):
    c, params = ORDERS[name], {"w": normal(0, 48, 32).astype(dtype)}
    state = moved(c.init(params))
    state = c.update(params, state, step=1)
    seen = bits(jax.jit(c.view)(params, state)["w"])
    packed = c.pack(params, state)
    for coded in (False, True):
        cj.save(tmp_path / "model", packed, {"n": 1}, coded=coded)
        loaded, _ = cj.load(tmp_path / "model")
        for tree in (packed, loaded):
            assert seen == bits(unpack(tree)["w"]) == bits(jax.jit(unpack)(tree)["w"])
        assert jax.tree.structure(loaded) == jax.tree.structure(packed)
    assert sum(part.nbytes for part in cj.export.breakdown(tmp_path / "model")) > 0


def test_each_order_has_its_form_and_its_bytes():
    params = {"w": normal(0, 128, 64)}
    packed = {name: c.pack(params, moved(c.init(params)))["w"] for name, c in ORDERS.items()}
    codes = INT4.pack(params, INT4.init(params))["w"].nbytes
    factors = 4 * 4 * (128 + 64)
    beside = packed["quantized base"]
    assert isinstance(beside, Sum) and beside.nbytes == codes + factors
    assert isinstance(beside.base, Quantized) and isinstance(beside.delta, LowRank)
    assert packed["lora"].nbytes == 4 * 128 * 64 + factors
    merged = packed["merged, then quantized"]
    assert isinstance(merged, Quantized) and merged.nbytes == codes
    assert isinstance(packed["merged, then pruned"], Sparse)
    qlora = ORDERS["quantized base"]
    row = coverage(qlora, params, moved(qlora.init(params))).rows[0]
    assert row.form == "Sum" and row.nbytes == beside.nbytes
    # Factors that make nothing yet need not be stored.
    assert isinstance(qlora.pack(params, qlora.init(params))["w"], Quantized)


def test_a_base_of_any_kind_is_packed_beside_the_factors():
    params = {"w": normal(0, 64, 48)}
    pruned = cj.prune.magnitude(0.75)
    bases = {
        Sparse: pruned,
        Clustered: cj.cluster.kmeans(8, iterations=3),
        Sum: cj.chain(INT4, adapter(2)),
    }
    for form, base in bases.items():
        c = cj.at("w", cj.chain(base, adapter(3)))
        state = moved(c.init(params))
        node = c.pack(params, state)["w"]
        assert isinstance(node, Sum) and isinstance(node.base, form)
        assert bits(node.unpack()) == bits(c.view(params, state)["w"])


def test_a_merged_model_does_not_drift_where_two_products_do():
    """x @ (q + l r) is the trained function; x @ q + (x @ l) r, merged later, is another."""
    params, x = {"w": normal(0, 256, 64)}, normal(2, 8, 256)
    c = cj.chain(adapter(8), INT4)
    state = moved(c.init(params))
    state = c.update(params, state, step=1)
    trained = x @ c.view(params, state)["w"]
    assert bits(trained) == bits(x @ unpack(c.pack(params, state))["w"])
    q = INT4.view(params, INT4.init(params))["w"]
    left, right = state.learned["0"]["w"]["left"], state.learned["0"]["w"]["right"]
    beside = x @ q + (x @ left) @ right
    later = {"w": q + left @ right}
    merged = x @ INT4.view(later, INT4.init(later))["w"]
    assert float(jnp.linalg.norm(merged - beside) / jnp.linalg.norm(beside)) > 0.01


# A base that is packed while the factors are trained.


def test_the_base_stays_packed_while_the_factors_are_trained():
    params = {"w": normal(0, 64, 48), "bias": jnp.zeros(48)}
    lora = cj.at("w", adapter(4))
    base = cj.at("w", INT4).pack(params, cj.at("w", INT4).init(params))
    state = lora.init(base)
    float_state = lora.init(unpack(base))
    assert [bits(x) for x in jax.tree.leaves(state)] == [
        bits(x) for x in jax.tree.leaves(float_state)
    ]
    optimizer, target, x = optax.adam(0.01), normal(5, 32, 48), normal(4, 32, 64)

    @jax.jit
    def step(learned, opt_state, base):
        def loss(learned):
            seen = lora.view(base, state._replace(learned=learned))
            return jnp.square(x @ seen["w"] + seen["bias"][None] - target).mean()

        value, grads = jax.value_and_grad(loss)(learned)
        return *followed(optimizer, grads, opt_state, learned), value

    learned, opt_state, losses = state.learned, optimizer.init(state.learned), []
    for _ in range(20):
        learned, opt_state, value = step(learned, opt_state, base)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    trained = state._replace(learned=learned)
    packed = lora.pack(base, trained)
    assert packed["w"].base is base["w"] and packed["bias"] is base["bias"]
    seen = lora.view(base, trained)["w"]
    assert bits(seen) == bits(unpack(packed)["w"]) == bits(lora.view(unpack(base), trained)["w"])
    assert nbytes(packed) < 0.5 * nbytes(params)


def test_a_step_on_a_packed_base_needs_less_than_a_full_one():
    """Bytes of the compiled step of a small decoder: arguments, and arguments with temporaries."""
    config = cj.models.DecoderConfig(64, 128, 3, heads=4, kv_heads=2, head_width=32, hidden=512)
    model = cj.models.Decoder(config)
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    optimizer = optax.adam(1e-3)

    def nats(params, tokens):
        logits = jnp.asarray(model.apply({"params": params}, tokens))[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def compiled(loss, trained, *rest):
        def step(trained, opt_state, *rest):
            grads = jax.grad(loss)(trained, *rest)
            return followed(optimizer, grads, opt_state, trained)

        states = jax.eval_shape(optimizer.init, trained)
        return jax.jit(step, donate_argnums=(0, 1)).lower(trained, states, *rest).compile()

    int4 = cj.at("**/kernel", INT4)
    drawn = jax.tree.map(lambda x: normal(0, *x.shape), params)
    base = int4.pack(drawn, int4.init(drawn))
    lora = cj.at("**/kernel", adapter(4, key=jax.random.key(0)))
    state = lora.init(base)

    def loss(learned, base, tokens):
        return nats(lora.view(base, state._replace(learned=learned)), tokens)

    full = compiled(nats, params, tokens).memory_analysis()
    ours = compiled(loss, state.learned, base, tokens).memory_analysis()
    if full is None or ours is None:
        pytest.skip("this backend tells no bytes")
    # Params and two moments in float32, against codes, scales and small factors with moments.
    assert ours.argument_size_in_bytes < 0.2 * full.argument_size_in_bytes
    total = [each.argument_size_in_bytes + each.temp_size_in_bytes for each in (ours, full)]
    # Less than the arguments alone would tell: the temporaries hold the merged kernels.
    assert total[0] < 0.9 * total[1]


# Layouts.


def test_a_stack_of_convolutions_is_its_layers():
    x = normal(0, 3, 2, 2, 8, 24)
    axes = Axes(x.shape, outputs=(4,), stack=(0,), source="trace")
    c = cj.chain(INT4, adapter(3))
    by_layer = bound(c, {"w": axes})
    state = by_layer.init({"w": x})
    factors = state.learned["1"]["w"]
    assert factors["left"].shape == (3, 32, 3) and factors["right"].shape == (3, 3, 24)
    state = moved(state)
    packed = by_layer.pack({"w": x}, state)["w"]
    seen = by_layer.view({"w": x}, state)["w"]
    assert isinstance(packed, Sum) and bits(packed.unpack()) == bits(seen)
    for i in range(3):
        own = state.learned["1"]["w"]
        alone = c.init({"w": x[i]})
        learned = {**alone.learned, "1": {"w": jax.tree.map(lambda a, i=i: a[i], own)}}
        np.testing.assert_allclose(
            seen[i], c.view({"w": x[i]}, alone._replace(learned=learned))["w"], atol=1e-6
        )


def test_the_error_of_a_bound_base_is_taken_layer_by_layer():
    x = normal(0, 2, 48, 32) * jnp.asarray([1.0, 20.0])[:, None, None]
    axes = Axes(x.shape, outputs=(2,), stack=(0,), source="trace")
    c = adapter(4, base=INT2, init="error")
    by_layer = bound(c, {"w": axes})
    seen = by_layer.view({"w": x}, by_layer.init({"w": x}))["w"]
    for i in range(2):
        alone = c.view({"w": x[i]}, c.init({"w": x[i]}))["w"]
        np.testing.assert_allclose(seen[i], alone, rtol=1e-5, atol=1e-5)


def test_what_is_too_thin_or_the_rank_too_high_is_skipped_and_said():
    params = {"bias": jnp.ones(8), "small": jnp.ones((4, 4)), "w": normal(0, 48, 32)}
    c = adapter(2)
    skipped = c.skipped(params)
    assert set(skipped) == {"bias", "small"} and "rank 2 hold 16 numbers" in skipped["small"]
    state = c.init(params)
    assert set(state.learned) == {"w"}
    slope = jax.grad(lambda p: c.view(p, state)["small"].sum())(params)
    assert (slope["small"] == 1).all()


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": 2.5},
        {"rank": 2, "alpha": 0.0},
        {"rank": 2, "alpha": float("nan")},
        {"rank": 2, "init": "gauss"},
        {"rank": 2, "init": "error"},
        {"rank": 2, "init": "error", "base": INT4, "key": jax.random.key(0)},
        {"rank": 2, "base": 4},
        {"rank": 2, "key": 7},
    ],
)
def test_bad_arguments_are_refused(options):
    with pytest.raises(ArgumentError):
        adapter(**options)


# Recovery.


def test_adapters_recover_what_two_bits_lose_by_kl_to_the_float_model():
    """A tiny teacher; the base in 2 bits; the factors follow KL and close most of the gap."""
    params = {"a": 0.3 * normal(0, 16, 64), "b": 0.3 * normal(1, 64, 16)}
    x = normal(2, 64, 16)

    def fn(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    teacher = fn(params, x)
    c = adapter(2, base=INT2)
    state = c.init(params)
    optimizer = optax.adam(0.02)

    @jax.jit
    def step(learned, opt_state):
        def loss(learned):
            logits = fn(c.view(params, state._replace(learned=learned)), x)
            return cj.distill.kl(logits, teacher).mean()

        value, grads = jax.value_and_grad(loss)(learned)
        return *followed(optimizer, grads, opt_state, learned), value

    learned, opt_state, values = state.learned, optimizer.init(state.learned), []
    for _ in range(100):
        learned, opt_state, value = step(learned, opt_state)
        values.append(float(value))
    assert values[-1] < 0.3 * values[0]
    packed = c.pack(params, state._replace(learned=learned))
    trained = fn(c.view(params, state._replace(learned=learned)), x)
    assert bits(fn(unpack(packed), x)) == bits(trained)
