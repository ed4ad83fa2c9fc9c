"""Logits of SmolLM2 in llama.cpp, from files that this library wrote, beside those in JAX.

    pip install '.[llm]' llama-cpp-python
    python experiments/language/llama_cpp_logits.py

llama.cpp rounds activations to 8 bits before each product with quantized weights, so only float32
files can agree to rounding; of the others the weights are equal bit for bit (tests/export).
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from texts import brown_tokens, keep

import compress_jax as cj


def main() -> None:
    """Write each file, run it, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", default=["F32", "Q8_0", "Q4_0", "Q4_1"])
    parser.add_argument("--tokens", type=int, default=64, help="of test documents")
    chosen = parser.parse_args()
    model, params, tokenizer = cj.models.load(cj.models.smollm2_file())
    assert tokenizer is not None
    tokens = brown_tokens(tokenizer)["test"][: chosen.tokens]
    print("| file | bytes | relative difference of logits | same first token |\n|---|--:|--:|--:|")
    for kind in chosen.kinds:
        packed = params
        if kind != "F32":
            grid = cj.at("**/kernel", cj.quantize.gguf(kind))
            packed = grid.pack(params, jax.jit(grid.init)(params))
        ours = jax.jit(model.apply)({"params": cj.unpack(packed)}, jnp.asarray(tokens[None]))[0]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            nbytes = cj.export.to_gguf(model, packed, file, tokenizer=tokenizer).nbytes
            theirs = logits_of(file, tokens)
        error = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))
        same = float((theirs.argmax(-1) == np.asarray(ours).argmax(-1)).mean())
        print(f"| {kind} | {nbytes:,} | {error:.1e} | {same:.0%} |", flush=True)
        record = {"kind": kind, "nbytes": nbytes, "difference": error, "same_first": same}
        keep("llama_cpp_logits.jsonl", {**record, "tokens": chosen.tokens})


def logits_of(file: Path, tokens: np.ndarray) -> np.ndarray:
    """Return llama.cpp's logits of each token, with keys and values in float32."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    kinds = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    made = llama_cpp.Llama(str(file), n_ctx=512, logits_all=True, verbose=False, **kinds)
    made.eval(tokens.tolist())
    logits = np.array(made.scores[: len(tokens)])
    made.close()
    return logits


if __name__ == "__main__":
    main()
