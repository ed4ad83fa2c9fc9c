"""GPTQ of one layer: time, compiling included, beside the published algorithm in torch.

python experiments/benchmarks/gptq_time.py --torch PYTHON                  # 1024x1024; PYTHON has
torch; about 1 minute python experiments/benchmarks/gptq_time.py --torch PYTHON --size 4096      #
4096x4096; about 10 minutes on 2 busy cores

Both get the same weights, Gram matrix and scales, and start with them in memory. Ours is timed from
the call of `gptq` to the last rounded weight, in one process whose caches are cleared before every
round: tracing, compiling, solving, and the check that the Hessian could be factored. Torch runs by
itself in a process of its own, where this same file is called with ``--solve`` after its import and
a small warm-up, neither of which counts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

DAMPING, BLOCK = 0.01, 128
HEAD = [
    "layer",
    "int4",
    "rounds",
    "ours s",
    "of it running s",
    "torch s",
    "torch, inputs in rows s",
    "ours / torch",
]
HEAD += ["ours / torch, inputs in rows", "output error: nearest", "ours", "torch"]


def by_torch(w: Any, gram: Any, scale: Any) -> Any:
    """Solve as published: weights ``[n, k]``.

    A rank-one update after each column, a lazy one after each block.
    """
    import torch  # pyright: ignore[reportMissingImports]

    n, k = w.shape
    h = 2 * gram
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w = torch.where(dead, 0, w)
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q = torch.zeros_like(w)
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        own, errors, inner = (
            w[:, start:end].clone(),
            torch.zeros(n, end - start),
            u[start:end, start:end],
        )
        for i in range(end - start):
            s = scale[:, start + i]
            q[:, start + i] = torch.clamp(torch.round(own[:, i] / s), -8, 7) * s
            errors[:, i] = (own[:, i] - q[:, start + i]) / inner[i, i]
            own[:, i:] -= errors[:, i : i + 1] @ inner[i : i + 1, i:]
        w[:, end:] -= errors @ u[start:end, end:]
    return q


def by_torch_in_rows(w: Any, gram: Any, scale: Any) -> Any:
    """Solve in the same way with weights ``[k, n]``, so that an input's row is contiguous."""
    import torch  # pyright: ignore[reportMissingImports]

    k, n = w.shape
    h = 2 * gram
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w = torch.where(dead[:, None], 0, w)
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q = torch.zeros_like(w)
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        own, errors, inner = w[start:end], torch.zeros(end - start, n), u[start:end, start:end]
        for i in range(end - start):
            s = scale[start + i]
            q[start + i] = torch.clamp(torch.round(own[i] / s), -8, 7) * s
            errors[i] = (own[i] - q[start + i]) / inner[i, i]
            own[i:].addr_(inner[i, i:], errors[i], alpha=-1)
        w[end:].addmm_(u[start:end, end:].T, errors, alpha=-1)
    return q


def solve(folder: Path, rows: bool) -> None:
    """Solve the problem in a folder with torch, in a fresh process; write result and seconds."""
    import torch  # pyright: ignore[reportMissingImports]

    by = by_torch_in_rows if rows else by_torch
    w, gram, scale = (
        torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("w", "gram", "scale")
    )
    if not rows:
        w, scale = w.T.contiguous(), scale.T.contiguous()
    by(torch.randn(64, 64), torch.eye(64), torch.ones(64, 64))
    began = time.perf_counter()
    q = by(w.clone(), gram.clone(), scale)
    seconds = time.perf_counter() - began
    np.save(folder / "q.npy", (q if rows else q.T).contiguous().numpy())
    print(
        json.dumps(
            {"seconds": seconds, "torch": torch.__version__, "threads": torch.get_num_threads()}
        )
    )


def layer(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return normal weights, and the Gram matrix of 2 * size correlated inputs of many sizes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2 * size, size)).astype(np.float32)
    for i in range(1, size):
        x[:, i] = 0.9 * x[:, i - 1] + np.float32((1 - 0.81) ** 0.5) * x[:, i]
    x *= np.exp(rng.normal(size=size)).astype(np.float32)
    return rng.normal(size=(size, size)).astype(np.float32), x.T @ x / len(x)


def compare(args: argparse.Namespace, granularity: str | int) -> tuple[list[Any], dict[str, Any]]:
    """Time all on one layer, in turns, and check that they agree."""
    import jax
    import jax.numpy as jnp
    from interleave import ratio

    from compress_jax.quantize import gptq, output_error, uniform
    from compress_jax.trace import Calibration, calibrate, gram

    w, moment = layer(args.size, args.seed)
    params, c = {"kernel": jnp.asarray(w)}, uniform(4, granularity=granularity)
    state, g = c.init(params), jnp.asarray(moment)
    (how,) = c.pointwise(params, state).values()
    seen = calibrate(lambda p, x: x @ p["kernel"], gram(), params, [jnp.zeros((1, args.size))])
    fed = {
        "kernel": {
            "input": seen["kernel"]["input"]._replace(
                gram=g, count=jnp.ones_like(seen["kernel"]["input"].count)
            )
        }
    }
    seen = Calibration(fed, seen.sites)

    def ours() -> tuple[float, float, jax.Array]:
        jax.clear_caches()
        times = [time.perf_counter()]
        for _ in range(2):  # what the second time takes was not spent compiling
            q = jax.block_until_ready(
                gptq(params, seen, c, state, damping=DAMPING, block=BLOCK).params["kernel"]
            )
            times.append(time.perf_counter())
        return times[1] - times[0], times[2] - times[1], q

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for key, value in {"w": w, "gram": moment, "scale": np.asarray(how.operands[0])}.items():
            np.save(folder / f"{key}.npy", value)

        def theirs(*options: str) -> tuple[dict[str, Any], np.ndarray]:
            command = [args.torch, str(Path(__file__).resolve()), "--solve", name, *options]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return json.loads(done.stdout), np.load(folder / "q.npy")

        runs = []
        for i in range(args.rounds):
            turns = [("ours", ours), ("torch", theirs), ("rows", lambda: theirs("--rows"))]
            runs.append({key: run() for key, run in turns[i % 3 :] + turns[: i % 3]})
    error = lambda q: float(output_error(params["kernel"], jnp.asarray(q), g))  # noqa: E731
    errors = [
        error(c.view(params, state)["kernel"]),
        error(runs[-1]["ours"][2]),
        error(runs[-1]["torch"][1]),
    ]
    assert abs(errors[1] / errors[2] - 1) < 0.01 and errors[1] < errors[0], errors
    seconds = {key: [run[key][0]["seconds"] for run in runs] for key in ("torch", "rows")}
    whole, again = ([run["ours"][j] for run in runs] for j in (0, 1))
    median = lambda times: f"{np.median(times):.2f}"  # noqa: E731
    times = [median(whole), median(again), median(seconds["torch"]), median(seconds["rows"])]
    ratios = [ratio(whole, seconds["torch"]), ratio(whole, seconds["rows"])]
    row = [
        f"{args.size}x{args.size}",
        granularity,
        args.rounds,
        *times,
        *ratios,
        *(f"{each:.5g}" for each in errors),
    ]
    return row, {key: runs[-1]["torch"][0][key] for key in ("torch", "threads")}


def main() -> None:
    """Read the command line; time both granularities, or be the torch half of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024, help="inputs and outputs of the layer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torch", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--solve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.solve:
        return solve(args.solve, args.rows)
    from interleave import report

    table, versions = [], {}
    for granularity in ("channel", 128):
        row, versions = compare(args, granularity)
        table.append(row)
    name = "gptq_time" if args.size == 1024 else f"gptq_time_{args.size}"
    report(name, HEAD, table, input=f"N(0, 1) weights, AR(1) inputs, seed {args.seed}", **versions)


if __name__ == "__main__":
    main()
