"""Keys and values on a grid in any attention, and rotations of what enters kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import compress_jax as cj
from compress_jax.core.errors import ArgumentError, NoMatchError, ShapeError

KVGrid = cj.quantize.KVGrid
CONFIG = cj.models.DecoderConfig(53, 16, 1, heads=4, kv_heads=2, head_width=4, hidden=24)
OURS = {"keys": ("**/key@query", "lhs"), "values": ("**/value@*", "lhs")}
FLAX = {"keys": ("query@key", "rhs"), "values": ("value@*", "lhs")}


@pytest.fixture(scope="module")
def decoder():
    model = cj.models.Decoder(CONFIG, scan=True)
    tokens = jax.random.randint(jax.random.key(2), (2, 7), 0, 53)
    params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
    noise = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    params = jax.tree.map(lambda x, y: 3 * x + 0.2 * y, params, noise)
    return model, params, tokens, lambda p, x: model.apply({"params": p}, x)


@pytest.mark.parametrize(
    "grid", [KVGrid(2, 3, block=4), KVGrid(3, 2, "token", block=4, group=2, rotate=True)]
)
def test_a_decoder_rounded_so_is_that_of_the_cache(decoder, grid):
    model, params, tokens, fn = decoder
    ruled = jax.jit(cj.quantize.round_kv(fn, grid, **OURS))(params, tokens)
    cached = jax.jit(cj.models.with_cache(model, grid))(params, tokens)
    plain = jax.jit(fn)(params, tokens)
    # One layer, and seven tokens: the last three see one block on the grid in both.
    size = np.abs(plain).max()
    assert np.abs(ruled[:, 4:] - cached[:, 4:]).max() < 2e-6 * size
    assert np.abs(plain[:, 4:] - cached[:, 4:]).max() > 1e-3 * size


def reference(x, p, key_bits, value_bits, block):
    """Attention of flax in float64, keys a channel, values a token."""

    def rounded(x, bits, axis):
        low = x.min(axis, keepdims=True).astype(np.float16).astype(np.float64)
        scale = ((x.max(axis, keepdims=True) - low) / (2**bits - 1)).astype(np.float16)
        return low + scale * np.clip(np.round((x - low) / scale), 0, 2**bits - 1)

    q, k, v = (
        np.einsum("btw,whd->bthd", x, p[n]["kernel"].astype(np.float64)) + p[n]["bias"]
        for n in ("query", "key", "value")
    )
    for begin in range(0, x.shape[1] // block * block, block):
        own = slice(begin, begin + block)
        k[:, own] = rounded(k[:, own], key_bits, 1)
        v[:, own] = rounded(v[:, own], value_bits, 3)
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    mixed = np.einsum("bhts,bshd->bthd", shares, v)
    return np.einsum("bthd,hdw->btw", mixed, p["out"]["kernel"]) + p["out"]["bias"]


def test_a_foreign_attention_is_that_of_float64():
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=12)
    x = jax.random.normal(jax.random.key(0), (2, 7, 8))
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    fn = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    plain = fn(params, x)
    theirs = jax.tree.map(np.asarray, params)
    wide = np.asarray(x, np.float64)
    errors = []
    for bits in ((2, 3), (8, 8)):
        found = jax.jit(cj.quantize.round_kv(fn, KVGrid(*bits, block=3), **FLAX))(params, x)
        assert np.abs(found - reference(wide, theirs, *bits, 3)).max() < 1e-5
        errors.append(float(jnp.abs(found - plain).max() / jnp.abs(plain).max()))
    assert errors[0] > 0.02 > 0.01 > errors[1] > 0

    # Derivatives are those of the identity: not zero, as those of rounding.
    ruled = cj.quantize.round_kv(fn, KVGrid(2, 2, block=7), **FLAX)
    slopes = jax.grad(lambda p: ruled(p, x).sum())(params)["key"]["kernel"]
    assert np.isfinite(slopes).all() and np.abs(slopes).max() > 0


def test_the_wrong_operand_is_refused(decoder):
    _, params, tokens, fn = decoder
    grid = KVGrid()
    keys, values = OURS.values()
    wrong = cj.quantize.round_kv(fn, grid, ("**/key@query", "rhs"), values)
    with pytest.raises(ShapeError, match="operand 'rhs' of site 'layers/attention/key@query'"):
        wrong(params, tokens)
    for operands in ((keys, ("**/nothing", "lhs")), (("nothing", "lhs"), values)):
        with pytest.raises(NoMatchError, match="nothing"):
            cj.quantize.round_kv(fn, grid, *operands)(params, tokens)
    with pytest.raises(ArgumentError, match="operand of values"):
        cj.quantize.round_kv(fn, grid, keys, ("b", "both"))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_a_decoder_without_tie_is_rotated_wholly(scan):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        rotated_wholly(scan)


def rotated_wholly(scan):
    # Widths that are no powers of two: 12 = 4 * 3, and 24 = 8 * 3 behind the activation.
    config = cj.models.DecoderConfig(53, 12, 2, heads=4, kv_heads=2, head_width=4, hidden=24)
    model = cj.models.Decoder(config, scan=scan, dtype=jnp.float64)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 53, (2, 7)), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(1), tokens)["params"]
    params = jax.tree.map(lambda x: 0.5 + jnp.asarray(rng.normal(size=x.shape)), shapes)
    plain = jax.jit(model.apply)({"params": params}, tokens)
    model, own = cj.models.untied(model, params)
    assert cj.models.untied(model, own) == (model, own)
    fn = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    result = cj.quantize.rotate(fn, own, tokens, key=jax.random.key(0))
    assert {"tokens/embedding", "head/kernel"} <= set(result.changed["tokens/embedding:1"])
    new, online = cj.quantize.rotate_inputs(
        fn, result.params, tokens, key=jax.random.key(3), pattern="**/down/kernel"
    )
    assert len(online.changed) == (1 if scan else 2)
    size = np.abs(plain).max()
    # Scores and rotary positions are float32 whatever the dtype; nothing else is.
    for run, p in ((fn, own), (fn, result.params), (new, online.params)):
        assert np.abs(jax.jit(run)(p, tokens) - plain).max() < 3e-7 * size
    # The new function alone has the rotation: without it the new params are others.
    assert np.abs(jax.jit(fn)(online.params, tokens) - plain).max() > 1e-2 * size
    with pytest.raises(NoMatchError, match="matches no site"):
        cj.quantize.rotate_inputs(fn, own, tokens, key=jax.random.key(3), pattern="**/nothing")
    with pytest.raises(ShapeError, match="no product with one contracted axis"):
        cj.quantize.rotate_inputs(fn, own, tokens, key=jax.random.key(3), pattern="**@query")
