"""The parts most others are made of: linear maps of channels, and convolutions over positions."""

from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ShapeError
from compress_jax.distill.parts import Part, Shape, fits
from compress_jax.distill.shapes import per_channel
from compress_jax.distill.stable import bounded


def linear(width: int | None = None, *, bias: bool = True) -> Part:
    """Return a linear map of the channels at each position: a regressor for vectors, tokens and, as "1x1 conv", images.

    Args:
      width: channels it returns; None for the teacher's.
      bias: whether it adds one.

    Returns:
      A `Part` with params ``{"kernel": [channels, width], "bias": [width]}``. Its ``init`` raises a ShapeError if positions
      of student and teacher differ and no width is given.

    Example:
      >>> params = linear().init(jax.random.key(0), (8, 16), (8, 64))
      >>> params["kernel"].shape, params["bias"].shape
      ((16, 64), (64,))
    """
    return _convolution(width, bias, window=1, stride=1, transposed=False)


def conv(width: int | None = None, *, window: int = 3, stride: int = 1, bias: bool = True) -> Part:
    """Return a convolution over up to three axes of positions, padded so that n positions become ``ceil(n / stride)``.

    On features without positions it is `linear`.

    Args:
      width: channels it returns; None for the teacher's.
      window: positions it sees along each axis.
      stride: 2 for a teacher with half the positions along each axis.
      bias: whether it adds one.

    Returns:
      A `Part` with params ``{"kernel": [*window, channels, width], "bias": [width]}``. Its ``init`` raises a ShapeError if
      what comes out does not have the teacher's positions and no width is given.

    Example:
      >>> params = conv(stride=2).init(jax.random.key(0), (8, 16, 16, 4), (8, 8, 8, 6))
      >>> conv(stride=2).apply(params, jnp.ones((1, 16, 16, 4))).shape
      (1, 8, 8, 6)
    """
    return _convolution(width, bias, window, stride, transposed=False)


def deconv(width: int | None = None, *, window: int = 4, stride: int = 2, bias: bool = True) -> Part:
    """Return a transposed convolution over the positions: n become ``n * stride``, for a teacher that has more of them.

    Args:
      width: channels it returns; None for the teacher's.
      window: positions that each one reaches along each axis; a multiple of the stride avoids checkerboards.
      stride: 2 for a teacher with twice the positions along each axis.
      bias: whether it adds one.

    Returns:
      A `Part` like `conv`.

    Example:
      >>> params = deconv().init(jax.random.key(0), (8, 4, 4, 4), (8, 8, 8, 6))
      >>> deconv().apply(params, jnp.ones((1, 4, 4, 4))).shape
      (1, 8, 8, 6)
    """
    return _convolution(width, bias, window, stride, transposed=True)


def _convolution(width: int | None, bias: bool, window: int, stride: int, transposed: bool) -> Part:
    def init(key: jax.Array, student_shape: Shape, teacher_shape: Shape) -> Any:
        axes = 0 if window == stride == 1 else len(student_shape) - 2
        out = teacher_shape[-1] if width is None else width
        shape = (window,) * axes + (student_shape[-1], out)
        params = {"kernel": jax.nn.initializers.he_normal()(key, shape, jnp.float32)}
        params |= {"bias": jnp.zeros(out, jnp.float32)} if bias else {}
        if width is None:
            fits(Part(init, apply), params, student_shape, teacher_shape)
        return params

    def apply(params: Any, x: jax.Array) -> jax.Array:
        kernel = params["kernel"]
        x = bounded(x, 4)
        axes = kernel.ndim - 2
        if axes == 0:
            y = x @ kernel
        elif transposed:
            y = jax.lax.conv_transpose(x, kernel, (stride,) * axes, "SAME", dimension_numbers=_layout(axes))
        else:
            y = jax.lax.conv_general_dilated(x, kernel, (stride,) * axes, "SAME", dimension_numbers=_layout(axes))
        return y + per_channel(params["bias"], y.ndim) if "bias" in params else y

    return Part(init, apply)


def _layout(axes: int) -> tuple[str, str, str]:
    """Return JAX's names for ``[batch, *positions, channels]`` and ``[*window, in, out]``."""
    if not 1 <= axes <= 3:
        raise ShapeError(f"a convolution takes [batch, *positions, channels] with up to 3 axes of positions, got {axes}")
    positions = "XYZ"[:axes]
    return f"N{positions}C", f"{positions}IO", f"N{positions}C"
