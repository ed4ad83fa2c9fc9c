"""What the studies of this folder share: Brown's documents as tokens, rows of them, and records."""

import json
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import compress_jax as cj


def brown_tokens(tokenizer: cj.data.Tokenizer) -> dict[str, np.ndarray]:
    """Return the documents of each split, one behind the other, int32 ``[tokens]``."""
    return {
        split: np.concatenate([np.asarray(ids, np.int32) for ids in tokenizer.encode(own)])
        for split, own in cj.data.brown_texts().items()
    }


def row(tokens: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """Return a row ``[1, length]`` that begins anywhere."""
    start = rng.integers(0, len(tokens) - length)
    return tokens[start : start + length][None]


def keep(file: str, record: dict[str, Any]) -> None:
    """Add a record to a file of results, with the versions and the day."""
    made = {
        "jax": jax.__version__,
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    path = Path(__file__).parent / "results" / file
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps({**record, **made}) + "\n")
