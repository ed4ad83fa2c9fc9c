"""What training recovers of SmolLM2 at few bits, by its divergence from the float model.

    python experiments/language/recover.py --formats W4g64 W3g64 --train adapter full --steps 200

The student sees the kernels on a grid; the teacher is the float model. Trained are the factors
beside a frozen base (adapter), factors merged before the grid (merged), the grid's scales (scales)
or every weight (full). Texts are Brown's training documents; the perplexity is
of test documents. Results are kept in experiments/language/results/recover.jsonl.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from texts import brown_tokens, keep, row
from tuned import tuned

import compress_jax as cj
from compress_jax.core.types import ModelFn, Params

FORMATS = {"W4g64": (4, 64), "W3g64": (3, 64), "W2g64": (2, 64)}  # bits, group size
RATES = {"adapter": 1e-3, "merged": 1e-3, "scales": 1e-4, "full": 1e-5}


def main() -> None:
    """Train, measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=["W4g64", "W3g64"])
    parser.add_argument("--train", nargs="+", choices=list(RATES), default=["adapter", "full"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--init", choices=["zero", "error"], default="zero", help="of an adapter")
    parser.add_argument("--rate", type=float, help="learning rate; by default one for each way")
    parser.add_argument("--length", type=int, default=256, help="tokens of a step")
    parser.add_argument("--tuned", type=int, default=0, help="steps of float32 training first")
    parser.add_argument("--tokens", type=int, default=4096, help="of test documents")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    model, params, tokenizer = cj.models.load(cj.models.smollm2_file())
    assert tokenizer is not None
    tokens = brown_tokens(tokenizer)
    train, test = tokens["train"], tokens["test"]

    def fn(params: Params, tokens: jax.Array) -> jax.Array:
        return jnp.asarray(model.apply({"params": params}, tokens))

    params = tuned(fn, params, tokens["train"], chosen.tuned)

    def measured(params: Params) -> float:
        found = cj.train.evaluate.perplexity(fn, params, test[: chosen.tokens], context=512)
        return found.perplexity

    float32 = measured(params)
    print("| format | trained | steps | perplexity | gap closed |\n|---|---|--:|--:|--:|")
    print(f"| float32 | | | {float32:.2f} | |", flush=True)
    for name in chosen.formats:
        bits, group_size = FORMATS[name]
        grid = cj.at("**/kernel", cj.quantize.uniform(bits, granularity=group_size))
        nearest = measured(_viewed(grid, params, grid.init(params)))
        print(f"| {name} | nothing | 0 | {nearest:.2f} | 0% |", flush=True)
        for way in chosen.train:
            plain = cj.at("**/kernel", _compression(way, bits, group_size, chosen))
            c = cj.bind(plain, fn, params, train[None, : chosen.length])
            began = time.perf_counter()
            after = _trained(c, way, fn, params, _rows(train, chosen), chosen)
            seconds = time.perf_counter() - began
            found = measured(_viewed(c, after.params, after.state))
            nbytes = cj.core.nbytes(c.pack(after.params, after.state))
            closed = (nearest - found) / (nearest - float32)
            _kept(
                chosen,
                format=name,
                trained=way,
                perplexity=found,
                nearest=nearest,
                float32=float32,
                divergence=after.divergence,
                bytes=nbytes,
                seconds=round(seconds, 1),
            )
            print(f"| {name} | {way} | {chosen.steps} | {found:.2f} | {closed:.0%} |", flush=True)


def _compression(
    way: str, bits: int, group_size: int, chosen: argparse.Namespace
) -> cj.Compression:
    """Return what the student's kernels are seen through."""
    grid = cj.quantize.uniform(bits, granularity=group_size)
    # Factors from zero are drawn: a decomposition of every kernel would take minutes.
    key = jax.random.key(chosen.seed)
    if way == "merged":
        return cj.chain(cj.lowrank.adapter(chosen.rank, key=key), grid)
    if way == "adapter":
        drawn = key if chosen.init == "zero" else None
        return cj.lowrank.adapter(chosen.rank, base=grid, init=chosen.init, key=drawn)
    if way == "scales":
        return cj.quantize.lsq(bits, group_size, start=cj.quantize.absmax)
    return grid


class _After(NamedTuple):
    """What training left.

    Attributes:
      params: the params.
      state: of the compression.
      divergence: from the teacher, in nats a token, mean of the last ten steps.
    """

    params: Params
    state: cj.CompressionState
    divergence: float


def _trained(
    c: cj.Compression,
    way: str,
    fn: ModelFn,
    params: Params,
    rows: Iterator[np.ndarray],
    chosen: argparse.Namespace,
) -> _After:
    """Follow the divergence from the float model; only in the full way params are trained."""
    state = jax.jit(c.init)(params)
    rate = chosen.rate or RATES[way]
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, max(chosen.steps, 1)))
    trained: dict[str, Any] = {"learned": state.learned}
    if way == "full":
        trained["params"] = params

    @partial(jax.jit, donate_argnums=(1, 2))
    def step(
        teacher: Params, trained: dict[str, Any], rest: tuple[Any, Any], tokens: jax.Array
    ) -> tuple[dict[str, Any], tuple[Any, Any], jax.Array]:
        fixed, opt_state = rest
        wanted = fn(teacher, tokens)

        def loss(trained: dict[str, Any]) -> jax.Array:
            own = cj.CompressionState(trained["learned"], fixed)
            seen = c.view(trained.get("params", teacher), own)
            return cj.distill.kl(fn(seen, tokens), wanted).mean()

        value, grads = jax.value_and_grad(loss)(trained)
        updates, opt_state = optimizer.update(grads, opt_state)
        trained = optax.apply_updates(trained, updates)  # pyright: ignore[reportAssignmentType]
        own = cj.CompressionState(trained["learned"], fixed)
        new = c.update(trained.get("params", teacher), own, step=0)
        return {**trained, "learned": new.learned}, (new.fixed, opt_state), value

    # Donated: the teacher's own arrays must not be among what is trained.
    trained = jax.tree.map(jnp.copy, trained)
    rest = (state.fixed, optimizer.init(trained))
    values = []
    for _, tokens in zip(range(chosen.steps), rows, strict=False):
        trained, rest, value = step(params, trained, rest, tokens)
        values.append(float(value))
        print(f"{way} {len(values)}/{chosen.steps} {values[-1]:.4f}", file=sys.stderr, flush=True)
    state = cj.CompressionState(trained["learned"], rest[0])
    last = float(np.mean(values[-10:])) if values else float("nan")
    return _After(trained.get("params", params), state, last)


def _viewed(c: cj.Compression, params: Params, state: cj.CompressionState) -> Params:
    return jax.jit(c.view)(params, state)


def _rows(tokens: np.ndarray, chosen: argparse.Namespace) -> Iterator[np.ndarray]:
    """Yield rows ``[1, length]`` that begin anywhere, the same for every way."""
    rng = np.random.default_rng(chosen.seed)
    while True:
        yield row(tokens, chosen.length, rng)


def _kept(chosen: argparse.Namespace, **found: Any) -> None:
    record = {
        **found,
        "steps": chosen.steps,
        "rank": chosen.rank,
        "init": chosen.init,
        "rate": chosen.rate or RATES[found["trained"]],
        "length": chosen.length,
        "test_tokens": chosen.tokens,
        "tuned": chosen.tuned,
        "seed": chosen.seed,
    }
    keep("recover.jsonl", record)


if __name__ == "__main__":
    main()
