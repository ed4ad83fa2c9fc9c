"""Keys and values in few bits: against float64, in any pieces, beside any other row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.quantize._activations.kv_grid import EntryLevels
from compress_jax.quantize._rewrites.rotate import rotation
from tests.models import decoder_reference
from tests.models.test_decoder import CONFIGS, TOKENS, quiet, written

KVGrid = cj.quantize.KVGrid
GRIDS = {
    "4 bits": KVGrid(4, 4, block=4),
    "2 and 3 bits, groups": KVGrid(2, 3, block=3, group=2),
    "by token": KVGrid(4, 2, keys="token", block=1),
    "by token, rotated": KVGrid(3, 4, keys="token", block=5, rotate=True),
}
CONFIG = cj.models.DecoderConfig(
    53, 16, 2, heads=4, kv_heads=2, head_width=4, hidden=24, sliding=(True, False), window=6
)
PROMPTS = [[3, 9, 27, 1, 50, 7], [4], [8, 8, 12]]


def rounded(x, bits, axis):
    """Round float64 ``[tokens, features]`` to levels between the extremes along an axis."""
    low = x.min(axis, keepdims=True).astype(np.float16).astype(np.float64)
    scale = (x.max(axis, keepdims=True) - low) / (2**bits - 1)
    scale = np.maximum(scale, 2.0**-14).astype(np.float16).astype(np.float64)
    return low + scale * np.clip(np.round((x - low) / scale), 0, 2**bits - 1)


def attention_on(grid):
    """Return attention of one head, float64, as if tokens came one at a time."""

    def attend(q, k, v, scale, window):
        if grid.rotate:
            turn = rotation(q.shape[1], jax.random.key(0))
            q, k = q @ turn, k @ turn
        size = v.shape[1] if grid.group is None else grid.group
        key_size = 1 if grid.keys == "channel" else size
        out = []
        for t in range(len(q)):
            keys, values = k.copy(), v.copy()
            for block in range(0, t // grid.block * grid.block, grid.block):
                own = slice(block, block + grid.block)
                axis = 0 if grid.keys == "channel" else 1
                for i in range(0, v.shape[1], key_size):
                    part = keys[own, i : i + key_size]
                    keys[own, i : i + key_size] = rounded(part, grid.key_bits, axis)
                for i in range(0, v.shape[1], size):
                    part = values[own, i : i + size]
                    values[own, i : i + size] = rounded(part, grid.value_bits, 1)
            first = 0 if window is None else max(0, t - window + 1)
            shares = decoder_reference._softmax(scale * (keys[first : t + 1] @ q[t]))
            out.append(shares @ values[first : t + 1])
        return np.array(out)

    return attend


@pytest.mark.parametrize(
    "name, grid", list(zip(["llama", "mistral"] * 2, GRIDS.values(), strict=True)), ids=GRIDS
)
def test_logits_are_those_of_float64(name, grid, tmp_path, monkeypatch):
    config = CONFIGS[name]
    w = decoder_reference.weights(config, np.random.default_rng(0))
    model, params, _ = cj.models.load(written(tmp_path, config, w), scan=True, log_fn=quiet)
    ours = jax.jit(cj.models.with_cache(model, grid))(params, TOKENS[None])[0]
    plain = decoder_reference.logits(config, w, TOKENS)
    monkeypatch.setattr(decoder_reference, "_attend", attention_on(grid))
    theirs = decoder_reference.logits(config, w, TOKENS)
    size = np.abs(theirs).max()
    assert np.abs(ours - theirs).max() < 3e-5 * size
    assert np.abs(plain - theirs).max() > 1e-3 * size  # the grid is felt


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scan"])
def decoder(request):
    model = cj.models.Decoder(CONFIG, scan=request.param)
    params = jax.jit(model.init)(jax.random.key(1), jnp.ones((1, 1), jnp.int32))["params"]
    return model, jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, params)


@pytest.mark.parametrize("grid", [GRIDS["2 and 3 bits, groups"], GRIDS["by token, rotated"]])
def test_pieces_of_any_lengths_and_padding_change_nothing(decoder, grid):
    model, params = decoder
    rows = np.stack([TOKENS % 53, TOKENS[::-1] % 53])
    whole = jax.jit(cj.models.with_cache(model, grid))(params, rows)
    cache = model.cache(2, capacity=19, grid=grid)
    apply = jax.jit(model.apply)
    place = np.zeros(2, int)
    # Tokens of each row that count; what is behind them is padding.
    for counts in ((3, 1), (1, 5), (5, 2), (1, 1), (5, 5), (4, 5)):
        tokens = np.full((2, 5), 7)
        for row, count in enumerate(counts):
            tokens[row, :count] = rows[row, place[row] : place[row] + count]
        lengths = jnp.array(counts, jnp.int32)
        found, cache = apply({"params": params}, tokens, cache=cache, lengths=lengths)
        for row, count in enumerate(counts):
            expected = whole[row, place[row] : place[row] + count]
            assert np.abs(found[row, :count] - expected).max() < 1e-5 * np.abs(whole).max()
        place += counts
    assert cache.length.tolist() == [19, 19]


@pytest.mark.parametrize("decoder", [True], indirect=True, ids=["scan"])
def test_rows_are_continued_alike_whatever_stands_beside_them(decoder):
    model, params = decoder
    grid = GRIDS["2 and 3 bits, groups"]
    together = cj.models.generate(model, params, PROMPTS, 12, grid=grid).tokens
    for row in (1, 2):  # those with padding
        alone = cj.models.generate(model, params, [PROMPTS[row]], 12, grid=grid).tokens
        assert together[row] == alone[0]


@pytest.mark.parametrize("decoder", [True], indirect=True, ids=["scan"])
def test_more_bits_are_nearer_and_blocks_that_are_never_full_are_exact(decoder):
    model, params = decoder
    params = jax.tree.map(lambda x: x / 3 if x.ndim > 1 else x, params)  # not chaotic
    rows = TOKENS[None] % 53
    plain = jax.jit(model.apply)({"params": params}, rows)

    def error(**options):
        found = jax.jit(cj.models.with_cache(model, KVGrid(**options)))(params, rows)
        return float(jnp.abs(found - plain).mean() / jnp.abs(plain).mean())

    errors = [error(key_bits=bits, value_bits=bits, block=4) for bits in (2, 4, 8)]
    assert errors[0] > 2 * errors[1] > 10 * errors[2] and errors[2] < 0.01
    assert error(block=32) < 1e-6
    assert error(block=32, rotate=True) < 1e-6  # a rotation alone changes no score


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("by_channel", [False, True])
def test_levels_are_within_half_a_step_and_codes_take_their_bits(bits, by_channel):
    levels = EntryLevels(bits, by_channel, block=8, group=None if by_channel else 3)
    rng = np.random.default_rng(bits)
    # Channels far from zero, as keys have them.
    x = (rng.normal(size=(5, 8, 2, 6)) + 20 * rng.normal(size=(1, 1, 2, 6))).astype(np.float32)
    coded = levels.encode(jnp.asarray(x))
    found = np.asarray(levels.decode(coded, 2, 6), np.float64)
    axes = (1,) if by_channel else (4,)
    grouped = x.reshape(5, 8, 2, -1, 6 if by_channel else 3)
    span = np.ptp(grouped, axis=axes, keepdims=True)
    step = np.broadcast_to(span / (2**bits - 1), grouped.shape).reshape(x.shape)
    # The lowest level is a float16, and so is the step, which counts 2**bits times.
    slack = np.abs(x).max() * 2**-11 + step * 2**bits * 2**-11
    assert (np.abs(found - x) <= step / 2 + slack).all()
    assert coded.codes.shape == (5, 8, -(-12 * bits // 8))
    again = levels.encode(jnp.asarray(found, jnp.float32))
    assert np.abs(levels.decode(again, 2, 6) - found).max() <= slack.max()


@pytest.mark.parametrize("decoder", [True], indirect=True, ids=["scan"])
def test_a_cache_is_as_small_as_its_bits(decoder):
    model, _ = decoder
    grid = KVGrid(4, 2, block=32)
    cache = model.cache(3, capacity=60, grid=grid)
    assert cache.capacity == 64
    entries = 2 * 3 * 64 * 2 * 4  # layers, rows, tokens, heads, features
    codes = entries * 4 // 8 + entries * 2 // 8
    scales = 4 * (entries // 32 + entries // 4)  # two float16 for each set of keys, of values
    floats = 2 * 4 * entries // 2  # one block of two, of keys and of values
    assert cache.nbytes == codes + scales + floats
    assert model.cache(3, capacity=64).nbytes == 2 * 4 * entries


def test_nan_spoils_what_shares_its_scale_and_nothing_else():
    levels = EntryLevels(4, False, block=2)
    x = jnp.ones((2, 2, 1, 4)).at[0, 1, 0, 2].set(jnp.nan).at[1, 0, 0, 0].set(-jnp.inf)
    found = np.isnan(levels.decode(levels.encode(x), 1, 4)).any(-1)[..., 0]
    assert found.tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("decoder", [True], indirect=True, ids=["scan"])
def test_wrong_grids_are_refused(decoder):
    model, params = decoder
    for options, said in (
        ({"key_bits": 1}, "key_bits must be a whole number from 2 to 8"),
        ({"value_bits": 9}, "value_bits"),
        ({"keys": "head"}, "keys"),
        ({"block": 0}, "block"),
        ({"group": 0}, "group"),
        ({"rotate": 1}, "rotate"),
    ):
        with pytest.raises(ArgumentError, match=said):
            KVGrid(**options)
    with pytest.raises(ShapeError, match="groups of 3 do not divide the 4 features"):
        model.cache(1, 8, grid=KVGrid(group=3))
    small = model.cache(1, 3, grid=KVGrid(block=2))
    with pytest.raises(ArgumentError, match="do not fit into a cache of 4"):
        model.apply({"params": params}, jnp.ones((1, 5), jnp.int32), cache=small)
