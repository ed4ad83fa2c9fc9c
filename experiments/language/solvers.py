"""Perplexity of SmolLM2 on held-out documents of the Brown corpus, under solvers and formats.

    python experiments/language/solvers.py --formats W4g64 --seeds 0 1 2

Every solver sees the same calibration texts, drawn by the seed from the training documents; the
perplexity is of test documents. Results are kept in experiments/language/results/solvers.jsonl.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from texts import brown_tokens, keep, row
from tuned import tuned

import compress_jax as cj
from compress_jax.core.types import Params

FORMATS: dict[str, Callable[[], cj.Compression]] = {
    "W8": lambda: cj.quantize.uniform(8, granularity="channel"),
    "W4g64": lambda: cj.quantize.uniform(4, granularity=64),
    "W4": lambda: cj.quantize.uniform(4, granularity="channel"),
    "W3g64": lambda: cj.quantize.uniform(3, granularity=64),
    "W2g64": lambda: cj.quantize.uniform(2, granularity=64),
}
ORDERED = partial(cj.quantize.gptq, act_order=True)
# Names of solvers: the Gram matrices that they see, and how the layers are solved.
TOGETHER = {
    "gptq": (False, cj.quantize.gptq),
    "gptq, activation order": (False, ORDERED),
    "gptq, rows alike": (True, cj.quantize.gptq),
    "gptq, rows alike, activation order": (True, ORDERED),
}
BLOCKS = "layerwise.solve"
COMPENSATED = "layerwise.solve, compensated"
AWQ = "awq"
SOLVERS = (*TOGETHER, AWQ, BLOCKS, COMPENSATED)


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=["W4g64"])
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=SOLVERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration row")
    parser.add_argument("--rows", type=int, default=16, help="calibration rows")
    parser.add_argument("--tuned", type=int, default=0, help="steps of float32 training first")
    parser.add_argument("--tokens", type=int, default=4096, help="of test documents")
    return parser.parse_args()


def main() -> None:
    """Measure, and print the table."""
    chosen = arguments()
    model, params, tokenizer = cj.models.load(cj.models.smollm2_file())
    assert tokenizer is not None
    tokens = brown_tokens(tokenizer)
    test = tokens["test"][: chosen.tokens]

    def fn(params: Params, tokens: jax.Array) -> jax.Array:
        return jnp.asarray(model.apply({"params": params}, tokens))

    params = tuned(fn, params, tokens["train"], chosen.tuned)

    def measured(params: Params) -> float:
        return cj.train.evaluate.perplexity(fn, params, test, context=chosen.length).perplexity

    float32 = measured(params)
    print("| format | seed | solver | perplexity | gap closed |\n|---|--:|---|--:|--:|")
    print(f"| float32 | | | {float32:.2f} | |", flush=True)
    for seed in chosen.seeds:
        rng = np.random.default_rng(seed)
        rows = [row(tokens["train"], chosen.length, rng) for _ in range(chosen.rows)]
        seen: dict[bool, cj.trace.Calibration] = {}
        for name in chosen.formats:
            plain = cj.at("**/kernel", FORMATS[name]())
            grid = cj.bind(plain, fn, params, rows[0])
            nearest = _nearest(measured, params, grid, name)
            for solver in chosen.solvers:
                began = time.perf_counter()
                if solver in (BLOCKS, COMPENSATED):
                    seen = {}
                    share = 1.0 if solver == COMPENSATED else 0.0
                    solved = cj.layerwise.solve(
                        fn, params, rows, plain, compensate=share, report=_said
                    )
                    print(solved.table, file=sys.stderr)
                else:
                    normalize, method = TOGETHER.get(solver, (False, None))
                    if normalize not in seen:
                        seen = {normalize: _calibrated(fn, params, rows, normalize)}
                        began = time.perf_counter()
                    own = seen[normalize]
                    if method is None:
                        solved = cj.quantize.awq(
                            fn, params, rows[0], calibration=own, compression=grid
                        )
                    else:
                        solved = method(params, own, grid)
                seconds = time.perf_counter() - began
                found = measured(solved.params)
                closed = (nearest - found) / (nearest - float32)
                _kept(chosen, name, seed, solver, found, float32, nearest, seconds, solved)
                print(f"| {name} | {seed} | {solver} | {found:.2f} | {closed:.0%} |", flush=True)


def _calibrated(
    fn: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    rows: list[np.ndarray],
    normalize: bool,
) -> cj.trace.Calibration:
    """Return statistics of every kernel's inputs."""
    names = [site.name for site in cj.trace.sites(fn, params, rows[0])]
    kernels = tuple(name for name in names if name.endswith("/kernel"))
    return cj.trace.calibrate(fn, cj.trace.gram(normalize), params, rows, where=kernels)


def _said(name: str, number: int, count: int) -> None:
    """Print how far it is, and the bytes of all arrays beside the peak of the process."""
    live = sum(array.nbytes for array in jax.live_arrays())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{number}/{count} {name}: {live / 1e6:.0f} MB of arrays, peak of the process "
        f"{peak / 1e6:.0f} MB",
        file=sys.stderr,
        flush=True,
    )


_known: dict[str, float] = {}


def _nearest(
    measured: Callable[[Params], float],
    params: Params,
    grid: cj.Compression,
    name: str,
) -> float:
    """Return the perplexity of rounding to nearest, measured once a format."""
    if name not in _known:
        view = jax.jit(lambda params: grid.view(params, grid.init(params)))(params)
        _known[name] = measured(view)
        print(f"| {name} | | nearest | {_known[name]:.2f} | 0% |", flush=True)
    return _known[name]


def _kept(
    chosen: argparse.Namespace,
    name: str,
    seed: int,
    solver: str,
    found: float,
    float32: float,
    nearest: float,
    seconds: float,
    solved: "cj.layerwise.Rewritten",
) -> None:
    record = {
        "format": name,
        "seed": seed,
        "solver": solver,
        "perplexity": found,
        "nearest": nearest,
        "float32": float32,
        "calibration_tokens": chosen.rows * chosen.length,
        "test_tokens": chosen.tokens,
        "tuned": chosen.tuned,
        "seconds": round(seconds, 1),
        "left_at_nearest": sum("nearest" in note for note in solved.notes.values()),
    }
    keep("solvers.jsonl", record)


if __name__ == "__main__":
    main()
