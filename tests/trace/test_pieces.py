"""Pieces of parameters in operands, against the moves themselves on an array of numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.layerwise._problem import lay_out, problems, why_not
from compress_jax.trace import calibrate, gram, sites


def numbered(params):
    """Return params whose every entry is a number of its own, above 0."""
    first, out = 1, {}
    for path, x in params.items():
        out[path] = jnp.arange(first, first + x.size, dtype=jnp.float32).reshape(x.shape)
        first += x.size
    return out, {path: int(np.asarray(x).min()) if x.size else 0 for path, x in out.items()}


def written_out(pieces, shape, firsts):
    """Return the operand that pieces describe, of numbered entries."""
    operand = np.zeros(shape, np.float32)
    for piece in pieces:
        place = np.full((1,) * len(shape), firsts[piece.path] + piece.offset)
        for axis, digits in enumerate(piece.axes):
            along = np.zeros(1, int)
            for size, stride in digits:
                along = (along[:, None] + np.arange(size) * stride).reshape(-1)
            place = place + along.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        box = tuple(
            slice(start, start + size)
            for start, size in zip(piece.starts, piece.sizes, strict=True)
        )
        operand[box] = place
    return operand


def halves(shape):
    """Return a shape whose first even axis is split in two."""
    i = next((i for i, n in enumerate(shape) if n % 2 == 0 and n > 2), None)
    return None if i is None else (*shape[:i], 2, shape[i] // 2, *shape[i + 1 :])


@st.composite
def moves(draw):
    """Draw a way to make an operand of three parameters by moves that leave entries as they are."""
    shape, chosen = (4, 6, 2), []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(
            st.sampled_from("transpose slice reshape merge rev pad join stack index take".split())
        )
        axis = draw(st.integers(0, len(shape) - 1))
        if kind == "transpose":
            order = draw(st.permutations(range(len(shape))))
            chosen.append(lambda x, p, order=tuple(order): x.transpose(order))
            shape = tuple(shape[i] for i in order)
        elif kind == "slice":
            low = draw(st.integers(0, shape[axis] - 1))
            step = draw(st.integers(1, 2))
            index = (*[slice(None)] * axis, slice(low, None, step))
            chosen.append(lambda x, p, index=index: x[index])
            shape = (*shape[:axis], len(range(low, shape[axis], step)), *shape[axis + 1 :])
        elif kind == "reshape" and (new := halves(shape)):
            chosen.append(lambda x, p, new=new: x.reshape(new))
            shape = new
        elif kind == "merge" and len(shape) > 2 and axis < len(shape) - 1:
            new = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
            chosen.append(lambda x, p, new=new: x.reshape(new))
            shape = new
        elif kind == "rev":
            chosen.append(lambda x, p, axis=axis: jnp.flip(x, axis))
        elif kind == "pad":
            chosen.append(
                lambda x, p, axis=axis: jnp.pad(x, [(int(i == axis), 0) for i in range(x.ndim)])
            )
            shape = tuple(n + (i == axis) for i, n in enumerate(shape))
        elif kind == "join":
            name = f"other{len(chosen)}"
            other = tuple(3 if i == axis else n for i, n in enumerate(shape))
            chosen.append(
                (
                    name,
                    other,
                    lambda x, p, axis=axis, name=name: jnp.concatenate([x, p[name]], axis),
                )
            )
            shape = tuple(n + 3 * (i == axis) for i, n in enumerate(shape))
        elif kind == "stack" and len(shape) < 5:
            name = f"other{len(chosen)}"
            chosen.append(
                (name, shape, lambda x, p, axis=axis, name=name: jnp.stack([p[name], x], axis))
            )
            shape = (*shape[:axis], 2, *shape[axis:])
        elif kind in ("index", "take") and len(shape) > 2:
            i = draw(st.integers(0, shape[axis] - 1))
            chosen.append(
                (lambda x, p, i=i, axis=axis: jnp.take(x, i, axis))
                if kind == "take"
                else (
                    lambda x, p, i=i, axis=axis: jax.lax.dynamic_index_in_dim(
                        x, jnp.int32(i), axis, keepdims=False
                    )
                )
            )
            shape = (*shape[:axis], *shape[axis + 1 :])
    params = {"w": jnp.zeros((4, 6, 2))}
    params |= {move[0]: jnp.zeros(move[1]) for move in chosen if isinstance(move, tuple)}
    steps = [move[2] if isinstance(move, tuple) else move for move in chosen]

    def operand(p):
        x = p["w"]
        for step in steps:
            x = step(x, p)
        return x

    return params, operand


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(moves())
def test_pieces_are_the_entries_that_the_moves_put_there(case):
    params, operand = case
    shape = jax.eval_shape(operand, params).shape
    x = jnp.ones((3, shape[0]))
    (site,) = sites(lambda p, x: jnp.tensordot(x, operand(p), 1), params, x)
    if not site.pieces:
        assert site.lost  # a box no more: a slice across what a reshape has joined
        return
    numbers, firsts = numbered(params)
    np.testing.assert_array_equal(written_out(site.pieces, shape, firsts), operand(numbers))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(moves(), st.integers(0, 9))
def test_problems_give_the_energy_of_the_outputs(case, seed):
    """sum |x W|^2 is the sum over a product's columns, whichever parameters they come from."""
    params, operand = case
    rng = np.random.default_rng(seed)
    params = {
        path: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for path, x in params.items()
    }
    shape = jax.eval_shape(operand, params).shape
    x = jnp.asarray(rng.normal(size=(5, shape[0])), jnp.float32)
    fn = lambda p, x: jnp.tensordot(x, operand(p), 1)  # noqa: E731
    seen = calibrate(fn, gram(), params, [x])
    tasks, reasons = problems(seen, params)
    (site,) = seen.sites.values()
    along_inputs = any(
        piece.sizes[0] != shape[0] for piece in site.pieces
    )  # then rows of several meet in one column
    if reasons or along_inputs:
        assert all(reasons.values())
        return
    energy = 0.0
    for path, own in tasks.items():
        for task in own:
            part = task.box.take(params[path])
            matrices = task.form.matrices(part)
            np.testing.assert_array_equal(
                task.box.put(params[path], task.form.stored(matrices)), params[path]
            )
            w = np.asarray(matrices, np.float64)
            energy += np.einsum("bkn,bkl,bln", w, np.asarray(task.gram, np.float64) * 5, w)
    np.testing.assert_allclose(
        energy, (np.asarray(fn(params, x), np.float64) ** 2).sum(), rtol=1e-4
    )


P = {name: jnp.ones((3, 4)) for name in "ab"} | {"s": jnp.ones((2, 3, 4)), "i": jnp.arange(2)}
REFUSED = {
    "combined": lambda p, x: x @ (p["a"] + p["b"]),
    "data or": lambda p, x: x @ p["s"][x[0, 0].astype(jnp.int32)],
    "the iteration of a loop": lambda p, x: jax.lax.fori_loop(
        0, 2, lambda i, y: y + x @ p["s"][i], jnp.zeros((5, 4))
    ),
    "several parameters": lambda p, x: x @ (p["a"] @ p["b"].T),
    "several indices": lambda p, x: jnp.tensordot(x, p["s"][jnp.array([1, 0, 1])], [[1], [1]]),
    "not the same in every": lambda p, x: (
        jax.lax.cond(x[0, 0] > 0, lambda: p["a"], lambda: p["b"]).T @ x.T
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_told_is_refused_for_the_true_reason(reason):
    params = {path: x for path, x in P.items() if path != "i"}
    tasks, reasons = problems(
        calibrate(REFUSED[reason], gram(), params, [jnp.ones((5, 3))]), params
    )
    assert any(reason.split(" (")[0] in why for why in reasons.values()), reasons
    assert not set(tasks) & set(reasons)


def test_a_kernel_that_its_own_norm_or_a_gain_changes_is_laid_out_and_what_changes_it_is_told():
    normed = lambda p, x: x @ (p["a"] / jnp.linalg.norm(p["a"], axis=0)[None] * p["b"][:1])  # noqa: E731
    (site,) = sites(normed, P, jnp.ones((5, 3)))
    (piece,) = site.pieces
    assert (piece.path, piece.offset, piece.sizes) == ("a", 0, (3, 4)) and set(piece.changed) == {
        "div",
        "mul",
    }


def test_slices_that_overlap_are_refused():
    fn = lambda p, x: (x @ p["a"][:, :3], x @ p["a"][:, 2:])  # noqa: E731
    _, reasons = problems(calibrate(fn, gram(), P, [jnp.ones((5, 3))]), P)
    assert "overlap" in reasons["a"]


def test_layers_that_are_stacked_to_be_scanned_keep_their_own_turns():
    rng = np.random.default_rng(0)
    p = {name: jnp.asarray(rng.normal(size=(3, 3)), jnp.float32) for name in "ab"}
    x = jnp.asarray(rng.normal(size=(7, 3)), jnp.float32)

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack([p["a"], p["b"]]))[0]

    tasks, _ = problems(calibrate(fn, gram(), p, [x]), p)
    hidden = jnp.tanh(x @ p["a"])
    for path, fed in (("a", x), ("b", hidden)):
        np.testing.assert_allclose(tasks[path][0].gram[0], fed.T @ fed / 7, rtol=1e-5)


def test_a_kernel_that_runs_backwards_meets_the_right_inputs():
    p, x = {"w": jnp.arange(6.0).reshape(3, 2)}, jnp.array([[1.0, 10.0, 100.0]])
    tasks, _ = problems(calibrate(lambda p, x: x @ p["w"][::-1], gram(), p, [x]), p)
    (task,) = tasks["w"]
    w = task.form.matrices(task.box.take(p["w"]))[0]
    np.testing.assert_allclose(
        jnp.diagonal(w.T @ task.gram[0] @ w), (x @ p["w"][::-1])[0] ** 2, rtol=1e-6
    )
    assert (
        task.box.flips == (0,)
        and lay_out(*(lambda s: (s, s.pieces[0]))(sites(lambda p, x: x @ p["w"], p, x)[0]))[0].whole
    )


def test_matrices_are_named_by_their_place_in_the_parameter():
    fn = lambda p, x: jnp.einsum("eti,eio->eto", x, p["s"]), jnp.ones((2, 5, 3))  # noqa: E731
    (task,) = problems(calibrate(fn[0], gram(), {"s": P["s"]}, [fn[1]]), P)[0]["s"]
    assert task.names("s") == ["s[0]", "s[1]"]
    parts = lambda p, x: (x @ p["s"][1], x @ p["a"][:, 1:3])  # noqa: E731
    one, other = problems(calibrate(parts, gram(), P, [jnp.ones((5, 3))]), P)[0].values()
    assert one[0].names("s") == ["s[1]"] and other[0].names("a") == ["a[:, 1:3]"]
    assert why_not(sites(lambda p, x: x @ x.T, P, jnp.ones((5, 3)))[0]) == "no parameter feeds it"
