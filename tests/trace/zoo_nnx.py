"""The models of `zoo_linen` in Flax NNX, with the same names: a graph, held by fn, and a state."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from tests.trace.zoo_entry import Draw, Made, inputs, randomise
from tests.trace.zoo_layers import causal_attention, heads, max_pool, rope


def flax_nnx(
    model: Callable[[nnx.Rngs], nnx.Module], *draws: Draw, mutable: Any = None
) -> Callable[[], Made]:
    """Return the ``make`` of a module, its inputs and the kind of variables it returns anew."""

    def make() -> Made:
        graph, state = nnx.split(nnx.eval_shape(lambda: model(nnx.Rngs(0))))

        def fn(variables: Any, *batch: jax.Array) -> Any:
            module: Any = nnx.merge(graph, variables)
            out = module(*batch)
            return (out, nnx.state(module, mutable)) if mutable else out

        return fn, randomise(state), inputs(*draws)

    return make


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.dense_0 = nnx.Linear(12, 20, rngs=rngs)
        self.dense_1 = nnx.Linear(20, 28, rngs=rngs)
        self.dense_2 = nnx.Linear(28, 10, rngs=rngs)

    def __call__(self, x):
        return self.dense_2(nnx.gelu(self.dense_1(nnx.relu(self.dense_0(x)))))


class LeNet(nnx.Module):
    def __init__(self, rngs):
        self.conv_0 = nnx.Conv(3, 6, (5, 5), rngs=rngs)
        self.conv_1 = nnx.Conv(6, 11, (5, 5), padding="VALID", rngs=rngs)
        self.dense_0 = nnx.Linear(44, 21, rngs=rngs)
        self.dense_1 = nnx.Linear(21, 17, rngs=rngs)
        self.head = nnx.Linear(17, 10, rngs=rngs)

    def __call__(self, x):
        x = max_pool(nnx.relu(self.conv_0(x)))
        x = max_pool(nnx.relu(self.conv_1(x)))
        x = nnx.relu(self.dense_0(x.reshape(x.shape[0], -1)))
        return self.head(nnx.relu(self.dense_1(x)))


class ConvNorm(nnx.Module):
    def __init__(self, into, width, rngs, kernel=3, stride=1, groups=1, train=False):
        window, strides = (kernel, kernel), (stride, stride)
        self.conv = nnx.Conv(
            into, width, window, strides, feature_group_count=groups, use_bias=False, rngs=rngs
        )
        self.norm = nnx.BatchNorm(width, use_running_average=not train, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


class ResidualBlock(nnx.Module):
    def __init__(self, into, width, stride, train, rngs):
        layer = partial(ConvNorm, rngs=rngs, train=train)
        self.first, self.second = layer(into, width, stride=stride), layer(width, width)
        self.shortcut = (
            layer(into, width, kernel=1, stride=stride) if (into, stride) != (width, 1) else None
        )

    def __call__(self, x):
        y = self.second(nnx.relu(self.first(x)))
        return nnx.relu(y + (self.shortcut(x) if self.shortcut else x))


class ResNet(nnx.Module):
    def __init__(self, rngs, train=False):
        self.stem = ConvNorm(3, 8, rngs, train=train)
        self.block_0 = ResidualBlock(8, 8, 1, train, rngs)
        self.block_1 = ResidualBlock(8, 12, 2, train, rngs)
        self.head = nnx.Linear(12, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.block_1(self.block_0(nnx.relu(self.stem(x)))).mean((1, 2)))


class EncoderBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention_norm, self.mlp_norm = (
            nnx.LayerNorm(16, rngs=rngs),
            nnx.LayerNorm(16, rngs=rngs),
        )
        self.attention = nnx.MultiHeadAttention(4, 16, decode=False, keep_rngs=False, rngs=rngs)
        self.up, self.down = nnx.Linear(16, 28, rngs=rngs), nnx.Linear(28, 16, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class ViT(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(3, 16, (4, 4), (4, 4), rngs=rngs)
        self.first, self.positions = (
            nnx.Param(jnp.zeros((1, 1, 16))),
            nnx.Param(jnp.zeros((1, 17, 16))),
        )
        self.block_0, self.block_1 = EncoderBlock(rngs), EncoderBlock(rngs)
        self.norm, self.head = nnx.LayerNorm(16, rngs=rngs), nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(x.shape[0], -1, 16)
        first = jnp.broadcast_to(self.first[...], (x.shape[0], 1, 16))
        x = jnp.concatenate([first, x], 1) + self.positions[...]
        return self.head(self.norm(self.block_1(self.block_0(x)))[:, 0])


class LlamaBlock(nnx.Module):
    def __init__(self, rngs):
        dense = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.attention_norm, self.mlp_norm = nnx.RMSNorm(16, rngs=rngs), nnx.RMSNorm(16, rngs=rngs)
        self.q, self.k, self.v, self.out = dense(16, 16), dense(16, 8), dense(16, 8), dense(16, 16)
        self.gate, self.up, self.down = dense(16, 20), dense(16, 20), dense(20, 16)

    def __call__(self, x):
        y = self.attention_norm(x)
        q, k, v = (heads(layer(y), n) for layer, n in [(self.q, 4), (self.k, 2), (self.v, 2)])
        x = x + self.out(causal_attention(rope(q), rope(k), v))
        y = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Llama(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(23, 16, rngs=rngs)
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(LlamaBlock))(rngs)
        self.norm, self.head = (
            nnx.RMSNorm(16, rngs=rngs),
            nnx.Linear(16, 23, use_bias=False, rngs=rngs),
        )

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @partial(nnx.remat, prevent_cse=False)
        def each(x, layer):
            return layer(x)

        return self.head(self.norm(each(self.embed(tokens), self.layers)))


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(23, 6, rngs=rngs)
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(6, 10, rngs=rngs), rngs=False)
        self.gru = nnx.RNN(nnx.GRUCell(10, 7, rngs=rngs), rngs=False)
        self.head = nnx.Linear(7, 5, rngs=rngs)

    def __call__(self, tokens):
        start = [jnp.zeros((tokens.shape[0], width)) for width in (10, 10, 7)]
        lstm, gru = (
            cast(Any, self.lstm),
            cast(Any, self.gru),
        )  # annotated as if a carry came back too
        x = lstm(self.embed(tokens), initial_carry=(start[0], start[1]))
        return self.head(gru(x, initial_carry=start[2])[:, -1])


class MoE(nnx.Module):
    def __init__(self, rngs):
        self.stem, self.router = nnx.Linear(12, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)
        self.up, self.down = nnx.Param(jnp.zeros((4, 16, 20))), nnx.Param(jnp.zeros((4, 20, 16)))
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        y = nnx.gelu(jnp.einsum("bd,edf->bef", x, self.up[...]))
        y = jnp.einsum("bef,efd->bed", y, self.down[...])
        return self.head(x + jnp.einsum("be,bed->bd", nnx.softmax(self.router(x)), y))


class SqueezeExcite(nnx.Module):
    def __init__(self, width, rngs):
        self.squeeze = nnx.Conv(width, 6, (1, 1), rngs=rngs)
        self.excite = nnx.Conv(6, width, (1, 1), rngs=rngs)

    def __call__(self, x):
        y = self.squeeze(x.mean((1, 2), keepdims=True))
        return x * nnx.sigmoid(self.excite(nnx.swish(y)))


class MBConv(nnx.Module):
    def __init__(self, into, hidden, width, stride, rngs):
        self.expand = ConvNorm(into, hidden, rngs, 1)
        self.depthwise = ConvNorm(hidden, hidden, rngs, 3, stride, groups=hidden)
        self.gate, self.project = SqueezeExcite(hidden, rngs), ConvNorm(hidden, width, rngs, 1)

    def __call__(self, x):
        y = nnx.swish(self.depthwise(nnx.swish(self.expand(x))))
        y = self.project(self.gate(y))
        return x + y if x.shape == y.shape else y


class MobileNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = ConvNorm(3, 8, rngs, stride=2)
        self.block_0, self.block_1 = MBConv(8, 24, 8, 1, rngs), MBConv(8, 20, 12, 2, rngs)
        self.head = nnx.Linear(12, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.block_1(self.block_0(nnx.swish(self.stem(x)))).mean((1, 2)))


class UNet(nnx.Module):
    def __init__(self, rngs):
        conv, up = partial(nnx.Conv, rngs=rngs), partial(nnx.ConvTranspose, rngs=rngs)
        self.down_0, self.down_1 = conv(3, 6, (3, 3)), conv(6, 10, (3, 3))
        self.bottom = conv(10, 14, (3, 3), (2, 2))
        self.up_1, self.mix_1 = up(14, 9, (2, 2), (2, 2)), conv(19, 11, (3, 3))
        self.up_0, self.mix_0 = up(11, 7, (2, 2), (2, 2)), conv(13, 8, (3, 3))
        self.norm, self.head = nnx.GroupNorm(8, num_groups=4, rngs=rngs), conv(8, 2, (1, 1))

    def __call__(self, x):
        fine = nnx.relu(self.down_0(x))
        middle = nnx.relu(self.down_1(max_pool(fine)))
        x = self.up_1(nnx.relu(self.bottom(middle)))
        x = self.up_0(nnx.relu(self.mix_1(jnp.concatenate([middle, x], -1))))
        x = self.mix_0(jnp.concatenate([fine, x], -1))
        return self.head(nnx.relu(self.norm(x)))


class DecoderBlock(nnx.Module):
    def __init__(self, rngs):
        dense = partial(nnx.Linear, rngs=rngs)
        self.attention_norm, self.mlp_norm = (
            nnx.LayerNorm(16, rngs=rngs),
            nnx.LayerNorm(16, rngs=rngs),
        )
        self.qkv, self.out, self.up, self.down = (
            dense(16, 48),
            dense(16, 16),
            dense(16, 30),
            dense(30, 16),
        )

    def __call__(self, x):
        q, k, v = (heads(each, 4) for each in jnp.split(self.qkv(self.attention_norm(x)), 3, -1))
        x = x + self.out(causal_attention(q, k, v))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class TiedLM(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.positions = nnx.Embed(23, 16, rngs=rngs), nnx.Param(jnp.zeros((9, 16)))
        self.block, self.norm = DecoderBlock(rngs), nnx.LayerNorm(16, rngs=rngs)

    def __call__(self, tokens):
        x = self.block(self.embed(tokens) + self.positions[...][None])
        return self.embed.attend(self.norm(x))
