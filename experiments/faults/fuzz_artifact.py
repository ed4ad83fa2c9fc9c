"""Ten thousand damaged artifacts with right checksums.

Every one is refused by name, or loads and is consistent.

    python experiments/faults/fuzz_artifact.py --mutations 10000

Small files of every kind of packed node, in every form that is read, are changed by `mutations`
and sealed again; half of the coded ones get the CRC-32 of what they decode to as well. Each is
loaded in a child process and counted as

    refused       an ArtifactError that names the file unnamed       an ArtifactError that does not
    raw           any other exception abort         the process ended hang          it took more
    than 10 seconds memory        loading took more than `max_bytes`, 256 MB here inconsistent  it
    loads, but does not unpack to what a NumPy reading of it gives, or is another after saving again
    equal         it loads, and is what it was before other         it loads, and is a consistent
    other model (a scale is another number, say)

What must be zero: unnamed, raw, abort, hang, memory, inconsistent. About 6 minutes of one
processor. 2026-11-28, 12,000 mutations (--first 30000): 10,130 refused, 1,124 other, 746 equal, and
none of the rest.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np  # noqa: E402
from campaign import campaign  # noqa: E402 # pyright: ignore[reportMissingImports]
from mutations import mutate, samples, version, with_content  # noqa: E402 # pyright: ignore[reportMissingImports]
from reading import assert_consistent, same  # noqa: E402 # pyright: ignore[reportMissingImports]

import compress_jax as cj  # noqa: E402
from compress_jax.core import ArtifactError  # noqa: E402
from compress_jax.export._artifact.artifact import opened
from compress_jax.export._coding.streams import Coded, _checksum, decoded

MAX_BYTES, BAD = 2**28, ("unnamed", "raw", "abort", "hang", "memory", "inconsistent")


def outcome(file: Path, original: Any = None) -> tuple[str, str]:
    """Return what becomes of a file, and the reason."""
    before = _memory("VmRSS")
    _forget_peak()
    try:
        packed, metadata = cj.load(file, max_bytes=MAX_BYTES)
    except ArtifactError as error:
        grown = _memory("VmHWM") - before
        if grown > MAX_BYTES:
            return "memory", f"{grown:,} bytes for {error}"
        return ("refused" if str(file) in str(error) else "unnamed"), str(error)
    except Exception:
        return "raw", traceback.format_exc()
    if (grown := _memory("VmHWM") - before) > MAX_BYTES:
        return "memory", f"{grown:,} bytes"
    try:
        assert_consistent(packed)
        for coded in (False, True):
            again = file.with_name("again")
            cj.save(again, packed, metadata, coded=coded)
            assert same(cj.load(again)[0], packed), "another after saving again"
    except Exception:
        return "inconsistent", traceback.format_exc()
    return ("equal" if original is not None and same(original, packed) else "other"), ""


def repaired(data: bytes, file: Path) -> bytes:
    """Return a coded file with the CRC-32 of what it decodes to, if it decodes."""
    file.write_bytes(data)
    try:
        found = opened(file, MAX_BYTES)
        assert isinstance(found.parts, Coded)
        total = _checksum(tensor for _, tensor in decoded(found.tree, found.parts))
        index = "index" if version(data) == 2 else "coded"
        return with_content(data, lambda c: {**c, index: {**c[index], "crc32": total}})
    except (ArtifactError, AssertionError):
        return data


def child(kept: Path, first: int, last: int) -> None:
    """Try mutations of some numbers, and print a line of JSON for each."""
    files = {file.name: file.read_bytes() for file in sorted(kept.iterdir())}
    names = list(files)
    with tempfile.TemporaryDirectory() as folder:
        file, originals = Path(folder) / "mutant.safetensors", {}
        for name in names:
            file.write_bytes(files[name])
            originals[name] = cj.load(file)[0]
        _limit(2**32)
        for number in range(first, last):
            rng, name = np.random.default_rng([17, number]), names[number % len(names)]
            try:
                data, way = mutate(files[name], rng)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                data, way = files[name], f"no mutation: {type(error).__name__}"
            if "coded" in name and rng.random() < 0.5:
                data = repaired(data, file)
            file.write_bytes(data)
            print(json.dumps({"start": number, "name": name, "way": way}), flush=True)
            start = time.process_time()
            kind, why = outcome(file, originals[name])
            print(
                json.dumps({"kind": kind, "why": why, "seconds": time.process_time() - start}),
                flush=True,
            )


def _memory(field: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _forget_peak() -> None:
    peak = Path("/proc/self/clear_refs")
    if peak.exists():
        peak.write_text("5")


def _limit(more: int) -> None:
    """Let the process grow by so many bytes of addresses and no further."""
    size = _memory("VmSize")
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))


def main() -> None:
    """Run the campaign, print the counts, and fail if any count that must be zero is not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--bad", type=Path, help="where to write the bad ones, as JSON")
    parser.add_argument("--child", nargs=3, help="the folder of the samples, first and last")
    args = parser.parse_args()
    if args.child:
        child(Path(args.child[0]), int(args.child[1]), int(args.child[2]))
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name, data in samples().items():
            (Path(folder) / name).write_bytes(data)
        command = [sys.executable, "-W", "error", __file__, "--child", folder]
        counts, bad = campaign(command, args.mutations, args.batch, args.first, BAD)
    print(
        f"{sum(counts.values()):,} mutations in {(time.perf_counter() - start) / 60:.1f} minutes: "
        f"{dict(counts)}"
    )
    if args.bad:
        args.bad.write_text(json.dumps(bad, indent=1))
    for case in bad[:20]:
        print(json.dumps(case, indent=1))
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
