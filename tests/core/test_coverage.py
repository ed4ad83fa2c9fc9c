"""The coverage table: every leaf has a row, every row without a packed form has a reason, totals
add up."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from compress_jax.core import NoMatchError, Sparse, at, coverage, leafwise, nbytes

PARAMS = {
    "dense": {"kernel": jnp.eye(64), "bias": jnp.zeros(64)},
    "mixed": jnp.ones((2, 2), jnp.bfloat16),
    "n": jnp.array(3),
}
sparse = leafwise(lambda x, *_: x, pack=lambda x, *_: min(Sparse.pack(x, x != 0), x, key=nbytes))


@pytest.mark.slow
def test_rows_say_what_became_of_each_leaf():
    c = at(("dense/*", "n"), sparse)
    table = coverage(c, PARAMS)
    assert [row.path for row in table.rows] == ["dense/bias", "dense/kernel", "mixed", "n"]
    kernel = table["dense/kernel"]
    stored = Sparse.pack(PARAMS["dense"]["kernel"], PARAMS["dense"]["kernel"] != 0).nbytes
    assert (kernel.form, kernel.shape, kernel.reason) == ("Sparse", (64, 64), "")
    assert (
        kernel.nbytes == stored and kernel.bits == 8 * stored / 4096 and kernel.sparsity == 63 / 64
    )
    assert table["mixed"].reason == "no pattern matches"
    assert (table["mixed"].nbytes, table["mixed"].bits, table["mixed"].form) == (8, 16.0, "dense")
    assert table["n"].reason == "int32 is not a floating-point dtype"
    assert table["dense/bias"].form == "Sparse" and table["dense/bias"].sparsity == 1.0


@pytest.mark.slow
def test_totals_are_those_of_the_packed_tree():
    table = coverage(sparse, PARAMS)
    assert (
        table.nbytes
        == nbytes(sparse.pack(PARAMS, sparse.init(PARAMS)))
        == sum(row.nbytes for row in table.rows)
    )
    assert table.bits == 8 * table.nbytes / (4096 + 64 + 4 + 1)


def test_no_dense_row_of_a_compression_is_without_a_reason():
    table = coverage(sparse, PARAMS)
    assert table["mixed"].reason == "no packed form of it is smaller"
    assert all((row.form == "dense") == bool(row.reason) for row in table.rows)


def test_packed_params_need_no_compression_and_no_reasons():
    packed = sparse.pack(PARAMS, sparse.init(PARAMS))
    table = coverage(None, packed)
    assert table.nbytes == nbytes(packed) and table["dense/kernel"].form == "Sparse"
    assert {row.reason for row in table.rows} == {""}


def test_a_given_state_is_used():
    gate = leafwise(lambda x, _, on: x * on, init=lambda x, key: (None, jnp.ones(())))
    state = gate.init({"w": jnp.ones(4)})
    off = state._replace(fixed=jax.tree.map(jnp.zeros_like, state.fixed))
    assert coverage(gate, {"w": jnp.ones(4)})["w"].sparsity == 0.0
    assert coverage(gate, {"w": jnp.ones(4)}, off)["w"].sparsity == 1.0


def test_nnx_states_have_the_same_table():
    linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    _, state = nnx.split(linear)
    plain = {"kernel": linear.kernel[...], "bias": linear.bias[...]}
    assert coverage(at("kernel", sparse), state) == coverage(at("kernel", sparse), plain)


def test_text_holds_every_row_aligned_and_the_total():
    lines = str(coverage(at("dense/kernel", sparse), PARAMS)).splitlines()
    assert (
        len(lines) == 6
        and lines[0].split()[:2] == ["path", "shape"]
        and lines[-1].startswith("total")
    )
    column = lines[0].index("form")
    assert [line[column:].split()[0] for line in lines[1:5]] == [
        "dense",
        "Sparse",
        "dense",
        "dense",
    ]
    assert all("no pattern matches" in lines[i] for i in (1, 3, 4))


def test_an_unknown_path_lists_the_known_ones():
    with pytest.raises(NoMatchError, match="dense/kernel, mixed"):
        coverage(sparse, PARAMS)["dense/kernle"]
