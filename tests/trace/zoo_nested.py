"""Plain functions whose contractions sit inside loops, branches, calls, derivatives, shards."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from tests.trace.zoo_entry import VECTORS, Answer, Entry, answer, integers, plain


@jax.jit
def layer(x, w):
    return jnp.tanh(x @ w)


def jitted(v, x):
    """One traced function, called with two kernels, one of them twice."""
    return layer(layer(layer(x, v["a"]), v["a"]), v["b"])


@jax.custom_jvp
def squareplus(x):
    return (x + jnp.sqrt(x * x + 4)) / 2


@squareplus.defjvp
def _(primals, tangents):
    (x,), (t,) = primals, tangents
    return squareplus(x), t * jnp.clip((1 + x / jnp.sqrt(x * x + 4)) / 2, 0.2, 0.8)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def steep(x, w, factor):
    return x @ w


@steep.defjvp
def _(factor, primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return steep(x, w, factor), factor * (dx @ w + x @ dw)


def custom_jvp(v, x):
    """An activation and a product with derivatives of their own."""
    return squareplus(steep(x, v["a"], 2)) @ v["b"]


@jax.custom_vjp
def twice_as_steep(x, w):
    return x @ w


def _forward(x, w):
    return x @ w, (x, w)


def _backward(kept, g):
    x, w = kept
    return 2 * g @ w.T, 2 * x.T @ g


twice_as_steep.defvjp(_forward, _backward)


def custom_vjp(v, x):
    """A product whose gradient is twice what it should be."""
    return jnp.tanh(twice_as_steep(x, v["a"])) @ v["b"]


def cond(v, x):
    """Each branch is taken once, whatever x is."""
    first = x.sum() > 0
    for flag in (first, ~first):
        x = lax.cond(flag, lambda y: jnp.tanh(y @ v["a"]), lambda y: jnp.cos(y @ v["b"].T), x)
    return x


def switch(v, x, index):
    return lax.switch(
        index, [lambda y: y[:, :8], lambda y: y @ v["a"], lambda y: jnp.tanh(y @ v["a"])], x
    )


def while_loop(v, x):
    """A while loop whose number of turns depends on the data."""
    small = lambda carry: (carry[0] < 4) & (jnp.abs(carry[1]).max() < 100)  # noqa: E731
    return lax.while_loop(
        small, lambda carry: (carry[0] + 1, carry[1] + jnp.tanh(carry[1] @ v["w"])), (0, x)
    )[1]


def fori_loop(v, x):
    return lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ v["w"]), x)


def carried(v, x):
    """The kernel goes round a loop with the activations."""
    return (
        lax.fori_loop(
            0, 3, lambda _, carry: (jnp.tanh(carry[0] @ carry[1]), carry[1]), (x, v["w"])
        )[0]
        @ v["b"]
    )


def scanned(v, x):
    """Stacked kernels, last first, and one that stays; remat keeps the products."""

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    def body(y, w):
        return y + jnp.tanh(y @ w) @ v["shared"], y.mean()

    y, means = lax.scan(body, x, v["layers"], reverse=True)
    return y + means.sum()


def nested_scan(v, x):
    """A matrix of kernels: a scan over rows around a scan over columns, a product at each level."""

    def column(y, w):
        return y + jnp.tanh(y @ w), None

    def row(y, ws):
        return lax.scan(column, y, ws["inner"])[0] @ ws["outer"], None

    return lax.scan(row, x, {"inner": v["inner"], "outer": v["outer"]})[0]


def mapped(v, x):
    """`lax.map`: every kernel of a stack on the same rows."""
    return lax.map(lambda w: x @ w, v["w"])


def vmapped(v, x):
    """One layer for all examples, written for one."""
    return jax.vmap(lambda row: v["b"] @ jnp.tanh(v["a"] @ row))(x)


def vmapped_ensemble(v, x):
    """A stack of models, written for one."""
    return jax.vmap(lambda w, b: jnp.tanh(x @ w + b[None]))(v["w"], v["b"])


def dropout(v, x, seed):
    keep = jax.random.bernoulli(jax.random.key(seed), 0.5, (3, 8))
    return jnp.where(keep, jnp.tanh(x @ v["a"]), 0.0) @ v["b"]


def sharded(v, x):
    """Column-parallel, then row-parallel over all devices."""
    columns, rows, everywhere = (
        PartitionSpec(None, "model"),
        PartitionSpec("model"),
        PartitionSpec(),
    )

    @partial(
        jax.shard_map,
        mesh=Mesh(np.array(jax.devices()), ("model",)),
        in_specs=(everywhere, columns, rows),
        out_specs=everywhere,
    )
    def two_layers(x, a, b):
        return lax.psum(jnp.tanh(x @ a) @ b, "model")

    return two_layers(x, v["a"], v["b"])


def sharded_answer() -> Answer:
    """Each device contracts its shard of both kernels; together they are the whole product."""
    n = jax.device_count()
    return Answer({"a": n, "b": n}, macs=3 * 12 * 24 + 3 * 24 * 10)


AB = {"a": (12, 8), "b": (8, 10)}  # x[3, 12] @ a @ b
AB_ANSWER = partial(answer, {"a": 3 * 12 * 8, "b": 3 * 8 * 10})
SQUARE = 3 * 12 * 12
NESTED = (
    Entry(
        "plain/jitted",
        plain(jitted, {"a": (12, 12), "b": (12, 10)}, VECTORS),
        lambda: Answer({"a": 2, "b": 1}, macs=2 * SQUARE + 3 * 12 * 10),
    ),
    Entry("plain/custom_jvp", plain(custom_jvp, AB, VECTORS), AB_ANSWER),
    Entry("plain/custom_vjp", plain(custom_vjp, AB, VECTORS), AB_ANSWER),
    Entry(
        "plain/cond",
        plain(cond, {"a": (12, 12), "b": (12, 12)}, VECTORS),
        lambda: Answer({"a": 2, "b": 2}, macs=4 * SQUARE),
    ),
    Entry(
        "plain/switch",
        plain(switch, {"a": (12, 8)}, VECTORS, lambda _: np.int32(2)),
        lambda: Answer({"a": 2}, 2 * 3 * 12 * 8),
    ),
    Entry(
        "plain/while_loop",
        plain(while_loop, {"w": (12, 12)}, VECTORS),
        partial(answer, {"w": SQUARE}),
        reverse=False,
    ),
    Entry(
        "plain/fori_loop",
        plain(fori_loop, {"w": (12, 12)}, VECTORS),
        partial(answer, {}, {"w": SQUARE}, loops=3),
    ),
    Entry(
        "plain/carried",
        plain(carried, {"w": (12, 12), "b": (12, 10)}, VECTORS),
        partial(answer, {"b": 3 * 12 * 10}, {"w": SQUARE}, loops=3),
    ),
    Entry(
        "plain/scanned",
        plain(scanned, {"layers": (4, 12, 8), "shared": (8, 12)}, VECTORS),
        partial(answer, {}, {"layers": 3 * 12 * 8, "shared": 3 * 8 * 12}, loops=4),
    ),
    Entry(
        "plain/nested_scan",
        plain(nested_scan, {"inner": (2, 3, 12, 12), "outer": (2, 12, 12)}, VECTORS),
        lambda: Answer({"inner": 2 * 3, "outer": 2}, macs=(2 * 3 + 2) * SQUARE),
    ),
    Entry(
        "plain/mapped",
        plain(mapped, {"w": (5, 12, 8)}, VECTORS),
        partial(answer, {}, {"w": 3 * 12 * 8}, loops=5),
    ),
    Entry("plain/vmapped", plain(vmapped, {"a": (8, 12), "b": (10, 8)}, VECTORS), AB_ANSWER),
    Entry(
        "plain/vmapped_ensemble",
        plain(vmapped_ensemble, {"w": (5, 12, 8), "b": (5, 8)}, VECTORS),
        partial(answer, {"w": 5 * 3 * 12 * 8}, uncontracted={"b": "a bias for each member"}),
    ),
    Entry("plain/dropout", plain(dropout, AB, VECTORS, integers(100)), AB_ANSWER),
    Entry("plain/sharded", plain(sharded, {"a": (12, 24), "b": (24, 10)}, VECTORS), sharded_answer),
)
