"""Memory that a compression adds to a training step of a model that loops over its layers.

python experiments/benchmarks/step_memory.py                # 3 minutes on 2 cores; compiles only

A decoder of 336 million parameters: 24 layers under ``nn.scan`` and ``nn.remat``, computed in
bfloat16 over float32 params, AdamW, 4 rows of 512 tokens. The step is compiled from shapes, not
run. "before" is the same compression whose view is taken of whole stacks before the model runs.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from interleave import report

import compress_jax as cj
from compress_jax import cluster, lowrank, prune, quantize, train
from compress_jax.models import GPT

HEAD = ["compression", "state", "temporaries", "of plain", "before", "of plain, before"]
KERNELS = "layers/**/kernel"
OPTIMIZER = train.label_optimizer(optax.adamw(1e-3), optax.adam(1e-3))
CASES: dict[str, cj.Compression] = {
    "plain": cj.identity(),
    "half pruned": prune.magnitude(0.5),
    "int4 by channel": quantize.uniform(4, granularity="channel"),
    "half pruned, int4": cj.chain(prune.magnitude(0.5), quantize.uniform(4, granularity="channel")),
    "half pruned, nf4": cj.chain(prune.magnitude(0.5), quantize.nf4()),
    "mxfp4": quantize.mxfp4(),
    "learned steps, groups of 128": quantize.lsq(4, granularity=128),
    "half pruned, learned steps": cj.chain(
        prune.magnitude(0.5), quantize.lsq(4, granularity="channel")
    ),
    "16 centers": cluster.kmeans(16),
    "rank 64": lowrank.svd(64),
    "RigL": prune.rigl(0.5, steps=1000, key=jax.random.key(0)),
    "half pruned, one bit": prune.bit_masks(prune.magnitude(0.5)),
    "half pruned, int4, one bit": prune.bit_masks(
        cj.chain(prune.magnitude(0.5), quantize.uniform(4, granularity="channel"))
    ),
    "half pruned every 100, one bit": cj.every(100, prune.bit_masks(prune.magnitude(0.5))),
    "RigL, one bit": prune.bit_masks(prune.rigl(0.5, steps=1000, key=jax.random.key(0))),
}


def decoder(depth: int) -> GPT:
    return GPT(
        vocabulary=32768,
        width=1024,
        depth=depth,
        heads=16,
        positions=512,
        scan=True,
        remat=True,
        dtype=jnp.bfloat16,
    )


def whole(compression: cj.Compression) -> cj.Compression:
    """Return a compression whose view is known of the whole tree only."""
    return compression._replace(view=lambda params, state: compression.view(params, state))


def temporaries(model: GPT, compression: cj.Compression, shapes: dict) -> tuple[int, int]:
    """Return bytes of temporaries of the compiled step, and of the compression's state."""
    tokens = jax.ShapeDtypeStruct((4, 512), jnp.int32)
    state = jax.eval_shape(
        lambda v: train.create(v, compression, OPTIMIZER, jax.random.key(1)), shapes
    )
    step = train.make_step(train.supervised(model, inputs="tokens"), OPTIMIZER, compression)
    batch = {"tokens": tokens, "label": tokens}
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.compression))
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not say what a program needs"
    return memory.temp_size_in_bytes, held


def main() -> None:
    """Compile every step and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=24)
    depth = parser.parse_args().depth
    model = decoder(depth)
    tokens = jax.ShapeDtypeStruct((4, 512), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    size = sum(x.size for x in jax.tree.leaves(shapes))
    plain, _ = temporaries(model, cj.identity(), shapes)
    rows = []
    for name, method in CASES.items():
        c = cj.bind(
            cj.at(KERNELS, method),
            lambda p, x: model.apply({"params": p}, x),
            shapes["params"],
            tokens,
        )
        inside, held = temporaries(model, c, shapes)
        before, _ = temporaries(model, whole(c), shapes)
        rows.append([name, *(f"{n / size:.2f}" for n in (held, inside)), f"{inside / plain:.3f}"])
        rows[-1] += [f"{before / size:.2f}", f"{before / plain:.3f}"]
    report("step_memory", HEAD, rows, parameters=size, unit="bytes a parameter")


if __name__ == "__main__":
    main()
