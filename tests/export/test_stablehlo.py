"""A StableHLO program holds packed weights and computes what the library computes."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core.errors import ExportError
from compress_jax.export._stablehlo import to_stablehlo
from compress_jax.models import DSCNN, Bert, BertClassifier, LeNet5, LeNet300100, ResNet, ViT

pytest.importorskip(
    "flatbuffers", reason="jax.export writes its files with the package flatbuffers"
)

STRANGER = """
import sys, jax, numpy as np, safetensors.numpy
folder, *names = sys.argv[1:]
x = np.load(f"{folder}/x.npy")
for name in names:
    program = jax.export.deserialize(bytearray(open(f"{folder}/{name}.stablehlo", "rb").read()))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    weights = ()
    if name.startswith("arguments"):
        weights = (safetensors.numpy.load_file(f"{folder}/{name}.safetensors"),)
    np.save(f"{folder}/{name}.npy", program.call(*weights, x))
assert not [name for name in sys.modules if name.split(".")[0] in ("compress_jax", "flax", "optax")]
"""


def fn(params, x):
    return jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None]) @ params["b"]["kernel"]


def layers(width=256):
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = (jax.random.normal(key, (width, width)) / width**0.5 for key in keys[:2])
    return {"a": {"kernel": a, "bias": jax.random.normal(keys[2], (width,))}, "b": {"kernel": b}}


def packed(compression, params):
    c = cj.at("**/kernel", compression)
    return c.pack(params, c.update(params, c.init(params), step=jnp.asarray(0)))


FORMS = {
    "float32": (None, 32),
    "int8": (cj.quantize.uniform(8, granularity="channel"), 8),
    "int4": (cj.quantize.uniform(4, granularity=32), 5),  # and a float32 scale for 32 codes
    "int3": (cj.quantize.uniform(3), 3),
    "nvfp4": (cj.quantize.nvfp4(), 4.5),
    "sparse": (cj.chain(cj.prune.magnitude(0.9), cj.cluster.kmeans(8)), 1),
    "lowrank": (cj.lowrank.svd(rank=16), 4),
}


def strangers(tmp_path, kinds):
    """Export, let a process that knows only JAX compute, and compare."""
    params, x = layers(), np.asarray(jax.random.normal(jax.random.key(1), (5, 256)))
    np.save(tmp_path / "x.npy", x)
    wanted = {}
    for weights, form in kinds:
        name, (compression, bits) = f"{weights}-{form}", FORMS[form]
        small = packed(compression, params) if compression else params
        exported = to_stablehlo(
            fn, small, jnp.asarray(x[:2]), tmp_path / f"{name}.stablehlo", weights=weights
        )
        files = [tmp_path / f"{name}.stablehlo", tmp_path / f"{name}.safetensors"]
        assert exported.nbytes == sum(file.stat().st_size for file in files if file.exists())
        assert exported.nbytes < bits / 8 * 2 * 256**2 + 16_384, name  # bias, program
        wanted[name] = fn(cj.unpack(small), x)
    subprocess.run([sys.executable, "-c", STRANGER, str(tmp_path), *wanted], check=True)
    for name, logits in wanted.items():
        np.testing.assert_allclose(
            np.load(tmp_path / f"{name}.npy"), logits, rtol=1e-4, atol=1e-5, err_msg=name
        )


@pytest.mark.slow
def test_a_process_without_this_package_computes_the_same_from_packed_weights(tmp_path):
    strangers(tmp_path, [("constants", "int4"), ("arguments", "sparse")])


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["constants", "arguments"])
def test_every_form_runs_in_a_process_without_this_package(weights, tmp_path):
    strangers(tmp_path, [(weights, form) for form in FORMS])


@pytest.mark.slow
def test_the_rows_tell_how_each_parameter_is_stored(tmp_path):
    exported = to_stablehlo(
        fn, packed(FORMS["int8"][0], layers(8)), jnp.ones((1, 8)), tmp_path / "m.stablehlo"
    )
    assert {row.name: row.form.split(",")[:2] for row in exported.rows} == {
        "a/bias": ["float32", " 32 bytes"],
        "a/kernel": ["Quantized", " 8 bits"],
        "b/kernel": ["Quantized", " 8 bits"],
    }
    assert exported.difference < 1e-6


def test_two_inputs_share_the_symbolic_batch_and_an_example_may_fix_it(tmp_path):
    def both(params, x, y):
        return x @ params["w"] + y

    params, file = {"w": jnp.eye(3)}, tmp_path / "m.stablehlo"
    to_stablehlo(both, params, (jnp.ones((2, 3)), jnp.ones((2, 3))), file)
    assert jax.export.deserialize(bytearray(file.read_bytes())).call(
        jnp.ones((7, 3)), jnp.ones((7, 3))
    ).shape == (7, 3)
    to_stablehlo(
        both,
        params,
        (jnp.ones((2, 3)), jnp.ones((2, 3))),
        file,
        batch="example",
        platforms=("cpu",),
    )
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    assert (program.platforms, program.in_avals[0].shape) == (("cpu",), (2, 3))


def test_bfloat16_leaves_go_through_either_way(tmp_path):
    params, file = {"w": jnp.asarray([[1.5, -2.25]], jnp.bfloat16)}, tmp_path / "m.stablehlo"
    for weights in ("constants", "arguments"):
        exported = to_stablehlo(
            lambda p, x: x @ p["w"].astype(jnp.float32),
            params,
            jnp.ones((1, 1)),
            file,
            weights=weights,
        )
        assert exported.difference == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fn": lambda p, x: x.reshape(int(x.shape[0]), 3)}, "pass batch='example'"),
        ({"fn": lambda p, x: x if x.shape[0] == 2 else x + 1}, "results differ by"),
        ({"fn": lambda p, x: p["no such leaf"]}, "KeyError.*no such leaf"),
        ({"example": jnp.ones(())}, r"shape \(\) has no axis of examples"),
        ({"weights": "elsewhere"}, "'elsewhere'"),
        ({"path": "m.safetensors", "weights": "arguments"}, "the weights would have"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_a_reason(tmp_path, arguments, words):
    given = {
        "fn": lambda p, x: x @ p["w"],
        "params": {"w": jnp.eye(3)},
        "example": jnp.ones((2, 3)),
        "path": "m.stablehlo",
    }
    given |= arguments
    given["path"] = tmp_path / given["path"]
    with pytest.raises(ExportError, match=words):
        to_stablehlo(**given)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (LeNet300100(), jnp.ones((2, 28, 28, 1))),
        (LeNet5(), jnp.ones((2, 32, 32, 1))),
        (ResNet(20), jnp.ones((2, 32, 32, 3))),
        (ViT(depth=2), jnp.ones((2, 32, 32, 3))),
        (
            BertClassifier(Bert(width=128, depth=2, heads=2)),
            jnp.array([[101, 7592, 102], [101, 102, 0]]),
        ),
        (DSCNN(), jnp.ones((2, 49, 10, 1))),
    ],
    ids=["mlp", "lenet5", "resnet20", "vit", "bert-tiny", "ds-cnn"],
)
def test_every_reference_network_is_exported_at_its_packed_size(model, x, bits, tmp_path):
    variables = jax.jit(model.init)(jax.random.key(0), x)
    if bits:
        c = cj.at(("**/kernel", "**/embedding"), cj.quantize.uniform(bits, granularity="channel"))
        variables = {
            **variables,
            "params": c.pack(variables["params"], c.init(variables["params"])),
        }
    exported = to_stablehlo(model.apply, variables, x, tmp_path / "m.stablehlo")
    assert exported.difference < 1e-5
    assert exported.nbytes < cj.core.nbytes(variables) + 150_000
