"""Decoders with the sizes of shrunk params give what the shrunk functions give."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core.errors import ShapeError, WeightsError

CONFIG = cj.models.DecoderConfig(20, 8, 3, heads=8, kv_heads=4, head_width=2, hidden=12)
LEARNED = replace(CONFIG, heads=4, kv_heads=2, head_width=4, norm="layer", positions=8)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 6)), jnp.int32)


def decoder(config, scan=False):
    model = cj.models.Decoder(config, scan=scan)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    params = jax.tree.map(lambda x: x * 4, params)
    return model, params, lambda p, x: model.apply({"params": p}, x)


def shrunk(fn, params, ratio):
    return cj.prune.shrink(fn, params, TOKENS, ratio=ratio)


@pytest.mark.parametrize("scan", [False, True])
def test_width_heads_and_hidden(scan):
    model, params, fn = decoder(CONFIG, scan)
    ratio = {"tokens/**": 0.25, "**/mlp/**": 0.5, f"**/query/kernel:{1 + scan}": 0.5}
    small = shrunk(fn, params, ratio)
    fit, own = cj.models.fitted(model, {"params": small.params})
    c = fit.config
    assert (c.width, c.heads, c.kv_heads, c.head_width, c.hidden) == (6, 4, 2, 2, 6)
    expected = small.fn(small.params, TOKENS)
    np.testing.assert_allclose(fit.apply(own, TOKENS), expected, rtol=1e-4, atol=1e-4)
    written = cj.models.generate(fit, own["params"], [TOKENS[0].tolist()], 1)  # with a cache
    assert written.tokens == [[int(expected[0, -1].argmax())]]


def test_queries_that_share_keys_after_layers_left():
    model, params, fn = decoder(CONFIG)
    short = cj.prune.drop_blocks(fn, params, batches=[TOKENS, TOKENS + 0], count=1, by="cosine")
    small = shrunk(short.fn, short.params, {"**/query/kernel:1#2": 0.5})
    fit, own = cj.models.fitted(model, small.params)
    assert (fit.config.depth, fit.config.heads, fit.config.kv_heads) == (2, 4, 4)
    assert sorted(own) == ["layer_0", "layer_1", "norm", "tokens"]
    expected = small.fn(small.params, TOKENS)
    np.testing.assert_allclose(fit.apply({"params": own}, TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_features_of_heads_keep_their_scale():
    model, params, fn = decoder(LEARNED)
    small = shrunk(fn, params, {"**/query/kernel:1#3": 0.5, "**/value/**": 0.5})
    with pytest.raises(WeightsError, match="heads may be 2, 4 features wide"):
        cj.models.fitted(model, small.params)
    fit, own = cj.models.fitted(model, small.params, head_width=2)
    assert fit.config.query_scale == 0.5 and fit.config.heads == 4
    expected = small.fn(small.params, TOKENS)
    np.testing.assert_allclose(fit.apply({"params": own}, TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_irregular_sizes_are_refused():
    model, params, fn = decoder(CONFIG)
    with pytest.raises(ShapeError, match="layers differ.*mlp/down/kernel"):
        cj.models.fitted(model, shrunk(fn, params, {"layer_1/mlp/**": 0.5}).params)
    with pytest.raises(ShapeError, match="as wide for values"):
        cj.models.fitted(model, shrunk(fn, params, {"**/value/**": 0.5}).params)
    mixed = replace(CONFIG, sliding=(True, False, False), window=2)
    model, params, _ = decoder(mixed, scan=True)
    params["layers"] = jax.tree.map(lambda x: x[:2], params["layers"])
    with pytest.raises(WeightsError, match="say which"):
        cj.models.fitted(model, params)
