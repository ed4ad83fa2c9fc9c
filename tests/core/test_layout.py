"""Which entries share a scale: against sums taken by explicit loops, and `restore` as the inverse
of `arrange`."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.core.errors import ShapeError
from compress_jax.core.layout import Layout

SHAPES = [(), (6,), (4, 6), (2, 3, 4), (2, 3, 2, 4)]


def numbered(shape):
    return jnp.asarray(np.arange(1, math.prod(shape) + 1, dtype=np.float32).reshape(shape))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from(["tensor", "channel", 2, 5, 64]), st.data())
@pytest.mark.slow
def test_restore_undoes_arrange(shape, granularity, data):
    axes = data.draw(
        st.sets(st.integers(-len(shape), len(shape) - 1), min_size=1, max_size=2)
        if shape
        else st.just({0})
    )
    layout = Layout.of(shape, granularity, tuple(axes), pad=True)
    x = numbered(shape)
    arranged = np.asarray(layout.arrange(x))
    assert np.array_equal(layout.restore(jnp.asarray(arranged)), x)
    kept = np.sort(np.ravel(arranged))
    assert (
        np.array_equal(kept[kept > 0], np.ravel(x)) and (kept >= 0).all()
    )  # all entries once, the rest is padding
    assert np.broadcast_shapes(layout.scale_shape, arranged.shape) == arranged.shape
    assert np.max(arranged, axis=layout.reduced, keepdims=True).shape == layout.scale_shape


@pytest.mark.parametrize("axis", [-1, 0, (0, -1), (2, 3)])
def test_groups_of_a_conv_kernel_are_runs_of_its_contracting_entries(axis):
    shape, size = (2, 3, 4, 5), 4
    x = np.asarray(numbered(shape))
    layout = Layout.of(shape, size, axis, pad=True)
    channels = {a % 4 for a in ((axis,) if isinstance(axis, int) else axis)}
    loops = [range(n) for a, n in enumerate(shape) if a in channels]
    columns = []
    for channel in itertools.product(*loops):
        at = iter(channel)
        index = tuple(next(at) if a in channels else slice(None) for a in range(4))
        run = x[index].ravel()
        columns.append(np.pad(run, (0, -len(run) % size)).reshape(-1, size))
    assert np.array_equal(layout.arrange(jnp.asarray(x)), np.stack(columns, axis=-1))


def test_shapes_of_scales():
    assert Layout.of((3, 3, 16, 32), "tensor").scale_shape == (1, 1, 1, 1)
    assert Layout.of((3, 3, 16, 32), "channel").scale_shape == (1, 1, 1, 32)
    assert Layout.of((3, 3, 16, 32), "channel", (0, -1)).scale_shape == (3, 1, 1, 32)
    assert Layout.of((3, 3, 16, 32), 48).scale_shape == (3, 1, 32)
    assert Layout.of((8, 4, 2), 4, (1, 2)).scale_shape == (2, 1, 8)
    assert Layout.of((5,), "channel").scale_shape == (1,)
    assert Layout.of((), "channel").scale_shape == ()
    assert Layout.of((4, 6), "channel", (1, -1)) == Layout.of((4, 6), "channel", 1)


def test_a_group_that_does_not_divide_is_refused_unless_padded():
    with pytest.raises(ShapeError, match="do not divide the 6"):
        Layout.of((2, 3, 4), 4)
    padded = Layout.of((2, 3, 4), 4, pad=True)
    assert padded.groups == 2 and padded.scale_shape == (2, 1, 4)
    assert padded.arrange(jnp.ones((2, 3, 4))).sum() == 24


@pytest.mark.parametrize("granularity", [0, -3, True, 2.0, "row"])
def test_unknown_granularities_are_refused(granularity):
    with pytest.raises(ValueError, match="granularity must be"):
        Layout.of((4, 4), granularity)


def test_an_axis_that_does_not_exist_is_refused():
    with pytest.raises(ShapeError, match="axis 2 does not exist"):
        Layout.of((4, 4), "channel", 2)


def test_tensor_and_channel_leave_the_array_as_it_is_under_jit():
    x = numbered((4, 6))
    layout = Layout.of((4, 6), "channel")
    assert jax.jit(lambda x: layout.restore(layout.arrange(x)))(x).tolist() == x.tolist()
    assert layout.arrange(x) is x
