"""Damaged StableHLO, ONNX and LiteRT files given to `cj.export.verify`.

Each raises an ExportError, and none ends the caller.

    python experiments/faults/fuzz_programs.py --suffix .stablehlo --mutations 600 python
    experiments/faults/fuzz_programs.py --suffix .onnx --mutations 300     # needs the extra onnx
    python experiments/faults/fuzz_programs.py --suffix .tflite --mutations 300   # needs the extra
    litert

Bytes are flipped, overwritten, cut and moved; half of the StableHLO files get a right digest again.
`verify` runs a file in a child process, which takes seconds to start; so a few long-lived children
do here what that child does, one file after the other, and what ended or held up one of them is
given to `verify` itself. Counted are

    refused   an ExportError that names the file answered  it runs, and its answers are compared
    with JAX's as those of any file ended     it ended or held up its process, and `verify` raised
    an ExportError that names the file raw       any other exception, in either unnamed   an
    ExportError that does not name the file

What must be zero: raw, unnamed. A minute or two of one processor each. 2026-11-28: 600 StableHLO
files, 547 refused, 51 answered, 2 ended; 300 ONNX files, 206 refused, 94 answered; 300 LiteRT
files, 243 refused, 57 answered; none raw or unnamed.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from campaign import campaign  # noqa: E402 # pyright: ignore[reportMissingImports]

import compress_jax as cj  # noqa: E402
from compress_jax.core import ExportError  # noqa: E402
from compress_jax.export import verify
from compress_jax.export._artifact.seal import sealed, unsealed
from compress_jax.export._verify.verify import SUFFIXES, _confine, runner, scores

X = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
PARAMS = {
    "a": jax.random.normal(jax.random.key(1), (8, 16)),
    "b": jax.random.normal(jax.random.key(2), (16, 4)),
}


def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Return scores of a small network."""
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def write(file: Path) -> None:
    """Export the network to the runtime of a suffix."""
    writers = {
        ".stablehlo": cj.export.to_stablehlo,
        ".onnx": cj.export.to_onnx,
        ".tflite": cj.export.to_litert,
    }
    int4 = cj.quantize.uniform(4)
    params = int4.pack(PARAMS, int4.init(PARAMS)) if file.suffix == ".stablehlo" else PARAMS
    writers[file.suffix](apply, params, jnp.asarray(X), file)


def mutate(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """Return a damaged file, and what was done to it."""
    content, size, how = bytearray(unsealed(data)), len(unsealed(data)), int(rng.integers(6))
    at = int(rng.integers(size))
    if how == 0:
        content[at] ^= 1 << rng.integers(8)
    elif how == 1:
        for _ in range(int(rng.integers(1, 30))):
            content[rng.integers(size)] = rng.integers(256)
    elif how == 2:
        content = content[:at]
    elif how == 3:
        content[at : at + 4] = [b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", bytes(4), rng.bytes(4)][
            rng.integers(4)
        ]
    elif how == 4:
        content[at : at + int(rng.integers(1, 40))] = b""
    else:
        other = int(rng.integers(size))
        content[at:at] = content[other : other + int(rng.integers(1, 60))]
    if sealed(unsealed(data)) != data:
        return bytes(content), WAYS[how]
    seal = rng.integers(3)  # a right digest, none, or that of the file before it was damaged
    return [sealed(bytes(content)), bytes(content), bytes(content) + data[len(unsealed(data)) :]][
        seal
    ], WAYS[how]


WAYS = (
    "flip a bit",
    "overwrite bytes",
    "cut",
    "overwrite a number",
    "leave out bytes",
    "repeat bytes",
)


def child(original: Path, first: int, last: int) -> None:
    """Try some mutations as the child of `verify` does, and print a line of JSON for each."""
    data = original.read_bytes()
    _confine(2**32)
    for number in range(first, last):
        changed, way = mutate(data, np.random.default_rng([29, number]))
        file = original.with_name(f"mutant{number}{original.suffix}")
        file.write_bytes(changed)
        print(json.dumps({"start": number, "name": str(file), "way": way}), flush=True)
        start = time.process_time()
        kind, why = outcome(file, partial(answers, file))
        print(
            json.dumps({"kind": kind, "why": why, "seconds": time.process_time() - start}),
            flush=True,
        )
        file.unlink()


def answers(file: Path) -> None:
    """Load a file and run it."""
    scores(runner(file), [X])


def outcome(file: Path, run: Callable[[], object]) -> tuple[str, str]:
    """Return what becomes of a file, and the reason."""
    try:
        run()
        return "answered", ""
    except ExportError as error:
        return ("refused" if str(file) in str(error) else "unnamed"), str(error)
    except Exception:
        return "raw", traceback.format_exc()


def again(file: Path) -> None:
    """Give a file to `verify` itself."""
    verify(file, lambda x: jnp.zeros((len(x), 4)), X, batch_sizes=(), timeout=60)


def main() -> None:
    """Run the campaign, print the counts, and fail if any count that must be zero is not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suffix", default=".stablehlo", choices=SUFFIXES)
    parser.add_argument("--mutations", type=int, default=600)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--child", nargs=3, help="the original, first and last")
    args = parser.parse_args()
    if args.child:
        child(Path(args.child[0]), int(args.child[1]), int(args.child[2]))
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / f"model{args.suffix}"
        write(original)
        command = [sys.executable, "-W", "ignore", __file__, "--child", str(original)]
        counts, bad = campaign(command, args.mutations, 100_000, args.first, ("raw", "unnamed"))
        wrong = [case for case in bad if case["kind"] in ("raw", "unnamed")]
        for case in bad:
            if case["kind"] in ("abort", "hang"):
                kind, why = outcome(file := Path(case["name"]), partial(again, file))
                counts[case["kind"]] -= 1
                counts["ended" if kind in ("refused", "answered") else kind] += 1
                print(
                    f"{case['way']}: {case['why']}; verify: {kind}: "
                    f"{re.sub('/tmp[^ ]*/', '', why)[:150]}"
                )
                wrong += [{**case, "kind": kind, "why": why}] if kind in ("raw", "unnamed") else []
    print(
        f"{sum(counts.values()):,} mutations in {(time.perf_counter() - start) / 60:.1f} minutes: "
        f"{dict(+counts)}"
    )
    for case in wrong[:20]:
        print(json.dumps(case, indent=1))
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
