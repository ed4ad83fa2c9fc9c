"""Operations against XLA's own analysis of the program it is given, before it optimises."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, value_and_grad

from compress_jax.trace._cost import cost
from tests.trace.zoo import BIG, ZOO

ENTRIES = {entry.name: entry for entry in (*ZOO, *BIG)}


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def analysed(fn, *args):
    """Return FLOPs and transcendental functions as XLA counts them before it optimizes."""
    found = jax.jit(fn).lower(*args).cost_analysis() or {}
    return found.get("flops", 0), found.get("transcendentals", 0)


def attention(params, x):
    q, k, v = (x @ params[name] for name in ("q", "k", "v"))
    return jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2.0) @ v


def normalised(params, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6) @ params["w"]


def convolve(x, w, stride=1, padding="VALID", **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=numbers, **options
    )


def biggest(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def backward(params, x):
    """A function and its gradient; XLA would not multiply by a cotangent that is the constant 1."""
    out, gradient = jax.vjp(lambda params: jnp.sin(convolve(x, params["w"])), params)
    return out, gradient(out)


SQUARE, IMAGE, KERNEL = ones(6, 6), ones(2, 9, 9, 4), {"w": ones(3, 3, 4, 8)}
EXACT = {
    "mlp": (lambda p, x: jax.nn.relu(x @ p["w"]) @ p["w"], {"w": SQUARE}, ones(5, 6)),
    "gelu": (lambda p, x: jax.nn.gelu(x @ p["w"]), {"w": SQUARE}, ones(5, 6)),
    "silu": (lambda p, x: jax.nn.silu(x @ p["w"]), {"w": SQUARE}, ones(5, 6)),
    "attention": (attention, dict.fromkeys("qkv", SQUARE), ones(2, 5, 6)),
    "normalised": (normalised, {"w": SQUARE}, ones(5, 6)),
    "convolution": (lambda p, x: convolve(x, p["w"], 2), KERNEL, IMAGE),
    "grouped": (
        lambda p, x: convolve(x, p["w"], feature_group_count=2),
        {"w": ones(3, 3, 2, 8)},
        IMAGE,
    ),
    "depthwise": (
        lambda p, x: convolve(x, p["w"], feature_group_count=4),
        {"w": ones(3, 3, 1, 8)},
        IMAGE,
    ),
    "dilated": (lambda p, x: convolve(x, p["w"], rhs_dilation=(2, 2)), KERNEL, IMAGE),
    "transposed": (lambda p, x: lax.conv_transpose(x, p["w"], (2, 2), "VALID"), KERNEL, IMAGE),
    "gradient of a convolution": (backward, KERNEL, IMAGE),
    "gradient of a maximum": (
        value_and_grad(lambda p, x: biggest(x * p["w"]).sum()),
        {"w": IMAGE},
        IMAGE,
    ),
    "statistics": (lambda p, x: (x @ p["w"]).var(0) / x.max(0), {"w": SQUARE}, ones(5, 6)),
    "vmapped": (
        lambda p, x: jax.vmap(lambda row: jnp.tanh(row @ p["w"]))(x),
        {"w": SQUARE},
        ones(5, 6),
    ),
    "nested": (
        lambda p, x: jax.jit(jax.checkpoint(lambda y: jnp.exp(y @ p["w"])))(x),
        {"w": SQUARE},
        ones(5, 6),
    ),
    "cast": (
        lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
        {"w": SQUARE},
        ones(5, 6),
    ),
    "updated": (lambda p, x: (x @ p["w"]).at[:2].add(x[:2]), {"w": SQUARE}, ones(5, 6)),
}


@pytest.mark.wide(10)
@pytest.mark.parametrize("name", EXACT)
def test_flops_are_those_of_xla_exactly(name):
    fn, *args = EXACT[name]
    total = cost(fn, *args)
    assert (total.flops, total.transcendentals) == analysed(fn, *args)
    assert total.flops > 0


ONE_EACH = """neg sign floor ceil round is_finite abs square
    exp log expm1 log1p tanh sin cos tan atan erf sqrt rsqrt cbrt"""
TWO_EACH = "add sub mul div rem max min pow atan2 eq ne lt gt"


@pytest.mark.parametrize(("names", "operands"), [(ONE_EACH, 1), (TWO_EACH, 2)])
def test_an_operation_on_elements_is_one_for_xla_too(names, operands):
    for name in names.split():
        fn = partial(lambda run, params, *rest: run(params, *rest), getattr(lax, name))
        args = [ones(3, 5)] * operands
        total = cost(fn, *args)
        assert (total.flops, total.transcendentals) == analysed(fn, *args), name
        assert total.flops + total.transcendentals == 15, name


@pytest.mark.parametrize("exponent", [-2, -1, 2, 3, 4, 5, 7, 8])
def test_integer_powers_are_products(exponent):
    fn = lambda x: lax.integer_pow(x, exponent)  # noqa: E731
    assert cost(fn, ones(3, 5)).flops == analysed(fn, ones(3, 5))[0] > 0


def on_padding(site):
    """Products with elements of the padding, which XLA leaves out; one axis after the other."""
    if site.kind != "conv":
        return 0
    numbers, p = site.params["dimension_numbers"], site.params
    real = 1
    for axis, (low, _) in enumerate(p["padding"]):
        size, window, out = (
            shape[spec[2 + axis]]
            for shape, spec in zip(
                (site.lhs_shape, site.rhs_shape, site.out_shape), numbers, strict=True
            )
        )
        start = np.arange(out)[:, None] * p["window_strides"][axis] - low
        at = start + np.arange(window) * p["rhs_dilation"][axis]
        dilation = p["lhs_dilation"][axis]
        real *= int(((at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)).sum())
    out, kernel = site.out_shape, site.rhs_shape
    return (
        site.macs
        - real * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    )


STRAIGHT = [
    "mlp",
    "lenet",
    "resnet",
    "resnet_train",
    "vit",
    "moe",
    "mobilenet",
    "unet",
    "tied_lm",
]  # without loops


@pytest.mark.wide(2)
@pytest.mark.parametrize(
    "name",
    [
        *(f"{name}/{kind}" for name in STRAIGHT for kind in ("linen", "nnx")),
        *(entry.name for entry in BIG),
    ],
)
def test_models_cost_what_xla_says_once_padding_is_left_out(name):
    """Not exactly: XLA adds in float32, guards indices out of range and folds constants."""
    fn, variables, inputs = ENTRIES[name].make()
    total = cost(fn, variables, *inputs)
    flops, transcendentals = analysed(fn, variables, *inputs)
    padding = 2 * sum(on_padding(each.site) for each in total.by_site.values())
    assert total.flops - padding == pytest.approx(flops, rel=3e-3 if "tied_lm" in name else 3e-6)
    assert total.transcendentals == pytest.approx(transcendentals, rel=1e-3)
