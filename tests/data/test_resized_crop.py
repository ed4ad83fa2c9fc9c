"""Random parts of images, resized: against NumPy in float64, and against what was published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.core.errors import ArgumentError
from compress_jax.data import random_resized_crop, resized_crop
from compress_jax.data._augment import _random_box


@pytest.fixture
def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(3, 9, 12, 2)), jnp.float32)


def matrix(size, start, length, out):
    """Weights ``[out, size]`` of linear interpolation along one axis, in float64."""
    step = length / out
    weights = np.zeros((out, size))
    for i in range(out):
        center = start + (i + 0.5) * step
        distances = np.abs(np.arange(size) + 0.5 - center) / max(step, 1.0)
        weights[i] = np.maximum(0, 1 - distances)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [4, 7, 20])
def test_a_box_is_resized_as_in_float64(images, size):
    boxes = np.array([[1.0, 2.0, 6.0, 8.0], [0.0, 0.0, 9.0, 12.0], [2.25, 0.5, 3.5, 11.0]])
    out = resized_crop(images, jnp.asarray(boxes, jnp.float32), size)
    for image, (top, left, rows, columns), found in zip(images, boxes, out, strict=True):
        down = matrix(9, top, rows, size)
        across = matrix(12, left, columns, size)
        wanted = np.einsum("ih,jw,hwc->ijc", down, across, np.asarray(image, np.float64))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_whole_box_is_the_image_and_a_box_of_its_size_a_slice(images):
    whole = jnp.array([[0.0, 0.0, 9.0, 12.0]] * 3)
    np.testing.assert_allclose(resized_crop(images, whole), images, atol=1e-6)
    part = jnp.array([[3.0, 5.0, 4.0, 4.0]] * 3)
    np.testing.assert_allclose(resized_crop(images, part, 4), images[:, 3:7, 5:9], atol=1e-6)


def test_boxes_lie_inside_have_their_share_and_ratio_and_go_everywhere():
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = jax.jit(jax.vmap(lambda key: _random_box(key, 60, 80, (0.08, 1.0), (0.75, 4 / 3))))
    top, left, rows, columns = np.asarray(draw(keys), np.float64).T
    assert min(top.min(), left.min()) >= 0
    assert (top + rows).max() <= 60 + 1e-3 and (left + columns).max() <= 80 + 1e-3
    share = rows * columns / 4800
    assert 0.0799 < share.min() < 0.09 and 0.95 < share.max() <= 1 + 1e-5
    ratios = columns / rows
    assert 0.7499 < ratios.min() < 0.76 and 1.32 < ratios.max() < 1.3334
    # Small boxes are rarely refused: log of the ratio is uniform, so half are below 1.
    assert abs((ratios[share < 0.4] < 1).mean() - 0.5) < 0.06
    middle = (left + columns / 2)[share < 0.2]
    assert middle.min() < 20 and middle.max() > 60


def test_a_box_that_never_fits_is_the_largest_one_in_the_middle():
    box = _random_box(jax.random.key(0), 10, 100, (1.0, 1.0), (0.75, 4 / 3))
    np.testing.assert_allclose(box, [0, 50 - 40 / 6, 10, 40 / 3], rtol=1e-5)


def test_nothing_random_is_left_where_the_ranges_are_points(images):
    square = images[:, :, :9]
    points = {"area": (1.0, 1.0), "ratio": (1.0, 1.0)}
    out = random_resized_crop(jax.random.key(0), square, **points, flip=False)
    np.testing.assert_allclose(out, square, atol=1e-5)
    many = jnp.repeat(square, 20, 0)
    flipped = np.asarray(random_resized_crop(jax.random.key(1), many, **points))
    kept = np.abs(flipped - many).max((1, 2, 3)) < 1e-4
    mirrored = np.abs(flipped - many[:, :, ::-1]).max((1, 2, 3)) < 1e-4
    assert (kept ^ mirrored).all() and 15 < kept.sum() < 45


def test_the_key_decides_and_jit_changes_nothing(images):
    first = random_resized_crop(jax.random.key(5), images, 6)
    compiled = jax.jit(random_resized_crop, static_argnums=2)(jax.random.key(5), images, 6)
    np.testing.assert_allclose(compiled, first, atol=1e-5)
    assert not np.allclose(random_resized_crop(jax.random.key(6), images, 6), first)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint8])
def test_dtype_stays(dtype):
    images = jnp.full((2, 5, 5, 3), 200, dtype)
    out = random_resized_crop(jax.random.key(0), images, 4)
    assert out.dtype == dtype and out.shape == (2, 4, 4, 3)
    assert (jnp.abs(out.astype(jnp.float32) - 200) <= 1).all()


@pytest.mark.parametrize(
    "wrong", [{"area": (0.0, 1.0)}, {"area": (0.5, 0.2)}, {"area": (0.1, 2.0)}, {"ratio": (2.0, 1)}]
)
def test_ranges_that_cannot_be_are_refused(images, wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        random_resized_crop(jax.random.key(0), images, **wrong)
