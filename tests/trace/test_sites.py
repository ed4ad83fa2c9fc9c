"""Every contraction is found, with the parameter that feeds it, whatever lies between the two."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import compress_jax as cj
from compress_jax.core import ShapeError
from compress_jax.trace import sites, unseen


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


W = {"w": normal(6, 4)}
X = normal(5, 6)


def only(fn, params=W, *inputs):
    (site,) = sites(fn, params, *(inputs or (X,)))
    return site


WAYS = {  # ways to write x @ w
    "operator": lambda p, x: x @ p["w"],
    "matmul": lambda p, x: jnp.matmul(x, p["w"]),
    "dot": lambda p, x: jnp.dot(x, p["w"]),
    "lax.dot": lambda p, x: jax.lax.dot(x, p["w"]),
    "tensordot": lambda p, x: jnp.tensordot(x, p["w"], 1),
    "einsum": lambda p, x: jnp.einsum("bi,io->bo", x, p["w"]),
    "vmap": lambda p, x: jax.vmap(lambda row: row @ p["w"])(x),
    "jit": lambda p, x: jax.jit(jnp.matmul)(x, p["w"]),
    "remat": lambda p, x: jax.checkpoint(jnp.matmul)(x, p["w"]),
    "twice transposed": lambda p, x: x @ p["w"].T.T,
    "reshaped": lambda p, x: x @ p["w"].reshape(2, 3, 4).reshape(6, 4),
    "new axis": lambda p, x: x @ jnp.squeeze(p["w"][None], 0),
    "cast": lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
    "masked": lambda p, x: x @ jnp.where(jnp.abs(p["w"]) > jnp.median(jnp.abs(p["w"])), p["w"], 0),
    "fake-quantized": lambda p, x: (
        x @ (jnp.round(p["w"] / jnp.abs(p["w"]).max(0, keepdims=True)) * jnp.abs(p["w"]).max())
    ),
    "barrier": lambda p, x: x @ jax.lax.optimization_barrier(p["w"]),
    "noisy": lambda p, x: x @ (p["w"] + jax.random.normal(jax.random.key(0), (6, 4))),
    "cond": lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: jnp.zeros((5, 4))),
    "stopped": lambda p, x: x @ jax.lax.stop_gradient(p["w"]),
}


@pytest.mark.parametrize("fn", WAYS.values(), ids=WAYS)
def test_the_parameter_is_found_on_the_right(fn):
    site = only(fn)
    assert (site.name, site.param, site.operand, site.kind) == ("w", "w", "rhs", "dot")
    assert site.param_axes == (0,) and site.contracting[1] and site.out_shape == (5, 4)
    assert site.macs == 5 * 6 * 4


LEFT = {
    "weights on the left": (lambda p, x: p["w"] @ x.T, (1,)),
    "transposed kernel": (lambda p, x: p["w"].T @ x, (0,)),
    "kernel.T on the right": (lambda p, x: x @ p["w"].T, (1,)),
    "einsum": (lambda p, x: jnp.einsum("oi,bi->bo", p["w"], x), (1,)),
}


@pytest.mark.parametrize("name", LEFT)
def test_operand_and_axes_follow_the_parameter(name):
    fn, axes = LEFT[name]
    x = normal(3, 4) if axes == (1,) else normal(6, 3)
    x = x if name != "weights on the left" else normal(3, 4)
    site = only(fn, W, x)
    assert site.param == "w" and site.param_axes == axes
    assert site.operand == ("rhs" if name == "kernel.T on the right" else site.operand)
    shape = (site.lhs_shape, site.rhs_shape)[site.operand == "rhs"]
    assert sorted(shape) == [4, 6]


def test_three_operands_of_an_einsum_are_two_sites():
    params = {"a": normal(6, 4), "b": normal(4, 3)}
    found = sites(lambda p, x: jnp.einsum("bi,ij,jk->bk", x, p["a"], p["b"]), params, normal(2, 6))
    assert {site.param for site in found} == {"a", "b"} and len(found) == 2


def test_ragged_dot():
    params = {"experts": normal(3, 6, 4)}
    site = only(
        lambda p, x: jax.lax.ragged_dot(x, p["experts"], jnp.array([1, 3, 1], jnp.int32)), params
    )
    assert (site.kind, site.param, site.operand, site.param_axes) == (
        "ragged_dot",
        "experts",
        "rhs",
        (1,),
    )
    assert site.macs == 5 * 6 * 4


def test_stacked_layers_by_index_by_scan_and_by_slices():
    params = {"layers": normal(3, 6, 6)}

    def by_scan(p, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, p["layers"])[0]

    def by_index(p, x):
        return x @ p["layers"][0] @ p["layers"][1] @ p["layers"][2]

    def by_loop(p, x):
        return jax.lax.fori_loop(0, 3, lambda i, x: x @ p["layers"][i], x)

    scanned, looped = only(by_scan, params), only(by_loop, params)
    assert scanned.loops == looped.loops == (3,) and scanned.count == 3
    assert scanned.param_axes == looped.param_axes == (
        1,
    ) and scanned.stack_axes == looped.stack_axes == (0,)
    indexed = sites(by_index, params, X)
    assert [site.name for site in indexed] == ["layers", "layers#2", "layers#3"]
    assert all(site.param_axes == (1,) and site.stack_axes == (0,) for site in indexed)
    assert indexed[0].uses == ("layers#2", "layers#3")
    assert scanned.macs == sum(site.macs for site in indexed)


def test_a_fused_kernel_is_not_mixed_up_with_its_pieces():
    params = {"qkv": normal(6, 12)}
    q, k, scores = sites(
        lambda p, x: (x @ p["qkv"][:, :4]) @ (x @ p["qkv"][:, 4:8]).T,
        params,
        X,
    )
    assert (q.param, k.param, scores.param) == ("qkv", "qkv", None)
    assert q.param_axes == k.param_axes == (0,) and scores.name == "qkv@qkv#2"


def test_an_axis_cut_by_a_reshape_is_not_claimed():
    site = only(lambda p, x: jnp.einsum("bi,oi->bo", x, p["w"].reshape(2, 3, 4).reshape(4, 6)), W)
    assert site.param == "w" and site.param_axes is None
    heads = only(lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"].reshape(6, 2, 2)), W)
    assert heads.param_axes == (0,)


def test_attention_has_readable_names():
    params = {f"block/{n}": {"kernel": normal(6, 6)} for n in ("query", "key", "value", "out")}

    def attention(p, x):
        q, k, v = (x @ p[f"block/{n}"]["kernel"] for n in ("query", "key", "value"))
        weights = jax.nn.softmax(q @ k.T / 6**0.5)
        return (weights @ v) @ p["block/out"]["kernel"]

    names = [site.name for site in sites(attention, params, X)]
    assert names[3:] == ["block/query@key", "block/query@key@value", "block/out/kernel"]


def test_both_uses_of_a_tied_embedding_show():
    params = {"embed": normal(9, 6)}

    def tied(p, tokens):
        return p["embed"][tokens] @ p["embed"].T

    site = only(tied, params, jnp.array([1, 2]))
    assert site.name == "embed" and site.uses == ("gather",) and site.param_axes == (1,)
    shared = sites(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["w"].T, W, X)
    assert [(site.name, site.uses) for site in shared] == [("w", ("w#2",)), ("w#2", ("w",))]


def test_parameters_meet():
    params = {
        "a": normal(4, 2),
        "b": normal(2, 3),
        "w": normal(6, 4),
        "scale": normal(4),
        "v": normal(6, 2),
    }
    scaled = only(lambda p, x: x @ (p["w"] * p["scale"][None]), params)
    assert scaled.param == "w" and scaled.also == ()
    lora = sites(lambda p, x: x @ (p["w"] + p["v"] @ p["a"].T), params, X)
    assert [(site.param, site.also) for site in lora] == [("a", ("v",)), ("w", ())]
    fused = sites(lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1), params, X)
    assert (fused[0].param, fused[0].also, fused[0].param_axes) == ("w", ("v",), None)
    rotated = sites(lambda p, x: x @ (jnp.eye(6) @ p["w"]), params, X)
    assert [site.name for site in rotated] == ["w", "w#2"]


@pytest.mark.slow
def test_every_view_of_the_library_is_seen_through():
    params = {"dense": {"kernel": normal(8, 4)}}
    views = [
        cj.quantize.uniform(4),
        cj.quantize.uniform(4, granularity=4, scale="mse"),
        cj.prune.magnitude(0.5),
        cj.chain(cj.prune.magnitude(0.5), cj.quantize.uniform(3)),
    ]
    for view in views:
        state = view.init(params)
        found = sites(
            lambda p, x, v=view, s=state: x @ v.view(p, s)["dense"]["kernel"], params, normal(3, 8)
        )
        assert [(site.name, site.operand, site.param_axes) for site in found] == [
            ("dense/kernel", "rhs", (0,))
        ]


@pytest.mark.slow
def test_a_view_that_does_not_read_the_weights_says_so():
    params, shared = {"dense": {"kernel": normal(8, 4)}}, cj.cluster.kmeans(4)
    state = shared.init(params)
    codes = state.fixed["dense/kernel"]
    fn = lambda p, x: x @ state.learned["dense/kernel"][codes]  # noqa: E731
    assert only(fn, params, normal(3, 8)).param is None and set(
        unseen(fn, params, normal(3, 8))
    ) == {"dense/kernel"}
    in_variables = lambda v, x: x @ v["state"].learned["dense/kernel"][codes]  # noqa: E731
    site = only(in_variables, {"params": params, "state": state}, normal(3, 8))
    assert site.param == "state/learned/dense/kernel"


def test_loops_that_carry_a_parameter_or_start_from_constants():
    def unrolled(p, x):
        def turn(carry, x):
            h, w = carry
            return (jnp.tanh(x @ p["w"] + h @ w), w), None

        return jax.lax.scan(turn, (jnp.zeros((5, 4)), p["u"]), jnp.stack([x] * 3))[0][0]

    found = sites(unrolled, {**W, "u": normal(4, 4)}, X)
    assert [(site.param, site.loops) for site in found] == [("w", (3,)), ("u", (3,))]
    condition = sites(
        lambda p, x: jax.lax.while_loop(lambda h: (h @ p["u"]).sum() > 9, lambda h: h @ p["u"], x),
        {"u": normal(6, 6)},
        X,
    )
    assert [(site.name, site.conditional, site.count) for site in condition] == [
        ("u", True, 1),
        ("u#2", True, 1),
    ]


def test_nested_loops_multiply():
    def fn(p, x):
        inner = lambda x, _: (x @ p["u"], None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, x, None, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, None, length=2)[0]

    site = only(fn, {"u": normal(6, 6)})
    assert site.loops == (2, 3) and site.macs == 6 * 5 * 6 * 6


@pytest.mark.parametrize("axis", [0, 1])
def test_shard_map_counts_the_devices(axis):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, params = normal(8, 6), {"w": normal(6, 4)}

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(("a", "b")), P()), out_specs=P(("a", "b")))
    def product(x, w):
        return x @ w

    site = only(lambda p, x: product(x, p["w"]), params, x)
    assert site.param == "w" and site.loops == (8,) and site.macs == 8 * 6 * 4


def test_convolutions():
    params = {"k": normal(3, 3, 4, 6), "d": normal(3, 3, 1, 4)}
    conv = partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    full, depthwise = sites(
        lambda p, x: conv(
            conv(x, p["d"], (1, 1), "SAME", feature_group_count=4), p["k"], (2, 2), "VALID"
        ),
        params,
        normal(2, 8, 8, 4),
    )[::-1]
    assert (full.kind, full.param, full.param_axes, full.groups) == ("conv", "k", (0, 1, 2), 1)
    assert full.macs == 2 * 3 * 3 * 6 * 3 * 3 * 4
    assert (depthwise.param, depthwise.groups, depthwise.macs) == ("d", 4, 2 * 8 * 8 * 4 * 9)


def test_unseen_says_what_is_not_contracted_and_why():
    params = {"table": normal(9, 6), "position": normal(5, 6), "w": normal(6, 4)}
    left = unseen(
        lambda p, t: (p["table"][t] + p["position"]) @ p["w"], params, jnp.zeros(5, jnp.int32)
    )
    assert (
        set(left) == {"table", "position"}
        and "gather" in left["table"]
        and "no contraction" in left["position"]
    )


def test_a_kernel_that_nobody_looks_into_is_reported():
    solve = lambda p, x: jax.lax.custom_linear_solve(  # noqa: E731
        lambda v: p["u"] @ v, x, lambda matvec, b: b, symmetric=True
    )
    params = {"u": normal(6, 6)}
    assert sites(solve, params, normal(6)) == []
    left = unseen(solve, params, normal(6))
    assert any("custom_linear_solve" in key for key in left) and "u" in left


def test_shapes_do_not_change_names():
    fn = WAYS["fake-quantized"]
    shapes = jax.ShapeDtypeStruct((6, 4), jnp.float32), jax.ShapeDtypeStruct((7, 6), jnp.float32)
    abstract = only(fn, {"w": shapes[0]}, shapes[1])
    assert abstract.name == only(fn).name and abstract.lhs_shape == (7, 6)


def test_what_is_not_an_array_is_refused_by_name():
    with pytest.raises(ShapeError, match=r"inputs/1/mode.*str.*bind"):
        sites(lambda p, x, o: x @ p["w"], W, X, {"mode": "train"})


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_moves_keep_track_of_the_axes(draw):
    """After random moves, the axes said to be summed over are those that really are."""
    shape = draw.draw(st.permutations([2, 3, 4]))
    moves = draw.draw(
        st.lists(st.sampled_from(["transpose", "merge", "split", "expand", "flip"]), max_size=5)
    )
    order = draw.draw(st.permutations(range(3)))
    pick = draw.draw(st.integers(0, 10))

    def moved(w):
        for move in moves:
            if move == "transpose":
                w = jnp.transpose(w, sorted(range(w.ndim), key=lambda i: order[i % 3] * 10 + i))
            if move == "merge" and w.ndim > 1:
                w = w.reshape(-1, *w.shape[2:])
            if move == "split" and w.shape[-1] % 2 == 0:
                w = w.reshape(*w.shape[:-1], 2, -1)
            if move == "expand":
                w = w[None]
            if move == "flip":
                w = w[::-1]
        return w

    w = jnp.arange(24, dtype=jnp.float32).reshape(shape)
    axis = pick % moved(w).ndim
    fn = lambda p, x: jnp.tensordot(x, moved(p["w"]), ((0,), (axis,)))  # noqa: E731
    site = only(fn, {"w": w}, jnp.ones(moved(w).shape[axis]))
    assert site.param == "w"
    if site.param_axes is None:
        return
    summed = moved(w).sum(axis)
    expected = w.sum(site.param_axes)
    np.testing.assert_array_equal(np.sort(summed.ravel()), np.sort(expected.ravel()))


def test_which_loop_runs_along_a_stacked_axis():
    """A recurrent cell in stacked layers: a loop over layers, one over time, of equal lengths."""
    params = {"layers": {"in": normal(3, 6, 6), "hidden": normal(3, 6, 6)}}

    def fn(p, x):
        def layer(x, w):
            return x, jax.lax.scan(
                lambda h, row: (jnp.tanh(row @ w["in"] + h @ w["hidden"]), h), jnp.zeros(6), x
            )[1]

        return jax.lax.scan(layer, x, p["layers"])

    for site in sites(fn, params, normal(3, 6)):
        assert site.loops == (3, 3) and (site.stack_axes, site.stack_loops) == ((0,), (0,))
    (indexed,) = sites(lambda p, x: x @ p["layers"]["in"][1], params, X)
    assert (indexed.stack_axes, indexed.stack_loops) == ((0,), (None,))
    (experts,) = sites(
        lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["layers"]["in"]), params, normal(3, 5, 6)
    )
    assert (experts.batch_axes, experts.param_axes, experts.stack_axes) == ((0,), (1,), ())
