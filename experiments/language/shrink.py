"""Perplexity of a narrower or shallower SmolLM2, before and after recovery by distillation.

    python experiments/language/shrink.py --cuts 0.1 0.2 0.3 --steps 200

A share of all parameters is cut: hidden features of the perceptrons (width), whole layers (depth),
or half and half (joint). What is cut is chosen by each criterion from training documents of the
Brown corpus; perplexity is of test documents. Recovery is distillation from the float model on
training documents: KL of each next token, without whole logits. Results are kept in
experiments/language/results/shrink.jsonl.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from texts import brown_tokens, keep, row

import compress_jax as cj
from compress_jax.core.types import Params

WIDTHS = ("magnitude", "activation", "activation, weighted")
DEPTHS = ("cosine", "distance")
WAYS = tuple(
    [f"width by {name}" for name in WIDTHS] + [f"depth by {name}" for name in DEPTHS] + ["joint"]
)
CHUNK = 4096  # columns of the vocabulary at a time


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuts", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--steps", type=int, default=0, help="of recovery")
    parser.add_argument("--rate", type=float, default=1e-4, help="the highest learning rate")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=8, help="calibration rows")
    parser.add_argument("--tokens", type=int, default=2048, help="of test documents")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    model, params, tokenizer = cj.models.load(cj.models.smollm2_file())
    assert tokenizer is not None
    tokens = brown_tokens(tokenizer)
    test = tokens["test"][: chosen.tokens]
    train = tokens["train"]
    rng = np.random.default_rng(chosen.seed)
    rows = [row(train, chosen.length, rng) for _ in range(chosen.rows)]

    def measured(model: Any, params: Params) -> float:
        fn = _function(model)
        return cj.train.evaluate.perplexity(fn, params, test, context=chosen.length).perplexity

    float32 = measured(model, params)
    print("| cut | way | parameters | perplexity | recovered |\n|--:|---|--:|--:|--:|")
    print(f"| 0 % | float32 | {_size(params):,} | {float32:.2f} | |", flush=True)
    for cut in chosen.cuts:
        for way in chosen.ways:
            began = time.perf_counter()
            small_model, small = _smaller(model, params, rows, cut, way)
            seconds = time.perf_counter() - began
            found = measured(small_model, small)
            recovered = None
            if chosen.steps:
                batches = (row(train, chosen.length, rng) for _ in range(chosen.steps))
                small = _distilled(small_model, small, model, params, batches, chosen)
                recovered = measured(small_model, small)
            _kept(chosen, cut, way, _size(small), found, recovered, float32, seconds)
            after = "" if recovered is None else f"{recovered:.2f}"
            cells = (f"{cut:.0%}", way, f"{_size(small):,}", f"{found:.2f}", after)
            print(f"| {' | '.join(cells)} |", flush=True)


def _function(model: Any) -> Callable[[Params, jax.Array], jax.Array]:
    return lambda params, tokens: jnp.asarray(model.apply({"params": params}, tokens))


def _size(params: Params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _smaller(
    model: Any, params: Params, rows: list[np.ndarray], cut: float, way: str
) -> tuple[Any, Params]:
    """Return a decoder that has lost a share of all parameters, and its params."""
    kind, _, criterion = way.partition(" by ")
    total = _size(params)
    lost = cut * total
    if kind != "width":
        layer = _size(params["layer_0"])
        count = round(lost / layer * (1 if kind == "depth" else 0.5))
        fn = _function(model)
        short = cj.prune.drop_blocks(
            fn, params, batches=rows, count=count, by=criterion or "cosine"
        )
        print(short.table, file=sys.stderr, flush=True)
        model, params = cj.models.fitted(model, short.params)
        lost -= total - _size(params)
    if kind != "depth":
        ratio = lost / sum(_size(layer["mlp"]) for key, layer in params.items() if "layer" in key)
        share = {"**/mlp/**": ratio}
        importance = _importance(model, params, rows, criterion or "activation, weighted")
        small = cj.prune.shrink(
            _function(model), params, rows[0], ratio=share, importance=importance
        )
        model, params = cj.models.fitted(model, small.params)
    return model, params


def _importance(
    model: Any, params: Params, rows: list[np.ndarray], name: str
) -> Callable[[cj.prune.importance.Member], jax.Array | None]:
    if name == "magnitude":
        return cj.prune.importance.magnitude()
    fn = _function(model)
    # Features of the perceptrons are read by `down` alone.
    moments = cj.trace.reducers.moments()
    seen = cj.trace.calibrate(fn, moments, params, rows, where="**/mlp/down/kernel")
    return cj.prune.importance.activation(seen, weighted=name.endswith("weighted"))


def _distilled(
    model: Any,
    params: Params,
    teacher: Any,
    teacher_params: Params,
    batches: Any,
    chosen: argparse.Namespace,
) -> Params:
    """Return params after distillation from the float model, one row a step."""
    student_head = cj.trace.with_last_product(_function(model))
    teacher_head = cj.trace.with_last_product(_function(teacher))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, chosen.rate, min(20, chosen.steps // 2 + 1), chosen.steps + 1
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    def loss(params: Params, teacher_params: Params, tokens: jax.Array) -> jax.Array:
        own = student_head(params, tokens)[1]
        theirs = jax.lax.stop_gradient(teacher_head(teacher_params, tokens)[1])
        return cj.distill.chunked_kl(
            own.hidden, own.kernel, theirs.hidden, theirs.kernel, 1.0, CHUNK
        ).mean()

    @jax.jit
    def step(
        params: Params, state: optax.OptState, teacher_params: Params, tokens: jax.Array
    ) -> tuple[Params, optax.OptState, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, teacher_params, tokens)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for number, tokens in enumerate(batches, 1):
        params, state, value = step(params, state, teacher_params, tokens)
        if number % 10 == 0 or number == chosen.steps:
            print(f"step {number}: KL {float(value):.4f}", file=sys.stderr, flush=True)
    return params


def _kept(
    chosen: argparse.Namespace,
    cut: float,
    way: str,
    size: int,
    found: float,
    recovered: float | None,
    float32: float,
    seconds: float,
) -> None:
    record = {
        "cut": cut,
        "way": way,
        "parameters": size,
        "perplexity": found,
        "recovered": recovered,
        "steps": chosen.steps,
        "float32": float32,
        "seed": chosen.seed,
        "calibration_tokens": chosen.rows * chosen.length,
        "test_tokens": chosen.tokens,
        "seconds": round(seconds, 1),
    }
    keep("shrink.jsonl", record)


if __name__ == "__main__":
    main()
