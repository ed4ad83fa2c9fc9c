"""The same operations as Flax Linen, NNX, Haiku, Keras, Equinox and plain JAX spell them: small models to export.

``SPELLINGS`` maps a name to a function without arguments that returns ``(fn, params, x)``;
``fn(params, x)`` is the model. The prefix of a name is what must be installed.
"""

# ruff: noqa: D101, D102, D107, E501
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax

Model = tuple[Callable[..., Any], Any, np.ndarray]
SPELLINGS: dict[str, Callable[[], Model]] = {}
IMAGES, ROWS, WORDS = (4, 8, 8, 3), (4, 12), (4, 6, 8)
NHWC = ("NHWC", "HWIO", "NHWC")


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.key(seed), shape))


def add(name: str, build: Callable[[], Model]) -> None:
    assert name not in SPELLINGS, name
    SPELLINGS[name] = build


def lax_conv(p: Any, x: Any) -> Any:
    return (
        lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=NHWC) + p["bias"]
    )


def behind_conv(
    layer: Callable[[Any], Any], shape: tuple[int, ...] = IMAGES
) -> Callable[[], Model]:
    """A convolution, the layer, the mean over what is left of the image, a dense layer."""

    def build() -> Model:
        x = normal(0, shape)
        params = {
            "kernel": jnp.asarray(normal(1, (3, 3, 3, 4)) / 5),
            "bias": jnp.asarray(normal(2, (4,)) / 5),
        }
        out = jax.eval_shape(lambda p, x: layer(lax_conv(p, x)), params, x)
        params["head"] = jnp.asarray(normal(3, (out.shape[-1], 5)) / 2)

        def fn(p: Any, x: Any) -> Any:
            y = layer(lax_conv(p, x))
            return y.mean(tuple(range(1, y.ndim - 1))) @ p["head"]

        return fn, params, x

    return build


def behind_dense(
    layer: Callable[[Any], Any], shape: tuple[int, ...] = ROWS, width: int = 16
) -> Callable[[], Model]:
    """A dense layer, the layer, a dense layer."""

    def build() -> Model:
        x = normal(0, shape)
        params = {
            "a": jnp.asarray(normal(1, (shape[-1], width)) / 3),
            "b": jnp.asarray(normal(2, (width, 5)) / 4),
        }
        return lambda p, x: layer(x @ p["a"]) @ p["b"], params, x

    return build


def linen(
    model: Callable[[], Any], shape: tuple[int, ...] = IMAGES, **call: Any
) -> Callable[[], Model]:
    def build() -> Model:
        module, x = model(), normal(0, shape)
        variables = spread(
            jax.jit(lambda key, x: module.init(key, x, **call))(jax.random.key(0), x)
        )
        return lambda v, x: module.apply(v, x, **call), variables, x

    return build


def spread(variables: Any) -> Any:
    """Draw what starts as all ones and zeros (norms, biases, statistics), so that no mistake in it is invisible."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(variables)
    drawn = []
    for i, (path, x) in enumerate(leaves):
        name, plain = jax.tree_util.keystr(path), jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)
        if plain and np.ptp(np.asarray(x)) == 0:
            noise = jnp.asarray(normal(i, np.shape(x)), x.dtype)
            x = (
                0.7 + 0.3 * abs(noise)
                if any(t in name for t in ("var", "scale", "gamma"))
                else 0.2 * noise
            )
        drawn.append(x)
    return jax.tree.unflatten(tree, drawn)


def nnx_model(
    make: Callable[[nnx.Rngs], Any], shape: tuple[int, ...] = IMAGES
) -> Callable[[], Model]:
    def build() -> Model:
        module = make(nnx.Rngs(0))
        module.eval()
        graph, state = nnx.split(module)
        return lambda s, x: nnx.merge(graph, s)(x), state, normal(0, shape)

    return build


def haiku(
    forward: Callable[[Any, Any], Any], shape: tuple[int, ...] = IMAGES
) -> Callable[[], Model]:
    def build() -> Model:
        import haiku as hk  # pyright: ignore[reportMissingImports]

        x = normal(0, shape)
        model = hk.without_apply_rng(hk.transform_with_state(lambda x: forward(hk, x)))
        params, state = model.init(jax.random.key(0), x)
        tree = spread({"params": params, "state": state})
        return lambda p, x: model.apply(p["params"], p["state"], x)[0], tree, x

    return build


def keras_model(
    layers: Callable[[Any], list[Any]], shape: tuple[int, ...] = IMAGES
) -> Callable[[], Model]:
    def build() -> Model:
        os.environ.setdefault("KERAS_BACKEND", "jax")
        import keras  # pyright: ignore[reportMissingImports]

        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input(shape[1:]), *layers(keras.layers)])
        names = {v.path: jnp.asarray(v.value) for v in model.trainable_variables}
        fixed = {v.path: jnp.asarray(v.value) for v in model.non_trainable_variables}

        def fn(p: Any, x: Any) -> Any:
            kept = [p["fixed"].get(v.path, v.value) for v in model.non_trainable_variables]
            return model.stateless_call(
                [p["params"][v.path] for v in model.trainable_variables], kept, x
            )[0]

        plain = {k: v for k, v in fixed.items() if jnp.issubdtype(v.dtype, jnp.floating)}
        return fn, spread({"params": names, "fixed": plain}), normal(0, shape)

    return build


def equinox(
    make: Callable[[Any, Any], Any], shape: tuple[int, ...] = (4, 3, 8, 8)
) -> Callable[[], Model]:
    def build() -> Model:
        import equinox as eqx

        model = make(eqx.nn, jax.random.key(0))
        params, static = eqx.partition(model, eqx.is_array)
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]

        def fn(p: Any, x: Any) -> Any:
            return jax.vmap(
                eqx.combine(jax.tree.unflatten(tree, [p[name] for name in names]), static)
            )(x)

        return (
            fn,
            spread(dict(zip(names, [leaf for _, leaf in leaves], strict=True))),
            normal(0, shape),
        )

    return build


def sequence(*layers: Any) -> Callable[[], Any]:
    return lambda: nn.Sequential(list(layers))


# -- pooling
# ------------------------------------------------------------------------------------------------------------
POOLS: dict[str, Callable[[Any], Any]] = {
    "max_pool(x, (2, 2), strides=(2, 2))": lambda y: nn.max_pool(y, (2, 2), strides=(2, 2)),
    "max_pool(x, (3, 3), (2, 2), 'SAME')": lambda y: nn.max_pool(y, (3, 3), (2, 2), "SAME"),
    "max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))": lambda y: nn.max_pool(
        y,
        (3, 3),
        (2, 2),
        ((1, 1), (1, 1)),  # pyright: ignore[reportArgumentType]
    ),
    "max_pool(x, window_shape=(3, 3), strides=(2, 2), padding='SAME')": lambda y: nn.max_pool(
        y, window_shape=(3, 3), strides=(2, 2), padding="SAME"
    ),
    "max_pool(x, (2, 2)) of stride 1": lambda y: nn.max_pool(y, (2, 2)),
    "max_pool(x, (8, 8)) over all": lambda y: nn.max_pool(y, (8, 8)),
    "avg_pool(x, (2, 2), strides=(2, 2))": lambda y: nn.avg_pool(y, (2, 2), strides=(2, 2)),
    "avg_pool(x, (2, 2), (2, 2))": lambda y: nn.avg_pool(y, (2, 2), (2, 2)),
    "avg_pool(x, (3, 3), (2, 2), 'SAME')": lambda y: nn.avg_pool(y, (3, 3), (2, 2), "SAME"),
    "avg_pool(..., count_include_pad=False)": lambda y: nn.avg_pool(
        y, (3, 3), (2, 2), "SAME", count_include_pad=False
    ),
    "avg_pool(x, (8, 8)) over all": lambda y: nn.avg_pool(y, (8, 8)),
    "min_pool(x, (2, 2), (2, 2))": lambda y: nn.pooling.min_pool(y, (2, 2), (2, 2)),
    "pool(x, 0., add, (2, 2), (2, 2), 'VALID')": lambda y: nn.pool(
        y, 0.0, lax.add, (2, 2), (2, 2), "VALID"
    ),
}
for name, pool in POOLS.items():
    add(f"linen: {name}", behind_conv(pool))
add("nnx: max_pool(x, (2, 2), (2, 2))", behind_conv(lambda y: nnx.max_pool(y, (2, 2), (2, 2))))
add(
    "nnx: avg_pool(x, (3, 3), (2, 2), 'SAME')",
    behind_conv(lambda y: nnx.avg_pool(y, (3, 3), (2, 2), "SAME")),
)

WINDOWS: dict[str, Callable[[Any], Any]] = {
    "reduce_window max SAME": lambda y: lax.reduce_window(
        y, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"
    ),
    "reduce_window max VALID": lambda y: lax.reduce_window(
        y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    ),
    "reduce_window max in pairs": lambda y: lax.reduce_window(
        y, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 0), (0, 1), (0, 0))
    ),
    "reduce_window max from 0": lambda y: lax.reduce_window(
        y, 0.0, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    ),
    "reduce_window max of a lambda": lambda y: lax.reduce_window(
        y, -jnp.inf, lambda a, b: jnp.maximum(a, b), (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    ),
    "reduce_window max dilated": lambda y: lax.reduce_window(
        y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID", window_dilation=(1, 2, 2, 1)
    ),
    "reduce_window max over channels": lambda y: lax.reduce_window(
        y, -jnp.inf, lax.max, (1, 1, 1, 2), (1, 1, 1, 2), "VALID"
    ),
    "reduce_window max over 3 axes": lambda y: lax.reduce_window(
        y, -jnp.inf, lax.max, (1, 2, 2, 2), (1, 2, 2, 2), "VALID"
    ),
    "reduce_window min": lambda y: lax.reduce_window(
        y, jnp.inf, lax.min, (1, 2, 2, 1), (1, 2, 2, 1), "SAME"
    ),
    "reduce_window add": lambda y: lax.reduce_window(
        y, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    ),
    "reduce_window add SAME, stride 1": lambda y: lax.reduce_window(
        y, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"
    ),
    "reduce_window add over channels": lambda y: lax.reduce_window(
        y, 0.0, lax.add, (1, 1, 1, 3), (1, 1, 1, 1), "SAME"
    ),
    "reduce_window max, channels first": lambda y: jnp.moveaxis(
        lax.reduce_window(
            jnp.moveaxis(y, 3, 1), -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"
        ),
        1,
        3,
    ),
    "reduce_window add, channels first": lambda y: jnp.moveaxis(
        lax.reduce_window(jnp.moveaxis(y, 3, 1), 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"),
        1,
        3,
    ),
    "reduce_window of one image, vmapped": jax.vmap(
        lambda y: lax.reduce_window(y, -jnp.inf, lax.max, (2, 2, 1), (2, 2, 1), "VALID")
    ),
    "reduce_window of one axis": lambda y: lax.reduce_window(
        y.reshape(y.shape[0], 64, 4), -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID"
    ),
    "reshape and max": lambda y: y.reshape(y.shape[0], 4, 2, 4, 2, 4).max((2, 4)),
    "reshape and mean": lambda y: y.reshape(y.shape[0], 4, 2, 4, 2, 4).mean((2, 4)),
    "global mean": lambda y: y.mean((1, 2)),
    "global max": lambda y: y.max((1, 2)),
    "global mean, keepdims": lambda y: y.mean((1, 2), keepdims=True),
    "maximum of slices": lambda y: jnp.maximum(y[:, ::2], y[:, 1::2]),
    "cumulative maximum": lambda y: lax.cummax(y, 1),
}
for name, pool in WINDOWS.items():
    add(f"jax: {name}", behind_conv(pool))


def hk_pool(call: Callable[[Any, Any], Any]) -> Callable[[], Model]:
    return haiku(lambda hk, x: hk.Linear(5)(call(hk, hk.Conv2D(4, 3)(x)).mean((1, 2))))


add("haiku: max_pool(x, 2, 2, 'VALID')", hk_pool(lambda hk, y: hk.max_pool(y, 2, 2, "VALID")))
add(
    "haiku: max_pool(x, (1, 3, 3, 1), (1, 2, 2, 1), 'SAME')",
    hk_pool(lambda hk, y: hk.max_pool(y, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")),
)
add("haiku: avg_pool(x, 2, 2, 'VALID')", hk_pool(lambda hk, y: hk.avg_pool(y, 2, 2, "VALID")))
add("haiku: avg_pool(x, 3, 2, 'SAME')", hk_pool(lambda hk, y: hk.avg_pool(y, 3, 2, "SAME")))
add(
    "haiku: MaxPool((2, 2), (2, 2), 'SAME')",
    hk_pool(lambda hk, y: hk.MaxPool((2, 2, 1), (2, 2, 1), "SAME")(y)),
)


def keras_pool(layer: Callable[[Any], Any]) -> Callable[[], Model]:
    return keras_model(
        lambda k: [k.Conv2D(4, 3, padding="same"), layer(k), k.GlobalAveragePooling2D(), k.Dense(5)]
    )


add("keras: MaxPooling2D()", keras_pool(lambda k: k.MaxPooling2D()))
add("keras: MaxPooling2D(3, 2, 'same')", keras_pool(lambda k: k.MaxPooling2D(3, 2, "same")))
add("keras: AveragePooling2D(2)", keras_pool(lambda k: k.AveragePooling2D(2)))
add("keras: AveragePooling2D(3, 2, 'same')", keras_pool(lambda k: k.AveragePooling2D(3, 2, "same")))
add(
    "keras: GlobalMaxPooling2D()",
    keras_model(lambda k: [k.Conv2D(4, 3), k.GlobalMaxPooling2D(), k.Dense(5)]),
)
add(
    "keras: channels first",
    keras_model(
        lambda k: [
            k.Permute((3, 1, 2)),
            k.MaxPooling2D(data_format="channels_first"),
            k.Flatten(),
            k.Dense(5),
        ]
    ),
)


def eqx_pool(layer: Callable[[Any], Any]) -> Callable[[], Model]:
    def make(n: Any, key: Any) -> Any:
        return n.Sequential(
            [
                n.Conv2d(3, 4, 3, padding=1, key=key),
                layer(n),
                n.Lambda(lambda y: y.mean((1, 2))),
                n.Linear(4, 5, key=key),
            ]
        )

    return equinox(make)


add("equinox: MaxPool2d(2, 2)", eqx_pool(lambda n: n.MaxPool2d(2, 2)))
add("equinox: MaxPool2d(3, 2, 1)", eqx_pool(lambda n: n.MaxPool2d(3, 2, 1)))
add("equinox: AvgPool2d(2, 2)", eqx_pool(lambda n: n.AvgPool2d(2, 2)))
add("equinox: AvgPool2d(3, 2, 1)", eqx_pool(lambda n: n.AvgPool2d(3, 2, 1)))
add("equinox: AdaptiveAvgPool2d(2)", eqx_pool(lambda n: n.AdaptiveAvgPool2d(2)))
add("equinox: AdaptiveMaxPool2d(3)", eqx_pool(lambda n: n.AdaptiveMaxPool2d(3)))


# -- norms and dropout
# --------------------------------------------------------------------------------------------------
class LinenNorm(nn.Module):
    norm: Callable[[], Any]

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        y = nn.relu(self.norm()(nn.Conv(4, (3, 3), name="conv")(x)))
        return nn.Dense(5)(y.mean((1, 2)))


def linen_norm(norm: Callable[[], Any]) -> Callable[[], Model]:
    return linen(lambda: LinenNorm(norm))


add("linen: BatchNorm", linen_norm(lambda: nn.BatchNorm(use_running_average=True)))
add(
    "linen: BatchNorm without scale",
    linen_norm(lambda: nn.BatchNorm(use_running_average=True, use_scale=False)),
)
add(
    "linen: BatchNorm without bias",
    linen_norm(lambda: nn.BatchNorm(use_running_average=True, use_bias=False)),
)
add(
    "linen: BatchNorm(epsilon=.1)",
    linen_norm(lambda: nn.BatchNorm(use_running_average=True, epsilon=0.1)),
)
add("linen: GroupNorm(2)", linen_norm(lambda: nn.GroupNorm(2)))
add("linen: LayerNorm", linen_norm(lambda: nn.LayerNorm()))
add(
    "linen: LayerNorm over rows and channels",
    linen_norm(lambda: nn.LayerNorm(reduction_axes=(1, 2, 3))),
)
add("linen: RMSNorm", linen_norm(lambda: nn.RMSNorm()))
add("linen: InstanceNorm", linen_norm(lambda: nn.InstanceNorm()))
add("linen: WeightNorm", linen(lambda: nn.WeightNorm(nn.Dense(5)), ROWS))
add(
    "linen: Dropout",
    linen(sequence(nn.Dense(16), nn.relu, nn.Dropout(0.5, deterministic=True), nn.Dense(5)), ROWS),
)


class NnxNet(nnx.Module):
    def __init__(self, middle: Callable[[nnx.Rngs], Any], rngs: nnx.Rngs):
        self.conv, self.middle, self.head = (
            nnx.Conv(3, 4, (3, 3), rngs=rngs),
            middle(rngs),
            nnx.Linear(4, 5, rngs=rngs),
        )

    def __call__(self, x: Any) -> Any:
        return self.head(nnx.relu(self.middle(self.conv(x))).mean((1, 2)))


def nnx_net(middle: Callable[[nnx.Rngs], Any]) -> Callable[[], Model]:
    return nnx_model(lambda rngs: NnxNet(middle, rngs))


add("nnx: BatchNorm", nnx_net(lambda r: nnx.BatchNorm(4, rngs=r)))
add("nnx: GroupNorm(2)", nnx_net(lambda r: nnx.GroupNorm(4, num_groups=2, rngs=r)))
add("nnx: LayerNorm", nnx_net(lambda r: nnx.LayerNorm(4, rngs=r)))
add("nnx: RMSNorm", nnx_net(lambda r: nnx.RMSNorm(4, rngs=r)))
add("nnx: Dropout", nnx_net(lambda r: nnx.Dropout(0.5, rngs=r)))
add(
    "haiku: BatchNorm",
    haiku(
        lambda hk, x: hk.Linear(5)(
            hk.BatchNorm(True, True, 0.9)(hk.Conv2D(4, 3)(x), is_training=hk.running_init()).mean(
                (1, 2)
            )
        )
    ),
)
add(
    "haiku: LayerNorm",
    haiku(lambda hk, x: hk.Linear(5)(hk.LayerNorm(-1, True, True)(hk.Linear(16)(x))), ROWS),
)
add("haiku: RMSNorm", haiku(lambda hk, x: hk.Linear(5)(hk.RMSNorm(-1)(hk.Linear(16)(x))), ROWS))
add(
    "haiku: GroupNorm(2)",
    haiku(lambda hk, x: hk.Linear(5)(hk.GroupNorm(2)(hk.Conv2D(4, 3)(x)).mean((1, 2)))),
)
add("keras: BatchNormalization", keras_pool(lambda k: k.BatchNormalization()))
add("keras: LayerNormalization", keras_pool(lambda k: k.LayerNormalization()))
add("keras: GroupNormalization(2)", keras_pool(lambda k: k.GroupNormalization(2)))
add("keras: Dropout", keras_pool(lambda k: k.Dropout(0.5)))
add("equinox: GroupNorm(2)", eqx_pool(lambda n: n.GroupNorm(2, 4)))
add(
    "equinox: LayerNorm",
    equinox(
        lambda n, key: n.Sequential(
            [n.Linear(12, 16, key=key), n.LayerNorm(16), n.Linear(16, 5, key=key)]
        ),
        ROWS,
    ),
)
add(
    "equinox: RMSNorm",
    equinox(
        lambda n, key: n.Sequential(
            [n.Linear(12, 16, key=key), n.RMSNorm(16), n.Linear(16, 5, key=key)]
        ),
        ROWS,
    ),
)
add(
    "equinox: Dropout",
    equinox(
        lambda n, key: n.Sequential(
            [n.Linear(12, 16, key=key), n.Dropout(0.5, inference=True), n.Linear(16, 5, key=key)]
        ),
        ROWS,
    ),
)

# -- layouts, kinds of layers
# -------------------------------------------------------------------------------------------
CONVS = {
    "Conv SAME": lambda: nn.Conv(4, (3, 3)),
    "Conv stride 2": lambda: nn.Conv(4, (3, 3), (2, 2)),
    "Conv padding 1": lambda: nn.Conv(4, (3, 3), padding=1),
    "Conv padding in pairs": lambda: nn.Conv(4, (3, 3), padding=((1, 0), (0, 2))),
    "Conv dilated": lambda: nn.Conv(4, (3, 3), kernel_dilation=(2, 2)),
    "Conv grouped": lambda: nn.Conv(6, (3, 3), feature_group_count=3),
    "Conv depthwise, times 2": lambda: nn.Conv(6, (3, 3), feature_group_count=3, use_bias=False),
    "Conv without bias": lambda: nn.Conv(4, (3, 3), use_bias=False),
    "Conv circular": lambda: nn.Conv(4, (3, 3), padding="CIRCULAR"),
    "Conv reflected": lambda: nn.Conv(4, (3, 3), padding="REFLECT"),
    "Conv of an input dilated": lambda: nn.Conv(
        4, (3, 3), padding=((1, 1), (1, 1)), input_dilation=(2, 2)
    ),
    "ConvTranspose": lambda: nn.ConvTranspose(4, (3, 3), (2, 2)),
    "ConvTranspose VALID": lambda: nn.ConvTranspose(4, (3, 3), (2, 2), padding="VALID"),
    "ConvTranspose(transpose_kernel=True)": lambda: nn.ConvTranspose(
        4, (3, 3), (2, 2), transpose_kernel=True
    ),
    "ConvLocal": lambda: nn.ConvLocal(4, (3, 3)),
    "DenseGeneral on rank 4": lambda: nn.DenseGeneral(5),
    "DenseGeneral over two axes": lambda: nn.DenseGeneral(5, axis=(-2, -1)),
    "DenseGeneral to two axes": lambda: nn.DenseGeneral((2, 3)),
}
for name, layer in CONVS.items():
    add(
        f"linen: {name}",
        linen(sequence(layer(), nn.relu, lambda y: y.reshape(y.shape[0], -1), nn.Dense(5))),
    )
add("linen: Conv of one axis", linen(sequence(nn.Conv(4, (3,)), nn.relu), WORDS))
add("linen: Conv causal", linen(sequence(nn.Conv(4, (3,), padding="CAUSAL"), nn.relu), WORDS))
add("linen: Conv of three axes", linen(sequence(nn.Conv(4, (3, 3, 3)), nn.relu), (2, 5, 5, 5, 3)))
add("linen: Dense", linen(sequence(nn.Dense(16), nn.relu, nn.Dense(5)), ROWS))
add("linen: Dense on rank 3", linen(sequence(nn.Dense(16), nn.relu, nn.Dense(5)), WORDS))
add(
    "linen: DenseGeneral on rank 2",
    linen(sequence(nn.DenseGeneral(16), nn.relu, nn.DenseGeneral(5)), ROWS),
)
add(
    "linen: DenseGeneral on rank 2 to two axes",
    linen(sequence(nn.DenseGeneral((2, 8)), nn.relu, nn.DenseGeneral(5, axis=(-2, -1))), ROWS),
)
add(
    "linen: DenseGeneral with batch axes",
    linen(sequence(nn.DenseGeneral(5, axis=-1, batch_dims=(0,))), (4, 3, 8)),
)
add("linen: Einsum", linen(sequence(nn.Einsum((12, 2, 8), "bi,ijk->bjk"), nn.relu), ROWS))
add(
    "nnx: Linear",
    nnx_model(
        lambda r: nnx.Sequential(nnx.Linear(12, 16, rngs=r), nnx.relu, nnx.Linear(16, 5, rngs=r)),
        ROWS,
    ),
)
add(
    "nnx: LinearGeneral over two axes",
    nnx_model(lambda r: nnx.LinearGeneral((6, 8), 5, axis=(-2, -1), rngs=r), WORDS),
)
add("nnx: Conv stride 2", nnx_model(lambda r: nnx.Conv(3, 4, (3, 3), strides=2, rngs=r)))
add("nnx: ConvTranspose", nnx_model(lambda r: nnx.ConvTranspose(3, 4, (3, 3), strides=2, rngs=r)))
add("nnx: Einsum", nnx_model(lambda r: nnx.Einsum("bi,ijk->bjk", (12, 2, 8), rngs=r), ROWS))
add("linen: GRU", linen(lambda: nn.RNN(nn.GRUCell(5)), WORDS))


def nnx_lstm() -> Model:
    """Return a layer whose cell draws its initial state: the merge must copy, or `jit` refuses it."""
    module = nnx.RNN(nnx.LSTMCell(8, 5, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return lambda p, x: nnx.merge(graph, p, rest, copy=True)(x), params, normal(0, WORDS)


add("nnx: LSTM", nnx_lstm)
add(
    "haiku: Conv2D channels first",
    haiku(lambda hk, x: hk.Conv2D(4, 3, data_format="NCHW")(x), (4, 3, 8, 8)),
)
add("haiku: Conv2DTranspose", haiku(lambda hk, x: hk.Conv2DTranspose(4, 3, 2)(x)))
add("haiku: DepthwiseConv2D", haiku(lambda hk, x: hk.DepthwiseConv2D(2, 3)(x)))
add("haiku: nets.MLP", haiku(lambda hk, x: hk.nets.MLP([16, 5])(x), ROWS))
add("haiku: Linear", haiku(lambda hk, x: hk.Linear(5)(jax.nn.relu(hk.Linear(16)(x))), ROWS))
add(
    "keras: Conv2D strides 2",
    keras_model(lambda k: [k.Conv2D(4, 3, strides=2, activation="relu"), k.Flatten(), k.Dense(5)]),
)
add(
    "keras: Conv2DTranspose",
    keras_model(lambda k: [k.Conv2DTranspose(4, 3, strides=2, padding="same")]),
)
add(
    "keras: DepthwiseConv2D",
    keras_model(
        lambda k: [k.DepthwiseConv2D(3, depth_multiplier=2), k.GlobalAveragePooling2D(), k.Dense(5)]
    ),
)
add(
    "keras: SeparableConv2D",
    keras_model(lambda k: [k.SeparableConv2D(4, 3), k.GlobalAveragePooling2D(), k.Dense(5)]),
)
add(
    "keras: EinsumDense",
    keras_model(lambda k: [k.EinsumDense("abc,cde->abde", (None, 2, 4))], WORDS),
)
add("equinox: Linear", equinox(lambda n, key: n.MLP(12, 5, 16, 1, key=key), ROWS))
add("equinox: Conv2d stride 2", equinox(lambda n, key: n.Conv2d(3, 4, 3, 2, key=key)))
add("equinox: ConvTranspose2d", equinox(lambda n, key: n.ConvTranspose2d(3, 4, 3, 2, key=key)))


def weights(
    fn: Callable[..., Any], x: tuple[int, ...], **shapes: tuple[int, ...]
) -> Callable[[], Model]:
    params = {name: normal(i + 1, shape) / 3 for i, (name, shape) in enumerate(shapes.items())}
    return lambda: (fn, jax.tree.map(jnp.asarray, params), normal(0, x))


OIHW = ("NCHW", "OIHW", "NCHW")
add(
    "jax: kernel [out, in]",
    weights(lambda p, x: jax.nn.relu(x @ p["w"].T) @ p["v"].T, ROWS, w=(16, 12), v=(5, 16)),
)
add(
    "jax: dot_general on [out, in]",
    weights(lambda p, x: lax.dot_general(x, p["w"], (((1,), (1,)), ((), ()))), ROWS, w=(5, 12)),
)
add("jax: w @ x, features first", weights(lambda p, x: (p["w"] @ x.T).T, ROWS, w=(5, 12)))
add(
    "jax: conv NCHW, OIHW",
    weights(
        lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=OIHW),
        (4, 3, 8, 8),
        w=(4, 3, 3, 3),
    ),
)
add(
    "jax: conv NHWC, OIHW",
    weights(
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC")
        ),
        IMAGES,
        w=(4, 3, 3, 3),
    ),
)
add(
    "jax: conv_transpose",
    weights(lambda p, x: lax.conv_transpose(x, p["w"], (2, 2), "SAME"), IMAGES, w=(3, 3, 3, 4)),
)
add(
    "jax: einsum of experts",
    weights(lambda p, x: jnp.einsum("becd,edf->becf", x, p["w"]), (4, 3, 5, 8), w=(3, 8, 6)),
)
add(
    "jax: einsum of heads",
    weights(lambda p, x: jnp.einsum("btd,dhk->bthk", x, p["w"]), WORDS, w=(8, 2, 4)),
)
add(
    "jax: einsum back from heads",
    weights(lambda p, x: jnp.einsum("bthk,hkd->btd", x, p["w"]), (4, 6, 2, 4), w=(2, 4, 8)),
)
add(
    "jax: a tied table",
    weights(lambda p, x: jax.nn.softmax(x @ p["table"].T) @ p["table"], (4, 8), table=(11, 8)),
)
add(
    "jax: a joined kernel, split",
    weights(lambda p, x: jax.nn.silu((h := x @ p["w"])[:, :8]) * h[:, 8:], ROWS, w=(12, 16)),
)
add(
    "jax: layers in a scan",
    weights(
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0],
        (4, 8),
        w=(3, 8, 8),
    ),
)
add(
    "jax: the same kernel twice",
    weights(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], (4, 8), w=(8, 8)),
)
add(
    "jax: a product with a constant",
    weights(lambda p, x: (x @ p["w"]) @ jnp.eye(5), ROWS, w=(12, 5)),
)

# -- activations
# --------------------------------------------------------------------------------------------------------
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": jax.nn.gelu,
    "gelu exact": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "relu6": jax.nn.relu6,
    "hard_swish": jax.nn.hard_swish,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.2),
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "mish": jax.nn.mish,
    "softplus": jax.nn.softplus,
    "log_softmax": jax.nn.log_softmax,
    "softmax(axis=0)": lambda x: jax.nn.softmax(x, axis=0),
    "glu": lambda x: jnp.concatenate([jax.nn.glu(x)] * 2, -1),
    "squareplus": jax.nn.squareplus,
    "maximum(x, 0)": lambda x: jnp.maximum(x, 0),
    "where(x > 0, x, 0)": lambda x: jnp.where(x > 0, x, 0),
    "clip(x, 0, 6)": lambda x: jnp.clip(x, 0, 6),
    "x * sigmoid(1.702 x)": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "square of relu": lambda x: jnp.square(jax.nn.relu(x)),
    "identity": lambda x: x,
}
for name, layer in ACTIVATIONS.items():
    add(f"jax: {name}", behind_dense(layer))
add("linen: PReLU", linen(sequence(nn.Dense(16), nn.PReLU(), nn.Dense(5)), ROWS))

# -- attention
# ----------------------------------------------------------------------------------------------------------
add("linen: SelfAttention", linen(lambda: nn.SelfAttention(2, deterministic=True), WORDS))
add(
    "linen: MultiHeadDotProductAttention",
    linen(lambda: nn.MultiHeadDotProductAttention(2, deterministic=True), WORDS),
)
add(
    "nnx: MultiHeadAttention",
    nnx_model(lambda r: nnx.MultiHeadAttention(2, 8, decode=False, rngs=r), WORDS),
)
add(
    "haiku: MultiHeadAttention",
    haiku(
        lambda hk, x: hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling())(
            x, x, x
        ),
        WORDS,
    ),
)
add(
    "equinox: MultiheadAttention",
    equinox(lambda n, key: Attend(n.MultiheadAttention(2, 8, key=key)), WORDS),
)


class Attend:  # registered below: a pytree that hands one array to query, key and value
    def __init__(self, layer: Any):
        self.layer = layer

    def __call__(self, x: Any) -> Any:
        return self.layer(x, x, x)


jax.tree_util.register_pytree_with_keys(
    Attend,
    lambda a: (((jax.tree_util.GetAttrKey("layer"), a.layer),), None),
    lambda _, kids: Attend(*kids),
)


def attention(p: Any, x: Any) -> Any:
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in ("q", "k", "v"))
    return jnp.einsum("bthk,hkd->btd", jax.nn.dot_product_attention(q, k, v), p["o"])


HEADS = {"q": (8, 2, 4), "k": (8, 2, 4), "v": (8, 2, 4), "o": (2, 4, 8)}
add("jax: dot_product_attention", weights(attention, WORDS, **HEADS))
add(
    "jax: attention, masked",
    weights(
        lambda p, x: (
            jax.nn.softmax(
                jnp.where(
                    jnp.tri(6, dtype=bool), jnp.einsum("btd,bsd->bts", x @ p["q"], x @ p["k"]), -1e9
                )
            )
            @ x
        ),
        WORDS,
        q=(8, 8),
        k=(8, 8),
    ),
)
