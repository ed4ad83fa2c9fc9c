"""Weights of PyTorch models: our networks compute the same, and weights that do not fit are listed.

The default tests know PyTorch's conventions from an independent forward pass in NumPy float64; the
slow ones ask torch, torchvision and transformers themselves, where these are installed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from scipy.special import erf

from compress_jax.core.errors import WeightsError
from compress_jax.models import Bert, BertClassifier, ImageNetResNet, pretrained

SIZES = {"vocabulary": 30, "width": 8, "depth": 2, "heads": 2, "positions": 6}
TOKENS = np.array([[5, 17, 9, 3, 2], [7, 2, 4, 0, 0]])
SEGMENTS = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])


def hugging_face(seed=0):
    """Return random weights under the names, and in the shapes, of Hugging Face's BertModel."""
    random = np.random.default_rng(seed)
    shapes = {
        f"embeddings.{name}_embeddings.weight": (n, 8)
        for name, n in [("word", 30), ("position", 6), ("token_type", 2)]
    }
    dense = {"pooler.dense": (8, 8)}
    for i in range(2):
        layer = f"encoder.layer.{i}"
        dense |= {f"{layer}.attention.self.{n}": (8, 8) for n in ("query", "key", "value")}
        dense |= {f"{layer}.attention.output.dense": (8, 8), f"{layer}.output.dense": (8, 32)}
        dense |= {f"{layer}.intermediate.dense": (32, 8)}
    norms = [
        "embeddings",
        *(f"encoder.layer.{i}.{n}" for i in range(2) for n in ("attention.output", "output")),
    ]
    shapes |= {f"{name}.weight": shape for name, shape in dense.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in dense.items()}
    shapes |= {f"{name}.LayerNorm.{end}": (8,) for name in norms for end in ("weight", "bias")}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def reference(w, tokens, segments):
    """BERT by its paper and PyTorch's conventions, in float64: hidden states and pooled output."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        centred /= np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-12)
        return centred * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    w = {name: x.astype(np.float64) for name, x in w.items()}
    x = (
        w["embeddings.word_embeddings.weight"][tokens]
        + w["embeddings.token_type_embeddings.weight"][segments]
    )
    x = norm(x + w["embeddings.position_embeddings.weight"][: tokens.shape[1]], "embeddings")
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        q, k, v = (
            linear(x, f"{layer}.attention.self.{n}").reshape(2, 5, 2, 4)
            for n in ("query", "key", "value")
        )
        mixed = np.zeros_like(q)
        for b, head in np.ndindex(2, 2):
            scores = q[b, :, head] @ k[b, :, head].T / 2 + np.where(tokens[b] == 0, -np.inf, 0)
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            mixed[b, :, head] = weights @ v[b, :, head]
        x = norm(
            x + linear(mixed.reshape(2, 5, 8), f"{layer}.attention.output.dense"),
            f"{layer}.attention.output",
        )
        hidden = linear(x, f"{layer}.intermediate.dense")
        hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        x = norm(x + linear(hidden, f"{layer}.output.dense"), f"{layer}.output")
    return x, np.tanh(linear(x[:, 0], "pooler.dense"))


def shapes(model, x):
    return jax.eval_shape(model.init, jax.random.key(0), x)


@pytest.mark.slow
def test_bert_computes_what_the_reference_does():
    weights, model = hugging_face(), BertClassifier(Bert(**SIZES), classes=3)
    head = {
        "classifier.weight": np.eye(3, 8, dtype=np.float32),
        "classifier.bias": np.zeros(3, np.float32),
    }
    variables = pretrained.bert(shapes(model, TOKENS), {**weights, **head})
    logits = jax.jit(model.apply)(variables, TOKENS, None, SEGMENTS)
    hidden, pooled = reference(weights, TOKENS, SEGMENTS)
    np.testing.assert_allclose(logits, pooled[:, :3], rtol=1e-4, atol=1e-5)
    encoder = pretrained.bert(shapes(Bert(**SIZES), TOKENS), weights, ignore=["pooler.*"])
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: bool((a == b).all()), encoder["params"], variables["params"]["encoder"]
        )
    )
    got = Bert(**SIZES).apply(encoder, TOKENS, None, SEGMENTS)
    np.testing.assert_allclose(got, hidden, rtol=1e-4, atol=1e-5)


def test_prefixes_and_old_names_of_layer_norms_are_understood(tmp_path):
    weights, model = hugging_face(), Bert(**SIZES)
    old = {"weight": "gamma", "bias": "beta"}
    renamed = {}
    for name, x in weights.items():
        stem, _, end = name.rpartition(".")
        renamed[f"bert.{stem}.{old[end] if 'LayerNorm' in stem else end}"] = x
    renamed |= {
        "bert.embeddings.position_ids": np.arange(6)[None],
        "cls.predictions.bias": np.zeros(30, np.float32),
    }
    safetensors.numpy.save_file(renamed, tmp_path / "model.safetensors")
    plain = pretrained.bert(shapes(model, TOKENS), weights, ignore=["pooler.*"])
    filled = pretrained.bert(
        shapes(model, TOKENS),
        pretrained.read(tmp_path / "model.safetensors"),
        ignore=["pooler.*", "cls.*"],
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), plain, filled))


def test_everything_that_does_not_fit_is_listed_at_once():
    weights, model = hugging_face(), BertClassifier(Bert(**SIZES), classes=3)
    del weights["encoder.layer.1.output.dense.bias"]
    weights["encoder.layer.0.attention.self.key.weight"] = np.zeros((8, 9), np.float32)
    with pytest.raises(WeightsError) as caught:
        pretrained.bert(shapes(model, TOKENS), {**weights, "lm_head.weight": np.zeros(3)})
    for words in (
        "params/encoder/layer_1_mlp/down/bias (their encoder.layer.1.output.dense.bias)",
        "params/head/kernel (their classifier.weight)",
        "lm_head.weight",
        "params/encoder/layer_0_attention/key/kernel: (9, 8) here is (8, 8)",
    ):
        assert words in str(caught.value)


@pytest.mark.slow
def test_a_fresh_head_stays_as_it_was_initialised():
    weights, model = hugging_face(), BertClassifier(Bert(**SIZES), classes=3)
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    filled = pretrained.bert(variables, weights, fresh="params/head/*")
    np.testing.assert_array_equal(
        filled["params"]["head"]["kernel"], variables["params"]["head"]["kernel"]
    )
    with pytest.raises(WeightsError, match="given as shapes only"):
        pretrained.bert(shapes(model, TOKENS), weights, fresh="params/head/*")


def test_pickles_and_foreign_models_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 not safetensors at all")
    with pytest.raises(WeightsError, match="weights_only=True"):
        pretrained.read(tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="params/stem/kernel.*no parameter of a model"):
        pretrained.bert({"params": {"stem": {"kernel": jnp.zeros((3, 3))}}}, {})


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ({}, 11_689_512),  # torchvision, resnet18 to resnet50
        ({"blocks": (3, 4, 6, 3)}, 21_797_672),
        ({"blocks": (3, 4, 6, 3), "bottleneck": True}, 25_557_032),
    ],
)
def test_imagenet_networks_have_the_published_parameters(arguments, parameters):
    variables = shapes(ImageNetResNet(**arguments), jnp.zeros((1, 64, 64, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("resnet18", {}), ("resnet50", {"blocks": (3, 4, 6, 3), "bottleneck": True})],
)
def test_resnets_compute_what_torchvision_does(name, arguments):
    torch = pytest.importorskip("torch", reason="the reference is torchvision's own network")
    torchvision = pytest.importorskip(
        "torchvision", reason="the reference is torchvision's own network"
    )
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)()
    x = torch.randn(2, 3, 65, 96)
    with torch.no_grad():
        theirs(x)  # in training mode: statistics that are not zero and one
        wanted = theirs.eval()(x).numpy()
    model, images = ImageNetResNet(**arguments), x.numpy().transpose(0, 2, 3, 1)
    weights = {key: value.numpy() for key, value in theirs.state_dict().items()}
    variables = pretrained.resnet(shapes(model, images), weights)
    np.testing.assert_allclose(
        jax.jit(model.apply)(variables, images), wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max()
    )


@pytest.mark.slow
def test_bert_computes_what_transformers_does():
    torch = pytest.importorskip("torch", reason="the reference is transformers' own network")
    transformers = pytest.importorskip(
        "transformers", reason="the reference is transformers' own network"
    )
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
    )
    theirs = transformers.BertForSequenceClassification(config).eval()
    tokens, mask = np.random.default_rng(0).integers(1, 30_522, (3, 9)), np.ones((3, 9), int)
    mask[1, 6:] = 0
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
    model = BertClassifier(Bert(width=128, depth=2, heads=2))
    weights = {key: value.numpy() for key, value in theirs.state_dict().items()}
    variables = pretrained.bert(shapes(model, tokens), weights)
    np.testing.assert_allclose(
        jax.jit(model.apply)(variables, tokens, mask), wanted, rtol=1e-4, atol=1e-5
    )
