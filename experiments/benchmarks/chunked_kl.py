"""Divergence of two heads over a large vocabulary, fused slice by slice or with all logits.

python experiments/benchmarks/chunked_kl.py               # 50,257 and 256,000 words; about 5
minutes on 2 cores python experiments/benchmarks/chunked_kl.py --width 512   # wider heads, where
matrix products weigh more

Each row is one gradient, to the student's hidden states and head. Memory is what the compiled
program allocates beside its arguments and results, which are the same for both. Time is of variants
that take turns.
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from interleave import interleaved, milliseconds, ratio, report

from compress_jax.distill import chunked_hinton, chunked_kl, hinton, jsd, kl, reverse_kl

HEAD = [
    "vocabulary",
    "form",
    "memory MB",
    "naive / fused",
    "ms",
    "ratio of time",
    "ratio of processor time",
    "gradient off by",
]
TEMPERATURE = 2.0


def arrays(tokens: int, width: int, vocabulary: int) -> tuple[jax.Array, ...]:
    """Return the student's hidden states and head, the teacher's, and labels."""
    keys, shapes = jax.random.split(jax.random.key(0), 4), ((tokens, width), (width, vocabulary))
    scaled = [
        jax.random.normal(key, (shape[0], shape[1]))
        for key, shape in zip(keys, shapes + shapes, strict=True)
    ]
    scaled[1], scaled[3] = (3 * head / width**0.5 for head in scaled[1::2])
    return *scaled, jnp.arange(tokens) * 977 % vocabulary


def forms(chunks: list[int]) -> dict[str, Any]:
    """Return the losses by name, each fused one with the naive form that it is held against."""

    def naive(
        loss: Any, hidden: Any, head: Any, teacher_hidden: Any, teacher_head: Any, labels: Any
    ) -> jax.Array:
        return loss(hidden @ head, teacher_hidden @ teacher_head, labels)

    def fused(chunk: int, direction: Any, *inputs: Any) -> jax.Array:
        return chunked_kl(*inputs[:4], temperature=TEMPERATURE, chunk=chunk, direction=direction)

    def both(chunk: int, *inputs: Any) -> jax.Array:
        return chunked_hinton(*inputs, alpha=0.1, temperature=TEMPERATURE, chunk=chunk)

    plain = {
        "forward": lambda s, t, labels: kl(s, t, TEMPERATURE),
        "reverse": lambda s, t, labels: reverse_kl(s, t, TEMPERATURE),
        "jsd": lambda s, t, labels: jsd(s, t, TEMPERATURE),
        "hinton": hinton(0.1, TEMPERATURE),
    }
    cases = {f"naive {name}": (name, partial(naive, loss)) for name, loss in plain.items()}
    for chunk in chunks:
        cases[f"fused forward, {chunk:,} at a time"] = "forward", partial(fused, chunk, "forward")
    for direction in ("reverse", "jsd"):
        cases[f"fused {direction}, {chunks[0]:,} at a time"] = (
            direction,
            partial(fused, chunks[0], direction),
        )
    cases[f"fused hinton, {chunks[0]:,} at a time"] = "hinton", partial(both, chunks[0])
    return cases


def compare(vocabulary: int, args: argparse.Namespace) -> list[list[Any]]:
    """Return the rows of one vocabulary."""
    inputs, cases = arrays(args.tokens, args.width, vocabulary), forms(args.chunks)
    steps: dict[str, Any] = {}
    for name, (_, loss) in cases.items():
        step = jax.jit(jax.grad(lambda *x, loss=loss: loss(*x).mean(), argnums=(0, 1)))
        steps[name] = step.lower(*inputs).compile()
    memory = {name: step.memory_analysis().temp_size_in_bytes for name, step in steps.items()}
    times = interleaved({name: partial(step, *inputs) for name, step in steps.items()}, args.rounds)
    rows = []
    for name, (kind, _) in cases.items():
        base, fused = f"naive {kind}", not name.startswith("naive")
        wall, cpu = (
            ratio(*([getattr(run, of) for run in times[case]] for case in (name, base)))
            for of in ("wall", "cpu")
        )
        saved = f"{memory[base] / memory[name]:.3g}" if fused else ""
        off = f"{difference(steps[name](*inputs), steps[base](*inputs)):.0e}" if fused else ""
        took = milliseconds(run.wall for run in times[name])
        rows.append(
            [f"{vocabulary:,}", name, f"{memory[name] / 1e6:,.1f}", saved, took, wall, cpu, off]
        )
    return rows


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference of two gradients, relative to each array's largest entry."""
    return max(
        float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(found, expected, strict=True)
    )


def main() -> None:
    """Compare at every vocabulary and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[50257, 256000])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=64, help="of the hidden states of both models")
    parser.add_argument(
        "--chunks",
        type=int,
        nargs="+",
        default=[4096, 1024, 16384],
        help="the first is used for all forms",
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = [row for vocabulary in args.vocabularies for row in compare(vocabulary, args)]
    name = "chunked_kl" if args.width == 64 else f"chunked_kl_width_{args.width}"
    report(name, HEAD, rows, tokens=args.tokens, width=args.width, rounds=args.rounds)


if __name__ == "__main__":
    main()
