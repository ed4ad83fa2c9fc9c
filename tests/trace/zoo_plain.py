"""Plain functions: every way to write a contraction and every way a parameter reaches one."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from compress_jax.core import straight_through
from tests.trace.zoo_entry import VECTORS, Answer, Entry, answer, integers, normal, plain


def operators(v, x):
    return jnp.dot(lax.dot(jnp.tanh(jnp.matmul(jnp.tanh(x @ v["a"]), v["b"])), v["c"]), v["d"])


def tensordot(v, x):
    return jnp.tensordot(x, v["a"], axes=((1, 2), (2, 0)))


def on_the_left(v, x):
    return v["b"] @ jnp.tanh(v["a"] @ x.T)


def transposed(v, x):
    return jnp.tanh(x @ v["a"].T) @ jnp.swapaxes(v["b"], 0, 1)


def contracted_in_place(v, x):
    """A transposed kernel without a transpose: dimension numbers say what is summed over."""
    return lax.dot_general(
        jnp.tanh(lax.dot_general(x, v["a"], (((1,), (1,)), ((), ())))),
        v["b"],
        (((1,), (0,)), ((), ())),
    )


def einsum(v, x):
    return jnp.einsum("bi,ij,jk->bk", x, v["a"], v["b"])


def reshaped(v, x):
    return jnp.tanh(x @ v["a"].reshape(12, 10)) @ v["b"].transpose(2, 0, 1).reshape(10, 14)


def cast(v, x):
    y = jnp.matmul(
        x.astype("bfloat16"), v["a"].astype("bfloat16"), preferred_element_type=jnp.float32
    )
    return jnp.tanh(y) @ v["b"].astype("bfloat16").astype("float32")


def stacked(v, x):
    return jnp.tanh(x @ v["w"][0]) @ v["w"][1]


def sliced(v, x):
    """One kernel of two layers side by side, cut both ways."""
    left, right = v["w"][:, :8], lax.slice_in_dim(v["w"], 8, 17, axis=1)
    return jnp.concatenate([x @ left, jnp.tanh(x @ right)], -1)


def joined(v, x):
    return x @ jnp.concatenate([v["a"], v["b"]], axis=1)


def fake_quantized(v, x):
    """A kernel of a mask, a scale and a straight-through rounding."""
    w = jnp.where(jnp.abs(v["a"]) > 0.05, v["a"], 0.0) * v["scale"][None]
    return x @ straight_through(lambda w: jnp.round(16 * w) / 16)(w)


def shared(v, x):
    return jnp.tanh(jnp.tanh(x @ v["w"]) @ v["w"]) @ v["w"].T


def both_parameters(v, x):
    """The second product is of two parameters: it counts for the larger one."""
    return x @ v["a"] + v["style"] @ v["b"]


def low_rank(v, x):
    return jnp.tanh(x @ v["w"] + (x @ v["down"]) @ v["up"])


def looked_up(v, x, index):
    """A kernel for each row, taken from a stack; a table that is only looked up."""
    return jnp.einsum("bi,bij->bj", x + v["table"][index], v["experts"][index])


def routed(v, x):
    """Top-1 mixture of experts: rows sorted by expert meet one kernel each."""
    probabilities = jax.nn.softmax(x @ v["router"])
    expert = probabilities.argmax(-1)
    order = expert.argsort()
    sizes = jnp.bincount(expert, length=4).astype("int32")
    y = lax.ragged_dot(jnp.tanh(lax.ragged_dot(x[order], v["up"], sizes)), v["down"], sizes)
    return y[order.argsort()] * probabilities.max(-1, keepdims=True)


def convolutions(v, x):
    """Channels first, grouped, dilated, strided; then one-dimensional."""
    layout = ("NCHW", "OIHW", "NCHW")
    y = lax.conv_general_dilated(
        x,
        v["grouped"],
        (2, 2),
        "SAME",
        rhs_dilation=(2, 2),
        dimension_numbers=layout,
        feature_group_count=2,
    )
    y = jnp.tanh(y).reshape(*y.shape[:2], -1)
    return lax.conv_general_dilated(
        y, v["line"], (1,), "VALID", dimension_numbers=("NCW", "WIO", "NWC")
    )


def rank_1(v, x):
    """Products of activations, and a parameter of rank 1 that is contracted."""
    return (x @ x.T) @ x @ v["direction"]


AB = {"a": (12, 8), "b": (8, 10)}  # x[3, 12] @ a @ b, in most of them
A, B = 3 * 12 * 8, 3 * 8 * 10
PLAIN = (
    Entry(
        "plain/operators",
        plain(operators, {"a": (12, 8), "b": (8, 10), "c": (10, 6), "d": (6, 5)}, VECTORS),
        partial(answer, {"a": A, "b": B, "c": 3 * 10 * 6, "d": 3 * 6 * 5}),
    ),
    Entry(
        "plain/tensordot",
        plain(tensordot, {"a": (4, 10, 5)}, normal(3, 5, 4)),
        partial(answer, {"a": 3 * 5 * 4 * 10}),
    ),
    Entry(
        "plain/on_the_left",
        plain(on_the_left, {"a": (8, 12), "b": (10, 8)}, VECTORS),
        partial(answer, {"a": A, "b": B}),
    ),
    Entry(
        "plain/transposed",
        plain(transposed, {"a": (8, 12), "b": (10, 8)}, VECTORS),
        partial(answer, {"a": A, "b": B}),
    ),
    Entry(
        "plain/contracted_in_place",
        plain(contracted_in_place, {"a": (8, 12), "b": (8, 10)}, VECTORS),
        partial(answer, {"a": A, "b": B}),
    ),
    Entry("plain/einsum", plain(einsum, AB, VECTORS), partial(answer, {"a": A, "b": B})),
    Entry(
        "plain/reshaped",
        plain(reshaped, {"a": (3, 4, 10), "b": (2, 7, 10)}, VECTORS),
        partial(answer, {"a": 3 * 12 * 10, "b": 3 * 10 * 14}),
    ),
    Entry("plain/cast", plain(cast, AB, VECTORS), partial(answer, {"a": A, "b": B})),
    Entry(
        "plain/stacked",
        plain(stacked, {"w": (2, 12, 12)}, VECTORS),
        lambda: Answer({"w": 2}, macs=2 * 3 * 12 * 12),
    ),
    Entry(
        "plain/sliced",
        plain(sliced, {"w": (12, 17)}, VECTORS),
        lambda: Answer({"w": 2}, macs=3 * 12 * (8 + 9)),
    ),
    Entry(
        "plain/joined",
        plain(joined, {"a": (12, 8), "b": (12, 5)}, VECTORS),
        partial(answer, {"a": A, "b": 3 * 12 * 5}, joined=(("a", "b"),)),
    ),
    Entry(
        "plain/fake_quantized",
        plain(fake_quantized, {"a": (12, 8), "scale": (8,)}, VECTORS),
        partial(answer, {"a": A}),
    ),
    Entry(
        "plain/shared",
        plain(shared, {"w": (12, 12)}, VECTORS),
        lambda: Answer({"w": 3}, macs=3 * 3 * 12 * 12),
    ),
    Entry(
        "plain/both_parameters",
        plain(both_parameters, {"a": (12, 8), "style": (1, 6), "b": (6, 8)}, VECTORS),
        partial(
            answer,
            {"a": A, "b": 6 * 8},
            uncontracted={"style": "the smaller operand of a product of parameters"},
        ),
    ),
    Entry(
        "plain/low_rank",
        plain(low_rank, {"w": (12, 8), "down": (12, 2), "up": (2, 8)}, VECTORS),
        partial(answer, {"w": A, "down": 3 * 12 * 2, "up": 3 * 2 * 8}),
    ),
    Entry(
        "plain/looked_up",
        plain(looked_up, {"experts": (5, 12, 8), "table": (5, 12)}, VECTORS, integers(5, 3)),
        partial(answer, {"experts": A}, uncontracted={"table": "looked up only"}),
    ),
    Entry(
        "plain/routed",
        plain(routed, {"router": (12, 4), "up": (4, 12, 8), "down": (4, 8, 10)}, normal(9, 12)),
        partial(answer, {"router": 9 * 12 * 4, "up": 9 * 12 * 8, "down": 9 * 8 * 10}),
    ),
    Entry(
        "plain/convolutions",
        plain(convolutions, {"grouped": (8, 3, 3, 3), "line": (3, 8, 5)}, normal(2, 6, 16, 16)),
        partial(answer, {"grouped": 2 * 8**2 * 3**2 * 3 * 8, "line": 2 * 62 * 3 * 8 * 5}),
    ),
    Entry(
        "plain/rank_1",
        plain(rank_1, {"direction": (12,)}, VECTORS),
        partial(answer, {"direction": 3 * 12}, anonymous=[3 * 3 * 12] * 2),
    ),
)
