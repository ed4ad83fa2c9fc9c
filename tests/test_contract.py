"""The fifteen laws every Compression keeps (see `compress_jax.core.compression`), over one table of
all there are.

A new method gets a row in CONTRACT and nothing else; without one,
`test_every_public_method_has_a_row` fails.
"""

import inspect
import typing
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import compress_jax as cj
from compress_jax import cluster, lowrank, prune, quantize
from compress_jax.core import (
    Clustered,
    Compression,
    LowRank,
    NonFiniteError,
    Quantized,
    Sparse,
    StateError,
    Sum,
    Tabled,
    identity,
)
from compress_jax.core.axes import Axes
from compress_jax.core.compression import leaf_views
from compress_jax.core.packed import is_packed
from compress_jax.core.paths import flatten
from compress_jax.prune._masks.score import mask_of
from compress_jax.trace._jaxpr.view_inside import view_inside

KERNEL = "body/kernel"


class Row(NamedTuple):
    """A compression and what the laws promise of it.

    `of`: the public functions it is made with. `form`: the packed node KERNEL becomes (None: it
    stays dense). `slope`: state -> d view / d params of KERNEL. `sharded`: tolerance of law 6; 0 is
    bit for bit. `keeps_shardings`: False where the view mixes axes (groups, products): under `jit`,
    XLA then chooses its layout.
    """

    of: tuple[Callable[..., Any], ...]
    compression: Compression
    form: type | None
    slope: Callable[[Any], Any]
    idempotent: bool = True
    sharded: float = 0.0
    keeps_shardings: bool = True
    traceable_init: bool = True
    refuses_nan: bool = True


def one(state):
    return 1.0


def none(state):
    return 0.0


def mask(state):
    return mask_of(state.fixed[KERNEL])


def uniform(sharded: float = 0.0, keeps_shardings: bool = True, **options) -> Row:
    c = quantize.uniform(**options)
    return Row(
        (quantize.uniform,), c, Quantized, one, sharded=sharded, keeps_shardings=keeps_shardings
    )


def rate_distortion(**options) -> Row:
    return Row((quantize.rate_distortion,), quantize.rate_distortion(**options), Quantized, one)


def gguf(kind: str) -> Row:
    # The leaves here are smaller than a block.
    return on_kernels(
        Row((quantize.gguf,), quantize.gguf(kind, pad=True), Quantized, one, keeps_shardings=False)
    )


def tabled(
    of: Callable[..., Compression],
    *args,
    slope=one,
    groups: bool = False,
    sharded: float = 0.0,
    **options,
) -> Row:
    return Row(
        (of,), of(*args, **options), Tabled, slope, sharded=sharded, keeps_shardings=not groups
    )


def inside(state):
    return jnp.abs(LATER["body"]["kernel"]) <= 1


def on_steps(bits: int) -> Callable[[Any], Any]:
    """The paper's slope of a weight on learned steps: 1 strictly between the outer levels."""

    def slope(state):
        scale = state.learned.get("0", state.learned)[KERNEL]["scale"]  # "0": within `at`
        v = LATER["body"]["kernel"] / jnp.abs(scale.reshape(1, -1))
        return (v > -(2.0 ** (bits - 1))) & (v < 2.0 ** (bits - 1) - 1)

    return slope


def pruned(of: Callable[..., Compression], *args, **options) -> Row:
    return on_kernels(
        Row((of,), of(*args, **options), Sparse, lambda s: mask_of(s.fixed["0"][KERNEL]))
    )


def one_bit(compression: Compression) -> Row:
    return pruned(prune.bit_masks, compression)


def magnitude(*args, **options) -> Row:
    return Row((prune.magnitude,), prune.magnitude(*args, **options), Sparse, mask)


def svd(**options) -> Row:
    return Row(
        (lowrank.svd,), lowrank.svd(**options), LowRank, none, sharded=1e-6, keeps_shardings=False
    )


def adapter(*before: Compression, form: type, rank: int) -> Row:
    """An adapter that starts from what the base loses: one that starts from zero shows nothing."""
    lost = lowrank.adapter(rank, alpha=3.0, base=signs, init="error")
    c = cj.chain(lost, *before) if before else lost
    row = Row((lowrank.adapter,), c, form, none, idempotent=False)
    return on_kernels(row._replace(sharded=1e-6, keeps_shardings=False))


def on_kernels(row: Row) -> Row:
    """Leave the small leaves out, where compiling for each of them takes long."""
    return row._replace(of=(*row.of, cj.at), compression=cj.at("**/kernel", row.compression))


half, int4 = prune.magnitude(0.5), quantize.uniform(bits=4, granularity="channel")
nf4, signs = quantize.nf4(8), quantize.binary(scale=0.5)
four = cluster.kmeans(4, iterations=10)
falling = optax.linear_schedule(0.3, 0.9, 3)

CONTRACT = {
    "identity": Row((identity,), identity(), None, one, refuses_nan=False),
    "int8": uniform(bits=8),
    "int4 channel": uniform(bits=4, granularity="channel"),
    "int3 groups": uniform(bits=3, granularity=8, keeps_shardings=False),
    "int4 padded groups": uniform(bits=4, granularity=5, pad=True, keeps_shardings=False),
    "int4 minmax asymmetric": uniform(bits=4, symmetric=False, granularity="channel"),
    "int2 mse": on_kernels(uniform(bits=2, granularity="channel", scale="mse", sharded=1e-6)),
    "int5 rms axis 0": uniform(bits=5, scale="rms", granularity="channel", axis=0, sharded=1e-6),
    "int4 percentile": on_kernels(
        uniform(bits=4, symmetric=False, scale="percentile", sharded=1e-6)
    ),
    "int8 narrow pnorm": on_kernels(
        uniform(bits=8, narrow=True, granularity="channel", scale="pnorm", sharded=1e-6)
    ),
    "int4 entropy": on_kernels(uniform(bits=4, scale="entropy", sharded=1e-6)),
    "rate and distortion": rate_distortion(),
    "rate and distortion, one step": rate_distortion(lam=0.2, step=0.4, relative=False, bits=5),
    "gguf Q8_0": gguf("Q8_0"),
    "gguf Q4_0": gguf("Q4_0"),
    "gguf Q4_1": gguf("Q4_1"),
    "fp8 e4m3": tabled(quantize.fp8),
    "fp8 e5m2 channel": on_kernels(tabled(quantize.fp8, "e5m2", "channel")),
    "fp4 groups": on_kernels(tabled(quantize.fp4, 4, groups=True)),
    "fp4 mse": on_kernels(tabled(quantize.fp4, "channel", "mse", sharded=1e-6)),
    "nf4 groups": tabled(quantize.nf4, 8, groups=True),
    "fp6": on_kernels(tabled(quantize.codebook, quantize.float_format(3, 2), "channel")),
    "own table": on_kernels(
        tabled(
            quantize.codebook, quantize.Table((-1.0, -0.25, 0.0, 0.5)), scale="mse", sharded=1e-6
        )
    ),
    "mxfp8": tabled(quantize.mxfp8, pad=True, groups=True),
    "mxfp4": on_kernels(tabled(quantize.mxfp4, "mse", pad=True, groups=True)),
    "nvfp4": tabled(quantize.nvfp4, pad=True, groups=True),
    "nvfp4 mse": on_kernels(tabled(quantize.nvfp4, "mse", groups=True)),
    "ternary": tabled(quantize.ternary, clip=1.0, slope=inside, sharded=1e-6),
    "ternary mse": on_kernels(tabled(quantize.ternary, scale="mse", sharded=1e-6)),
    "binary": tabled(quantize.binary, sharded=1e-6),
    "binary connect": on_kernels(tabled(quantize.binary, scale=1.0, clip=1.0, slope=inside)),
    "prune a leaf": magnitude(0.75),
    "prune all": magnitude(0.75, scope="global"),
    "prune on a schedule": magnitude(falling),
    "prune 2:4": pruned(prune.magnitude, None, prune.n_m(2, 4)),
    "prune blocks": pruned(prune.magnitude, 0.5, prune.block((3, 5))),
    "prune channels of all": pruned(
        prune.magnitude, falling, prune.channel(-1, "l2"), scope="global"
    ),
    "prune heads": pruned(prune.magnitude, 0.5, prune.head(-1, heads=4)),
    "prune at random": pruned(prune.random, falling, jax.random.key(7)),
    "saliency": pruned(prune.saliency, 0.5, decay=0.9),
    "fisher": pruned(prune.fisher, 0.5, scope="global"),
    "movement": pruned(prune.movement, falling, every=2),
    "soft movement": pruned(prune.movement, threshold=-1.0, penalty=0.1),
    "own scores": pruned(prune.scored, lambda p: jax.tree.map(jnp.cos, p), 0.5),
    "own rule": pruned(prune.by_score, prune.Score(lambda seen: jnp.sin(seen.x), signed=True), 0.5),
    "relative to the leaf": pruned(
        prune.by_score, prune.normalized(prune.Score(lambda seen: seen.x)), 0.5, scope="global"
    ),
    "lamp": pruned(prune.lamp, 0.5),
    "among what is left": pruned(prune.nested, prune.magnitude(falling)),
    "set": pruned(prune.sparse_evolution, 0.5, 4, jax.random.key(7), every=1),
    "rigl": pruned(prune.rigl, falling, 4, jax.random.key(7), every=1),
    "own growth": pruned(
        prune.regrowing,
        prune.Growth(lambda seen: jnp.cos(seen.x)),
        0.5,
        4,
        jax.random.key(7),
        every=2,
    ),
    "straight through": pruned(prune.straight_through, half)._replace(slope=one),
    "top kast": pruned(prune.top_kast, 0.75, falling)._replace(
        slope=lambda s: s.fixed["0"][KERNEL]["backward"]
    ),
    "one bit": Row((prune.bit_masks,), prune.bit_masks(prune.magnitude(0.75)), Sparse, mask),
    "one bit 2:4": one_bit(prune.magnitude(None, prune.n_m(2, 4))),
    "one bit rigl": one_bit(prune.rigl(falling, 4, jax.random.key(7), every=1)),
    "one bit then quantize": Row(
        (prune.bit_masks, cj.chain),
        prune.bit_masks(cj.chain(half, cj.every(2, int4))),
        Quantized,
        lambda s: mask_of(s.fixed["0"][KERNEL]),
    ),
    "lsq": Row((quantize.lsq,), quantize.lsq(4), Quantized, on_steps(4), sharded=1e-6),
    "lsq channel": on_kernels(
        Row(
            (quantize.lsq,),
            quantize.lsq(2, "channel", start=quantize.absmax),
            Quantized,
            on_steps(2),
        )
    ),
    "share": on_kernels(Row((cluster.kmeans,), four, Clustered, none)),
    "rank 2": svd(rank=2),
    "energy": svd(energy=0.5)._replace(traceable_init=False),
    "adapter": adapter(form=Sum, rank=2),
    "adapter then quantize": adapter(int4, form=Quantized, rank=3),
    "prune then quantize": Row(
        (cj.chain,), cj.chain(half, int4), Quantized, lambda s: s.fixed["0"][KERNEL]
    ),
    "quantize then prune": Row(
        (cj.chain,), cj.chain(int4, half), Quantized, lambda s: s.fixed["1"][KERNEL]
    ),
    "prune then nf4": Row(
        (cj.chain,),
        cj.chain(half, nf4),
        Tabled,
        lambda s: s.fixed["0"][KERNEL],
        keeps_shardings=False,
    ),
    "binary then prune": Row(
        (cj.chain,), cj.chain(signs, half), Tabled, lambda s: s.fixed["1"][KERNEL]
    ),
    "prune then share": on_kernels(Row((cj.chain,), cj.chain(half, four), Clustered, none)),
    "coarse then fine grid": Row(
        (cj.chain,), cj.chain(int4, quantize.uniform(bits=3)), Quantized, one, idempotent=False
    ),
    "kernels only": Row((cj.at,), cj.at("**/kernel", int4), Quantized, one),
    "rules": Row((cj.rules,), cj.rules([("head/*", half), ("**/kernel", int4)]), Quantized, one),
    "every 2": Row((cj.every,), cj.every(2, prune.magnitude(falling)), Sparse, mask),
    "from step 1": Row((cj.between,), cj.between(1, None, int4), Quantized, one),
    "steps 1 and 2": Row(
        (cj.between,), cj.between(1, 3, half), Sparse, lambda s: s.fixed["of"][KERNEL]
    ),
    "all at once": Row(
        (cj.chain, cj.at, cj.between, cj.every),
        cj.at(
            "**/kernel", cj.chain(cj.between(0, 2, half), cj.between(1, None, cj.every(2, int4)))
        ),
        Quantized,
        lambda s: s.fixed["0"]["0"]["of"][KERNEL],
    ),
}
# Rows that vary an option of a row that is run by default.
SLOW = {
    *(
        "int4 padded groups",
        "int5 rms axis 0",
        "int4 percentile",
        "int8 narrow pnorm",
        "int4 entropy",
        "rate and distortion, one step",
        "fp8 e5m2 channel",
        "gguf Q4_0",
    ),
    *(
        "fp4 mse",
        "fp6",
        "own table",
        "mxfp4",
        "nvfp4 mse",
        "ternary mse",
        "binary connect",
        "prune on a schedule",
    ),
    *(
        "prune channels of all",
        "prune heads",
        "fisher",
        "soft movement",
        "own scores",
        "own rule",
        "own growth",
    ),
    *(
        "energy",
        "quantize then prune",
        "prune then nf4",
        "binary then prune",
        "coarse then fine grid",
        "from step 1",
    ),
    *(
        "steps 1 and 2",
        "int4 minmax asymmetric",
        "fp4 groups",
        "nvfp4",
        "saliency",
        "movement",
        "lamp",
        "every 2",
        "rules",
    ),
    *("lsq channel", "prune blocks", "among what is left", "kernels only", "int4 channel"),
    *("int2 mse", "prune then share", "one bit 2:4", "one bit then quantize"),
}
assert SLOW < CONTRACT.keys()
ROWS = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CONTRACT]
)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="body")(nn.Conv(16, (1, 2), use_bias=False, name="head")(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.body, self.head = (
            nnx.Linear(16, 8, rngs=rngs),
            nnx.Conv(8, 16, (1, 2), use_bias=False, rngs=rngs),
        )


def normal(seed: int, shape: tuple[int, ...], dtype=np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(
        dtype
    )


def layers() -> dict[str, Any]:
    return {
        "body": {"kernel": normal(1, (16, 8)), "bias": normal(2, (8,))},
        "head": {"kernel": normal(3, (1, 2, 8, 16))},
    }


PARAMS = {**layers(), "norm": {"scale": normal(5, (8,), jnp.bfloat16)}}
LATER = jax.tree.map(lambda x: (0.8 * x + 0.1).astype(x.dtype), PARAMS)


def bits(tree: Any) -> dict[str, tuple[Any, ...]]:
    """Return dtype, shape and the very bytes of every array of a tree, by path."""
    return {
        path: (x.dtype, x.shape, np.asarray(x).tobytes())
        for path, x in flatten(jax.tree.map(jnp.asarray, tree))[0].items()
    }


KERNEL_WITH = {bad: LATER["body"]["kernel"].at[3, 2].set(float(bad)) for bad in ("nan", "-inf")}


class Trained(NamedTuple):
    state: Any
    seen: Any
    update: Callable[..., Any]
    view: Callable[..., Any]
    traces: Counter


@cache
def trained(name: str) -> Trained:
    """Run three jitted steps, as a training loop would: init, then update and view at steps 0, 1,
    2."""
    c, traces = CONTRACT[name].compression, Counter()

    @jax.jit
    def update(params, state, step, key):
        traces["update"] += 1
        return c.update(params, state, step=step, grads=params, key=key)

    @jax.jit
    def view(params, state):
        traces["view"] += 1
        return c.view(params, state)

    state, seen = c.init(PARAMS), None
    for step, params in enumerate([PARAMS, LATER, LATER]):
        state = update(params, state, jnp.asarray(step, jnp.int32), jax.random.key(step))
        seen = view(params, state)
    return Trained(state, seen, update, view, traces)


@pytest.mark.wide(2)
@ROWS
def test_1_view_keeps_structure_shapes_and_dtypes(name):
    c = CONTRACT[name].compression
    chex.assert_trees_all_equal_shapes_and_dtypes(trained(name).seen, PARAMS)
    if CONTRACT[name].form is not None:
        assert bits(trained(name).seen)[KERNEL] != bits(LATER)[KERNEL]
    odd = {**PARAMS, "step": jnp.arange(3), "none": jnp.zeros((0, 4)), "key": jax.random.key(0)}
    seen = c.view(odd, c.init(odd))
    assert jax.tree.structure(seen) == jax.tree.structure(odd)
    assert (
        seen["step"].dtype == jnp.int32
        and seen["step"].tolist() == [0, 1, 2]
        and seen["none"].shape == (0, 4)
    )
    assert {"step", "none", "key"} <= set(c.skipped(odd))


@pytest.mark.wide(2)
@ROWS
def test_2_what_is_trained_is_what_ships(name):
    c, (state, seen, *_) = CONTRACT[name].compression, trained(name)
    packed = c.pack(LATER, state)
    assert (
        bits(seen)
        == bits(c.view(LATER, state))
        == bits(cj.unpack(packed))
        == bits(jax.jit(cj.unpack)(packed))
    )
    node = flatten(packed)[0][KERNEL]
    assert type(node) is CONTRACT[name].form if CONTRACT[name].form else not is_packed(node)
    moved = state._replace(
        learned=jax.tree.map(lambda x: 1.01 * x, state.learned)
    )  # as an optimizer moves it
    assert bits(trained(name).view(LATER, moved)) == bits(cj.unpack(c.pack(LATER, moved)))
    assert (bits(c.view(LATER, moved)) != bits(seen)) == bool(jax.tree.leaves(state.learned))


@pytest.mark.wide(33)
@ROWS
def test_3_view_is_idempotent(name):
    run = trained(name)
    assert (bits(run.view(run.seen, run.state)) == bits(run.seen)) or not CONTRACT[name].idempotent


@pytest.mark.wide(10)
@ROWS
def test_4_gradients_are_finite_and_as_promised(name):
    c, state = CONTRACT[name].compression, trained(name).state
    weights = jax.tree.map(lambda x: (x * x + 1).astype(x.dtype), PARAMS)

    @jax.jit
    def slopes(params, learned):
        def loss(params, learned):
            seen = c.view(params, state._replace(learned=learned))
            return sum(
                (s * w).astype(jnp.float32).sum()
                for s, w in zip(*map(jax.tree.leaves, (seen, weights)), strict=True)
            )

        return jax.grad(loss, argnums=(0, 1))(params, learned)

    params, learned = slopes(LATER, state.learned)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves((params, learned)))
    assert all(bool((g != 0).any()) for g in jax.tree.leaves(learned))
    promised = jnp.asarray(CONTRACT[name].slope(state), jnp.float32)
    assert (params["body"]["kernel"] == weights["body"]["kernel"] * promised).all()
    for path in c.skipped(PARAMS):
        assert (flatten(params)[0][path] == flatten(weights)[0][path]).all()


@ROWS
def test_5_update_and_view_compile_once_and_the_state_keeps_its_type(name):
    run = trained(name)
    assert run.traces == {"update": 1, "view": 1}
    start = CONTRACT[name].compression.init(PARAMS)
    after = jax.eval_shape(run.update, PARAMS, start, jnp.int32(0), jax.random.key(0))
    assert jax.tree.structure(after) == jax.tree.structure(start)
    assert [jax.typeof(x) for x in jax.tree.leaves(start)] == [
        jax.typeof(x) for x in jax.tree.leaves(run.state)
    ]


def placed(params: Any) -> Any:
    """Shard every leaf over eight devices, on all its axes at once but for the tiny ones of a
    convolution."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("four", "two"))

    def place(x):
        names = iter(("four", "two"))
        spec = PartitionSpec(*(next(names) if n >= 8 else None for n in x.shape))
        out = jax.device_put(x, NamedSharding(mesh, spec))
        assert len(out.sharding.device_set) == 8 and not out.sharding.is_fully_replicated
        return out

    return jax.tree.map(place, params)


@cache
def two_steps(name: str) -> Callable[..., Any]:
    c = CONTRACT[name].compression

    def rest(params, later, state):
        state = c.update(later, state, step=jnp.int32(2), grads=params, key=jax.random.key(0))
        return state, c.view(later, state)

    if CONTRACT[name].traceable_init:
        return jax.jit(lambda params, later: rest(params, later, c.init(params)))
    return lambda params, later: jax.jit(rest)(params, later, c.init(params))


@cache
def alone(name: str) -> Any:
    return two_steps(name)(PARAMS, LATER)


@pytest.mark.wide(5)
@ROWS
def test_6_sharded_equals_alone_and_view_keeps_shardings(name):
    params, later = placed(PARAMS), placed(LATER)
    state, seen = two_steps(name)(params, later)
    tolerance = CONTRACT[name].sharded
    if tolerance:
        for got, expected in zip(*map(jax.tree.leaves, ((state, seen), alone(name))), strict=True):
            np.testing.assert_allclose(
                np.asarray(got, float), np.asarray(expected, float), rtol=tolerance, atol=tolerance
            )
    else:
        assert bits(state) == bits(alone(name)[0]) and bits(seen) == bits(alone(name)[1])
    for x, y in zip(jax.tree.leaves(later), jax.tree.leaves(seen), strict=True):
        assert y.sharding.is_equivalent_to(x.sharding, x.ndim) or not CONTRACT[name].keeps_shardings


@pytest.fixture(scope="module")
def restored(request, tmp_path_factory) -> dict[str, Any]:
    """States and params of all rows that are run, through one checkpoint."""
    run = {item.callspec.params["name"] for item in request.session.items if "test_7" in item.name}
    names = {name: f"row{i}" for i, name in enumerate(CONTRACT) if name in run}
    path = tmp_path_factory.mktemp("orbax") / "all"
    tree = {key: {"params": LATER, "state": trained(name).state} for name, key in names.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        back = checkpointer.restore(path, abstract)
    return {name: back[key] for name, key in names.items()}


@pytest.mark.wide(3)
@ROWS
def test_7_orbax_round_trip_is_exact(name, restored):
    c, back = CONTRACT[name].compression, restored[name]
    assert jax.tree.structure(back["state"]) == jax.tree.structure(trained(name).state)
    assert bits(back["state"]) == bits(trained(name).state)
    assert bits(c.view(back["params"], back["state"])) == bits(trained(name).seen)


@cache
def flavours() -> tuple[Any, Any, Any]:
    """The same values as a plain dict, as Linen's own tree and as an NNX state."""
    linen = jax.eval_shape(Linen().init, jax.random.key(0), jnp.ones((1, 4, 16, 8)))["params"]
    _, state = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param)
    leaves = flatten(layers())[0]
    trees = [flatten(tree) for tree in (linen, state)]
    for named, _ in trees:
        assert {path: x.shape for path, x in named.items()} == {
            path: x.shape for path, x in leaves.items()
        }
    return (layers(), *(rebuild(leaves) for _, rebuild in trees))


@pytest.mark.wide(7)
@ROWS
def test_8_linen_nnx_and_dict_agree(name):
    c = CONTRACT[name].compression
    plain, *others = flavours()
    state = c.init(plain)
    for tree in others:
        own = c.init(tree)
        assert bits(own) == bits(state)
        seen, packed = c.view(tree, own), c.pack(tree, own)
        assert type(seen) is type(packed) is type(tree)
        assert bits(seen) == bits(c.view(plain, state)) == bits(cj.unpack(packed))
        assert c.skipped(tree) == c.skipped(plain)


@ROWS
def test_9_a_leaf_that_is_not_finite_is_named(name):
    c, state = CONTRACT[name].compression, trained(name).state
    broken, infinite = (
        {**LATER, "body": {**LATER["body"], "kernel": KERNEL_WITH[bad]}} for bad in ("nan", "-inf")
    )
    calls = [
        lambda: c.init(broken),
        lambda: c.init(infinite),
        lambda: c.view(broken, state),
        lambda: c.update(broken, state, step=2),
        lambda: c.pack(broken, state),
    ]
    for call in calls[: 5 if CONTRACT[name].refuses_nan else 0]:
        with pytest.raises(NonFiniteError, match=KERNEL):
            call()


@pytest.mark.wide(7)
@ROWS
def test_10_where_the_view_goes_entry_by_entry_it_says_how(name):
    """Rows cut out of an array, with their operands, are seen as they are within it: solvers round
    a row at a time."""
    c, (state, seen, *_) = CONTRACT[name].compression, trained(name)
    steps = c.pointwise(LATER, state)
    if CONTRACT[name].form in (Quantized, Tabled, Sparse):
        assert KERNEL in steps
    views = flatten(seen)[0]
    for path, (see, operands) in steps.items():
        x = flatten(LATER)[0][path]
        assert all(operand.shape == x.shape for operand in operands)
        rows = [see(x[i], *(operand[i] for operand in operands)) for i in range(len(x))]
        assert bits(jnp.stack(rows)) == bits(views[path])
    assert set(steps) <= set(views) - set(c.skipped(LATER))


# Whose leaves or layers answer for each other, or draw random numbers of their own, on purpose.
TOGETHER = {
    *("prune all", "prune channels of all", "fisher", "relative to the leaf", "lamp"),
    *("prune at random", "set", "rigl", "own growth", "one bit rigl"),
}


def stack() -> jax.Array:
    """Four layers, each of another size: what they share would spoil the smaller ones."""
    return normal(6, (4, 16, 8)) * jnp.asarray([1.0, 0.02, 30.0, 0.5], jnp.float32)[:, None, None]


def after_an_update(c: Compression, traceable: bool) -> Callable[[Any], Any]:
    def rest(params, state):
        state = c.update(params, state, step=jnp.int32(2), grads=params, key=jax.random.key(0))
        return state, c.view(params, state)

    if traceable:
        return jax.jit(lambda params: rest(params, c.init(params)))
    return lambda params: jax.jit(rest)(params, c.init(params))


def in_body(x: jax.Array) -> dict[str, Any]:
    return {"body": {"kernel": x}}


@ROWS
@pytest.mark.parametrize("place", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_11_a_stack_is_its_layers(name, place):
    row, x = CONTRACT[name], stack()
    if name == "rules":
        pytest.skip("its first rule is for another leaf")
    shape = tuple(np.moveaxis(np.empty(x.shape), 0, place).shape)
    axes = Axes(shape, outputs=(2,), stack=(place,), source="trace")
    c = row.compression if row.compression.bind is None else row.compression.bind({KERNEL: axes})
    params = in_body(jnp.moveaxis(x, 0, place))
    state, seen = after_an_update(c, row.traceable_init)(params)
    packed = c.pack(params, state)
    assert bits(cj.unpack(packed)) == bits(seen)
    assert (
        type(packed["body"]["kernel"]) is row.form
        if row.form
        else not is_packed(packed["body"]["kernel"])
    )
    views = jnp.moveaxis(seen["body"]["kernel"], place, 0)
    for see, operands in c.pointwise(params, state).values():
        assert bits(see(params["body"]["kernel"], *operands)) == bits(seen["body"]["kernel"])
    if name in TOGETHER:
        return
    alone = after_an_update(row.compression, row.traceable_init)
    for layer, view in zip(x, views, strict=True):
        np.testing.assert_allclose(
            view, alone(in_body(layer))[1]["body"]["kernel"], rtol=2e-6, atol=1e-7
        )


ACCEPTED = {
    ("every 2", "prune on a schedule"),
    ("prune on a schedule", "every 2"),
}  # `every` only thins updates


@cache
def begun() -> dict[str, Any]:
    """A state of every row, as shapes where `init` can be traced."""
    return {
        name: jax.eval_shape(row.compression.init, PARAMS)
        if row.traceable_init
        else row.compression.init(PARAMS)
        for name, row in CONTRACT.items()
    }


@pytest.mark.wide(2)
@pytest.mark.parametrize("name", CONTRACT)
def test_12_the_state_of_another_method_is_refused(name):
    c, params = CONTRACT[name].compression, jax.eval_shape(lambda: PARAMS)
    jax.eval_shape(c.view, params, begun()[name])
    for other, state in begun().items():
        if other == name or (name, other) in ACCEPTED:
            continue
        for call in (c.view, c.pack, lambda p, s: c.update(p, s, step=2, grads=p)):
            with pytest.raises(StateError):
                jax.eval_shape(call, params, state)


SHAPES = [
    (),
    (1,),
    (8,),
    (1, 8),
    (8, 1),
    (16, 8),
    (8, 16),
    (4, 8),
    (16, 4),
    (2, 16, 8),
    (128,),
    (16, 8, 1),
    (1, 16, 8),
]


@pytest.mark.wide(15)
@pytest.mark.parametrize("name", CONTRACT)
def test_12_the_state_of_other_params_is_refused_by_name(name):
    c, state = CONTRACT[name].compression, begun()[name]
    if not jax.tree.leaves(state):
        pytest.skip("it has no state")
    others = [
        in_body(jax.ShapeDtypeStruct(shape, jnp.float32)) for shape in SHAPES if shape != (16, 8)
    ]
    others += [in_body(jax.ShapeDtypeStruct((16, 8), jnp.bfloat16))]
    for other in others:
        params = {**jax.eval_shape(lambda: PARAMS), "body": {**PARAMS["body"], **other["body"]}}
        for call in (c.view, c.pack, lambda p, s: c.update(p, s, step=2, grads=p)):
            with pytest.raises(StateError, match=KERNEL):
                jax.eval_shape(call, params, state)
    with pytest.raises(StateError, match="bias"):
        jax.eval_shape(c.view, in_body(PARAMS["body"]["kernel"]), state)


def test_12_a_state_whose_arrays_were_changed_is_refused():
    c = prune.magnitude(0.5)
    state = c.init(PARAMS)
    cut = state._replace(fixed=jax.tree.map(lambda x: x[:1], state.fixed))
    with pytest.raises(StateError, match="fixed array"):
        c.view(PARAMS, cut)


def test_12_a_state_made_by_hand_never_changes_a_shape():
    c, masks = prune.magnitude(0.5), {"w": jnp.ones((2, 8, 4), bool)}
    with pytest.raises(StateError, match=r"'w'.*\(8, 4\)"), jax.numpy_rank_promotion("allow"):
        c.view({"w": jnp.ones((8, 4))}, cj.CompressionState({}, masks))


def test_12_options_that_print_alike_are_told_apart():
    schedules = [optax.linear_schedule(0.0, end, 10) for end in (0.5, 0.6)]
    first, second = (prune.magnitude(schedule) for schedule in schedules)
    with pytest.raises(StateError, match="0.6"):
        second.view(PARAMS, first.init(PARAMS))
    ones, twos = (
        cj.leafwise(fn, init=lambda x, key: (None, x))
        for fn in (lambda x, _, f: x + f, lambda x, _, f: x - f)
    )
    with pytest.raises(StateError):
        twos.view(PARAMS, ones.init(PARAMS))


@pytest.mark.wide(33)
@ROWS
def test_13_what_is_not_finite_is_seen_so_under_jit(name):
    run = trained(name)
    for bad in KERNEL_WITH.values():
        seen = run.view({**LATER, "body": {**LATER["body"], "kernel": bad}}, run.state)["body"][
            "kernel"
        ]
        assert not jnp.isfinite(seen[3, 2]), "a diverged weight looks like any other"


def extreme(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Numbers up to the largest there is, down to subnormal ones and zeros of both signs."""
    x = normal(11, shape).ravel()
    ends = [
        float(jnp.finfo(dtype).max),
        -float(jnp.finfo(dtype).max),
        float(jnp.finfo(dtype).tiny) / 4,
        0.0,
        -0.0,
    ]
    x = (x * (ends[0] / jnp.abs(x).max())).at[: len(ends)].set(jnp.asarray(ends, jnp.float32))
    return x.reshape(shape).astype(dtype)


EXTREME = {
    "body": {"kernel": extreme((16, 8), jnp.float16), "bias": extreme((8,), jnp.float32)},
    "head": {
        "kernel": jnp.full((1, 2, 8, 16), jnp.finfo(jnp.float16).tiny / 8, jnp.float16)
        .at[0, 0]
        .set(0.0)
    },
    "norm": {"scale": extreme((8,), jnp.bfloat16)},
}


@pytest.mark.wide(3)
@ROWS
def test_14_what_is_finite_is_seen_finite_and_ships_so(name):
    c = CONTRACT[name].compression
    state = c.init(EXTREME)
    grads = jax.tree.map(jnp.ones_like, EXTREME)
    for step in range(2):
        state = c.update(EXTREME, state, step=step, grads=grads, key=jax.random.key(0))
        seen = c.view(EXTREME, state)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((seen, state.learned)))
        assert bits(cj.unpack(c.pack(EXTREME, state))) == bits(seen)


# Their view of one leaf needs others, or their state is of another form than the leaf.
TAKEN_WHOLE = {name for name in CONTRACT if "energy" in name} | {"identity"}


def through_layers(params, x):
    """A loop over the layers of a stack, as a model has it: rematerialized."""

    @jax.checkpoint
    def layer(x, w):  # [2, 16] and [16, 8]
        return jnp.tanh(x @ w) @ w.T, None

    return jnp.square(jax.lax.scan(layer, x, params["body"]["kernel"])[0]).sum()


@pytest.mark.wide(12)
@ROWS
def test_15_a_view_taken_in_a_loop_is_the_view(name):
    row, params = CONTRACT[name], in_body(stack() / 8)
    if name == "rules":
        pytest.skip("its first rule is for another leaf")
    axes = Axes((4, 16, 8), outputs=(2,), stack=(0,), source="trace")
    c = row.compression if row.compression.bind is None else row.compression.bind({KERNEL: axes})
    state, _ = after_an_update(c, row.traceable_init)(params)
    assert bool(leaf_views(c, params, state)) == (name not in TAKEN_WHOLE)
    x = normal(7, (2, 16))

    def before(params, learned):
        return through_layers(c.view(params, state._replace(learned=learned)), x)

    def inside(params, learned):
        views = leaf_views(c, params, state._replace(learned=learned))
        return view_inside(through_layers, views)(params, x)

    wanted, found = (
        jax.jit(jax.value_and_grad(fn, (0, 1)))(params, state.learned) for fn in (before, inside)
    )
    if name not in TAKEN_WHOLE:
        chex.assert_trees_all_close(found, wanted, rtol=2e-5, atol=1e-6)


def test_every_public_method_has_a_row():
    core = {identity, cj.chain, cj.at, cj.rules, cj.every, cj.between}
    public = {
        getattr(package, name)
        for package in (quantize, prune, cluster, lowrank)
        for name in package.__all__
        if inspect.isfunction(fn := getattr(package, name))
        and typing.get_type_hints(fn).get("return") is Compression
    }
    assert {
        quantize.uniform,
        prune.magnitude,
        cluster.kmeans,
        lowrank.svd,
    } <= public  # the search itself works
    assert core | public <= {fn for row in CONTRACT.values() for fn in row.of}
