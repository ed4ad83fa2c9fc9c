"""Random networks: whatever group is found in them passes the permutation check."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.trace._groups.groups import groups, verify_groups


def _axis(draw, shape):
    return draw(st.integers(0, len(shape) - 1))


def _dense(draw, shape):
    axis, width = _axis(draw, shape), draw(st.sampled_from([2, 3, 4, 6]))
    new = (shape[axis], width)
    return [new], lambda x, w: jnp.moveaxis(jnp.tensordot(x, w, (axis, 0)), -1, axis)


def _scale(draw, shape):
    axis = _axis(draw, shape)
    return [
        shape[axis : axis + 1]
    ], lambda x, w: x * jnp.expand_dims(w, [i for i in range(x.ndim) if i != axis])


def _table(draw, shape):
    return [shape[-2:]], lambda x, w: jnp.tanh(x + w.reshape((1,) * (x.ndim - w.ndim) + w.shape))


def _normalise(draw, shape):
    axis, kind = _axis(draw, shape), draw(st.sampled_from(["softmax", "mean", "max"]))
    if kind == "softmax":
        return [], lambda x: jax.nn.softmax(x, axis)
    return [], lambda x: x - getattr(jnp, kind)(x, axis, keepdims=True)


def _reshape(draw, shape):
    total, new = math.prod(shape), []
    while total > 1 and len(new) < 3:
        new.append(draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0])))
        total //= new[-1]
    return [], lambda x: x.reshape(*new, total)


def _transpose(draw, shape):
    order = draw(st.permutations(range(len(shape))))
    return [], lambda x: x.transpose(order)


def _slice(draw, shape):
    axis = _axis(draw, shape)
    start = draw(st.integers(0, shape[axis] - 1))
    stop, step = draw(st.integers(start + 1, shape[axis])), draw(st.sampled_from([1, 1, 2]))
    return [], lambda x: jax.lax.slice_in_dim(x, start, stop, step, axis)


def _join(draw, shape):
    """Put a value beside a changed copy of itself, in one of several ways."""
    axis, kind = (
        _axis(draw, shape),
        draw(st.sampled_from(["concatenate", "stack", "tile", "repeat", "pad", "halves"])),
    )
    half = shape[axis] // 2
    return [], {
        "concatenate": lambda x: jnp.concatenate([x, jnp.tanh(x)], axis),
        "stack": lambda x: jnp.stack([x, jnp.tanh(x)], axis),
        "tile": lambda x: jnp.tile(x, [2 if i == axis else 1 for i in range(x.ndim)]),
        "repeat": lambda x: jnp.repeat(x, 2, axis),
        "pad": lambda x: jnp.pad(x, [(1, 2) if i == axis else (0, 0) for i in range(x.ndim)]),
        "halves": lambda x: jnp.concatenate(jnp.split(x, [half], axis)[::-1], axis),
    }[kind]


def _ordered(draw, shape):
    """Something that goes by the order of an axis, or that no rule is known for."""
    axis, kind = (
        _axis(draw, shape),
        draw(st.sampled_from(["cumsum", "sort", "flip", "take", "fft", "iota", "write"])),
    )
    mask = np.arange(shape[axis], dtype="float32").reshape(
        [-1 if i == axis else 1 for i in range(len(shape))]
    )
    return [], {
        "cumsum": lambda x: jnp.cumsum(x, axis),
        "sort": lambda x: jnp.sort(x, axis),
        "flip": lambda x: jnp.flip(x, axis),
        "take": lambda x: jnp.take(x, jnp.array([0, -1]), axis),
        "fft": lambda x: jnp.fft.fft(x, axis=axis).real,
        "iota": lambda x: x * mask,
        "write": lambda x: jnp.moveaxis(jnp.moveaxis(x, axis, 0).at[0].set(0.0), 0, axis),
    }[kind]


def _pair(draw, shape):
    """Multiply a value with itself: scores, an outer product, a loop that adds it up."""
    axis, kind = _axis(draw, shape), draw(st.sampled_from(["scores", "outer", "scan", "cond"]))
    return [], {
        "scores": lambda x: (
            jnp.matmul(jnp.tanh(x)[..., None], x[..., None, :])
            if x.ndim < 2
            else x @ jnp.swapaxes(x, -1, -2)
        ),
        "outer": lambda x: jnp.expand_dims(x, axis) * jnp.expand_dims(jnp.tanh(x), axis + 1),
        "scan": lambda x: jax.lax.scan(
            lambda c, row: (c + row, jnp.tanh(c)), jnp.zeros(shape[1:]), x
        )[1],
        "cond": lambda x: jax.lax.cond(jnp.abs(x).sum() > 1.2345, jnp.tanh, lambda x: 2 * x, x),
    }[kind]


STEPS = [_dense] * 5 + [
    _scale,
    _table,
    _normalise,
    _reshape,
    _reshape,
    _transpose,
    _slice,
    _join,
    _join,
    _ordered,
    _pair,
]


@st.composite
def networks(draw, choice=tuple(STEPS), last=jax.nn.softplus):  # positive: sums do not cancel
    """Draw a function of parameters and an input, and the shapes of its parameters."""
    shape, params, steps = (3, 4), {}, []
    for i in range(draw(st.integers(2, 9))):
        needs, step = draw(st.sampled_from(choice))(draw, shape)
        names = [f"{i}/{step.__name__}{j}" for j in range(len(needs))]
        new = jax.eval_shape(
            step, *(jax.ShapeDtypeStruct(each, jnp.float32) for each in (shape, *needs))
        ).shape
        if 0 < math.prod(new) <= 600 and 0 < len(new) <= 4:
            shape, params = new, params | dict(zip(names, needs, strict=True))
            steps.append((names, step))
    out = draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))

    def fn(params, x):
        for names, step in steps:
            x = step(x, *(params[name] for name in names))
        return last(x).sum(tuple(out))

    return fn, params


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(networks())
def test_every_group_passes_the_permutation_check(network):
    fn, shapes = network
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }
    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    found = groups(fn, params, x)
    report = verify_groups(fn, params, x, groups=found, tolerance=1e-3)
    assert report.ok, f"{report}\n{jax.make_jaxpr(fn)(params, x)}"
    listed = {member for group in found for member in group.members} | found.frozen.keys()
    assert listed == {
        (name, i) for name, shape in shapes.items() for i, size in enumerate(shape) if size > 1
    }
