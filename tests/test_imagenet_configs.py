"""The configs at the scale of ImageNet, through their arguments a thousandth as large."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from PIL import Image

import compress_jax as cj
from compress_jax.cli.config import build, load_config
from compress_jax.core.paths import flatten

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {"size": 32, "epochs": 0.2, "candidate_epochs": 0.5, "batch_size": 16, "max_drop": 0.99}
VIT = {"width": 32, "depth": 1, "teacher_width": 64, "teacher_depth": 2, **SMALL}
BIT = {"blocks": (1, 1, 1, 1), "width": 32, "teacher_blocks": (1, 1, 1, 1), "teacher_width": 32,
       **SMALL}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of forty images each."""
    rng = np.random.default_rng(0)
    place = tmp_path_factory.mktemp("images")
    for color, name in enumerate(("red", "green", "blue")):
        (place / name).mkdir()
        for i in range(40):
            pixels = rng.integers(0, 256, (36, 40, 3)).astype(np.uint8)
            pixels[..., color] = 200
            Image.fromarray(pixels).save(place / name / f"{i}.png")
    return place


def experiment(name, arguments):
    return build(load_config(CONFIGS / f"{name}.py"), arguments)


def run(made, place):
    # A network in bfloat16 whose logits are float32 mixes dtypes, as it does for users.
    with jax.numpy_dtype_promotion("standard"):
        return cj.search.compress(made, place, log_fn=lambda line: None)


def kernels(result, place, name):
    packed = cj.load(place / "candidates" / name / "artifact.safetensors")[0]
    leaves = flatten(cj.unpack(packed)["params"])[0]
    return {path: np.asarray(x) for path, x in leaves.items() if path.endswith("/kernel")}


@pytest.mark.slow
def test_vit_runs_from_a_folder_and_published_names_to_an_artifact(folder, tmp_path):
    """Divided over eight devices, two microbatches a step, the teacher's weights from a file."""
    import safetensors.numpy

    from compress_jax.models.pretrained import VIT as NAMES
    from compress_jax.models.pretrained import _torch_name

    first = experiment("vit_b16_vit_s16", {**VIT, "images": str(folder)})
    with jax.numpy_dtype_promotion("standard"):
        drawn = first.teacher.pure.init(jax.random.key(1), np.zeros((1, 32, 32, 3), np.float32))
    weights = {}
    for path, x in flatten(drawn)[0].items():
        value = np.asarray(x)
        if path.endswith("/kernel"):
            value = np.moveaxis(value, (-1, -2), (0, 1))
        weights[f"vit.{_torch_name(path, NAMES)}"] = np.ascontiguousarray(value)
    safetensors.numpy.save_file(weights, tmp_path / "teacher.safetensors")
    more = {"images": str(folder), "fsdp": 4, "microbatches": 2,
            "teacher": str(tmp_path / "teacher.safetensors")}  # fmt: skip
    with jax.numpy_dtype_promotion("standard"):
        made = experiment("vit_b16_vit_s16", {**VIT, **more})
    given = flatten(made.teacher.variables)[0]
    for path, x in flatten(drawn)[0].items():
        np.testing.assert_array_equal(given[path], x)
    assert made.data.train["image"][:].min() >= -1 and made.data.train["image"][:].max() <= 1
    result = run(made, tmp_path / "work")
    assert {row.name for row in result.rows} >= {"int8", "2-of-4-int8", "prune-50-int8"}
    found = kernels(result, tmp_path / "work", "2-of-4-int8")
    layers = [x for path, x in found.items() if path.startswith("layer_")]
    assert layers
    for x in layers:
        # [in, out]: of every four inputs at most two are left.
        assert ((x.reshape(-1, 4, x.shape[-1]) != 0).sum(1) <= 2).all()


@pytest.mark.slow
def test_bit_runs_from_a_folder_and_its_zeros_are_zeros_where_they_are_used(folder, tmp_path):
    made = experiment("resnet152x2_resnet50", {**BIT, "images": str(folder)})
    # One device: eight emulated ones take minutes, and the other config has them.
    one = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    result = run(dataclasses.replace(made, mesh=one), tmp_path)
    assert {row.name for row in result.rows} >= {"int8", "prune-80-int8"}
    found = kernels(result, tmp_path, "prune-80-int8")
    blocks = [x for path, x in found.items() if path.startswith("block_")]
    assert blocks and all(0.75 < (x == 0).mean() < 0.85 for x in blocks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"), [("vit_b16_vit_s16", VIT), ("resnet152x2_resnet50", BIT)]
)
def test_it_is_planned_without_images(name, arguments):
    made = experiment(name, arguments)
    assert made.data.notes[0].startswith("images are blank")
    with jax.numpy_dtype_promotion("standard"):
        plan = next(iter(cj.search.plan(made)))
    assert plan.stage == "student" and plan.arguments["teacher"] > plan.arguments["params"] / 8
    assert plan.flops > 0


@pytest.mark.parametrize("name", ["vit_b16_vit_s16", "resnet152x2_resnet50"])
def test_student_and_teacher_see_the_same_mixed_crops_and_no_labels(name):
    made = experiment(name, {"batch_size": 8, "size": 32, "epochs": 0.1})
    (term,) = made.terms
    assert term.name == "kl" and made.student.training.augment is not None
    batch = {"image": np.full((8, 32, 32, 3), 0.5, np.float32), "label": np.arange(8)}
    mixed = made.student.training.augment(jax.random.key(0), batch)
    np.testing.assert_allclose(mixed["image"], 0.5, rtol=1e-5)
    assert mixed["label"].shape == (8, 1000)
    np.testing.assert_allclose(mixed["label"].sum(1), 1, rtol=1e-5)
