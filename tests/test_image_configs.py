"""The configs of images, on a few small files: they run from the files to what is exported."""

import dataclasses
import functools
import io
import json
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import compress_jax as cj
from compress_jax.cli import main
from compress_jax.cli.config import load_config

CONFIGS = Path(__file__).parents[1] / "configs"


def picture(rng, color, height=40):
    """Noise of a color, which differs from all others."""
    pixels = rng.integers(0, 256, (height, 44, 3)).astype(np.uint8)
    pixels[..., color] = 200
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    """Three classes of thirty images each, JPEG and PNG, of several sizes."""
    rng = np.random.default_rng(0)
    for color, name in enumerate(("red", "green", "blue")):
        place = tmp_path / "images" / name
        place.mkdir(parents=True)
        for i in range(30):
            picture(rng, color, 40 + i % 7).save(place / f"{i}.{('jpg', 'png')[i % 2]}")
    return tmp_path / "images"


@pytest.mark.slow
def test_resnet50_resnet18_runs_from_a_folder(folder, tmp_path, monkeypatch):
    """From weights with torchvision's names; with a block a stage, and few channels."""
    narrow = functools.partial(cj.models.ImageNetResNet, width=4)

    def small(blocks=(2, 2, 2, 2), **options):
        return narrow(blocks=(1,) * len(blocks), **options)

    monkeypatch.setattr(cj.models, "ImageNetResNet", small)
    monkeypatch.setattr("compress_jax.report._page.pictures", lambda run: {})
    words = ["--images", str(folder), "--size", "32", "--batch-size", "8", "--max-drop", "0.99"]
    for stage in ("teacher", "student", "candidate"):
        words += [f"--{stage}-steps", "2"]
    words += ["--teacher", str(torchvision_file(small, tmp_path))]
    config, work = str(CONFIGS / "resnet50_resnet18.py"), str(tmp_path / "work")
    assert main(["run", config, "--workdir", work, *words]) == 0
    results = json.loads((tmp_path / "work" / "results.json").read_text())
    assert {"int8", "prune-80-int8"} <= {row["name"] for row in results["rows"]}
    assert main(["eval", work]) == 0
    assert main(["export", work, "--to", "stablehlo"]) == 0


def torchvision_file(small, place):
    """Random weights with torchvision's names, in a safetensors file."""
    import safetensors.numpy

    from compress_jax.core.paths import flatten
    from compress_jax.models.pretrained import RESNET, _torch_name

    model = small(blocks=(3, 4, 6, 3), bottleneck=True, classes=1000)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(1)
    weights = {}
    for path, x in flatten(shapes)[0].items():
        value = np.abs(rng.normal(0.1, 0.1, x.shape)).astype(np.float32)
        if path.endswith("/kernel"):
            value = np.transpose(value, (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)))
        weights[_torch_name(path, RESNET)] = np.ascontiguousarray(value)
    safetensors.numpy.save_file(weights, place / "resnet50.safetensors")
    return place / "resnet50.safetensors"


@pytest.mark.slow
def test_efficientnet_lite0_agrees_with_itself(tmp_path, monkeypatch):
    """With few channels and random weights: out of an archive of photos, to the end."""
    rng = np.random.default_rng(0)
    archive = tmp_path / "pictures.tgz"
    with tarfile.open(archive, "w:gz") as file:
        for i in range(40):
            content = io.BytesIO()
            picture(rng, i % 3).save(content, "jpeg")
            info = tarfile.TarInfo(f"package/assets/{i}.jpeg")
            info.size = len(content.getvalue())
            file.addfile(info, io.BytesIO(content.getvalue()))
    network = cj.models.EfficientNetLite(width=0.1, depth=0.1, classes=12)
    drawn = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    monkeypatch.setattr(cj.models, "load_efficientnet_lite", lambda path: (network, drawn))
    monkeypatch.setattr(cj.data, "npm_archive", lambda *package: archive)
    function = load_config(CONFIGS / "efficientnet_lite0.py")
    made = function(size=32, steps=2, batch_size=8, depthwise="conv", max_drop=0.99)
    sizes = [len(getattr(made.data, part)["image"]) for part in ("train", "validation", "test")]
    assert sizes == [24, 6, 10]
    assert float(made.data.train["image"].min()) >= -127 / 128
    params = dict(drawn)["params"]
    _, _, state = made.student.pure.train(
        params, {"batch_stats": drawn["batch_stats"]}, (made.data.train["image"][:4],),
        jax.random.key(0), None,
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], drawn["batch_stats"])
    assert [row.name for row in made.candidates][2:] == [
        "int4-gptq", "int4-trained", "prune-50-int8-trained",
    ]  # fmt: skip
    few = dataclasses.replace(made, candidates=made.candidates[-1:])
    result = cj.search.compress(few, tmp_path / "work", log_fn=lambda line: None)
    student, chosen = result.rows
    assert student.test == 1 and chosen.nbytes < student.nbytes / 2
