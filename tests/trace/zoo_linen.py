"""The zoo's models in Flax Linen; `zoo_nnx` has the same names, `zoo_answers` the answers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tests.trace.zoo_entry import Draw, Made, inputs, randomise
from tests.trace.zoo_layers import causal_attention, heads, max_pool, rope


def linen(model: Callable[[], nn.Module], *draws: Draw, mutable: Any = False) -> Callable[[], Made]:
    """Return the ``make`` of a module, of its inputs and of the collections it returns anew."""

    def make() -> Made:
        module, batch = model(), inputs(*draws)
        variables = randomise(jax.eval_shape(module.init, jax.random.key(0), *batch))
        return partial(module.apply, mutable=mutable), variables, batch

    return make


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(20, name="dense_0")(x))
        x = nn.gelu(nn.Dense(28, name="dense_1")(x))
        return nn.Dense(10, name="dense_2")(x)


class LeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = max_pool(nn.relu(nn.Conv(6, (5, 5), name="conv_0")(x)))
        x = max_pool(nn.relu(nn.Conv(11, (5, 5), padding="VALID", name="conv_1")(x)))
        x = nn.relu(nn.Dense(21, name="dense_0")(x.reshape(x.shape[0], -1)))
        x = nn.relu(nn.Dense(17, name="dense_1")(x))
        return nn.Dense(10, name="head")(x)


class ConvNorm(nn.Module):
    """A convolution without bias and its batch norm."""

    width: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    train: bool = False

    @nn.compact
    def __call__(self, x):
        window, strides = (self.kernel, self.kernel), (self.stride, self.stride)
        x = nn.Conv(
            self.width,
            window,
            strides,
            feature_group_count=self.groups,
            use_bias=False,
            name="conv",
        )(x)
        return nn.BatchNorm(use_running_average=not self.train, name="norm")(x)


class ResidualBlock(nn.Module):
    width: int
    stride: int
    train: bool

    @nn.compact
    def __call__(self, x):
        layer = partial(ConvNorm, train=self.train)
        y = nn.relu(layer(self.width, stride=self.stride, name="first")(x))
        y = layer(self.width, name="second")(y)
        if x.shape != y.shape:
            x = layer(self.width, kernel=1, stride=self.stride, name="shortcut")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(ConvNorm(8, train=self.train, name="stem")(x))
        x = ResidualBlock(8, 1, self.train, name="block_0")(x)
        x = ResidualBlock(12, 2, self.train, name="block_1")(x)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class EncoderBlock(nn.Module):
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="attention_norm")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y)
        y = nn.gelu(nn.Dense(self.hidden, name="up")(nn.LayerNorm(name="mlp_norm")(x)))
        return x + nn.Dense(x.shape[-1], name="down")(y)


class ViT(nn.Module):
    patch: int = 4
    width: int = 16
    heads: int = 4
    hidden: int = 28
    layers: int = 2
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        window = (self.patch, self.patch)
        x = nn.Conv(self.width, window, window, name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        first = self.param("first", nn.initializers.normal(), (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, self.width)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(), (1, *x.shape[1:]))
        for i in range(self.layers):
            x = EncoderBlock(self.heads, self.hidden, name=f"block_{i}")(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


class LlamaBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        dense = partial(nn.Dense, use_bias=False)
        y = nn.RMSNorm(name="attention_norm")(x)
        q, k, v = (
            heads(dense(4 * n, name=name)(y), n) for name, n in [("q", 4), ("k", 2), ("v", 2)]
        )
        x = x + dense(16, name="out")(causal_attention(rope(q), rope(k), v))
        y = nn.RMSNorm(name="mlp_norm")(x)
        return x + dense(16, name="down")(
            nn.silu(dense(20, name="gate")(y)) * dense(20, name="up")(y)
        ), None


class Llama(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(23, 16, name="embed")(tokens)
        block = nn.remat(LlamaBlock, prevent_cse=False)
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scan(name="layers")(x, None)
        return nn.Dense(23, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(23, 6, name="embed")(tokens)
        x: Any = nn.RNN(nn.OptimizedLSTMCell(10, name="lstm"))(x)
        x: Any = nn.RNN(nn.GRUCell(7, name="gru"))(x)
        return nn.Dense(5, name="head")(x[:, -1])


class MoE(nn.Module):
    """Soft mixture: every expert works on every row, weighted by the router."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="stem")(x)
        weights = nn.softmax(nn.Dense(4, name="router")(x))
        up = self.param("up", nn.initializers.normal(), (4, 16, 20))
        down = self.param("down", nn.initializers.normal(), (4, 20, 16))
        y = jnp.einsum("bef,efd->bed", nn.gelu(jnp.einsum("bd,edf->bef", x, up)), down)
        return nn.Dense(10, name="head")(x + jnp.einsum("be,bed->bd", weights, y))


class SqueezeExcite(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.swish(nn.Conv(6, (1, 1), name="squeeze")(x.mean((1, 2), keepdims=True)))
        return x * nn.sigmoid(nn.Conv(x.shape[-1], (1, 1), name="excite")(y))


class MBConv(nn.Module):
    hidden: int
    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        y = nn.swish(ConvNorm(self.hidden, 1, name="expand")(x))
        y = nn.swish(ConvNorm(self.hidden, 3, self.stride, groups=self.hidden, name="depthwise")(y))
        y = ConvNorm(self.width, 1, name="project")(SqueezeExcite(name="gate")(y))
        return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.swish(ConvNorm(8, stride=2, name="stem")(x))
        x = MBConv(24, 8, 1, name="block_0")(x)
        x = MBConv(20, 12, 2, name="block_1")(x)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        fine = nn.relu(nn.Conv(6, (3, 3), name="down_0")(x))
        middle = nn.relu(nn.Conv(10, (3, 3), name="down_1")(max_pool(fine)))
        x = nn.relu(nn.Conv(14, (3, 3), (2, 2), name="bottom")(middle))
        x = nn.ConvTranspose(9, (2, 2), (2, 2), name="up_1")(x)
        x = nn.relu(nn.Conv(11, (3, 3), name="mix_1")(jnp.concatenate([middle, x], -1)))
        x = nn.ConvTranspose(7, (2, 2), (2, 2), name="up_0")(x)
        x = nn.Conv(8, (3, 3), name="mix_0")(jnp.concatenate([fine, x], -1))
        return nn.Conv(2, (1, 1), name="head")(nn.relu(nn.GroupNorm(4, name="norm")(x)))


class DecoderBlock(nn.Module):
    """Queries, keys and values of one kernel."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(48, name="qkv")(nn.LayerNorm(name="attention_norm")(x))
        q, k, v = (heads(each, 4) for each in jnp.split(y, 3, -1))
        x = x + nn.Dense(16, name="out")(causal_attention(q, k, v))
        y = nn.gelu(nn.Dense(30, name="up")(nn.LayerNorm(name="mlp_norm")(x)))
        return x + nn.Dense(16, name="down")(y)


class TiedLM(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(23, 16, name="embed")
        positions = self.param("positions", nn.initializers.normal(), (9, 16))
        x = DecoderBlock(name="block")(embed(tokens) + positions[None])
        return embed.attend(nn.LayerNorm(name="norm")(x))
