"""Memory and speed of training data that stay on disk, beside the same data in memory.

    python experiments/benchmarks/data_on_disk.py

Each way runs in a process of its own: it opens a token file and a folder of images, takes batches
in shuffled order, and reports its peak memory, rows a second, and the time from its start to its
first batch.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import compress_jax as cj

TOKENS = 1_000_000_000  # 2 GB on disk, 4 GB in memory
LENGTH = 1024
IMAGES = 2000
SIZE = 224
BATCH = 64


def main() -> None:
    """Write the files, run each way, print the table."""
    folder = Path(tempfile.mkdtemp())
    write_tokens(folder / "train.bin")
    write_images(folder / "images")
    print(f"{'':22} {'first batch':>12} {'rows a second':>14} {'peak memory':>12} {'data':>8}")
    for kind in ("tokens", "images"):
        for way in ("in memory", "on disk"):
            command = [sys.executable, __file__, kind, way, str(folder)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            print(
                f"{kind + ' ' + way:22} {found['first']:10.1f} s {found['rate']:14,.0f} "
                f"{found['peak'] / 1e9:9.2f} GB {found['data'] / 1e9:5.2f} GB"
            )


def write_tokens(file: Path) -> None:
    """Write a stream of tokens, a part at a time."""
    random = np.random.default_rng(0)
    with file.open("wb") as stream:
        for _ in range(10):
            stream.write(random.integers(0, 50_000, TOKENS // 10).astype(np.uint16).tobytes())


def write_images(folder: Path) -> None:
    """Write JPEG files of two classes, of the sizes that ImageNet has."""
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    for i in range(IMAGES):
        coarse = Image.fromarray(random.integers(0, 255, (24, 32, 3)).astype(np.uint8))
        coarse.resize((500, 375)).save(folder / "ab"[i % 2] / f"{i}.jpg", quality=90)


def opened(kind: str, way: str, folder: Path) -> cj.data.Data:
    """Return the data in one of the ways."""
    if kind == "tokens" and way == "on disk":
        return cj.data.tokens_on_disk(folder / "train.bin", length=LENGTH, vocabulary=50_000)
    if kind == "tokens":
        rows = np.fromfile(folder / "train.bin", np.uint16)
        rows = rows[: len(rows) // LENGTH * LENGTH].astype(np.int32).reshape(-1, LENGTH)
        return cj.data.Data.from_arrays({"tokens": rows})
    if way == "on disk":
        return cj.data.images_on_disk(folder / "images", size=SIZE)
    return cj.data.from_folder(folder / "images", size=SIZE)


def measure(kind: str, way: str, folder: Path) -> dict[str, float]:
    """Open the data, take batches, and return what it cost."""
    began = time.perf_counter()
    data = opened(kind, way, folder)
    feed = cj.data.batches(data.train, BATCH, seed=0)
    feed[0]
    first = time.perf_counter() - began
    steps = 20
    began = time.perf_counter()
    for step in range(1, 1 + steps):
        feed[step]
    rate = steps * BATCH / (time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    splits = (data.train, data.validation, data.test)
    size = sum(column.nbytes for split in splits for column in split.values())
    return {"first": first, "rate": rate, "peak": peak, "data": size}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
