"""The spelling of an operation must not matter to an export.

Each is written and right, or refused by name.

Claim: of every spelling in `spelled.py` (pooling, norms, dropout, layouts, transposed and batched
products, activations, attention, over Flax Linen, NNX, Haiku, Keras, Equinox and plain JAX) the
ONNX file computes what JAX does, at another batch size too, or an ExportError says what to do; no
other exception is ever raised. With ``--static`` in uint8 x uint8, where a site that has no integer
kernel is listed with the reason.

    python experiments/faults/spellings.py            # 2 minutes on 2 idle cores
    python experiments/faults/spellings.py --static   # 5 minutes

Result, 2026-11-28, on a machine that 8 others used: without --static the first 85 spellings
(pooling, norms, dropout) were written and right to 1e-6, none refused, none raw. The run was
stopped there. Of the others an earlier state of the code wrote all that it came to but DenseGeneral
with batch axes, where JAX needs a fixed batch. Attention and --static were not run since sites are
listed instead of refused. An NNX LSTM, whose cell mutates its random state, is not in the table.

Needs pip install 'compress_jax[onnx]' dm-haiku keras equinox; spellings of a package that is not
there are skipped.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

import jax
from spelled import SPELLINGS

import compress_jax as cj
from compress_jax.core.errors import ExportError
from compress_jax.export._verify.agreement import agree
from compress_jax.export._verify.verify import runner

PACKAGES = {
    "linen": "flax",
    "nnx": "flax",
    "jax": "jax",
    "haiku": "haiku",
    "keras": "keras",
    "equinox": "equinox",
}


def outcome(name: str, static: bool, folder: Path) -> tuple[str, str]:
    """Export one spelling.

    Args:
      name: of the spelling.
      static: whether in integers.
      folder: for the file.

    Returns:
      ``("written" | "refused" | "raw", details)``.
    """
    fn, params, x = SPELLINGS[name]()
    options = (
        {"how": cj.quantize.static(8, symmetric=False), "batches": [x], "weights": "uint8"}
        if static
        else {}
    )
    try:
        done = cj.export.to_onnx(fn, params, x, folder / "model.onnx", **options)
        if not static:
            fewer = x[: len(x) - 1]
            agree(jax.jit(fn)(params, fewer), runner(done.path)(fewer), 1e-3, "another batch size")
    except ExportError as error:
        return "refused", " ".join(str(error).split())
    except Exception as error:
        return "raw", f"{type(error).__name__}: {error}"
    floats = [
        f"{row.name} {row.form}: {row.reason}"
        for row in done.rows
        if static and "int8" not in row.form
    ]
    return "written", "; ".join([f"{done.difference:.1e}", *floats])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--static", action="store_true")
    parser.add_argument("--only", default="", help="part of a name")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for name in [name for name in SPELLINGS if options.only in name]:
            if find_spec(PACKAGES[name.partition(":")[0]]) is None:
                counts["package missing"] += 1
                continue
            kind, details = outcome(name, options.static, Path(folder))
            counts[kind] += 1
            print(f"| `{name}` | {kind} | {details[:300].replace('|', '/')} |", flush=True)
    print(", ".join(f"{n} {kind}" for kind, n in counts.items()))


if __name__ == "__main__":
    main()
