"""The criterion of `shrink` that data chooses, and scores of features that no kernel reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core.errors import ArgumentError, DataError, NonFiniteError
from compress_jax.prune._channels.judge import distances, relative_error

RNG = np.random.default_rng(0)
BATCHES = [jnp.asarray(RNG.normal(size=(16, 3)), jnp.float32) for _ in range(4)]


def mlp(p, x):
    return jax.nn.relu(x @ p["up"] + p["bias"][None]) @ p["down"]


def dead_but_large():
    """Return params whose first two hidden features have the largest kernels and never fire."""
    up = RNG.normal(size=(3, 6))
    up[:, :2] *= 5
    bias = np.array([-1e3, -1e3, 0.1, 0.2, 0.3, 0.4])
    down = RNG.normal(size=(6, 2))
    return {"up": jnp.float32(up), "bias": jnp.float32(bias), "down": jnp.float32(down)}


def without(p, x, kept):
    """Return what is left of the function, in float64."""
    up, bias, down = (np.asarray(p[name], np.float64) for name in ("up", "bias", "down"))
    h = np.maximum(np.asarray(x, np.float64) @ up[:, kept] + bias[kept], 0)
    return h @ down[kept]


def test_data_chooses_what_magnitude_cannot_see():
    params = dead_but_large()
    small = cj.prune.shrink(mlp, params, ratio=1 / 3, batches=BATCHES)
    judged = {each.name: each for each in small.table.judged}
    assert list(judged) == ["magnitude", "activation", "activation, weighted"]
    assert [name for name, each in judged.items() if each.taken] == ["activation"]
    assert small.kept["up:1"].tolist() == [2, 3, 4, 5] and judged["activation"].distance < 1e-12
    # The other number in the table is that of magnitude's own choice on the batch held out.
    kept = cj.prune.shrink(mlp, params, BATCHES[0], ratio=1 / 3).kept["up:1"]
    full = without(params, BATCHES[3], np.arange(6))
    error = np.square(without(params, BATCHES[3], kept) - full).sum() / np.square(full).sum()
    assert kept.tolist()[:2] == [0, 1] and error > 0.01
    np.testing.assert_allclose(judged["magnitude"].distance, error, rtol=1e-4)
    assert "by activation: distance" in str(small.table) and ", taken" in str(small.table)


def test_all_choices_run_in_one_program():
    compiled = []

    def distance(small, full):
        compiled.append(1)
        return relative_error(small, full)

    loss = lambda p, x: jnp.square(mlp(p, x)).mean()  # noqa: E731
    options = {"batches": BATCHES, "hold_out": 0.5, "loss": loss}
    small = cj.prune.shrink(mlp, dead_but_large(), ratio=0.5, distance=distance, **options)
    assert [each.name for each in small.table.judged][-1] == "taylor" and len(compiled) == 1


def test_a_given_criterion_keeps_its_meaning_and_several_are_judged():
    params = dead_but_large()
    magnitude = cj.prune.importance.magnitude()
    plain = cj.prune.shrink(mlp, params, BATCHES[0], ratio=0.5)
    same = cj.prune.shrink(mlp, params, ratio=0.5, importance=magnitude, batches=BATCHES)
    assert same.kept["up:1"].tolist() == plain.kept["up:1"].tolist() and not plain.table.judged
    assert [each.name for each in same.table.judged] == ["importance"]
    last = lambda member: jnp.arange(6.0) if member.path == "up" else None  # noqa: E731
    several = {"magnitude": magnitude, "last": last}
    chosen = cj.prune.shrink(mlp, params, ratio=1 / 3, importance=several, batches=BATCHES)
    assert [each.name for each in chosen.table.judged if each.taken] == ["last"]
    assert chosen.kept["up:1"].tolist() == [2, 3, 4, 5]


def test_wrong_arguments_are_refused():
    params = dead_but_large()
    with pytest.raises(ArgumentError, match="need batches"):
        cj.prune.shrink(mlp, params, BATCHES[0], ratio=0.5, loss=lambda p, x: 0.0)
    with pytest.raises(DataError, match="1 of them are held out"):
        cj.prune.shrink(mlp, params, ratio=0.5, batches=BATCHES[:1])
    with pytest.raises(ArgumentError, match="hold_out"):
        cj.prune.shrink(mlp, params, ratio=0.5, batches=BATCHES, hold_out=1.0)
    nothing = lambda small, full: jnp.float32(jnp.nan)  # noqa: E731
    with pytest.raises(NonFiniteError, match="no distance"):
        cj.prune.shrink(mlp, params, ratio=0.5, batches=BATCHES, distance=nothing)


def scores(p, x):
    return jnp.einsum("bd,cd->bc", x @ p["query"], x @ p["key"])


def test_features_of_queries_and_keys_are_scored_where_they_are_made():
    params = {name: jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32) for name in ("query", "key")}
    square = np.square(np.concatenate(BATCHES[:3]).astype(np.float64)).mean(0)  # [3]
    power = [np.square(np.asarray(params[name], np.float64)).T @ square for name in params]
    order = np.argsort(power[0] + power[1])
    activation = {
        "a": cj.prune.importance.activation(
            cj.trace.calibrate(scores, cj.trace.reducers.moments(), params, BATCHES[:3])
        )
    }
    small = cj.prune.shrink(scores, params, ratio=0.4, importance=activation, batches=BATCHES)
    assert small.kept["query:1"].tolist() == sorted(order[2:].tolist())


CONFIG = cj.models.DecoderConfig(
    20, 8, 1, heads=4, kv_heads=2, head_width=2, hidden=12, norm="layer", positions=8, gated=False
)


@pytest.mark.parametrize("scan", [False, True])
def test_every_group_of_a_decoder_has_a_score(scan):
    model = cj.models.Decoder(CONFIG, scan=scan)
    tokens = [jnp.asarray(RNG.integers(0, 20, (2, 6)), jnp.int32) for _ in range(2)]
    params = jax.jit(model.init)(jax.random.key(0), tokens[0])["params"]
    fn = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    # Of features of queries and keys, and of heads, only those with globs of their own go.
    small = cj.prune.shrink(fn, params, ratio=0.5, batches=tokens, hold_out=0.5)
    assert len(small.table.rows) == 6
    assert not any("no score" in row.reason for row in small.table.rows)
    assert [each.note for each in small.table.judged] == ["", "", ""]
    # The programs that judge keep the first channels; the function itself keeps those chosen.
    found = cj.trace.groups(fn, params, tokens[0])
    error = distances(fn, params, found, {"": small.kept}, [(tokens[1],)])[""]
    expected = relative_error(small.fn(small.params, tokens[1]), fn(params, tokens[1]))
    np.testing.assert_allclose(error, expected, rtol=1e-4)
