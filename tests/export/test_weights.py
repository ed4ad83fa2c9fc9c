"""Weights for other frameworks: the evaluated numbers, under documented names."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import compress_jax as cj
from compress_jax.core.errors import ArtifactError, ExportError
from compress_jax.export._weights import to_safetensors
from compress_jax.models import Bert, ImageNetResNet, pretrained

PARAMS = {
    "params": {
        "conv": {
            "kernel": jax.random.normal(jax.random.key(0), (3, 3, 8, 4)),
            "bias": jnp.arange(4.0),
        }
    }
}


def packed(compression):
    c = cj.at("**/kernel", compression)
    return c.pack(PARAMS, c.update(PARAMS, c.init(PARAMS), step=jnp.asarray(0)))


@pytest.mark.slow
def test_dense_weights_are_bit_for_bit_the_unpacked_ones(tmp_path):
    small = packed(cj.chain(cj.prune.magnitude(0.5), cj.cluster.kmeans(4)))
    size = to_safetensors(small, tmp_path / "f", metadata={"accuracy": 0.5, "model": "conv"})
    assert size == (tmp_path / "f").stat().st_size
    read = safetensors.numpy.load_file(tmp_path / "f")
    assert sorted(read) == ["params/conv/bias", "params/conv/kernel"]
    np.testing.assert_array_equal(
        read["params/conv/kernel"], cj.unpack(small)["params"]["conv"]["kernel"]
    )
    with safetensors.safe_open(tmp_path / "f", "numpy") as file:
        strings = file.metadata()
    assert strings == {
        "format": "flax",
        "weights": "dense",
        "groups": "{}",
        "accuracy": "0.5",
        "model": "conv",
    }


@pytest.mark.wide(1)
@pytest.mark.parametrize(
    "compression",
    [
        cj.quantize.uniform(8),
        cj.quantize.uniform(4, symmetric=False, granularity="channel"),
        cj.quantize.uniform(3, granularity=24),
        cj.chain(
            cj.prune.magnitude(0.9), cj.quantize.uniform(4, symmetric=False, granularity="channel")
        ),
        cj.chain(cj.prune.magnitude(0.9), cj.quantize.uniform(4, granularity=24)),
    ],
    ids=["tensor", "channel", "groups", "pruned", "pruned groups"],
)
@pytest.mark.slow
def test_integers_give_the_array_by_the_documented_formula(compression, tmp_path):
    small = packed(compression)
    to_safetensors(small, tmp_path / "f", weights="integers")
    read, name = safetensors.numpy.load_file(tmp_path / "f"), "params/conv/kernel"
    with safetensors.safe_open(tmp_path / "f", "numpy") as file:
        groups = json.loads(file.metadata()["groups"])
    codes, scale, zero = (read[f"{name}.{end}"] for end in ("codes", "scale", "zero_point"))
    assert (codes.dtype, codes.shape) == (np.uint8, (3, 3, 8, 4))
    arranged = codes.reshape(-1, groups[name], 4) if groups else codes
    array = (
        (arranged.astype(np.int32) - zero.astype(np.int32)).astype(np.float32) * scale
    ).reshape(3, 3, 8, 4)
    np.testing.assert_array_equal(array, cj.unpack(small)["params"]["conv"]["kernel"])


@pytest.mark.parametrize("weights", ["dense", "integers"])
def test_pytorchs_layout_has_outputs_first(weights, tmp_path):
    to_safetensors(
        packed(cj.quantize.uniform(8, granularity="channel")),
        tmp_path / "f",
        layout="torch",
        weights=weights,
    )
    read = safetensors.numpy.load_file(tmp_path / "f")
    kernel = read["conv.weight"] if weights == "dense" else read["conv.weight.codes"] - 128.0
    assert kernel.shape == (4, 8, 3, 3) and "conv.bias" in read
    if weights == "integers":
        assert read["conv.weight.scale"].shape == (4, 1, 1, 1)
        kernel = (
            read["conv.weight.codes"] - read["conv.weight.zero_point"].astype(np.float32)
        ) * read["conv.weight.scale"]
    wanted = np.asarray(PARAMS["params"]["conv"]["kernel"])
    np.testing.assert_allclose(
        kernel.transpose(2, 3, 1, 0), wanted, atol=np.abs(wanted).max() / 250
    )


def test_statistics_and_tables_have_pytorchs_names(tmp_path):
    model = ImageNetResNet(blocks=(1,), width=4, classes=3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    to_safetensors(
        jax.tree.map(lambda x: jnp.ones(x.shape), shapes), tmp_path / "f", layout="torch"
    )
    names = set(safetensors.numpy.load_file(tmp_path / "f"))
    assert {
        "stem.weight",
        "stem_norm.weight",
        "stem_norm.running_var",
        "block_0_0.norm_1.running_mean",
        "head.bias",
    } <= names
    shapes = jax.eval_shape(Bert(20, 8, 1, 2).init, jax.random.key(0), jnp.zeros((1, 4), int))
    to_safetensors(
        jax.tree.map(lambda x: jnp.ones(x.shape), shapes), tmp_path / "f", layout="torch"
    )
    assert "tokens.weight" in pretrained.read(tmp_path / "f")


@pytest.mark.slow
def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ExportError, match="'conv.weight'"):
        to_safetensors(
            packed(cj.quantize.uniform(4, granularity=24)),
            tmp_path / "f",
            weights="integers",
            layout="torch",
        )
    with pytest.raises(ExportError, match="two leaves would be called 'a.weight'"):
        to_safetensors(
            {"a": {"kernel": jnp.ones(2), "scale": jnp.ones(2)}}, tmp_path / "f", layout="torch"
        )
    with pytest.raises(ArtifactError, match="metadata"):
        to_safetensors(PARAMS, tmp_path / "f", metadata={"model": object()})
    assert not list(tmp_path.iterdir())
