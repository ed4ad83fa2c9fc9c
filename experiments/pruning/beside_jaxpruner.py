"""Every algorithm of JaxPruner beside ours: the same model, data, batches, budget and seeds.

And mask updates timed.

COMPRESS_JAX_DATA=DIR python experiments/pruning/beside_jaxpruner.py             # accuracy; about
10 minutes on 2 cores python experiments/pruning/beside_jaxpruner.py --time --algorithms magnitude
rigl  # mask updates

JaxPruner is not on PyPI, and calls `jax.tree_map`, which JAX no longer has; `restored_tree_map`
puts it back. Nothing is chosen: both run with the settings below, taken from JaxPruner's and RigL's
papers and scaled to the length of the training; test accuracy is measured once a run, after the
last step.
"""

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import compress_jax as cj
from compress_jax import prune
from compress_jax.core.paths import flatten
from compress_jax.train import create, make_step

RESULTS = Path(__file__).parent / "results"
SPARSITY, STEPS, BEGIN, END, EVERY, DROP, BATCH = 0.9, 400, 40, 300, 20, 0.3, 64
GRADUAL = prune.cubic(SPARSITY, BEGIN - 1, END - 1)  # JaxPruner's schedule is one step ahead
KERNELS = "**/kernel"
DUE = 200  # a step at which both sides choose masks anew; after END ours would not
DENSE_TO_SPARSE = ("random", "magnitude", "saliency", "global_magnitude", "global_saliency")


class Net(nn.Module):
    """A perceptron of two hidden layers on images of 14 x 14."""

    widths: tuple[int, ...] = (100, 50, 10)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits."""
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


def ours(algorithm: str, key: jax.Array) -> cj.Compression:
    """Return our counterpart of an algorithm of JaxPruner."""
    gradual: dict[str, Any] = {"every": EVERY}

    def relative(
        measure: Callable[[prune.ScoreInputs], jax.Array], needs_grads: bool = False
    ) -> cj.Compression:
        """Return what JaxPruner's global pruners do."""
        score = prune.normalized(prune.Score(measure, needs_grads=needs_grads))
        return prune.by_score(score, GRADUAL, scope="global", **gradual)

    methods: dict[str, Callable[[], cj.Compression]] = {
        "no_prune": cj.identity,
        "random": lambda: prune.random(GRADUAL, key, **gradual),
        "magnitude": lambda: prune.magnitude(GRADUAL, **gradual),
        "saliency": lambda: prune.saliency(GRADUAL, **gradual),
        "global_magnitude": lambda: relative(lambda seen: seen.x),
        "global_saliency": lambda: relative(lambda seen: seen.x * seen.grad, needs_grads=True),
        "magnitude_ste": lambda: prune.straight_through(prune.magnitude(SPARSITY)),
        "random_ste": lambda: prune.straight_through(prune.random(SPARSITY, key)),
        "static_sparse": lambda: prune.random(SPARSITY, key),
        "set": lambda: prune.sparse_evolution(
            SPARSITY, STEPS, key, drop=DROP, every=EVERY, end_fraction=END / STEPS
        ),
        "rigl": lambda: prune.rigl(
            SPARSITY, STEPS, key, drop=DROP, every=EVERY, end_fraction=END / STEPS
        ),
    }
    c = methods[algorithm]()
    if (
        algorithm in DENSE_TO_SPARSE
    ):  # as in JaxPruner, what is pruned stays so, and the last mask is of step END
        c = cj.between(0, END + 1, prune.nested(c))
    return c if algorithm == "no_prune" else cj.at(KERNELS, c)


def restored_tree_map(fn: Callable[..., Any], *trees: Any, is_leaf: Any = None) -> Any:
    """Do what `jax.tree_map` did, as JaxPruner relies on it.

    Where the first tree has None, so has the result.
    """
    return jax.tree.map(
        lambda x, *rest: None if x is None else fn(x, *rest), *trees, is_leaf=lambda x: x is None
    )


@cache
def jaxpruner() -> Any:
    """Import JaxPruner onto today's JAX."""
    setattr(jax, "tree_map", restored_tree_map)  # noqa: B010
    return importlib.import_module("jaxpruner")


def theirs(algorithm: str, key: jax.Array) -> Any:
    """Return JaxPruner's updater of an algorithm, configured like ours."""
    config = importlib.import_module("ml_collections").ConfigDict(
        {"algorithm": algorithm, "sparsity": SPARSITY}
    )
    config.update({"dist_type": "uniform", "rng_seed": key})
    if algorithm in ("set", "rigl"):
        config.update(
            {
                "update_freq": EVERY,
                "update_start_step": 1,
                "update_end_step": END,
                "drop_fraction": DROP,
            }
        )
    elif "ste" not in algorithm and algorithm != "static_sparse":
        config.update({"update_freq": EVERY, "update_start_step": BEGIN, "update_end_step": END})
    return jaxpruner().create_updater_from_config(config)


def read() -> dict[str, np.ndarray]:
    """Return Fashion-MNIST in 14 x 14: 10,000 training images, and all 10,000 test images."""
    data = cj.data.load("fashion_mnist")

    def small(images: np.ndarray) -> np.ndarray:
        return images.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196)

    train, test = data.train, data.test
    return {
        "x": small(train["image"][:10000]),
        "y": train["label"][:10000],
        "test_x": small(test["image"]),
        "test_y": test["label"],
    }


def cross_entropy(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Return the mean cross entropy of a batch."""
    logits: Any = Net().apply({"params": params}, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def optimizer() -> optax.GradientTransformation:
    """Return the optimizer of both sides."""
    return optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))


def train_ours(algorithm: str) -> Callable[..., Any]:
    """Return the training of a seed: ``(key, data) -> params as the model sees them``."""

    def loss(
        params: Any, model_state: Any, batch: Any, key: Any, teacher: Any, train: bool = True
    ) -> Any:
        return cross_entropy(params, batch), (model_state, {})

    @jax.jit
    def run(key: jax.Array, data: dict[str, jax.Array]) -> Any:
        c = ours(algorithm, jax.random.fold_in(key, 9))
        step = make_step(loss, optimizer(), c)
        state = create(start(key), c, optimizer(), key)
        state = jax.lax.fori_loop(
            0, STEPS, lambda i, state: step(state, batch_of(key, i, data))[0], state
        )
        return c.view(state.params, state.compression)

    return run


def train_theirs(algorithm: str) -> Callable[..., Any]:
    """Return the same training by JaxPruner, along its README."""

    @jax.jit
    def run(key: jax.Array, data: dict[str, jax.Array]) -> Any:
        updater = theirs(algorithm, jax.random.fold_in(key, 9))
        wrapped, params = updater.wrap_optax(optimizer()), start(key)["params"]
        state = wrapped.init(params)
        params = updater.post_gradient_update(params, state)

        def step(i: jax.Array, carry: Any) -> Any:
            params, state = carry
            grads = jax.grad(cross_entropy)(
                updater.pre_forward_update(params, state), batch_of(key, i, data)
            )
            updates, state = wrapped.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return updater.post_gradient_update(params, state), state

        params, state = jax.lax.fori_loop(0, STEPS, step, (params, state))
        return updater.pre_forward_update(params, state)

    return run


def start(key: jax.Array) -> Any:
    """Return the initial variables of a seed, the same on both sides."""
    return Net().init(key, jnp.ones((1, 196)))


def batch_of(
    key: jax.Array, i: jax.Array, data: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Return the batch of a step, the same on both sides."""
    chosen = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, len(data["y"]))
    return data["x"][chosen], data["y"][chosen]


def accuracy(params: Any, data: dict[str, jax.Array]) -> float:
    """Return the test accuracy in per cent."""
    found = Net().apply({"params": params}, data["test_x"]).argmax(-1)  # pyright: ignore[reportAttributeAccessIssue]
    return 100 * float((found == data["test_y"]).mean())


def pruned(params: Any) -> float:
    """Return the share of kernel entries that are zero."""
    kernels = [x for path, x in flatten(params)[0].items() if path.endswith("kernel")]
    return 1 - sum(int((x != 0).sum()) for x in kernels) / sum(x.size for x in kernels)


def compare(seeds: int, algorithms: list[str]) -> None:
    """Train everything on both sides and write the table."""
    data, file = (
        {name: jnp.asarray(x) for name, x in read().items()},
        RESULTS / "beside_jaxpruner.json",
    )
    rows = (
        json.loads(file.read_text())["rows"] if file.exists() else {}
    )  # one may run a few algorithms at a time
    for algorithm in algorithms:
        began, found = time.time(), {}
        for side, train in (("theirs", train_theirs), ("ours", train_ours)):
            run = train(algorithm)
            trained = [run(jax.random.key(seed), data) for seed in range(seeds)]
            found[side] = [round(accuracy(params, data), 2) for params in trained]
            found[f"{side} sparsity"] = [round(pruned(params), 6) for params in trained]
        rows[algorithm] = found
        print(algorithm, found, f"{time.time() - began:.0f} s", flush=True)
        write("beside_jaxpruner", {name: rows[name] for name in ALGORITHMS if name in rows})


def write(name: str, rows: dict[str, Any]) -> None:
    """Write the accuracies as JSON, and a table of means, paired differences, standard errors."""
    lines = [
        "| algorithm | JaxPruner | ours | ours - JaxPruner | sparsity, theirs | ours |",
        "| --- " * 6 + "|",
    ]
    for algorithm, found in rows.items():
        gaps = [a - b for a, b in zip(found["ours"], found["theirs"], strict=True)]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5
        cells = [algorithm, *(f"{statistics.mean(found[side]):.2f}" for side in ("theirs", "ours"))]
        cells += [f"{statistics.mean(gaps):+.2f} ± {error:.2f}"]
        cells += [
            f"{100 * statistics.mean(found[f'{side} sparsity']):.2f} %"
            for side in ("theirs", "ours")
        ]
        lines.append("| " + " | ".join(cells) + " |")
    settings = {
        "sparsity": SPARSITY,
        "steps": STEPS,
        "begin": BEGIN,
        "end": END,
        "every": EVERY,
        "drop": DROP,
    }
    where = {"date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, **settings}
    note = ", ".join(f"{key}: {value}" for key, value in where.items())
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + f"\n\n{note}\n")
    (RESULTS / f"{name}.json").write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")


def clock(rounds: int, algorithms: list[str]) -> None:
    """Time the mask updates of both sides in turns, on a perceptron of 1.9 million weights."""
    sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
    interleave = importlib.import_module("interleave")
    params = jax.jit(Net((1024, 1024, 10)).init)(jax.random.key(0), jnp.ones((1, 784)))["params"]
    grads, lines = jax.tree.map(jnp.sin, params), []
    for algorithm in algorithms:
        updater, c = theirs(algorithm, jax.random.key(1)), ours(algorithm, jax.random.key(1))
        their_state = (
            updater.wrap_optax(optax.adam(1e-3)).init(params)._replace(count=jnp.int32(DUE))
        )
        their_update: Any = (
            jax.jit(updater.update_state).lower(their_state, params, grads).compile()
        )
        our_state, now = c.init(params), jnp.int32(DUE)
        our_update: Any = jax.jit(lambda p, s, g, i, c=c: c.update(p, s, step=i, grads=g))
        our_update = our_update.lower(params, our_state, grads, now).compile()
        runs = {
            "theirs": lambda f=their_update, s=their_state: f(s, params, grads),
            "ours": lambda f=our_update, s=our_state, i=now: f(params, s, grads, i),
        }
        times = interleave.interleaved(runs, rounds)
        a, b = ([run.wall for run in times[side]] for side in ("theirs", "ours"))
        lines.append(
            [
                algorithm,
                interleave.milliseconds(a),
                interleave.milliseconds(b),
                interleave.ratio(a, b),
            ]
        )
        print(lines[-1], flush=True)
    head = ["algorithm", "JaxPruner ms", "ours ms", "JaxPruner / ours"]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * 4, *lines])
    RESULTS.mkdir(exist_ok=True)
    note = f"date: {time.strftime('%Y-%m-%d')}, jax: {jax.__version__}, rounds: {rounds}"
    note += ", weights: 1,862,656"
    (RESULTS / "beside_jaxpruner_time.md").write_text(f"{table}\n\n{note}\n")


ALGORITHMS = ["no_prune", "random", "magnitude", "saliency", "global_magnitude", "global_saliency"]
ALGORITHMS += ["magnitude_ste", "random_ste", "static_sparse", "set", "rigl"]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS, choices=ALGORITHMS)
    parser.add_argument("--time", action="store_true", help="time mask updates instead")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    clock(args.rounds, args.algorithms) if args.time else compare(args.seeds, args.algorithms)
