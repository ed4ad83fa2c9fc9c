"""Models of waveforms: what comes before the first parameter stays in floats in every file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.data import MFCC, LogMel, Standardized, standardized
from compress_jax.export._litert.to_litert import to_litert
from compress_jax.models import DSCNN, Crepe, WithFrontEnd
from compress_jax.quantize._activations.static import static

for package in ("litert_converter", "ai_edge_litert", "ai_edge_quantizer", "onnxruntime"):
    pytest.importorskip(package, reason="needs pip install 'compress_jax[onnx,litert]'")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)

SMALL = LogMel(rate=1000, window=32, hop=16, bands=6, low=0.0)  # [batch, 160] to [batch, 9, 6]
INT8 = cj.quantize.uniform(8, granularity="channel")


def waves(examples: int, samples: int, rate: int = 16000) -> np.ndarray:
    """Return silence, a faint, a loud, and other chords with noise, as int16."""
    random = np.random.default_rng(0)
    time = np.arange(samples) / rate
    hz = random.uniform(rate / 160, rate / 4, (examples, 3, 1))
    sizes = random.uniform(0.05, 0.4, (examples, 3, 1))
    sound = (sizes * np.sin(2 * np.pi * hz * time)).sum(1)
    sound += 0.03 * random.normal(size=sound.shape)
    sound *= np.array([0.0, 0.003, 3.0, *[1.0] * (examples - 3)])[:, None]
    return (np.clip(sound, -1, 1) * 32767).astype(np.int16)


def float_shapes(path) -> set[tuple[int, ...]]:
    """Return the shapes of a flatbuffer's float32 matrices."""
    from compress_jax.export._litert.interpreter import interpreter

    details = interpreter(path).get_tensor_details()
    return {tuple(x["shape"].tolist()) for x in details if x["dtype"] == np.float32}


def spectral(params, sound):
    """Return logits of a standardized log-mel spectrogram."""
    x = Standardized(SMALL, (-7.0,) * 6, (4.0,) * 6)(sound)
    hidden = jax.nn.relu(x @ params["first"] + params["bias"][None, None])
    return hidden.mean(1) @ params["last"]


@pytest.fixture(scope="module")
def network():
    random = np.random.default_rng(1)
    shapes = {"first": (6, 16), "bias": (16,), "last": (16, 5)}
    params = {name: jnp.asarray(random.normal(size=of), jnp.float32) for name, of in shapes.items()}
    return params, waves(8, 160, 1000)


@pytest.mark.parametrize("weights", ["dynamic", "stored"])
def test_only_packed_leaves_are_integers_in_litert(weights, network, tmp_path):
    params, sound = network
    packed = {**params, "first": INT8.pack(params["first"], INT8.init(params["first"]))}
    done = to_litert(spectral, packed, sound, tmp_path / "m.tflite", weights=weights)
    assert done.difference < 0.02
    rows = {row.name: row.form for row in done.rows}
    assert rows["first"] == f"{'dynamic' if weights == 'dynamic' else 'weight_only'}_wi8"
    assert rows["last"] == "float32"
    # The matrices of the spectrum (17 frequencies, 6 bands), and the weights that are an array.
    floats = float_shapes(done.path)
    assert {(6, 17), (5, 16)} <= floats
    assert weights == "stored" or (16, 6) not in floats


def test_a_spectrum_is_computed_in_floats_before_integer_layers(network, tmp_path):
    params, sound = network
    how = static(bits=8, symmetric=False)
    done = to_litert(spectral, params, sound, tmp_path / "m.tflite", how=how, batches=[sound])
    assert done.difference < 0.05
    floats = float_shapes(done.path)
    assert (6, 17) in floats and not {(16, 6), (5, 16)} & floats


def with_statistics(model, sound):
    """Return variables, their batch statistics those of the sounds."""
    variables = jax.jit(model.init)(jax.random.key(0), sound)
    train = jax.jit(lambda v: model.apply(v, sound, train=True, mutable=["batch_stats"])[1])
    for _ in range(40):
        variables = {**variables, **train(variables)}
    return variables


KEYWORDS = {"classes": 4, "width": 8, "blocks": 1}
SPEECH = {
    "keywords": (lambda x: DSCNN(**KEYWORDS, depthwise="shifts"), waves(8, 4000), MFCC(10)),
    "keywords, grouped": (lambda x: DSCNN(**KEYWORDS), waves(8, 4000), MFCC(10)),
    "pitch": (lambda x: Crepe(width=1), (waves(8, 1024) / 2**15).astype(np.float32), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
@pytest.mark.parametrize("name", SPEECH)
def test_speech_models_answer_as_in_jax_in_every_runtime(name, sparsity, tmp_path):
    make, sound, front_end = SPEECH[name]
    model = make(sound)
    if front_end is not None:
        model = WithFrontEnd(model, standardized(front_end, sound))
    variables = with_statistics(model, sound)
    rounded = cj.quantize.uniform(8, granularity="channel", scale="mse")
    pruned = cj.prune.magnitude(sparsity, scope="global")
    c = cj.at("**/kernel", cj.chain(pruned, rounded) if sparsity else rounded)
    packed = {**variables, "params": c.pack(variables["params"], c.init(variables["params"]))}
    dense = cj.unpack(packed)

    def fn(variables, x):
        return model.apply(variables, x)

    for suffix, write in (
        ("onnx", cj.export.to_onnx),
        ("tflite", cj.export.to_litert),
        ("stablehlo", cj.export.to_stablehlo),
    ):
        done = write(fn, packed, sound, tmp_path / f"m.{suffix}")
        # LiteRT also rounds what enters a packed layer, as it runs; pitch has six in a row.
        limit = 0.05 if suffix == "tflite" else 0.02
        assert done.difference < limit, suffix
        found = cj.export.verify(done.path, lambda x: fn(dense, x), sound, batch_sizes=())
        assert found.difference < limit and found.agreement >= 0.8, suffix
