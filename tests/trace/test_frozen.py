"""What freezes an axis, what does not, and how it is shown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.core.errors import NoMatchError, ShapeError
from compress_jax.trace._groups.groups import groups
from tests.trace.zoo_entry import inputs, normal, randomise

(VECTOR,) = inputs(normal(4, 5))


def shapes(**sizes):
    return randomise({name: np.empty(size) for name, size in sizes.items()})


def members(found):
    return {group.name: set(group.members) for group in found}


def hidden(middle):
    """Return a network of two layers with something between them, and its groups."""
    params = shapes(w=(5, 6), v=(6, 3))
    return groups(lambda p, x: middle(x @ p["w"]) @ p["v"], params, VECTOR)


ALTERNATING = np.array([1, 2, 1, 2, 1, 2], "float32")
FREEZES = {
    "unknown op fft": lambda h: jnp.fft.fft(h).real,
    "constant": lambda h: h * ALTERNATING[None],
    "cumsum": lambda h: jnp.cumsum(h, 1),
    "argmax": lambda h: h * jnp.argmax(h, 1, keepdims=True).astype("float32"),
    "sort": lambda h: jnp.sort(h, 1),
    "rev": lambda h: h[:, ::-1],
    "top_k": lambda h: h + jax.lax.top_k(h, 1)[1].astype("float32"),
    "looked up by index": lambda h: h + h[:, jnp.array([1])],
    "strided slice": lambda h: h + h[:, ::6],
    "numbered by iota": lambda h: h * jnp.arange(6, dtype="float32")[None],
    "scan": lambda h: jax.lax.scan(lambda c, x: (c + x, c + x), jnp.zeros(4), h.T)[1].T,
    "spatial window": lambda h: jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 3), (1, 1), "SAME"),
}


@pytest.mark.parametrize("reason", FREEZES)
def test_what_freezes(reason):
    found = hidden(FREEZES[reason])
    assert not len(found) and found.frozen[("w", 1)] == found.frozen[("v", 0)] == reason
    assert found.unknown == ({"fft": 1} if "fft" in reason else {})


@pytest.mark.parametrize(
    "middle",
    [
        lambda h: h * np.ones((1, 6), "float32") + jnp.full((4, 6), 2.0),
        lambda h: h * np.array([[1], [2], [3], [4]], "float32") * np.ones((4, 6), "float32"),
        lambda h: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h, 0.0),
        lambda h: jax.nn.softmax(h) - h.mean(-1, keepdims=True),
        lambda h: jax.lax.cond(h.sum() > 0, jnp.tanh, lambda h: h * 2, h),
        lambda h: jax.lax.while_loop(lambda c: c.sum() > 1, lambda c: c / 2, h),
        lambda h: jax.lax.fori_loop(0, 3, lambda i, c: jax.nn.relu(c + h), h),
        lambda h: jax.checkpoint(jax.jit(jax.nn.relu))(h),
        lambda h: jnp.pad(h, ((0, 0), (2, 0)))[:, 2:],
    ],
)
def test_what_does_not(middle):
    assert members(hidden(middle)) == {"w:1": {("w", 1), ("v", 0)}}


def test_a_constant_freezes_only_what_it_tells_apart():
    # Halves differ, columns within a half do not.
    mask = np.kron(np.array([[1.0, 2.0]], "float32"), np.ones((4, 3), "float32"))

    def fn(p, x):
        masked = (x @ p["w"]).reshape(4, 2, 3) * mask.reshape(4, 2, 3)
        return masked.reshape(4, 6) @ p["v"]

    found = groups(fn, shapes(w=(5, 6), v=(6, 3)), VECTOR)
    assert [group.coordinates[("w", 1)].tolist() for group in found] == [[0, 1, 2] * 2]
    assert found.frozen[("w", 1)] == "constant"


def test_parameters_without_effect_are_no_group():
    found = groups(lambda p, x: x @ p["w"][:, :3], shapes(w=(5, 8), unused=(4, 4)), VECTOR)
    assert not len(found)
    assert found.frozen == {
        ("w", 0): "input",
        ("w", 1): "output, unused",
        ("unused", 0): "unused",
        ("unused", 1): "unused",
    }


def test_a_group_twice_in_one_axis_is_frozen():
    def fn(p, x):
        h = x @ p["w"]
        return (h[:, :, None] * h[:, None, :]).reshape(4, -1) @ p["v"]

    found = groups(fn, shapes(w=(5, 6), v=(36, 3)), VECTOR)
    assert (
        not len(found) and found.frozen[("w", 1)] == found.frozen[("v", 0)] == "twice in one axis"
    )


def test_a_table_shows_groups_frozen_axes_and_unknown_ops():
    text = str(hidden(lambda h: jnp.fft.fft(h).real))
    assert (
        "no groups" in text
        and "frozen (unknown op fft): v:0, w:1" in text
        and "unknown ops: fft x1" in text
    )
    assert "w:1" in str(hidden(jnp.tanh)).splitlines()[1]


def test_groups_are_a_list():
    found = hidden(jnp.tanh)
    assert (
        len(found) == len(list(found)) == 1
        and found[0] is found[-1] is found["w:1"]
        and found[:1] == (found[0],)
    )
    with pytest.raises(NoMatchError, match="w:1"):
        found["w:0"]
    with pytest.raises(ShapeError, match="coordinates 0 to 5"):
        found.keep(shapes(w=(5, 6), v=(6, 3)), {"w:1": [6]})
    with pytest.raises(ShapeError, match="permutation"):
        found.permute(shapes(w=(5, 6), v=(6, 3)), "w:1", [0, 0, 1, 2, 3, 4])
