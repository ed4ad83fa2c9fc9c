"""Views taken inside loops equal those taken before, whatever stands around the loop."""

from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import compress_jax as cj
from compress_jax.core.compression import LeafView, leaf_views
from compress_jax.core.paths import flatten
from compress_jax.trace._jaxpr.view_inside import used_inside, view_inside


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def layer(x, w):
    return jnp.tanh(x @ w), None


def scanned(params, x):
    return jax.lax.scan(layer, x, params["w"])[0]


def rematerialized(params, x):
    return jax.lax.scan(jax.checkpoint(layer), x, params["w"])[0]


def cast_before(params, x):
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    return scanned(half, x.astype(jnp.bfloat16)).astype(jnp.float32)


def jitted(params, x):
    return jax.jit(scanned)(params, x)


def used_twice(params, x):
    return scanned(params, x) + jnp.square(params["w"]).sum()


def cells(params, x):
    """Two loops, one in the other: a stack of stacks."""

    def group(x, ws):
        return jax.lax.scan(jax.checkpoint(layer), x, ws)

    return jax.lax.scan(group, x, params["w"].reshape(2, 2, 4, 4))[0]


def parts(params, x):
    """No loop: each layer is rematerialized by itself."""
    for w in (params["first"], params["second"]):
        x, _ = jax.checkpoint(layer)(x, w)
    return x @ params["head"]


def while_scanned(params, x):
    """A loop in a branch, which is not entered: the view is taken before it."""
    return jax.lax.cond(x.sum() < 1e9, lambda: scanned(params, x), lambda: x * 2)


def named_saved(params, x):
    """A policy of what is kept instead of computed again."""
    policy = jax.checkpoint_policies.save_only_these_names("out")

    def own(x, w):
        return checkpoint_name(jnp.tanh(x @ w), "out"), None

    return jax.lax.scan(jax.checkpoint(own, policy=policy, prevent_cse=False), x, params["w"])[0]


STACK = {"w": normal(0, (4, 4, 4))}
PARTS = {name: normal(i, (4, 4)) for i, name in enumerate(("first", "second", "head"))}

CASES: dict[str, tuple[Callable[..., jax.Array], dict[str, jax.Array], list[str]]] = {
    "scan": (scanned, STACK, ["w"]),
    "remat in scan": (rematerialized, STACK, ["w"]),
    "a cast before": (cast_before, STACK, ["w"]),
    "jit around": (jitted, STACK, ["w"]),
    "used outside too": (used_twice, STACK, ["w"]),
    "a reshape before": (cells, STACK, []),
    "remat alone": (parts, PARTS, ["first", "second"]),
    "a branch": (while_scanned, STACK, []),
    "a policy": (named_saved, STACK, ["w"]),
}


def views_of(c: cj.Compression, fn: Callable[..., Any], params: Any, x: jax.Array):
    c = cj.bind(c, fn, params, x)
    state = c.init(params)
    return c, state, leaf_views(c, params, state)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_a_view_before(name):
    fn, params, inside = CASES[name]
    x = normal(9, (3, 4))
    assert used_inside(fn, params, x) == inside
    mixed = cj.chain(cj.prune.magnitude(0.5), cj.quantize.lsq(4, granularity="channel"))
    c, state, views = views_of(mixed, fn, params, x)

    def before(params, learned):
        return fn(c.view(params, state._replace(learned=learned)), x).sum()

    def late(params, learned):
        own = leaf_views(c, params, state._replace(learned=learned))
        return view_inside(fn, own)(params, x).sum()

    wanted = jax.jit(jax.value_and_grad(before, (0, 1)))(params, state.learned)
    found = jax.jit(jax.value_and_grad(late, (0, 1)))(params, state.learned)
    # To rounding, of bfloat16 in one case: which sums a compiler joins depends on the processor.
    close = (
        {"rtol": 2**-6, "atol": 2**-7} if name == "a cast before" else {"rtol": 1e-5, "atol": 1e-6}
    )
    chex.assert_trees_all_close(found, wanted, **close)

    at_view = jax.jit(jax.grad(lambda p: view_inside(fn, views, at_view=True)(p, x).sum()))(params)
    dense = jax.jit(jax.grad(lambda w: fn(w, x).sum()))(c.view(params, state))
    chex.assert_trees_all_close(at_view, dense, **close)
    # Where a weight is pruned, its gradient is zero at the weight and need not be at the view.
    mask = flatten(c.view(params, state))[0]
    pruned = np.concatenate([np.asarray(m == 0).ravel() for m in mask.values()])
    flat = np.concatenate([np.asarray(g).ravel() for g in flatten(at_view)[0].values()])
    assert np.abs(flat[pruned]).max() > 0


def test_a_stack_of_stacks_is_sliced_twice():
    params = {"w": normal(1, (2, 3, 4, 4))}

    def fn(params, x):
        return jax.lax.scan(lambda x, ws: jax.lax.scan(layer, x, ws), x, params["w"])[0]

    x = normal(2, (3, 4))
    _, _, views = views_of(cj.quantize.uniform(3, granularity="channel"), fn, params, x)
    assert views["w"].stacked == 2
    made = str(jax.make_jaxpr(view_inside(fn, views))(params, x))
    assert "f32[2,3,4,4] = round" not in made and ":f32[4,4] = round" in made


def test_the_loop_holds_no_view_of_the_whole_stack():
    c, state, views = views_of(cj.quantize.nf4(4), rematerialized, STACK, normal(2, (3, 4)))
    made = str(jax.make_jaxpr(view_inside(rematerialized, views))(STACK, normal(2, (3, 4))))
    lines = [line for line in made.splitlines() if "= select_n" in line or "= mul" in line]
    assert lines and not any("f32[4,4,4]" in line for line in lines)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_scanned_modules_are_seen_inside(kind):
    """Flax's own ways to run layers in a loop."""
    x = normal(3, (2, 8))
    if kind == "linen":
        fn, params = linen_stack(x)
    else:
        fn, params = nnx_stack()
    path = next(path for path in flatten(params)[0] if "kernel" in path)
    assert path in used_inside(fn, params, x)
    c, state, views = views_of(cj.at("**kernel*", cj.quantize.uniform(4)), fn, params, x)
    wanted = jax.jit(lambda p: fn(c.view(p, state), x))(params)
    np.testing.assert_array_equal(jax.jit(view_inside(fn, views))(params, x), wanted)


def linen_stack(x):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(8)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return layers()(x, None)[0]

    model = Stack()
    return model.apply, model.init(jax.random.key(0), x)


def nnx_stack():
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(key):
        return nnx.Linear(8, 8, rngs=nnx.Rngs(key))

    graph, params = nnx.split(create(jax.random.split(jax.random.key(0), 3)))

    def fn(params, x):
        model = nnx.merge(graph, params)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return nnx.tanh(layer(x))

        return forward(x, model)

    return fn, params


def test_a_leaf_that_is_seen_whole_stays_whole():
    """A view that cannot be sliced is taken before the loop."""
    doubled = LeafView(lambda x, layers, shared: x * 2, None)
    x = normal(4, (3, 4))
    wanted = scanned({"w": STACK["w"] * 2}, x)
    np.testing.assert_allclose(view_inside(scanned, {"w": doubled})(STACK, x), wanted, rtol=1e-6)
