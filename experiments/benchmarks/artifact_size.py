"""Bits a weight of the coded artifact beside its entropy, and the speed of writing.

python experiments/benchmarks/artifact_size.py                             # 3 minutes on a busy
machine

The bound is what no coder of independent symbols goes below: the empirical entropy of each leaf's
stored codes, masks and indices under their own frequencies, plus the bytes of everything else
(biases, scales, codebooks) as they are. Files count whole, with header, tables and checksum. The
reference tensor has 1Mi normal weights, 90 % of them zeros, the others sharing 15 values; its
entropy is that of 16 symbols. Networks have normal weights, biases too, which zstandard cannot make
smaller; training changes the frequencies, not the coder. Speeds are of dense float32 bytes a second
of processor time, median of rounds that take turns.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from interleave import interleaved, report

import compress_jax as cj
from compress_jax.core import Clustered
from compress_jax.core.paths import flatten
from compress_jax.export._artifact import structure
from compress_jax.export._coding.streams import unpacked
from compress_jax.models import LeNet5, LeNet300100, ResNet

HEAD = [
    "what",
    "weights",
    "plain",
    "coded",
    "bound",
    "coded / bound",
    "plain / coded",
    "encode MB/s",
    "decode MB/s",
]


def entropy(symbols: np.ndarray) -> float:
    """Return the bytes of symbols under their own frequencies."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8


def bound(packed: Any) -> float:
    """Return the least bytes of a packed tree, as the module says."""
    described, tensors = structure.encode(packed)
    held = dict(structure.places(described))
    return sum(
        x.nbytes if (how := held[name]) is None else entropy(unpacked(x, *how))
        for name, x in tensors.items()
    )


def shared(w: np.ndarray, values: int, zeros: float = 0.9) -> Clustered:
    """Return an array of zeros (the smallest entries) and shared values (Lloyd's algorithm)."""
    kept = np.abs(w) > np.quantile(np.abs(w), zeros)
    x = w[kept]
    codebook = np.quantile(x, (np.arange(values) + 0.5) / values)
    for _ in range(30):
        nearest = np.searchsorted((codebook[1:] + codebook[:-1]) / 2, x)
        codebook = np.bincount(nearest, x, values) / np.maximum(
            np.bincount(nearest, minlength=values), 1
        )
    codes = np.full(w.shape, values, np.int32)
    codes[kept] = nearest
    return Clustered.pack(
        jnp.asarray(codes), jnp.asarray(codebook, jnp.float32), jnp.dtype("float32")
    )


def network(model: Any, shape: tuple[int, ...], pack: Callable[[np.ndarray], Any]) -> Any:
    """Return the packed kernels and the other params of a model with normal weights."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]
    leaves, rebuild = flatten(shapes)
    random = np.random.default_rng(0)
    arrays = {
        path: random.normal(size=leaf.shape).astype(np.float32) for path, leaf in leaves.items()
    }
    return rebuild(
        {path: pack(x) if path.endswith("kernel") else jnp.asarray(x) for path, x in arrays.items()}
    )


def integers(bits: int) -> Callable[[np.ndarray], Any]:
    """Return what packs an array as integers with a scale for each channel."""
    c = cj.quantize.uniform(bits, granularity="channel")
    return lambda x: c.pack(jnp.asarray(x), c.init(jnp.asarray(x)))


def row(name: str, packed: Any, least: float, folder: Path, rounds: int) -> list[Any]:
    """Measure one tree."""
    plain, coded = folder / "plain", folder / "coded"
    sizes = cj.save(plain, packed), cj.save(coded, packed, coded=True)
    weights = sum(x.size for x in jax.tree.leaves(cj.unpack(packed)))
    turns = {
        "encode": lambda: cj.save(coded, packed, coded=True),
        "decode": lambda: cj.load(coded)[0],
    }
    runs = interleaved(turns, rounds)
    speeds = [
        f"{4e-6 * weights / statistics.median(run.cpu for run in runs[turn]):,.0f}"
        for turn in turns
    ]
    bits = [f"{8 * size / weights:.4f}" for size in (*sizes, least)]
    return [
        name,
        f"{weights:,}",
        *bits,
        f"{sizes[1] / least:.4f}",
        f"{sizes[0] / sizes[1]:.2f}",
        *speeds,
    ]


def main(rounds: int) -> None:
    """Print and keep the table."""
    caffe, small = LeNet5(features=(20, 50), hidden=(500,)), (28, 28, 1)
    tensor = shared(np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32), 15)
    trees = {
        "reference tensor, 90 % zeros, 15 values": (tensor, entropy(np.asarray(tensor.unpack())))
    }
    for name, tree in {
        "LeNet-300-100, int4": network(LeNet300100(), small, integers(4)),
        "LeNet-300-100, 90 % zeros, 16 values": network(
            LeNet300100(), small, lambda x: shared(x, 16)
        ),
        "LeNet-5 (431,080), int8": network(caffe, small, integers(8)),
        "ResNet-20, int8": network(ResNet(20), (32, 32, 3), integers(8)),
        "ResNet-20, int4": network(ResNet(20), (32, 32, 3), integers(4)),
    }.items():
        trees[name] = (tree, bound(tree))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (tree, least) in trees.items():
            rows.append(row(name, tree, least, Path(folder), rounds))
            print(rows[-1], flush=True)
    report(
        "artifact_size",
        HEAD,
        rows,
        rounds=rounds,
        unit="bits a weight; MB of float32 a second of processor time",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    main(parser.parse_args().rounds)
