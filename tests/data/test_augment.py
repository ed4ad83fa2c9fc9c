import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.data import random_crop_flip


@pytest.fixture
def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(64, 7, 5, 2)), jnp.float32) + 10.0


def _candidates(image, pad, fill):
    """Every window of the framed image and its mirror image, by NumPy."""
    h, w, c = image.shape
    framed = np.empty((h + 2 * pad, w + 2 * pad, c), image.dtype)
    framed[:] = fill
    framed[pad : pad + h, pad : pad + w] = image
    for dy in range(2 * pad + 1):
        for dx in range(2 * pad + 1):
            window = framed[dy : dy + h, dx : dx + w]
            yield (dy, dx, False), window
            yield (dy, dx, True), window[:, ::-1]


@pytest.mark.slow
def test_every_result_is_one_shift_of_its_image_and_all_shifts_occur(images):
    fill = np.array([-1.0, 3.0], np.float32)
    out = np.asarray(random_crop_flip(jax.random.key(0), images, pad=1, fill=jnp.asarray(fill)))
    seen = []
    for before, after in zip(np.asarray(images), out, strict=True):
        found = [
            how for how, window in _candidates(before, 1, fill) if np.array_equal(window, after)
        ]
        assert len(found) == 1
        seen += found
    assert {how[2] for how in seen} == {True, False}
    assert len({how[:2] for how in seen}) == 9


def test_without_padding_and_mirror_it_is_the_identity(images):
    np.testing.assert_array_equal(
        random_crop_flip(jax.random.key(3), images, pad=0, flip=False), images
    )


def test_without_mirror_no_image_is_mirrored(images):
    out = random_crop_flip(jax.random.key(1), images, pad=2, flip=False)
    for before, after in zip(np.asarray(images), np.asarray(out), strict=True):
        found = [how for how, window in _candidates(before, 2, 0) if np.array_equal(window, after)]
        assert found and not found[0][2]


def test_the_key_decides_and_jit_changes_nothing(images):
    a = random_crop_flip(jax.random.key(5), images)
    np.testing.assert_array_equal(jax.jit(random_crop_flip)(jax.random.key(5), images), a)
    assert not np.array_equal(random_crop_flip(jax.random.key(6), images), a)


@pytest.mark.wide(2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.uint8])
def test_shape_and_dtype_stay(images, dtype):
    out = random_crop_flip(jax.random.key(0), images.astype(dtype), pad=3)
    assert out.shape == images.shape and out.dtype == dtype
