"""Damage the files of a finished run at random.

Every command must say so in one sentence, and lose nothing.

    python experiments/faults/fuzz_workdir.py --trials 300

Each trial takes a copy of the folder, damages one of its files (cut, flipped bits, other types,
other versions, garbage, another file's content, a folder in its place, nothing there), and calls
report, run, eval and inspect on it. Counted are the ends: done, one sentence, and what must not be:
a raw trace, several lines, and files that the command changed though they were not damaged. About 2
seconds a trial on 2 cores.
"""

import argparse
import collections
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import compress_jax.report._page as report_write
from compress_jax.cli import main

CONFIG = '''
import numpy as np, optax
import compress_jax as cj
from compress_jax.data import Data
from compress_jax.models import LeNet300100
from compress_jax.search import Candidate, Experiment, Network, Requirement, Training

def split(seed, n):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n).astype(np.int32)
    return {"image": rng.normal(label[:, None, None, None], 0.5, (n, 4, 4, 1)).astype(np.float32),
        "label": label}

def config(bits: int = 4) -> Experiment:
    """Blobs."""
    splits = split(0, 96), split(1, 64), split(2, 64)
    data = Data("blobs", *splits, 3, "0" * 64, tuple("abc"), np.zeros(1), np.ones(1), 1.0, {})
    training = Training(optax.adam(0.01), 4, batch_size=32, save_every=2)
    candidates = (Candidate("int", cj.at("**/kernel", cj.quantize.uniform(bits)), training),)
    student, teacher = (Network(LeNet300100(3, hidden), training) for hidden in ((24,), (32,)))
    return Experiment("blobs", data, student, candidates, Requirement(max_drop=0.9),
        teacher=teacher,
                      loss=cj.distill.hinton(0.5, 2.0))
'''


def other_types(data: bytes, rng: random.Random) -> bytes:
    """Give an entry of a JSON file a value of another type, with its digest left as it was."""
    lines = data.splitlines() or [b"{}"]
    at = rng.randrange(len(lines)) if not data.startswith(b"{\n") else None
    try:
        tree = json.loads(data if at is None else lines[at])
    except ValueError:
        return b"[]"
    node: Any = tree
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.4:
            node[key] = rng.choice(
                [None, [], {}, "x", -1, 1e400, 10**30, True, "\x1b[2J", "../../etc"]
            )
            break
        node = node[key]
    if isinstance(tree, dict) and rng.random() < 0.5:
        tree.pop("sha256", None)
    text = json.dumps(tree).encode()
    return text if at is None else b"\n".join([*lines[:at], text, *lines[at + 1 :]])


def flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data or b"\0")
    for _ in range(rng.choice([1, 1, 3, 30])):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


HOW = {
    "cut": lambda data, rng: data[: rng.randrange(len(data) + 1)],
    "flip": flip,
    "types": other_types,
    "version": lambda data, rng: data.replace(b'"version": ', b'"version": 9', 1),
    "garbage": lambda data, rng: rng.randbytes(rng.choice([1, 40, 4000])),
    "deep": lambda data, rng: b"[" * 200_000,
    "twice": lambda data, rng: data + data,
    "other": None,
    "folder": None,
    "gone": None,
}


def damage(folder: Path, rng: random.Random) -> tuple[Path, str]:
    """Damage one file of a folder; return which, and how."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    shallow = [
        file
        for file in files
        if "checkpoints" not in file.parts and "tensorboard" not in file.parts
    ]
    file, how = rng.choice(shallow if rng.random() < 0.7 else files), rng.choice(list(HOW))
    data = file.read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "other":
        file.write_bytes(rng.choice([other for other in files if other != file]).read_bytes())
    elif how != "gone":
        file.write_bytes(HOW[how](data, rng))
    return file, how


def call(words: list[str]) -> tuple[str, str]:
    """Return how a command ended, and what it said on standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except BaseException:
            return "RAW", traceback.format_exc()
    said = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
    rest = [line for line in err.getvalue().splitlines() if not line.startswith("error:")]
    if "Traceback" in err.getvalue() or "\x1b" in err.getvalue() + out.getvalue():
        return "RAW", err.getvalue()
    if code == 0:
        return "done", ""
    return (
        "one sentence"
        if len(said) == 1 and not any("Error" in line for line in rest)
        else "SEVERAL"
    ), err.getvalue()


def kept(folder: Path, but: Path) -> dict[str, bytes]:
    """Return what must not change: checkpoints and artifacts other than the damaged one."""
    files = [
        f for f in folder.rglob("*") if f.is_file() and f != but and "tensorboard" not in f.parts
    ]
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in files
        if file.suffix in (".safetensors", ".py")
    }


def trial(whole: Path, config: Path, seed: int) -> list[tuple[str, str, str, str]]:
    """Return command, end, file and what was said, of each command on one damaged folder."""
    rng, found = random.Random(seed), []
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(whole, Path(place) / "run")
        file, how = damage(folder, rng)
        name = f"{file.relative_to(folder)} ({how})"
        before = kept(folder, file)
        commands = {
            "report": [str(folder)],
            "eval": [str(folder)],
            "inspect": [str(folder / "artifact.safetensors")],
        }
        commands |= {"run": [str(config), "--workdir", str(folder)]}
        for command, words in commands.items():
            end, said = call([command, *words])
            found.append((command, end, name, said))
        after = kept(folder, file)
        lost = [path for path in before if after.get(path) != before[path]]
        if lost:
            found.append(("run", "CHANGED", name, ", ".join(lost)))
    return found


def run(trials: int, seed: int, pictures: bool) -> int:
    """Fuzz, print the counts, and return how many ends were not as they should be."""
    if not pictures:
        report_write.pictures = lambda run: {}
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    with tempfile.TemporaryDirectory() as place:
        config, whole = Path(place) / "blobs.py", Path(place) / "whole"
        config.write_text(CONFIG)
        assert call(["run", str(config), "--workdir", str(whole)])[0] == "done"
        for i in range(trials):
            for command, end, name, said in trial(whole, config, seed + i):
                counts[command, end] += 1
                if end.isupper():
                    print(
                        f"seed {seed + i}: {command} after {name}: {end}\n{said}", file=sys.stderr
                    )
    for (command, end), count in sorted(counts.items()):
        print(f"{command:8} {end:13} {count}")
    return sum(count for (_, end), count in counts.items() if end.isupper())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pictures",
        action="store_true",
        help="draw the report's pictures too, which takes most of the time",
    )
    given = parser.parse_args()
    sys.exit(min(run(given.trials, given.seed, given.pictures), 1))
