"""A quantized decoder writes in ONNX Runtime, its cache going in and out, what it writes in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj

pytest.importorskip("jax2onnx", reason="needs pip install 'compress_jax[onnx]'")
runtime = pytest.importorskip("onnxruntime", reason="needs pip install 'compress_jax[onnx]'")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)

CONFIG = cj.models.DecoderConfig(
    61, 32, 2, heads=4, kv_heads=2, head_width=8, hidden=48, qk_norm=True
)
PROMPT, STEPS, CAPACITY = [5, 9, 31, 2], 6, 12


def session(path):
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(made, tokens, cache):
    """Call a file with its inputs in the order of the exported function's."""
    values = [np.asarray(tokens, np.int32), *cache]
    named = {each.name: x for each, x in zip(made.get_inputs(), values, strict=True)}
    logits, *cache = made.run(None, named)
    return logits, cache


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_it_writes_in_onnx_runtime_what_it_writes_in_jax(scan, tmp_path):
    model = cj.models.Decoder(CONFIG, scan=scan)
    params = jax.jit(model.init)(jax.random.key(1), jnp.ones((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, params)
    int8 = cj.at("**/kernel", cj.quantize.uniform(8, granularity="channel"))
    packed = int8.pack(params, int8.init(params))
    step = cj.models.cached_step(model)
    empty = jax.tree.leaves(model.cache(1, CAPACITY))
    files = {}
    for name, tokens in (("prompt", [PROMPT]), ("token", [[7]])):
        example = (jnp.asarray(tokens, jnp.int32), *empty)
        file = tmp_path / f"{name}.onnx"
        exported = cj.export.to_onnx(step, packed, example, file, batch="example")
        assert exported.difference < 1e-4
        files[name] = session(file)
    logits, cache = run(files["prompt"], [PROMPT], map(np.asarray, empty))
    written = []
    for _ in range(STEPS):
        written.append(int(logits[0, -1].argmax()))
        logits, cache = run(files["token"], [[written[-1]]], cache)
    expected = cj.models.generate(model, packed, [PROMPT], STEPS).tokens[0]
    assert written == expected and len(set(expected)) > 2
    assert int(cache[-1][0]) == len(PROMPT) + STEPS


@pytest.mark.parametrize("tree", [(np.ones(2), np.ones(2)), {"a": np.ones(2)}])
def test_a_tree_as_one_input_is_refused(tree, tmp_path):
    with pytest.raises(cj.core.ExportError, match="input 1 is a .*, and a file takes arrays"):
        cj.export.to_onnx(lambda p, x, y: x, {}, (np.ones((1, 2)), tree), tmp_path / "m.onnx")
