"""Perplexity of SmolLM2 when its keys and values, or weights and activations too, have few bits.

    python experiments/language/cache.py                    # keys and values
    python experiments/language/cache.py --parts w4a4       # weights and activations in 4 bits

Keys and values are read from a quantized cache as if tokens came one at a time. Results are kept in
experiments/language/results/cache.jsonl.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from texts import brown_tokens, keep

import compress_jax as cj
from compress_jax.core.types import Params

CACHED = 2048  # tokens of the row whose bytes are counted
Fn = Callable[[Params, jax.Array], jax.Array]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=["kv", "w4a4"], default=["kv"])
    parser.add_argument("--grids", default="", help="only grids whose name contains a word")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--tokens", type=int, default=2048, help="of test documents")
    chosen = parser.parse_args()
    # Stacked layers: one layer is compiled instead of 30.
    model, params, tokenizer = cj.models.load(cj.models.smollm2_file(), scan=True)
    assert tokenizer is not None
    study = Study(chosen, brown_tokens(tokenizer)["test"][: chosen.tokens])
    print("| what | perplexity | of float | bits an entry |\n|---|--:|--:|--:|")
    study.measured("float32", cj.models.with_cache(model, None), params)
    if "kv" in chosen.parts:
        keys_and_values(study, model, params, chosen.bits)
    if "w4a4" in chosen.parts:
        weights_and_activations(study, model, params)


class Study:
    """The test tokens, the perplexity of the float model, and where results go."""

    def __init__(self, chosen: argparse.Namespace, test: np.ndarray) -> None:
        """Take the arguments of the command line, and test tokens."""
        self.chosen = chosen
        self.test = test
        self.float32 = 0.0

    def measured(self, name: str, fn: Fn, params: Params, bits: float | None = None) -> None:
        """Print a row of the table, and keep it."""
        began = time.perf_counter()
        length = self.chosen.length
        found = cj.train.evaluate.perplexity(fn, params, self.test, context=length, batch_size=1)
        self.float32 = self.float32 or found.perplexity
        ratio = found.perplexity / self.float32 - 1
        size = "" if bits is None else f"{bits:.2f}"
        print(f"| {name} | {found.perplexity:.3f} | {ratio:+.2%} | {size} |", flush=True)
        record = {
            "what": name,
            "perplexity": found.perplexity,
            "float32": self.float32,
            "bits_per_entry": bits,
            "test_tokens": self.chosen.tokens,
            "context": length,
            "seconds": round(time.perf_counter() - began, 1),
        }
        keep("cache.jsonl", record)


def keys_and_values(
    study: Study, model: cj.models.Decoder, params: Params, widths: list[int]
) -> None:
    """Measure grids of the cache, weights and activations in float32."""
    for bits in widths:
        grid = partial(cj.quantize.KVGrid, bits, bits)
        by_token = partial(grid, keys="token", block=1)
        grids = {
            "keys a channel, blocks of 64": grid(),
            "keys a channel, blocks of 32": grid(block=32, group=32),
            "keys a token, all but the own": by_token(),
            "keys a token, rotated, all but the own": by_token(rotate=True),
        }
        for name in filter(lambda name: study.chosen.grids in name, grids):
            fn = cj.models.with_cache(model, grids[name])
            size = entry_bits(model, grids[name])
            study.measured(f"{bits} bits, {name}", fn, params, size)


def entry_bits(model: cj.models.Decoder, grid: cj.quantize.KVGrid) -> float:
    """Return the bits of a key or value in a long cache, everything counted."""
    stored = jax.eval_shape(lambda: model.cache(1, CACHED, grid=grid).layers)
    plain = jax.eval_shape(lambda: model.cache(1, CACHED).layers)
    entries = sum(x.size for x in jax.tree.leaves(plain))
    return 8 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stored)) / entries


def weights_and_activations(study: Study, model: cj.models.Decoder, params: Params) -> None:
    """Measure 4 bits with and without rotations."""
    grid = cj.quantize.KVGrid(block=32, group=32)
    model, params = cj.models.untied(model, params)
    plain = cj.models.with_cache(model, None)
    tokens = study.test[None, :8]
    rotated = cj.quantize.rotate(plain, params, tokens, key=jax.random.key(0)).params
    w4a4(study, "W4 g64 A4, as it is", plain, params)
    w4a4(study, "W4 g64 A4, residual stream and values rotated", plain, rotated)
    name = "rotated, and the inputs of down at run time"
    turned = partial(cj.quantize.rotate_inputs, key=jax.random.key(1), pattern="**/down/kernel")
    fn, result = turned(plain, rotated, tokens)
    w4a4(study, f"W4 g64 A4, {name}", fn, result.params)
    cached, _ = turned(cj.models.with_cache(model, grid), rotated, tokens)
    w4a4(study, f"W4 g64 A4 KV4, {name}", cached, result.params)


def w4a4(study: Study, name: str, fn: Fn, params: Params) -> None:
    """Measure weights rounded to nearest in groups of 64, and activations by their own ranges.

    The head and its inputs are float32.
    """
    int4 = cj.at("layers/**/kernel", cj.quantize.uniform(4, granularity=64))
    view = jax.jit(lambda params: int4.view(params, int4.init(params)))(params)
    how = [("layers/**/kernel", cj.quantize.dynamic(4, granularity="token"))]
    quantized = cj.quantize.activations(fn, how)
    study.measured(name, lambda params, x: quantized.apply(params, {}, x), view)


if __name__ == "__main__":
    main()
