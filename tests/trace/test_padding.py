"""Calibration of padded batches: statistics are those of the entries that count alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import compress_jax as cj
from compress_jax.core.errors import ArgumentError, DataError, NoMatchError, ShapeError
from compress_jax.quantize._activations.range_rules import spread
from compress_jax.trace import Reducer, calibrate, reducers

B, T, D = 4, 6, 8
LENGTHS = (6, 1, 0, 3)
TOKENS = np.arange(T)[None] < np.array(LENGTHS)[:, None]
X = jax.random.normal(jax.random.key(0), (B, T, D)) + 2.0
SHAPES = {"qkv": (D, 3, 2, 4), "out": (2, 4, D), "up": (D, 5), "stack": (3, D, D), "head": (D, 3)}
P = {
    name: jax.random.normal(jax.random.key(i), shape) / 3
    for i, (name, shape) in enumerate(SHAPES.items())
}
REDUCERS = {
    "absmax": reducers.absmax(),
    "absmax channel": reducers.absmax("channel"),
    "minmax": reducers.minmax(),
    "minmax channel": reducers.minmax(granularity="channel"),
    "moments": reducers.moments(),
    "absmean": reducers.absmean(),
    "norm": reducers.norm(),
    "outliers": reducers.outliers(2.0),
    "histogram": reducers.histogram(64),
    "gram": reducers.gram(),
    "spread": spread(),
    "spread channel": spread(True),
}


def model(p, x):
    """Attention, flat rows of tokens, layers in a scan, a pooled head; 99 is padding."""
    there = (jnp.abs(x).max(-1) < 50.0)[:, None, None, :]
    q, k, v = jnp.einsum("btd,dchk->cbhtk", x, p["qkv"])
    scores = jnp.where(there, jnp.einsum("bhqk,bhsk->bhqs", q, k), -1e9)
    y = jnp.einsum(
        "bhqs,bhsk->bhqk", jax.nn.softmax(scores), jnp.where(there[:, :, 0, :, None], v, 0.0)
    )
    y = x + jnp.einsum("bhqk,hkd->bqd", y, p["out"])
    rows = y.reshape(-1, D)
    up = jnp.tanh(rows @ p["up"])
    y = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), y, p["stack"])[0]
    pooled = jnp.where(there[:, 0, 0, :, None], y, 0.0).sum(1)
    return up, pooled @ p["head"]


PADDED = jnp.where(TOKENS[..., None], X, 99.0)
WHERE = ("qkv", "out", "up", "stack", "head")


def alone(reduce, where=WHERE):
    """Return statistics of each sequence by itself, without padding."""
    return calibrate(
        model, reduce, P, [X[i : i + 1, :n] for i, n in enumerate(LENGTHS) if n], where
    )


def close(found, expected):
    for name, one in expected.items():
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4, err_msg=name)


@pytest.mark.wide(1)
@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.slow
def test_statistics_of_a_padded_batch_are_those_of_its_sequences_alone(name):
    found = calibrate(model, REDUCERS[name], P, [PADDED], WHERE, mask=lambda x: TOKENS)
    close(found, alone(REDUCERS[name]))


def test_every_reducer_is_tried():
    made = {name for name in reducers.__all__ if returns(getattr(reducers, name)) is Reducer}
    assert made == {each.split()[0] for each in REDUCERS} - {"spread"} | {"per_input"}


def returns(made):
    return getattr(made, "__annotations__", {}).get("return")


@pytest.mark.wide(1)
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, 1e30])
@pytest.mark.slow
def test_what_does_not_count_may_hold_anything(value):
    fn = lambda p, x: jnp.tanh(x @ p["up"])  # noqa: E731
    dirty = jnp.where(TOKENS[..., None], X, value)
    for reduce in REDUCERS.values():
        found = calibrate(fn, reduce, P, [dirty], mask=[TOKENS])
        close(found, calibrate(fn, reduce, P, [X[TOKENS]]))


@pytest.mark.slow
def test_masks_come_by_name_by_function_or_one_a_batch():
    fn = lambda p, batch: batch["x"] @ p["up"]  # noqa: E731
    batches = [{"x": X, "mask": TOKENS.astype(np.int32)}, {"x": X[:2, :4], "mask": TOKENS[:2, :4]}]
    every = [calibrate(fn, reducers.gram(), P, batches, mask=each) for each in (
        "mask", lambda batch: batch["mask"], [batch["mask"] for batch in batches])]  # fmt: skip
    rows = jnp.concatenate([X[TOKENS], X[:2, :4][TOKENS[:2, :4]]])
    for each in every:
        np.testing.assert_allclose(each["up"]["input"].gram, rows.T @ rows, rtol=1e-5)
        assert int(each["up"]["input"].count) == len(rows)
    with pytest.raises(DataError, match="a mask for each batch"):
        calibrate(fn, reducers.gram(), P, batches, mask=[TOKENS])
    with pytest.raises(DataError, match="no entry 'msak'"):
        calibrate(fn, reducers.gram(), P, batches, mask="msak")
    with pytest.raises(ShapeError, match="fits the leading axes of no input"):
        calibrate(fn, reducers.gram(), P, batches[:1], mask=[TOKENS[:, :2]])


def test_an_error_of_the_batches_themselves_is_theirs():
    def broken():
        yield X
        raise ValueError("the file is broken")

    fn = lambda p, x: x @ p["up"]  # noqa: E731
    for mask in ([TOKENS] * 2, lambda batch: TOKENS, None):
        with pytest.raises(ValueError, match="the file is broken"):
            calibrate(fn, reducers.absmax(), P, broken(), mask=mask)
    for masks in ([TOKENS], [TOKENS] * 3):
        with pytest.raises(DataError, match="a mask for each batch"):
            calibrate(fn, reducers.absmax(), P, [X] * 2, mask=masks)


@pytest.mark.slow
def test_batches_of_several_lengths_leave_out_what_holds_the_length():
    found = calibrate(model, reducers.gram(), P, [X, X[:, :3]])
    assert set(WHERE) <= set(found) and found.left_out and not set(found.left_out) & set(found)
    gone = next(iter(found.left_out))
    assert "shape" in found.left_out[gone] and gone not in found.sites
    with pytest.raises(NoMatchError, match="cannot be merged"):
        found[gone]
    with pytest.raises(ShapeError, match="leave it out of where"):
        calibrate(model, reducers.gram(), P, [X, X[:, :3]], tuple(found.left_out))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.SimpleCell(5), name="rnn")(x)


@pytest.mark.slow
def test_a_recurrent_layer_counts_its_turns():
    module = Recurrent()
    variables = module.init(jax.random.key(0), X)
    fn = lambda v, x: module.apply(v, x)  # noqa: E731
    found = calibrate(fn, reducers.gram(), variables, [X], mask=[TOKENS])
    name = next(each for each in found if each.endswith("i/kernel"))
    expected = np.einsum("bti,btj->tij", *(np.where(TOKENS[..., None], X, 0),) * 2)
    np.testing.assert_allclose(found[name]["input"].gram, expected, rtol=1e-4)
    np.testing.assert_array_equal(found[name]["input"].count, TOKENS.sum(0))


@pytest.mark.parametrize("padding", ["SAME", ((2, 0),)])
def test_windows_stand_at_positions_that_count(padding):
    w = {"kernel": jnp.ones((3, D, 2))}
    spec = ("NHC", "HIO", "NHC")

    def fn(w, x):
        return jax.lax.conv_general_dilated(x, w["kernel"], (1,), padding, dimension_numbers=spec)

    clean = jnp.where(TOKENS[..., None], X, 0.0)
    found = calibrate(fn, reducers.gram(), w, [clean], mask=[TOKENS])["kernel"]["input"]
    own = [
        calibrate(fn, reducers.gram(), w, [X[i : i + 1, :n]])["kernel"]["input"]
        for i, n in enumerate(LENGTHS)
        if n
    ]
    np.testing.assert_allclose(found.gram, sum(each.gram for each in own), rtol=1e-5)
    assert int(found.count) == sum(LENGTHS)
    rows = calibrate(fn, reducers.gram(), w, [X], mask=[np.array([1, 0, 0, 1])])["kernel"]["input"]
    np.testing.assert_allclose(
        rows.gram, calibrate(fn, reducers.gram(), w, [X[::3]])["kernel"]["input"].gram, rtol=1e-5
    )


REFUSED = {
    "sorted": lambda p, x: jnp.sort(x, axis=1) @ p["up"],
    "reversed": lambda p, x: x[:, ::-1] @ p["up"],
    "permuted": lambda p, x: x[:, jnp.argsort(x[0, :, 0])] @ p["up"],
    "of single tokens that data choose": lambda p, x: (
        x.reshape(-1, D)[jnp.argsort(x[..., 0].ravel())[:5]] @ p["up"]
    ),
    "strided": lambda p, x: x[:, ::2] @ p["up"],
    "an unknown primitive": lambda p, x: jnp.fft.rfft(x, axis=1).real @ p["up"],
    "with tokens in front": lambda p, x: jnp.concatenate([x[:, :1] * 0, x], axis=1) @ p["up"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(name):
    with pytest.raises(ShapeError, match="counts of the input of site 'up'.*leave the site out"):
        calibrate(REFUSED[name], reducers.absmax(), P, [X], mask=[TOKENS])


def test_a_reducer_without_masks_refuses_them():
    own = Reducer(lambda site, lhs, rhs: jnp.abs(lhs).max(), jnp.maximum)
    with pytest.raises(ArgumentError, match="takes no masks"):
        calibrate(lambda p, x: x @ p["up"], own, P, [X], mask=[TOKENS])


@pytest.mark.wide(1)
@pytest.mark.parametrize("solve", [cj.prune.wanda, cj.prune.sparsegpt])
@pytest.mark.slow
def test_solvers_solve_for_what_counts(solve):
    padded = calibrate(model, reducers.gram(), P, [PADDED], "up", mask=[TOKENS])
    one, other = (
        solve(P, each, 0.5, pattern="up").params["up"]
        for each in (padded, alone(reducers.gram(), "up"))
    )
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
