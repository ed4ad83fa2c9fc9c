"""An Equinox model: kernels on the left of vectors, images channels first, the batch by vmap."""

import equinox as eqx
import jax
import jax.numpy as jnp

from tests.trace.zoo_entry import Answer, Entry, Made, answer, inputs, normal, randomise


class ConvNet(eqx.Module):
    conv: eqx.nn.Conv2d
    dense: eqx.nn.MLP
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(3, 6, 4, stride=4, key=keys[0])
        self.dense = eqx.nn.MLP(6, 20, 14, depth=2, key=keys[1])
        self.norm, self.head = eqx.nn.LayerNorm(20), eqx.nn.Linear(20, 10, key=keys[2])

    def __call__(self, x):
        return self.head(self.norm(self.dense(jnp.tanh(self.conv(x)).mean((1, 2)))))


def make() -> Made:
    module = eqx.filter_eval_shape(ConvNet, jax.random.key(0))
    arrays, rest = eqx.partition(module, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def fn(variables, x):
        return jax.vmap(eqx.combine(variables, rest))(x)

    return fn, randomise(arrays), inputs(normal(2, 3, 16, 16))


def known() -> Answer:
    layers = {"conv/weight": 4**2 * 4**2 * 3 * 6, "head/weight": 20 * 10}
    layers |= {
        f"dense/layers/{i}/weight": size for i, size in enumerate([6 * 14, 14 * 14, 14 * 20])
    }
    return answer(
        {path: 2 * macs for path, macs in layers.items()},
        uncontracted={"conv/bias": "bias, with axes of 1"},
    )


EQUINOX = (Entry("convnet/equinox", make, known),)
