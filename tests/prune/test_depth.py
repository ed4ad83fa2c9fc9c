"""Blocks that are dropped: what is found, what is skipped, what is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import compress_jax as cj
from compress_jax.core.errors import ConfigError, NoMatchError, ShapeError
from compress_jax.core.paths import flatten

RNG = np.random.default_rng(0)
DEPTH = 4
SIZES = (1.0, 0.01, 0.3, 2.0)  # the second block changes least
PARAMS = {
    f"layer_{i}": {
        "up": jnp.asarray(RNG.normal(size=(5, 7)) * size, jnp.float32),
        "down": jnp.asarray(RNG.normal(size=(7, 5)), jnp.float32),
    }
    for i, size in enumerate(SIZES)
} | {"head": jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)}
BATCHES = [jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32) for _ in range(4)]


def residual(p, x):
    for i in range(DEPTH):
        x = x + jnp.tanh(x @ p[f"layer_{i}"]["up"]) @ p[f"layer_{i}"]["down"]
    return x @ p["head"]


def stacked(p, x):
    body = lambda x, own: (x + jnp.tanh(x @ own["up"]) @ own["down"], None)  # noqa: E731
    return jax.lax.scan(body, x, p["layers"])[0] @ p["head"]


def stack(p):
    layers = [p[f"layer_{i}"] for i in range(DEPTH)]
    return {"layers": jax.tree.map(lambda *own: jnp.stack(own), *layers), "head": p["head"]}


def by_numpy(x, kept):
    """Return the outputs of the blocks that are kept, and the influence of all, in float64."""
    x = np.asarray(x, np.float64)
    influence = []
    for i in range(DEPTH):
        up, down = (np.asarray(PARAMS[f"layer_{i}"][name], np.float64) for name in ("up", "down"))
        y = x + np.tanh(x @ up) @ down
        cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        influence.append(1 - cosine.mean())
        x = y if i in kept else x
    return x @ np.asarray(PARAMS["head"], np.float64), influence


def backwards(p, x):
    body = lambda x, own: (x + jnp.tanh(x @ own["up"]) @ own["down"], None)  # noqa: E731
    return jax.lax.scan(body, x, p["layers"], reverse=True)[0] @ p["head"]


CASES = {
    "unrolled": (residual, PARAMS),
    "scanned": (stacked, stack(PARAMS)),
    "inside jit": (jax.jit(residual), PARAMS),
}


@pytest.mark.parametrize("name", CASES)
def test_against_numpy(name):
    fn, params = CASES[name]
    small = cj.prune.drop_blocks(fn, params, batches=BATCHES, count=2, by="cosine")
    expected = np.mean([by_numpy(x, range(DEPTH))[1] for x in BATCHES[:3]], 0)
    found = [row.influence["cosine"] for row in small.table.rows]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    kept = sorted(np.argsort(expected)[2:].tolist())
    assert list(small.kept) == kept
    left, full = by_numpy(BATCHES[3], kept)[0], by_numpy(BATCHES[3], range(DEPTH))[0]
    np.testing.assert_allclose(small.fn(small.params, BATCHES[3]), left, rtol=1e-4, atol=1e-4)
    error = np.square(left - full).sum() / np.square(full).sum()
    np.testing.assert_allclose(small.table.judged[0].distance, error, rtol=1e-3)
    assert small.table.after.params == small.table.before.params - 2 * 70
    if name == "scanned":
        assert small.params["layers"]["up"].shape == (2, 5, 7)
        np.testing.assert_array_equal(
            small.params["layers"]["up"], params["layers"]["up"][np.array(kept)]
        )
    else:
        assert sorted(small.params) == ["head", *(f"layer_{i}" for i in kept)]


def test_the_nearer_of_two_criteria_is_taken_and_what_is_missed_least_goes():
    runs = []

    def distance(small, full):
        runs.append(1)  # once a compilation
        return jnp.square(small - full)

    small = cj.prune.drop_blocks(residual, PARAMS, batches=BATCHES, count=1, distance=distance)
    assert len(runs) == 1 and 1 not in small.kept
    judged = {each.name: each.distance for each in small.table.judged}
    taken = next(each.name for each in small.table.judged if each.taken)
    assert judged[taken] == min(judged.values())
    alone = [
        np.mean([np.square(by_numpy(x, {0, 1, 2, 3} - {i})[0] - by_numpy(x, range(4))[0]).mean()
                 for x in BATCHES[:3]])
        for i in range(DEPTH)
    ]  # fmt: skip
    found = [row.influence["distance"] for row in small.table.rows]
    np.testing.assert_allclose(found, alone, rtol=1e-3)
    assert "by distance: distance" in str(small.table)


def test_what_is_left_trains_casts_and_is_shrunk_again():
    small = cj.prune.drop_blocks(residual, PARAMS, batches=BATCHES, ratio=0.5, by="cosine")
    gradient = jax.grad(lambda p: small.fn(p, BATCHES[0]).sum())(small.params)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small.params)
    assert small.fn(half, BATCHES[0].astype(jnp.bfloat16)[:2]).dtype == jnp.bfloat16
    narrow = cj.prune.shrink(small.fn, small.params, BATCHES[0], ratio={"*/up:1": 0.5})
    assert narrow.fn(narrow.params, BATCHES[0]).shape == (6, 3)
    again = cj.prune.drop_blocks(small.fn, small.params, batches=BATCHES, count=1, by="cosine")
    assert len(again.kept) == 1
    with pytest.raises(ShapeError, match="without the blocks"):
        small.fn(PARAMS, BATCHES[0])


class Layer(nn.Module):
    post: bool

    @nn.compact
    def __call__(self, x, mask):
        attention = nn.MultiHeadDotProductAttention(2, name="attention")
        norm = nn.LayerNorm(name="norm")
        y = x + attention(x, x, mask=mask) if self.post else x + attention(norm(x), mask=mask)
        y = norm(y) if self.post else y
        return y + nn.Dense(8, name="down")(nn.relu(nn.Dense(12, name="up")(y)))


class Encoder(nn.Module):
    """A foreign transformer, whose layers share a mask."""

    post: bool = False
    layers: tuple[int, ...] = (0, 1, 2)

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="embed")(x)
        mask = (jnp.arange(x.shape[1])[:, None] >= jnp.arange(x.shape[1])[None])[None, None]
        for i in self.layers:
            x = Layer(self.post, name=f"layer_{i}")(x, mask)
        return nn.Dense(3, name="out")(nn.LayerNorm(name="final")(x).mean(1))


def test_a_scan_that_runs_backwards_begins_at_its_end():
    flipped = {**stack(PARAMS), "layers": jax.tree.map(lambda x: x[::-1], stack(PARAMS)["layers"])}
    small = cj.prune.drop_blocks(backwards, flipped, batches=BATCHES, count=1, by="cosine")
    same = cj.prune.drop_blocks(stacked, stack(PARAMS), batches=BATCHES, count=1, by="cosine")
    assert small.kept == same.kept and small.table.rows[0].block == "layers[3]"
    np.testing.assert_allclose(
        small.fn(small.params, BATCHES[0]), same.fn(same.params, BATCHES[0]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("post", [False, True])
def test_a_foreign_transformer_is_the_one_with_fewer_layers(post):
    x = jnp.asarray(RNG.normal(size=(2, 4, 5)), jnp.float32)
    model = Encoder(post)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    found = cj.trace.blocks(model.apply, variables, x)
    able = [block.name for block in found.found if not block.reason]
    assert able == [f"params/layer_{i}" for i in range(3)]
    for gone in range(3):
        smaller, run = found.without(variables, [f"params/layer_{gone}"])
        left = Encoder(post, tuple(i for i in range(3) if i != gone))
        np.testing.assert_allclose(run(smaller, x), left.apply(smaller, x), rtol=1e-5, atol=1e-6)


CONFIG = cj.models.DecoderConfig(
    20, 8, 3, heads=4, kv_heads=2, head_width=2, hidden=12, sliding=(True, False, True), window=2
)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_a_decoder_without_its_middle_layer(scan, remat):
    model = cj.models.Decoder(CONFIG, scan=scan, remat=remat)
    tokens = jnp.asarray(RNG.integers(0, 20, (2, 6)), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda x: x * 4, params)  # so that layers matter
    fn = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    found = cj.trace.blocks(fn, params, tokens)
    smaller, run = found.without(params, [found.found[1].name])
    fit, own = cj.models.fitted(model, smaller, layers=(0, 2))
    assert fit.config.depth == 2 and fit.config.sliding == (True, True)
    np.testing.assert_allclose(
        run(smaller, tokens), fit.apply({"params": own}, tokens), rtol=1e-4, atol=1e-4
    )


def test_what_cannot_be_skipped_says_why():
    wide = lambda p, x: jnp.tanh(x @ p["layer_0"]) @ p["layer_1"]  # noqa: E731
    params = {"layer_0": jnp.ones((5, 5)), "layer_1": jnp.ones((5, 3))}
    found = cj.trace.blocks(wide, params, BATCHES[0])
    assert [block.reason for block in found.found] == ["no other block has leaves like its own"] * 2
    named = cj.trace.blocks(wide, params, BATCHES[0], patterns=["layer_0", "layer_1"])
    assert [bool(block.reason) for block in named.found] == [False, True]
    with pytest.raises(ShapeError, match="no single value"):
        named.without(params, ["layer_1"])
    # A branch made of another leaf's values on the way is no block of its own.
    normed = lambda p, x: x + (x * p["scale"][None]) @ p["w"]  # noqa: E731
    params = {"scale": jnp.ones(5), "w": jnp.ones((5, 5))}
    branch = cj.trace.blocks(normed, params, BATCHES[0], patterns=["w"]).found
    assert "no single value" in branch[0].reason
    both = cj.trace.blocks(normed, params, BATCHES[0], patterns=[("w", "scale")]).found
    assert not both[0].reason
    used = lambda p, x: stacked(p, x) + p["layers"]["up"].sum()  # noqa: E731
    loop = cj.trace.blocks(used, stack(PARAMS), BATCHES[0]).found
    assert {block.reason for block in loop} == {"its leaves are used outside the loop too"}


def test_lists_and_excluded_blocks():
    params = {"blocks": [PARAMS[f"layer_{i}"] for i in range(DEPTH)], "head": PARAMS["head"]}

    def fn(p, x):
        for own in p["blocks"]:
            x = x + jnp.tanh(x @ own["up"]) @ own["down"]
        return x @ p["head"]

    options = {"batches": BATCHES, "count": 1, "by": "cosine"}
    least = cj.prune.drop_blocks(fn, params, **options).kept
    first = ({0, 1, 2, 3} - set(least)).pop()
    small = cj.prune.drop_blocks(fn, params, exclude=f"blocks/{first}", **options)
    assert first in small.kept and small.table.rows[first].reason == "excluded"
    gone = ({0, 1, 2, 3} - set(small.kept)).pop()
    assert small.params["blocks"][gone] == {"up": None, "down": None}
    assert len(flatten(small.params)[0]) == 7
    with pytest.raises(NoMatchError):
        cj.prune.drop_blocks(fn, params, exclude="nothing", **options)
    with pytest.raises(ConfigError, match="4 can be skipped"):
        cj.prune.drop_blocks(fn, params, batches=BATCHES, count=4)
    with pytest.raises(ConfigError, match="say how much"):
        cj.prune.drop_blocks(fn, params, batches=BATCHES)
