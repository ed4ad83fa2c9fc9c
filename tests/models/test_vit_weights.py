"""Published weights of ViT: against a forward pass in NumPy float64, and against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from compress_jax.core.errors import WeightsError
from compress_jax.models import ViT, pretrained

MODEL = ViT(5, 4, 8, 2, 2, pool="token", gelu="exact")
IMAGES = np.random.default_rng(1).normal(size=(3, 8, 12, 3)).astype(np.float32)


def hugging_face():
    """Random weights under the names, and in the shapes, of ViTForImageClassification."""
    shapes = {
        "embeddings.cls_token": (1, 1, 8),
        "embeddings.position_embeddings": (1, 7, 8),
        "embeddings.patch_embeddings.projection.weight": (8, 3, 4, 4),
        "embeddings.patch_embeddings.projection.bias": (8,),
    }
    sizes = {f"attention.attention.{name}": (8, 8) for name in ("query", "key", "value")}
    sizes |= {"attention.output.dense": (8, 8)}
    sizes |= {"intermediate.dense": (32, 8), "output.dense": (8, 32)}
    for i in range(2):
        layer = f"encoder.layer.{i}"
        shapes |= {f"{layer}.{name}.weight": size for name, size in sizes.items()}
        shapes |= {f"{layer}.{name}.bias": size[:1] for name, size in sizes.items()}
        for name in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{layer}.{name}.{end}": (8,) for end in ("weight", "bias")}
    shapes |= {f"layernorm.{end}": (8,) for end in ("weight", "bias")}
    random = np.random.default_rng(0)
    weights = {f"vit.{name}": random.normal(size=shape) for name, shape in shapes.items()}
    weights |= {"classifier.weight": random.normal(size=(5, 8))}
    return {**weights, "classifier.bias": random.normal(size=5)}


def reference(weights, images):
    """ViT by its paper and PyTorch's conventions, in float64."""
    w = {name.removeprefix("vit."): np.asarray(x, np.float64) for name, x in weights.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    answers = []
    for image in np.asarray(images, np.float64):
        rows = [w["embeddings.cls_token"][0, 0]]
        kernel = w["embeddings.patch_embeddings.projection.weight"]
        for top in range(0, image.shape[0], 4):
            for left in range(0, image.shape[1], 4):
                patch = image[top : top + 4, left : left + 4]
                token = np.einsum("hwc,ochw->o", patch, kernel)
                rows.append(token + w["embeddings.patch_embeddings.projection.bias"])
        x = np.stack(rows) + w["embeddings.position_embeddings"][0]
        for layer in ("encoder.layer.0", "encoder.layer.1"):
            y = norm(x, f"{layer}.layernorm_before")
            place = f"{layer}.attention.attention"
            q, k, v = (linear(y, f"{place}.{name}") for name in ("query", "key", "value"))
            mixed = []
            for part in (slice(0, 4), slice(4, 8)):
                scores = np.exp(q[:, part] @ k[:, part].T / 2)
                mixed.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
            x = x + linear(np.concatenate(mixed, -1), f"{layer}.attention.output.dense")
            y = linear(norm(x, f"{layer}.layernorm_after"), f"{layer}.intermediate.dense")
            x = x + linear(y * (1 + erf(y / np.sqrt(2))) / 2, f"{layer}.output.dense")
        answers.append(linear(norm(x, "layernorm")[0], "classifier"))
    return np.stack(answers)


def timm(weights):
    """The same weights by timm's names, query, key and value in one array."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "encoder.layer": "blocks",
        "layernorm": "norm",
        "classifier": "head",
    }
    found = {}
    for name, x in weights.items():
        name = name.removeprefix("vit.")
        if "attention.attention" in name:
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        found[name] = x
    for i in range(2):
        for end in ("weight", "bias"):
            place = f"vit.encoder.layer.{i}.attention.attention"
            parts = [weights[f"{place}.{each}.{end}"] for each in ("query", "key", "value")]
            found[f"blocks.{i}.attn.qkv.{end}"] = np.concatenate(parts)
    return found


def shapes():
    return jax.eval_shape(MODEL.init, jax.random.key(0), IMAGES)


def test_it_computes_what_the_reference_does_from_either_names():
    weights = hugging_face()
    variables = pretrained.vit(shapes(), weights)
    logits = jax.jit(MODEL.apply)(variables, IMAGES)
    np.testing.assert_allclose(logits, reference(weights, IMAGES), rtol=1e-3, atol=1e-3)
    jax.tree.map(np.testing.assert_array_equal, pretrained.vit(shapes(), timm(weights)), variables)


def test_what_does_not_fit_is_listed_by_name():
    weights = hugging_face()
    del weights["vit.embeddings.cls_token"]
    weights["vit.embeddings.position_embeddings"] = np.zeros((1, 9, 8))
    weights["vit.pooler.dense.bias"] = np.zeros(8)
    with pytest.raises(WeightsError) as caught:
        pretrained.vit(shapes(), weights)
    for words in (
        "params/token (their embeddings.cls_token)",
        "params/positions: (1, 9, 8) here is (1, 7, 8)",
        "pooler.dense.bias",
    ):
        assert words in str(caught.value)


@pytest.mark.slow
def test_it_computes_what_transformers_does(tmp_path):
    torch = pytest.importorskip("torch", reason="the reference is transformers' own network")
    transformers = pytest.importorskip(
        "transformers", reason="the reference is transformers' own network"
    )
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=192,
        image_size=32, patch_size=8, num_labels=7,
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = theirs(x).logits.numpy()
    model = ViT(7, 8, 48, 3, 3, pool="token", gelu="exact")
    images = x.numpy().transpose(0, 2, 3, 1)
    # Files keep the names that state_dict lost in transformers 5.
    theirs.save_pretrained(tmp_path)
    weights = pretrained.read(tmp_path / "model.safetensors")
    drawn = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(images))
    variables = pretrained.vit(drawn, weights)
    np.testing.assert_allclose(model.apply(variables, images), wanted, rtol=1e-4, atol=1e-5)
