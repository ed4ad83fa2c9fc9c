"""The relative error of every weight format beside Qwix's, on the same input in the same run.

pip install '.[bench]' python experiments/benchmarks/quantization_error.py            # N(0, 1),
1024x1024, scales per channel; about 2 minutes

Qwix has scales by absmax, minmax and root mean square, each times a factor of the user's. A format
is compared with Qwix's plain rule and with the best factor of any of its rules, found by trying 100
of them on this very input. "Equal" is to nine digits; both errors are sums in float64 of float32
numbers.
"""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import qwix  # pyright: ignore[reportMissingImports]
from interleave import report

from compress_jax import quantize
from compress_jax.core import Compression, nbytes

HEAD = [
    "format",
    "granularity",
    "Qwix",
    "Qwix, best factor",
    "ours",
    "ours: scale",
    "bits a weight",
    "beaten",
]
COLUMNS = ("channel", 128, 64, 32, 16)


class Row(NamedTuple):
    """One format at one granularity: Qwix's name and rule for it, and ours."""

    format: str
    granularity: str | int
    qtype: Any
    rule: str
    ours: Compression
    scale: str = "mse"


def rows() -> Iterator[Row]:
    """Yield the rows of the table: the published comparison, then what else both libraries have."""

    def uniform(
        bits: int, granularity: str | int = "channel", symmetric: bool = True
    ) -> Compression:
        return quantize.uniform(bits, symmetric, granularity, "mse")

    yield Row("int8", "channel", "int8", "absmax", uniform(8))
    yield Row("int8 asymmetric", "channel", "int8", "minmax", uniform(8, symmetric=False))
    for granularity in COLUMNS[:4]:
        yield Row("int4", granularity, "int4", "absmax", uniform(4, granularity))
    yield Row("int4 asymmetric", "channel", "int4", "minmax", uniform(4, symmetric=False))
    yield Row("int3", "channel", "int3", "absmax", uniform(3))
    yield Row("int2", "channel", "int2", "absmax", uniform(2))
    yield Row("nf4", "channel", "nf4", "absmax", quantize.nf4("channel", "mse"))
    yield Row("nf4", 64, "nf4", "absmax", quantize.nf4(64, "mse"))
    yield Row("mxfp4", 32, "mxfp4", "absmax", quantize.mxfp4("mse"))
    yield Row("nvfp4", 16, "nvfp4", "absmax", quantize.nvfp4("mse"))
    yield Row("fp4 e2m1", "channel", jnp.float4_e2m1fn, "absmax", quantize.fp4("channel", "mse"))
    yield Row(
        "fp8 e4m3", "channel", jnp.float8_e4m3fn, "absmax", quantize.fp8("e4m3", "channel", "mse")
    )
    yield Row(
        "fp8 e5m2", "channel", jnp.float8_e5m2, "absmax", quantize.fp8("e5m2", "channel", "mse")
    )
    yield Row("mxfp8", 32, "mxfp8", "absmax", quantize.mxfp8(scale="mse"))


def ours_alone() -> Iterator[tuple[str, str | int, str, Compression]]:
    """Yield what Qwix does not have, and other scale rules of ours."""
    for scale in ("floor", "ceil"):
        yield "mxfp4", 32, scale, quantize.mxfp4(scale)
    yield "nvfp4", 16, "absmax", quantize.nvfp4()
    for scale in ("percentile", "rms", "pnorm", "entropy"):
        yield "int4", "channel", scale, quantize.uniform(4, granularity="channel", scale=scale)
    for scale in ("twn", "mse"):
        yield "ternary", "channel", scale, quantize.ternary(scale=scale)
    yield "binary", "channel", "mse", quantize.binary()
    yield (
        "fp6 e2m3",
        "channel",
        "mse",
        quantize.codebook(quantize.float_format(2, 3), "channel", "mse"),
    )


def relative(w: jax.Array, view: jax.Array) -> float:
    """Return the relative Frobenius error, in float64."""
    difference = np.asarray(view, np.float64) - np.asarray(w, np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(w, np.float64)))


def of_ours(w: jax.Array, compression: Compression) -> tuple[float, float]:
    """Return our error and the stored bits for each weight, scales included."""
    state = compression.init({"w": w})
    packed = compression.pack({"w": w}, state)
    return relative(w, compression.view({"w": w}, state)["w"]), 8 * nbytes(packed) / w.size


def of_qwix(w: jax.Array, row: Row, rule: str) -> float:
    """Return Qwix's error."""
    tiled = {} if isinstance(row.granularity, str) else {0: row.granularity}
    qtype = jnp.dtype(row.qtype) if row.qtype in ("int8", "int4") else row.qtype
    packed = qwix.quantize(
        w, qtype, channelwise_axes=(1,), tiled_axes=tiled, calibration_method=rule
    )
    return relative(w, qwix.dequantize(packed))


def best_of_qwix(w: jax.Array, row: Row) -> float:
    """Return the least error of Qwix's rules, symmetric or not, over a grid of factors."""
    factors = {row.rule: np.linspace(0.2, 1.2, 51)} | (
        {} if row.rule == "minmax" else {"rms": np.linspace(0.8, 5.7, 50)}
    )
    return min(
        of_qwix(w, row, f"{rule},{factor:.3f}") for rule, of in factors.items() for factor in of
    )


def main() -> None:
    """Measure all formats and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024, help="rows and columns of the matrix")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    w, table = jax.random.normal(jax.random.key(args.seed), (args.size, args.size)), []
    for row in rows():
        error, bits = of_ours(w, row.ours)
        plain, best = of_qwix(w, row, row.rule), best_of_qwix(w, row)
        least = min(plain, best)
        verdict = (
            "equal"
            if np.isclose(error, least, rtol=1e-9, atol=0)
            else "yes"
            if error < least
            else "NO"
        )
        cells = [
            f"{plain:.5f} ({row.rule})",
            f"{best:.5f}",
            f"{error:.5f}",
            row.scale,
            f"{bits:.2f}",
            verdict,
        ]
        table.append([row.format, row.granularity, *cells])
    for name, granularity, scale, compression in ours_alone():
        error, bits = of_ours(w, compression)
        table.append([name, granularity, "", "", f"{error:.5f}", scale, f"{bits:.2f}", ""])
    report(
        "quantization_error",
        HEAD,
        table,
        qwix=qwix.__version__,
        input=f"N(0, 1), {args.size}x{args.size}, seed {args.seed}",
    )


if __name__ == "__main__":
    main()
