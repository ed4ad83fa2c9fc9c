"""llama.cpp computes from our files what the model computes in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from tests.export.test_gguf import MODEL, UNTIED, packed_of, params_of, tokenizer_of
from tests.models.decoder_reference import weights
from tests.models.test_decoder import TOKENS, quiet
from tests.models.test_gguf import CONFIGS, written

pytest.importorskip("gguf", reason="needs gguf: pip install 'compress_jax[llm]'")
llama_cpp = pytest.importorskip("llama_cpp", reason="needs pip install llama-cpp-python")
pytestmark = pytest.mark.slow


def theirs(file):
    """Return llama.cpp's logits of each token, with keys and values in float32."""
    options = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "logits_all": True}
    kinds = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    made = llama_cpp.Llama(str(file), verbose=False, **options, **kinds)
    made.eval(TOKENS.tolist())
    logits = np.array(made.scores[: len(TOKENS)])
    made.close()
    return logits


def difference(model, params, file):
    """Return the root mean square difference of the logits, relative to their size."""
    ours = np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray(TOKENS[None]))[0])
    return np.sqrt(np.square(theirs(file) - ours).mean() / np.square(ours).mean())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_family_in_float32(name, tmp_path):
    """Sums in another order: rounding alone; GELU is a table of float16 numbers in llama.cpp."""
    config = CONFIGS[name]
    written(tmp_path / "theirs.gguf", config, weights(config, np.random.default_rng(0)))
    model, params, _ = cj.models.load(tmp_path / "theirs.gguf", log_fn=quiet)
    file = tmp_path / "ours.gguf"
    cj.export.to_gguf(model, params, file, tokenizer=tokenizer_of(tmp_path))
    bound = 5e-6 if model.config.activation == "silu" else 1e-3
    assert difference(model, params, file) < bound


@pytest.mark.parametrize("model", [MODEL, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantized(model, kind, tmp_path):
    """llama.cpp rounds activations to 8 bits in blocks of 32.

    The step is a block's largest magnitude over 127, about 2.2 / 127 standard deviations, and the
    error of an entry that over the root of 12: 0.5 % of it. Each product has that error, whatever
    the type of the weights, and a token passes 9 of them one behind the other: 1.5 %. With other
    weights than ours, as nearest int4 without these scales has them, logits differ by 10 %.
    """
    packed, view = packed_of(params_of(model), kind)
    file = tmp_path / "model.gguf"
    cj.export.to_gguf(model, packed, file, tokenizer=tokenizer_of(tmp_path))
    assert difference(model, view, file) < 0.03
