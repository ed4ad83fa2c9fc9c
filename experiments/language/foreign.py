"""A decoder that nobody here wrote, compressed without a change: Qwen 3 of jax-ml/bonsai, in NNX.

    git clone https://github.com/jax-ml/bonsai
    python experiments/language/foreign.py bonsai

Its weights are random: those of `models.Decoder`, whose logits it must give. Printed are the
largest difference of both, what traces find in its code, the error of its logits in 4 bits, rounded
to nearest and solved, and its size at three quarters of its widths.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import compress_jax as cj
from compress_jax.core.paths import flatten
from compress_jax.core.types import ModelFn, Params

SHAPE = cj.models.DecoderConfig(
    256, 64, 4, heads=4, kv_heads=2, head_width=16, hidden=128, qk_norm=True, epsilon=1e-6,
    rope=cj.models.Rope(theta=1_000_000.0), tied=False,
)  # fmt: skip


def main() -> None:
    """Compare, compress, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clone", type=Path, help="a clone of github.com/jax-ml/bonsai")
    sys.path.insert(0, str(parser.parse_args().clone))
    decoder = cj.models.Decoder(SHAPE)
    tokens = [jax.random.randint(jax.random.key(i), (8, 32), 1, 256) for i in range(8)]
    own = jax.jit(decoder.init)(jax.random.key(0), tokens[0])["params"]
    fn, like = theirs()
    params = renamed(own, like)
    exact = fn(params, tokens[0])
    ours = decoder.apply({"params": own}, tokens[0])
    print(f"logits differ by at most {abs(exact - ours).max():.1e} of {abs(exact).max():.2f}")
    found = cj.trace.groups(fn, params, tokens[0])
    blocks = cj.trace.segments(fn, params, tokens[0])
    sites = cj.trace.sites(fn, params, tokens[0])
    print(f"{len(sites)} sites, {len(found)} groups of channels, {len(blocks) - 1} blocks")

    plain = jax.jit(fn)(params, tokens[-1])

    def error(changed: Params) -> str:
        difference = fn(changed, tokens[-1]) - plain
        return f"{float(jnp.linalg.norm(difference) / jnp.linalg.norm(plain)):.4f}"

    int4 = cj.at("**/kernel", cj.quantize.uniform(4, granularity=16))
    bound = cj.bind(int4, fn, params, tokens[0])
    nearest = bound.pack(params, bound.init(params))
    solved = cj.layerwise.solve(fn, params, tokens[:-1], int4)
    print(f"4 bits: error {error(cj.unpack(nearest))} rounded, {error(solved.params)} solved")
    print(f"bytes: {cj.nbytes(params):,} -> {cj.nbytes(nearest):,}")
    small = cj.prune.shrink(fn, params, tokens[0], ratio=0.25)
    shape = small.fn(small.params, tokens[0]).shape
    print(f"3/4 wide: {cj.nbytes(small.params):,} bytes, logits {shape}")


def theirs() -> tuple[ModelFn, Params]:
    """Return bonsai's Qwen 3 as a pure function of params and tokens, and its params."""
    from bonsai.models.qwen3.modeling import LayerCache, ModelConfig, Qwen3  # type: ignore

    config = ModelConfig(
        SHAPE.depth, SHAPE.vocabulary, SHAPE.width, SHAPE.hidden, SHAPE.heads, SHAPE.head_width,
        SHAPE.kv_heads, 1_000_000, 8.0, 1e4, SHAPE.epsilon, False,
    )  # fmt: skip
    graph, params, rest = nnx.split(Qwen3(config, rngs=nnx.Rngs(0)), nnx.Param, ...)

    def fn(params: Params, tokens: jax.Array) -> jax.Array:
        rows, length = tokens.shape
        caches = [LayerCache(config, rows, length, jnp.float32) for _ in range(SHAPE.depth)]
        model = nnx.merge(graph, params, rest)
        return model(tokens, cache=caches, segment_ids=jnp.ones_like(tokens))

    return fn, nnx.to_pure_dict(params)


NAMES = {
    "query/": "q_proj/", "key/": "k_proj/", "value/": "v_proj/", "out/": "o_proj/",
    "query_norm/": "q_norm/", "key_norm/": "k_norm/", "attention_norm/": "input_layernorm/",
    "mlp_norm/": "post_attention_layernorm/", "attention/": "attn/", "up/": "up_proj/",
    "gate/": "gate_proj/", "down/": "down_proj/", "layer_": "layers/", "tokens/": "embedder/",
    "head/": "lm_head/",
}  # fmt: skip


def renamed(own: Params, like: Params) -> Params:
    """Return the weights of a `Decoder` under bonsai's names."""
    leaves = {}
    for path, x in flatten(own)[0].items():
        name = f"/{path}".replace("/norm/", "/final_norm/")
        for ours, other in NAMES.items():
            name = name.replace(f"/{ours}", f"/{other}")
        leaves[name[1:]] = x
    wanted, rebuild = flatten(like)
    assert set(leaves) == set(wanted), set(leaves) ^ set(wanted)
    return rebuild({p: jnp.asarray(np.reshape(leaves[p], x.shape)) for p, x in wanted.items()})


if __name__ == "__main__":
    main()
