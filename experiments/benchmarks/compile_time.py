"""Compile time that a compression adds to a model whose layers are not stacked.

python experiments/benchmarks/compile_time.py                           # 50 kernels, 10 minutes
python experiments/benchmarks/compile_time.py --kernels 500 --after     # without "leaf by leaf"
python experiments/benchmarks/compile_time.py --time                    # also runs both steps

A chain of equal kernels [256, 256], unrolled, trained with Adam. Programs are traced, lowered and
compiled from shapes; seconds are of the processor, which load disturbs less than wall time. "Leaf
by leaf" is the same compression without loops over leaves that are alike, in the same run.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from interleave import interleaved, ratio, report

import compress_jax as cj
from compress_jax import cluster, lowrank, prune, quantize, train
from compress_jax.core import alike

WIDTH = 256
HEAD = ["compression", "kernels", "init", "view", "update", "step", "step / plain"]
HEAD += ["temporaries of update", "of step", "leaf by leaf: init", "update", "step"]
HEAD += ["temporaries of update", "of step", "step time / leaf by leaf"]
CASES: dict[str, cj.Compression] = {
    "plain": cj.identity(),
    "int4, absmax": quantize.uniform(4, granularity="channel"),
    "int4, mse": quantize.uniform(4, granularity="channel", scale="mse"),
    "learned steps": quantize.lsq(4, granularity="channel"),
    "half of each pruned": prune.magnitude(0.5),
    "half of all pruned": prune.magnitude(0.5, scope="global"),
    "2 of 4": prune.magnitude(None, prune.n_m(2, 4)),
    "16 centers": cluster.kmeans(16),
    "rank 16": lowrank.svd(16),
    "RigL": prune.rigl(0.5, 1000, jax.random.key(0), every=1),
}
OPTIMIZER = train.label_optimizer(optax.adam(1e-3), optax.adam(1e-3))


class Cost(NamedTuple):
    """Seconds of the processor to trace, lower and compile, and bytes of temporaries."""

    seconds: float
    temporaries: int


def cost(fn: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Cost:
    jax.clear_caches()  # else a second program finds the traces of the first
    start = time.process_time()
    compiled = jax.jit(fn, donate_argnums=donate).lower(*args).compile()
    seconds = time.process_time() - start
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not say what a program needs"
    return Cost(seconds, memory.temp_size_in_bytes)


@contextmanager
def leaf_by_leaf() -> Iterator[None]:
    """Compile as if no two leaves were alike."""
    fewest, alike.FEWEST = alike.FEWEST, 10**9
    try:
        yield
    finally:
        alike.FEWEST = fewest


def loss(
    params: Any, model_state: Any, batch: Any, key: Any, teacher: Any, train: bool = True
) -> Any:
    x = batch
    for name in sorted(params):
        x = jax.nn.relu(x @ params[name]["kernel"])
    return jnp.square(x).mean(), (model_state, {})


def costs(c: cj.Compression, params: Any) -> dict[str, Cost]:
    state = jax.eval_shape(c.init, params)
    count = jax.ShapeDtypeStruct((), jnp.int32)

    def update(params: Any, state: Any, step: jax.Array, grads: Any) -> Any:
        return c.update(params, state, step=step, grads=grads, key=jax.random.key(0))

    step = train.make_step(loss, OPTIMIZER, c)
    return {
        "init": cost(c.init, params),
        "view": cost(c.view, params, state),
        "update": cost(update, params, state, count, params),
        "step": cost(step, train_state(c, params), batch(), donate=(0,)),
    }


def train_state(c: cj.Compression, params: Any) -> Any:
    make = lambda p: train.create({"params": p}, c, OPTIMIZER, jax.random.key(1))  # noqa: E731
    return jax.eval_shape(make, params)


def batch() -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((8, WIDTH), jnp.float32)


def step_time(c: cj.Compression, params: Any) -> str:
    """Return the ratio of step times: with loops over alike leaves, and leaf by leaf."""
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)  # noqa: E731
    normal = jax.random.normal(jax.random.key(0), (WIDTH, WIDTH)) / WIDTH**0.5
    weights = jax.tree.map(lambda x: normal, params)
    state = train.create({"params": weights}, c, OPTIMIZER, jax.random.key(1))
    shapes = train_state(c, params)
    looped = jax.jit(train.make_step(loss, OPTIMIZER, c)).lower(shapes, batch()).compile()
    jax.clear_caches()
    with leaf_by_leaf():
        apart = jax.jit(train.make_step(loss, OPTIMIZER, c)).lower(shapes, batch()).compile()
    x = zeros(batch()) + 1
    runs = interleaved({"apart": lambda: apart(state, x), "looped": lambda: looped(state, x)}, 7)
    return ratio([run.cpu for run in runs["looped"]], [run.cpu for run in runs["apart"]])


def main() -> None:
    """Compile every program and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", type=int, default=50)
    parser.add_argument("--after", action="store_true", help="no comparison, which takes longest")
    parser.add_argument("--time", action="store_true", help="run the steps of both forms as well")
    parser.add_argument("--methods", nargs="*", default=list(CASES))
    options = parser.parse_args()
    kernel = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    params = {f"layer_{i:03}": {"kernel": kernel} for i in range(options.kernels)}
    size = 4 * WIDTH**2 * options.kernels
    rows = []
    costs(CASES["plain"], params)  # JAX's own first use is not counted
    plain = costs(CASES["plain"], params)["step"].seconds
    for name in options.methods:
        found = costs(CASES[name], params)
        row = [name, str(options.kernels), *(f"{each.seconds:.2f}" for each in found.values())]
        row += [f"{found['step'].seconds / plain:.2f}"]
        row += [f"{found[what].temporaries / size:.2f}" for what in ("update", "step")]
        if not options.after and name != "plain":
            with leaf_by_leaf():
                before = costs(CASES[name], params)
            row += [f"{before[what].seconds:.2f}" for what in ("init", "update", "step")]
            row += [f"{before[what].temporaries / size:.2f}" for what in ("update", "step")]
        if options.time and name != "plain":
            row += [""] * (len(HEAD) - 1 - len(row)) + [step_time(CASES[name], params)]
        rows.append(row + [""] * (len(HEAD) - len(row)))
        print(rows[-1], flush=True)
    name = f"compile_time_{options.kernels}"
    report(name, HEAD, rows, unit="processor seconds; temporaries in sizes of the params")


if __name__ == "__main__":
    main()
