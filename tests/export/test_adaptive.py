"""Adaptive coding: a reader written from its page, every tensor back, and no file that hurts."""

import hashlib
import itertools
import json
import math
import sys
import time
from pathlib import Path

import constriction
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

import compress_jax as cj
from compress_jax.core import ArtifactError
from compress_jax.core.bits import Bits
from compress_jax.export._artifact import structure
from compress_jax.export._artifact.breakdown import breakdown
from compress_jax.export._artifact.compact import written_coded
from compress_jax.export._artifact.container import rowed
from compress_jax.export._coding import adaptive
from compress_jax.export._coding.adaptive import Decoder, Settings, Tensor, choose, cost, encode
from compress_jax.export._coding.streams import code
from tests.export.test_artifact import bits as all_bits
from tests.export.test_streams import entropy

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "faults"))
import mutations  # noqa: E402 # pyright: ignore[reportMissingImports]

QUEUE, MODELS = constriction.stream.queue, constriction.stream.model  # pyright: ignore


def ragged(seed: int, shape: tuple[int, ...], bits: int, center: int) -> np.ndarray:
    """Return symbols whose size differs by row and by column, clipped to their range."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(size=shape[-1:])) * np.exp(rng.normal(size=(*shape[:-1], 1)))
    levels = np.round(rng.laplace(size=shape) * size * 2 ** (bits - 4))
    return np.clip(center + levels, 0, 2**bits - 1).astype(int).ravel()


def on_paths(symbols, bits, shape, transposed) -> np.ndarray:
    """Move symbols to levels that their columns' paths allow."""
    middle = 2 ** (bits - 1)
    levels = (symbols - middle).reshape(-1, shape[-1])
    levels = (levels.T if transposed else levels).copy()
    states = np.zeros(levels.shape[1], int)
    for row in levels:
        grid = states // 2
        row -= np.sign(row) * ((row + grid) % 2) * (row != 0)  # towards zero
        states = adaptive.NEXT[states, (np.abs(row) + grid * (row != 0)) // 2 % 2]
    return (levels.T if transposed else levels).ravel() + middle


@st.composite
def tensors(draw) -> Tensor:
    bits = draw(st.integers(1, 8))
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    center = draw(st.integers(0, 2**bits - 1))
    symbols = ragged(draw(st.integers(0, 2**32 - 1)), shape, bits, center)
    transposed = draw(st.booleans()) and math.prod(shape[:-1]) > 1
    mean = draw(st.integers(0, adaptive.CLASSES - 1))
    if draw(st.booleans()):
        found = Settings(2 ** (bits - 1), transposed, mean, paths=True)
        if adaptive.allowed(found, bits, shape):
            symbols = on_paths(symbols, bits, shape, transposed)
            return Tensor(symbols, bits, shape, found)
    return Tensor(symbols, bits, shape, Settings(center, transposed, mean))


@given(st.lists(tensors(), max_size=4))
@settings(max_examples=60, deadline=None)
def test_tensors_come_back_in_order(many):
    decoder = Decoder(encode(many))
    for each in many:
        back = decoder.symbols(each.bits, each.shape, each.settings)
        np.testing.assert_array_equal(back, each.symbols)
    decoder.close()


@pytest.mark.parametrize("shape", [(2, 70_000), (70_000, 2), (9, 20_000), (300_000,), (3, 3, 9, 7)])
def test_large_and_narrow_tensors_come_back(shape):
    symbols = ragged(0, shape, 5, 16)
    found, size = choose(symbols, 5, shape)
    words = encode([Tensor(symbols, 5, shape, found)])
    np.testing.assert_array_equal(Decoder(words).symbols(5, shape, found), symbols)
    assert size < 4 * len(words) < 1.01 * size + 8


def test_rows_wider_than_the_limit_are_cut(monkeypatch):
    monkeypatch.setattr(adaptive, "WIDEST", 50)
    symbols = ragged(0, (7, 130), 4, 8)
    own = Settings(8, False, 20)
    assert not adaptive.allowed(own._replace(transposed=True), 4, (7, 130))
    words = encode([Tensor(symbols, 4, (7, 130), own)])
    np.testing.assert_array_equal(Decoder(words).symbols(4, (7, 130), own), symbols)


def read(words, bits, rows, columns, center, mean, paths=False):
    """Read one tensor as the page of the format says, one symbol after the other."""
    quarters, middles = (4096, 4871, 5793, 6889), (4467, 5312, 6317, 7512)
    edges = [q * 2**o >> 6 for o in range(14) for q in quarters]
    means = [64, *(m * 2**o >> 6 for o in range(14) for m in middles)]
    top = 2**bits - 1 - center
    longest = max(center, top)
    counts = {}
    for grid, (which, m) in itertools.product((0, 1), enumerate(means)):
        t, own = 2**36 * 4096 // (4096 + m), []
        for _ in range((longest + 1) // 2 + 1 if paths else longest + 1):
            own.append((t >> 20) + 4)
            t = t * m // (4096 + m)
        counts[grid, which] = own
    signs = [16 * 4096] * 2
    decoder = QUEUE.RangeDecoder(words)

    def one(weights):
        share = np.array(weights, float) / sum(weights)
        return int(decoder.decode(MODELS.Categorical(share, perfect=False)))

    s, r, states = [16 * means[mean]] * columns, [16 * 4096] * columns, [0] * columns
    out = np.zeros((rows, columns), int)
    length = max(32, -(-rows * columns // 4096))
    assert length < 2 * columns
    for i in range(rows):
        a = b = 8 * means[mean]
        f = 4096
        c = [s[j] * 4096 // r[j] for j in range(columns)]
        index = {}
        for first in range(0, columns, length):
            piece = range(first, min(first + length, columns))
            grid = {j: states[j] // 2 if paths else 0 for j in piece}
            kind = {j: (grid[j], sum(e <= c[j] * f // 4096 for e in edges)) for j in piece}
            own = {j: one(counts[kind[j]]) for j in sorted(piece, key=lambda j: (kind[j], j))}  # noqa: B023
            index |= own
            size = {j: 2 * k - grid[j] * (k > 0) if paths else k for j, k in own.items()}
            both = [j for j in piece if 0 < size[j] <= min(center, top)]
            below = {j: size[j] > top for j in piece} | {j: bool(one(signs)) for j in both}
            for j in piece:
                out[i, j] = center - size[j] if below[j] else center + size[j]
                for offset, weight in ((0, 4096), (1, 1024), (-1, 1024)):
                    if (near := (grid[j], kind[j][1] + offset)) in counts:
                        counts[near][own[j]] += weight
            for j in both:
                signs[below[j]] += 4096
            a += 4096 * sum(own.values())
            b += sum(c[j] for j in piece)
            f = min(max(a * 4096 // b, 64), 2**18)
        for j in range(columns):
            states[j] = ((0, 2), (2, 0), (1, 3), (3, 1))[states[j]][index[j] % 2]
            s[j] += 4096 * index[j]
            r[j] += f
            if r[j] > 2**22:
                s[j], r[j] = s[j] // 2, r[j] // 2
    return out


@pytest.mark.parametrize(("bits", "center"), [(4, 8), (6, 29), (3, 0), (1, 0)])
def test_a_reader_written_from_the_page_reads_it(bits, center):
    shape = (40, 90)
    symbols = ragged(1, shape, bits, center)
    own = Settings(center, False, 23)
    words = encode([Tensor(symbols, bits, shape, own)])
    np.testing.assert_array_equal(read(words, bits, *shape, center, 23).ravel(), symbols)
    if center == 2 ** (bits - 1):
        symbols = on_paths(symbols, bits, shape, False)
        words = encode([Tensor(symbols, bits, shape, own._replace(paths=True))])
        back = read(words, bits, *shape, center, 23, paths=True)
        np.testing.assert_array_equal(back.ravel(), symbols)


def test_the_words_never_change():
    """Were this test to change, old files would be lost."""
    symbols = np.arange(6000) ** 2 % 7919 % 16 * (np.arange(6000) % 60 % 7 == 0)
    words = encode([Tensor(symbols, 4, (100, 60), Settings(3, t, 20)) for t in (False, True)])
    assert len(words) < 6000 * 4 / 32
    digest = hashlib.sha256(words.astype("<u4").tobytes()).hexdigest()
    assert digest == "7e68cd8be8f0e78dfea33292b6c98ca9cd858d6e31918e67382c9a24e784a430"


def test_what_neighbors_tell_is_not_paid_again():
    symbols = ragged(2, (200, 200), 6, 32)
    alike = np.random.default_rng(0).permutation(symbols)
    found, size = choose(symbols, 6, (200, 200))
    assert 8 * size < 0.91 * entropy(symbols)
    # Where there is nothing to tell, learning the counts is all that is lost.
    assert 8 * choose(alike, 6, (200, 200))[1] < 1.01 * entropy(symbols)
    assert size == cost(Tensor(symbols, 6, (200, 200), found))


def trained() -> dict:
    """Weights whose columns and rows differ in size, as those of trained networks do."""
    size = jnp.exp(jax.random.normal(jax.random.key(1), (120,)) / 2)
    kernel = jax.random.normal(jax.random.key(0), (200, 120)) * size[None, :]
    return {"kernel": kernel, "bias": jnp.linspace(-1, 1, 120)}


def test_a_file_has_it_where_it_is_smaller_and_is_read_whole_or_in_parts(tmp_path):
    params = trained()
    c = cj.quantize.rate_distortion()
    packed = c.pack(params, c.init(params))
    size = cj.save(tmp_path / "f", packed, coded=True)
    tree, tensors_ = structure.encode(packed)
    parts = [code(tree, tensors_, adaptively=flag) for flag in (False, True)]
    small, smaller = (len(x.ans) + len(x.adaptive) + len(x.rest) for x in parts)
    assert not parts[0].adaptive and parts[1].adaptive
    assert smaller < 0.985 * small and size < smaller + 300
    back, _ = cj.load(tmp_path / "f")
    assert all_bits(back) == all_bits(packed)
    leaves = dict(cj.export.stream(tmp_path / "f"))
    assert all(all_bits(leaves[name]) == all_bits(packed[name]) for name in packed)
    assert sum(part.nbytes for part in breakdown(tmp_path / "f")) == pytest.approx(size)
    with safetensors.safe_open(tmp_path / "f", "numpy") as file:
        assert file.metadata()["version"] == "4"


def test_many_symbols_in_few_bytes_are_left_to_the_tables():
    tree, tensors_ = structure.encode({"k": Bits.pack(jnp.zeros((4000, 500), int), 4)})
    assert not code(tree, tensors_).adaptive


WRONG = [
    {"streams": [[16, 0, 99]]},
    {"streams": [[64, 0, 20]]},
    {"streams": [[-1, 0, 20]]},
    {"streams": [[16, 4, 20]]},
    {"streams": [[16, -1, 20]]},
    {"streams": [[15, 2, 20]]},
    {"streams": [[16, 2, 20]]},
    {"streams": [[16, True, 20]]},
    {"streams": [[16, 0]]},
    {"streams": [[16, 0, 20.0]]},
    {"streams": [None]},
    {"adaptive": -4},
    {"adaptive": 2},
    {"adaptive": 0},
    {"adaptive": None},
    {"adaptive": 10**9},
]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_settings_and_sizes_that_are_not_so_are_refused(change, tmp_path):
    file = tmp_path / "f"
    codes = Bits.pack(jnp.asarray(ragged(3, (100, 60), 5, 16)).reshape(100, 60), 5)
    cj.save(file, {"codes": codes}, coded=True)

    def changed(content):
        assert len(content["coded"]["streams"][0]) == 3 and content["coded"]["adaptive"] > 100
        return {**content, "coded": content["coded"] | change}

    file.write_bytes(mutations.with_content(file.read_bytes(), changed))
    with pytest.raises(ArtifactError, match=f"^{file}: "):
        cj.load(file)


def test_a_row_has_no_columns_to_transpose(tmp_path):
    assert not adaptive.allowed(Settings(1, True, 0), 1, (7,))
    assert not adaptive.allowed(Settings(1, False, 0), 9, (7, 7))
    assert not adaptive.allowed(Settings(8, False, 0, paths=True), 4, (7,))
    assert not adaptive.allowed(Settings(8, False, 0, paths=True), 4, (10**6, 1))


@given(st.integers(0, 2**32 - 1), st.integers(0, 300))
@settings(max_examples=30, deadline=None)
def test_words_that_no_encoder_wrote_give_symbols_or_an_error(seed, size):
    words = np.random.default_rng(seed).integers(0, 2**32, size, dtype=np.uint32)
    decoder = Decoder(words)
    try:
        found = decoder.symbols(5, (30, 40), Settings(16, False, 20))
        decoder.close()
    except ArtifactError:
        return
    assert found.max() < 32


def test_a_few_bytes_that_claim_many_symbols_are_refused_in_time(tmp_path):
    file = tmp_path / "f"
    coded = {"ans": 0, "adaptive": 0, "streams": [[0, 0, 0]], "tables": [], "crc32": 0}
    content = {"tree": ["Bits", {"bits": 1, "shape": [10**7]}], "metadata": {}, "coded": coded}
    text = json.dumps(content, separators=(",", ":")).encode()
    file.write_bytes(rowed(mutations.described(text) + mutations.squeezed(b""), 4))
    start = time.perf_counter()
    with pytest.raises(ArtifactError, match="cannot be 10,000,000"):
        cj.load(file)
    assert time.perf_counter() - start < 1


def test_a_version_that_is_too_new_is_named_as_such(tmp_path):
    tree = structure.encode({"k": Bits.pack(jnp.arange(4), 2)})
    (tmp_path / "f").write_bytes(rowed(written_coded(*tree, {}).data, 5))
    with pytest.raises(ArtifactError, match="version 5.*upgrade"):
        cj.load(tmp_path / "f")
