"""An artifact leaf by leaf is the artifact, and every byte of it is accounted for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core import ArtifactError
from compress_jax.core.paths import flatten
from compress_jax.export._artifact.breakdown import breakdown
from compress_jax.export._coding import streams
from compress_jax.export._coding.stream import stream
from tests.export.test_artifact import METADATA, PACKED, bits


@pytest.mark.parametrize("coded", [False, True])
def test_the_leaves_are_those_of_the_whole(coded, tmp_path):
    cj.save(tmp_path / "f", PACKED, METADATA, coded=coded)
    whole, parts = flatten(cj.load(tmp_path / "f")[0])[0], dict(stream(tmp_path / "f"))
    assert sorted(parts) == sorted(whole)
    assert all(bits(parts[path]) == bits(whole[path]) for path in whole)


def test_no_leaf_is_decoded_before_it_is_asked_for(tmp_path, monkeypatch):
    codes = jnp.asarray(np.random.default_rng(0).geometric(0.7, 4096) % 4)
    tree = {name: cj.core.packed.Bits.pack(codes, 2) for name in "abc"}
    cj.save(tmp_path / "f", tree, coded=True)
    done, repacked = [], streams.repacked
    monkeypatch.setattr(streams, "repacked", lambda *of: done.append(of) or repacked(*of))
    found = stream(tmp_path / "f")
    for number, (_, leaf) in enumerate(found, start=1):
        assert len(done) == number
        np.testing.assert_array_equal(leaf.unpack(), codes)


def test_a_damaged_file_yields_no_leaf(tmp_path):
    cj.save(tmp_path / "f", PACKED, coded=True)
    content = bytearray((tmp_path / "f").read_bytes())
    content[-1] ^= 1
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ArtifactError, match="checksum"):
        next(stream(tmp_path / "f"))


@pytest.mark.parametrize("coded", [False, True])
def test_the_parts_add_up_to_the_file(coded, tmp_path):
    written = cj.save(tmp_path / "f", PACKED, METADATA, coded=coded)
    parts = breakdown(tmp_path / "f")
    assert sum(part.nbytes for part in parts) == pytest.approx(written)
    assert {part.path for part in parts} == {*flatten(PACKED)[0], ""} and min(
        part.nbytes for part in parts
    ) >= 0


@pytest.mark.slow
def test_codes_count_as_their_entropy_and_the_rest_as_it_is_compressed(tmp_path):
    w = jax.random.normal(jax.random.key(0), (256, 256))
    c = cj.chain(cj.prune.magnitude(0.9), cj.cluster.kmeans(15, iterations=5))
    state = c.init({"w": w})
    cj.save(tmp_path / "f", c.pack({"w": w}, state), coded=True)
    seen = np.asarray(c.view({"w": w}, state)["w"])
    counts = np.unique(seen, return_counts=True)[1]
    symbols = {part.cause: part.nbytes for part in breakdown(tmp_path / "f")}
    zeros = np.array([counts.max(), counts.sum() - counts.max()])
    kept = np.delete(counts, counts.argmax())
    for cause, each in (("mask", zeros), ("values", kept)):
        wanted = -(each * np.log2(each / each.sum())).sum() / 8
        assert symbols[cause] == pytest.approx(wanted, rel=0.01)
    assert 30 < symbols["codebook"] < 90  # fifteen float32 numbers
