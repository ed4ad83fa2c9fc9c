"""Networks cut into blocks, and solved one block after the other."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compress_jax as cj
from compress_jax.core.errors import ArgumentError, ConfigError, DataError
from compress_jax.core.paths import flatten
from compress_jax.trace import calibrate, gram, segments

INT3 = cj.at("**/kernel", cj.quantize.uniform(3, granularity="channel"))


def decoder():
    config = cj.models.DecoderConfig(
        31, 16, 3, heads=4, kv_heads=2, head_width=4, hidden=24, qk_norm=True, tied=False,
        sliding=(True, False, True), window=4,
    )  # fmt: skip
    model = cj.models.Decoder(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 31)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    return lambda p, x: model.apply({"params": p}, x), params, tokens


def nnx_network():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(3)])

        def __call__(self, x):
            skip = x
            for layer in self.layers:
                x = nnx.relu(layer(x)) + skip  # the input crosses every cut
            return x

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    return (
        lambda p, x: nnx.merge(graph, p)(x),
        state,
        jax.random.normal(jax.random.key(0), (4, 6)),
    )


def equinox_network():
    model = eqx.nn.MLP(5, 3, 8, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    x = jax.random.normal(jax.random.key(0), (4, 5))
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, x


def outputs_first():
    """A result that is made before the last block, and one of two outputs that is an input."""
    params = {f"l{i}": {"kernel": jnp.full((3, 3), i + 1.0)} for i in range(2)}

    def fn(p, x):
        early = x @ p["l0"]["kernel"]
        return {"early": early, "late": jnp.tanh(early) @ p["l1"]["kernel"], "x": x, "one": 1.0}

    return fn, params, jnp.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize("make", [decoder, nnx_network, equinox_network, outputs_first])
def test_the_parts_together_are_the_function(make):
    fn, params, x = make()
    parts = segments(fn, params, x)
    leaves = flatten(params)[0]
    values = tuple(jax.tree.leaves(x))
    for part in parts:
        values = part.run({path: leaves[path] for path in part.paths}, *values)
    whole = jax.tree.leaves(fn(params, x))
    assert len(whole) == len(values) and len(parts) >= 3
    for ours, theirs in zip(values, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    # Blocks use their own params alone.
    names = [part.name for part in parts[1:]]
    for part in parts[1:-1]:
        others = [name for name in names if name != part.name]
        assert not any(path.startswith(f"{name}/") for path in part.paths for name in others)


def test_blocks_can_be_named():
    fn, params, x = decoder()
    parts = segments(fn, params, x, blocks=["layer_0/*/**", ("layer_1/**", "layer_2/**")])
    assert [part.name for part in parts][1:] == ["layer_0/*/**", "('layer_1/**', 'layer_2/**')"]
    with pytest.raises(ConfigError, match="'layer_9/\\*\\*' matches no leaf"):
        segments(fn, params, x, blocks=["layer_9/**"])
    unused = {**params, "layer_7": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(ConfigError, match="uses no leaf of the block 'layer_7'"):
        segments(fn, unused, x)


def chain():
    """Three dense layers, and inputs of very different sizes."""
    rng = np.random.default_rng(0)
    params = {
        f"layer_{i}": {"kernel": jnp.asarray(rng.normal(size=(24, 24)) / 5, jnp.float32)}
        for i in range(3)
    }

    def fn(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params[f"layer_{i}"]["kernel"])
        return x

    mix = rng.normal(size=(24, 24))
    return fn, params, [jnp.asarray(rng.normal(size=(64, 24)) @ mix, jnp.float32) for _ in range(8)]


def test_each_block_is_solved_on_what_the_solved_ones_give():
    """The same as by hand: calibrate the whole network once for each layer, solved ones in it."""
    fn, params, batches = chain()
    ours = cj.layerwise.solve(fn, params, batches, INT3, cj.quantize.gptq, refit=False)
    bound = cj.bind(INT3, fn, params, batches[0])
    state = bound.init(params)
    now = params
    for i in range(3):
        name = f"layer_{i}/kernel"
        statistics = [
            calibrate(fn, gram(normalize=True), now, part, where=name)
            for part in (batches[:6], batches[6:])
        ]
        solved = cj.quantize.gptq(params, statistics[0], bound, state, held_out=statistics[1])
        now = {**now, f"layer_{i}": solved.params[f"layer_{i}"]}
    for i in range(3):
        np.testing.assert_array_equal(
            ours.params[f"layer_{i}"]["kernel"], now[f"layer_{i}"]["kernel"]
        )
    assert set(ours.changed) == {f"layer_{i}/kernel" for i in range(3)}
    # Exact under the compression, and packed as such.
    again = ours.compression.view(ours.params, ours.state)
    jax.tree.map(np.testing.assert_array_equal, again, ours.params)
    packed = ours.compression.pack(ours.params, ours.state)
    jax.tree.map(np.testing.assert_array_equal, cj.unpack(packed), ours.params)


def test_solved_networks_are_closer_than_rounded_ones():
    fn, params, batches = chain()
    solved = cj.layerwise.solve(fn, params, batches, INT3, cj.quantize.gptq)
    nearest = cj.bind(INT3, fn, params, batches[0]).view(params, solved.state)
    new = jnp.concatenate([batch[::-1] * 0.9 for batch in batches])

    def error(p):
        return float(jnp.square(fn(p, new) - fn(params, new)).mean())

    assert error(solved.params) < 0.75 * error(nearest)


def test_each_leaf_takes_the_method_that_is_best_on_held_out_batches():
    fn, params, batches = chain()
    done = []

    def worse(params, calibration, compression, state, *, held_out):
        """Solve well but for one layer, which is rounded to nearest."""
        solved = cj.quantize.gptq(params, calibration, compression, state, held_out=held_out)
        view = compression.view(params, state)
        return solved._replace(
            params={**solved.params, **{path: view[path] for path in view if "layer_1" in path}}
        )

    def other(params, calibration, compression, state, *, held_out):
        solved = cj.quantize.gptq(params, calibration, compression, state, held_out=held_out)
        view = compression.view(params, state)
        own = {path: solved.params[path] for path in view if "layer_1" in path}
        return solved._replace(params={**view, **own})

    both = cj.layerwise.solve(
        fn, params, batches, INT3, {"first": worse, "second": other},
        report=lambda *words: done.append(words),
    )  # fmt: skip
    chosen = {path: note.split(";")[0] for path, note in both.notes.items()}
    assert chosen == {
        "layer_0/kernel": "method: first",
        "layer_1/kernel": "method: second",
        "layer_2/kernel": "method: first",
    }
    assert [name for name, _, _ in done][1:] == ["layer_0", "layer_1", "layer_2"]
    assert done[-1][1:] == (4, 4)


def test_a_decoder_is_solved_with_its_head_and_its_table_left():
    fn, params, tokens = decoder()
    batches = [(tokens + i) % 31 for i in range(4)]
    ordered = partial(cj.quantize.gptq, act_order=True)
    everything = cj.at(("**/kernel", "**/embedding"), cj.quantize.uniform(4, granularity="channel"))
    solved = cj.layerwise.solve(fn, params, batches, everything, ordered)
    kernels = {path for path in flatten(params)[0] if path.endswith("kernel")}
    assert set(solved.changed) == kernels and "head/kernel" in kernels
    assert "tokens/embedding" in solved.skipped  # a lookup: rounded to nearest, and said
    again = solved.compression.view(solved.params, solved.state)
    jax.tree.map(np.testing.assert_array_equal, again, solved.params)


def test_wrong_requests_are_refused():
    fn, params, batches = chain()
    for options, error, said in (
        ({"method": {}}, ArgumentError, "give a method"),
        ({"hold_out": 1.0}, ArgumentError, "hold_out must be"),
        ({"batches": batches[:1]}, DataError, "there are 1 batches, and 1 of them are held out"),
        ({"batches": []}, DataError, "there are 0 batches"),
        ({"blocks": ["nothing"]}, ConfigError, "matches no leaf"),
    ):
        given = {"batches": batches, "method": cj.quantize.gptq, **options}
        with pytest.raises(error, match=said):
            cj.layerwise.solve(fn, params, compression=INT3, **given)
