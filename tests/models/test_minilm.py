import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn

import compress_jax as cj
from compress_jax.core.errors import ArgumentError, WeightsError
from compress_jax.models import Bert, LeNet300100, minilm_classifier, minilm_folder, starting_at


def test_training_starts_at_the_weights_whatever_the_key():
    model = LeNet300100(hidden=(4,), classes=2)
    x = jnp.ones((3, 5))
    given = jax.jit(model.init)(jax.random.key(7), x)
    pure = cj.tasks.pure(starting_at(model, lambda drawn: given))
    for seed in range(2):
        variables = jax.jit(pure.init)(jax.random.key(seed), x)
        assert jax.tree.all(jax.tree.map(np.array_equal, dict(variables), dict(given)))
    assert np.array_equal(pure.apply(variables, x), model.apply(given, x))


def test_a_model_with_statistics_is_refused():
    init, _ = starting_at(nn.BatchNorm(use_running_average=True), lambda drawn: drawn)
    with pytest.raises(ArgumentError, match=r"has \['batch_stats'\] besides parameters"):
        init(jax.random.key(0), jnp.ones((2, 3)))


def test_a_folder_without_weights_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="lacks tokenizer.json of MiniLM-L6"):
        minilm_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"")
    assert minilm_folder(str(tmp_path)) == tmp_path
    with pytest.raises(WeightsError, match="cannot read"):
        minilm_classifier(tmp_path, 2)


@pytest.mark.slow
def test_a_classifier_of_two_layers_has_the_weights_of_the_first_two(tmp_path):
    """Of random weights with MiniLM's names and shapes."""
    shapes = {
        "embeddings.word_embeddings.weight": (30522, 384),
        "embeddings.position_embeddings.weight": (512, 384),
        "embeddings.token_type_embeddings.weight": (2, 384),
        "pooler.dense.weight": (384, 384),
        "pooler.dense.bias": (384,),
    }
    for i in range(6):
        layer = f"encoder.layer.{i}"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value"):
            shapes |= {f"{layer}.{name}.weight": (384, 384), f"{layer}.{name}.bias": (384,)}
        shapes[f"{layer}.attention.output.dense.weight"] = (384, 384)
        shapes[f"{layer}.intermediate.dense.weight"] = (1536, 384)
        shapes[f"{layer}.intermediate.dense.bias"] = (1536,)
        shapes[f"{layer}.output.dense.weight"] = (384, 1536)
        for name in ("attention.output", "output"):
            shapes[f"{layer}.{name}.dense.bias"] = (384,)
            shapes[f"{layer}.{name}.LayerNorm.weight"] = (384,)
            shapes[f"{layer}.{name}.LayerNorm.bias"] = (384,)
    shapes |= {f"embeddings.LayerNorm.{name}": (384,) for name in ("weight", "bias")}
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.05, shape).astype("f") for name, shape in shapes.items()}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    init, apply = minilm_classifier(tmp_path, classes=3, depth=2)
    tokens = jnp.array([[101, 7, 9, 102, 0]])
    params = jax.jit(init)(jax.random.key(0), tokens, tokens != 0)
    kernel = params["encoder"]["layer_1_attention"]["query"]["kernel"]
    assert np.array_equal(kernel, weights["encoder.layer.1.attention.self.query.weight"].T)
    assert "layer_2_attention" not in params["encoder"]
    hidden = Bert(width=384, depth=2, heads=12).apply({"params": params["encoder"]}, tokens)
    pooled = np.tanh(
        np.asarray(hidden)[:, 0] @ weights["pooler.dense.weight"].T + weights["pooler.dense.bias"]
    )
    head = {name: np.asarray(x) for name, x in params["head"].items()}
    wanted = pooled @ head["kernel"] + head["bias"]
    assert np.allclose(apply(params, tokens, tokens != 0), wanted, atol=1e-4)
