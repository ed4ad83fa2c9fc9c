"""Kill a run at random moments, go on, and compare what it ends with, bit for bit.

python experiments/faults/kills.py                       # 45 kills, about 40 minutes on 2 cores

Campaigns of one and of two processes, and of a search: the same command is started again and again
in one folder and killed (SIGKILL or SIGTERM, the launcher or one of its processes, at a random
moment); after some kills it is left to end. Its artifact must be that of a run which nobody
stopped, and no command may end with a traceback.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

CONFIG = '''
"""Pruned and quantized below a teacher."""
import jax, numpy as np, optax
import compress_jax as cj

RULES = (("dense_*/kernel", jax.sharding.PartitionSpec("fsdp")),)

def split(seed, n):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n).astype(np.int32)
    image = rng.normal(0, 0.8, (n, 4, 4, 1)).astype(np.float32)
    image[np.arange(n), label, label, 0] += 3
    return {"image": image, "label": label}

def training(steps):
    return cj.search.Training(optax.adam(0.01), steps, batch_size=32, save_every=20)

def config(steps: int = 1500, searched: bool = False) -> cj.search.Experiment:
    """Compress, or search."""
    data = cj.data.Data.from_arrays(split(0, 256), split(1, 60), split(2, 70))
    small = cj.at("**/kernel", cj.chain(cj.prune.magnitude(0.5), cj.quantize.lsq(4)))
    bits = {f"int{n}": cj.quantize.uniform(n, granularity="channel") for n in (2, 4, 8)}
    alone = {"bits alone": ("int2", "int4", "int8")}
    return cj.search.Experiment(
        "kills", data,
        cj.search.Network(cj.models.LeNet300100(3, (32, 16)), training(steps), rules=RULES),
        () if searched else (cj.search.Candidate("small", small, training(steps)),),
        cj.search.Requirement(max_drop=0.02 if searched else 0.9),
        search=cj.search.Search(bits, training, steps // 5, baselines=alone) if searched else None,
        mesh=cj.train.make_mesh(fsdp=min(2, jax.device_count())),
        teacher=cj.search.Network(cj.models.LeNet300100(3, (64, 32)), training(steps)),
        loss=cj.tasks.classification().distillation(alpha=0.5, temperature=2.0),
    )
'''
SHAPES = {
    "1 process": ("--devices", "1"),
    "2 processes": ("--processes", "2", "--devices", "2"),
    "a search": ("--devices", "1", "--searched"),
}
ENDED = "it had ended"
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


def start(config: Path, folder: Path, flags: tuple[str, ...]) -> subprocess.Popen[str]:
    """Start the command in a folder."""
    command = [sys.executable, "-m", "compress_jax.cli", "run", str(config), *flags]
    return subprocess.Popen(
        [*command, "--workdir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def processes(parent: int) -> list[int]:
    """Return a process and those that it has started."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    return [parent, *map(int, children.read_text().split())] if children.exists() else [parent]


def killed(process: subprocess.Popen[str], after: float, rng: random.Random) -> tuple[str, str]:
    """Kill one of a command's processes after some seconds; return what was done and printed."""
    end = time.monotonic() + after
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    done = ENDED
    if process.poll() is None:
        own = processes(process.pid)
        place = rng.randrange(len(own))
        sent = rng.choice(SIGNALS)
        os.kill(own[place], sent)
        done = f"{sent.name} to {'the command' if place == 0 else f'process {place - 1}'}"
    out, _ = process.communicate(timeout=3600)
    return done, out


def digest(folder: Path) -> str:
    """Return the digest of a run's artifact and of all its rows."""
    rows = json.dumps(json.loads((folder / "results.json").read_text())["rows"])
    artifact = (folder / "artifact.safetensors").read_bytes()
    return hashlib.sha256(artifact + rows.encode()).hexdigest()[:12]


class Count(NamedTuple):
    """What came of some kills."""

    kills: int = 0
    bad_ends: int = 0
    runs: int = 0
    other_bits: int = 0


def campaign(
    name: str,
    config: Path,
    folder: Path,
    kills: int,
    rng: random.Random,
    straight: str,
    full: float,
) -> Count:
    """Kill one run until it has ended in spite of it or was killed so often; then let it end."""
    met = bad = 0
    ended = False
    while met < kills and not ended:
        process = start(config, folder, SHAPES[name])
        done, out = killed(process, rng.uniform(0.15, 0.85) * full, rng)
        ended = done == ENDED
        met += not ended
        # What is killed outright says nothing; everything else ends in an exit code of its own.
        fits = "Traceback" not in out and process.returncode in (0, 1, 143, -signal.SIGKILL)
        bad += not fits
        said = out.strip().splitlines()[-1:] or [""]
        print(f"{name}: {done}, exit code {process.returncode}: {said[0][:100]}", flush=True)
        if not fits:
            print(out[-2000:])
    process = start(config, folder, SHAPES[name])
    out, _ = process.communicate(timeout=3600)
    same = process.returncode == 0 and digest(folder) == straight
    print(f"{name}: ended with {process.returncode}, {'the same' if same else 'OTHER'} bits")
    if not same:
        print(out[-2000:])
    return Count(met, bad, 1, int(not same))


def campaigns(name: str, config: Path, root: Path, kills: int, rng: random.Random) -> Count:
    """Kill runs of one kind until there were so many kills; at most five a run."""
    begun = time.monotonic()
    whole = Path(tempfile.mkdtemp(dir=root))
    process = start(config, whole, SHAPES[name])
    out, _ = process.communicate(timeout=3600)
    assert process.returncode == 0, out
    full = time.monotonic() - begun
    total = Count()
    while total.kills < kills:
        folder = Path(tempfile.mkdtemp(dir=root))
        most = min(5, kills - total.kills)
        found = campaign(name, config, folder, most, rng, digest(whole), full)
        total = Count(*map(sum, zip(total, found, strict=True)))
    return total


def main() -> int:
    """Run all campaigns and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=15, help="of each kind of run")
    parser.add_argument("--steps", type=int, default=1500, help="of each training")
    parser.add_argument("--only", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "kills.py"
        config.write_text(CONFIG.replace("steps: int = 1500", f"steps: int = {args.steps}"))
        found = {
            name: campaigns(name, config, Path(scratch), args.kills, rng) for name in args.only
        }
    print("\n| run | kills | bad ends | runs | runs with other bits |\n|---|--:|--:|--:|--:|")
    for name, count in found.items():
        print(f"| {name} | {' | '.join(map(str, count))} |")
    return int(any(count.bad_ends or count.other_bits for count in found.values()))


if __name__ == "__main__":
    sys.exit(main())
