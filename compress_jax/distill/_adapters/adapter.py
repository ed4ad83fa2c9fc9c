"""Parts: the small learned maps that some losses need between student and teacher, as pairs of pure functions.

A part's params are a plain tree of float32 arrays: put them beside the student's under an optimizer
label of their own, save and resume them with the run, and leave them out of what is exported. No
part has a state or averages over the batch. They compute in float32, finite with finite gradients
at any finite features.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ShapeError
from compress_jax.core.types import Params
from compress_jax.distill._losses.shapes import bounded, per_channel

Shape = Sequence[int]


class Adapter(NamedTuple):
    """A learned map from the student's features towards the teacher's.

    Attributes:
      init: ``(key, student_shape, teacher_shape) -> params``; shapes with the batch,
        ``[batch, *positions, channels]`` (lists of them in `fusion`).
      apply: ``(params, features) -> features``, of any batch.

    Example:
      >>> part = norm()
      >>> params = part.init(jax.random.key(0), (32, 8, 8, 16), (32, 8, 8, 16))
      >>> part.apply(params, jnp.ones((2, 8, 8, 16))).shape
      (2, 8, 8, 16)
    """

    init: Callable[[jax.Array, Any, Any], Any]
    apply: Callable[[Any, Any], Any]


def fits(part: Adapter, params: Params, student_shape: Shape, teacher_shape: Shape) -> None:
    """Raise a ShapeError unless a part turns the student's shape into the teacher's.

    Example:
      >>> fits(activation(), {}, (8, 4, 4, 2), (8, 4, 4, 2))
    """
    given = jax.eval_shape(
        part.apply, params, jax.ShapeDtypeStruct(tuple(student_shape), jnp.float32)
    ).shape
    if given[1:] != tuple(teacher_shape[1:]):
        raise ShapeError(
            f"this part turns features {tuple(student_shape)} into {given}, the teacher's are "
            f"{tuple(teacher_shape)}: take "
            "conv(stride=...) for fewer positions, deconv(stride=...) for more, or distill.resize_features one of "
            "them"
        )


def activation(function: Callable[[jax.Array], jax.Array] = jax.nn.relu) -> Adapter:
    """Return a part without params that applies a function of one array.

    Args:
      function: ``features -> features``.

    Returns:
      A `Adapter` with params ``{}``.

    Example:
      >>> activation().apply({}, jnp.array([[-1.0, 2.0]])).tolist()
      [[0.0, 2.0]]
    """
    return Adapter(lambda key, student_shape, teacher_shape: {}, lambda params, x: function(x))


def norm(epsilon: float = 1e-5) -> Adapter:
    """Return a normalisation of the channels at each position, "layer norm": it needs no batch and keeps no averages.

    ``scale * (x - mean(x)) / sqrt(var(x) + epsilon) + bias``, mean and variance over channels, in
    float32. Where the published parts have batch norm, ours have this.

    Args:
      epsilon: added to the variance.

    Returns:
      A `Adapter` with params ``{"scale": [channels], "bias": [channels]}``.

    Example:
      >>> params = norm().init(jax.random.key(0), (8, 2), (8, 2))
      >>> abs(norm().apply(params, jnp.array([[1.0, 3.0]]))).round(2).tolist()
      [[1.0, 1.0]]
    """

    def init(key: jax.Array, student_shape: Shape, teacher_shape: Shape) -> Any:
        width = student_shape[-1]
        return {"scale": jnp.ones(width, jnp.float32), "bias": jnp.zeros(width, jnp.float32)}

    def apply(params: Params, x: jax.Array) -> jax.Array:
        x = bounded(x, 4)
        x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + epsilon)
        return per_channel(params["scale"], x.ndim) * x + per_channel(params["bias"], x.ndim)

    return Adapter(init, apply)


def sequential(*parts: Adapter) -> Adapter:
    """Return parts one after the other.

    Args:
      *parts: each takes what the one before returns; a width of None means the teacher's.

    Returns:
      A `Adapter` with params ``{"0": ..., "1": ...}``. Its ``init`` raises a ShapeError if what comes
      out has another shape than the teacher's features.

    Example:
      >>> part = sequential(norm(), activation())
      >>> params = part.init(jax.random.key(0), (8, 16), (8, 16))
      >>> sorted(params), part.apply(params, jnp.ones((2, 16))).shape
      (['0', '1'], (2, 16))
    """

    def init(key: jax.Array, student_shape: Shape, teacher_shape: Shape) -> Any:
        params, shape = {}, student_shape
        for i, (part, own) in enumerate(zip(parts, jax.random.split(key, len(parts)), strict=True)):
            params[str(i)] = part.init(own, shape, teacher_shape)
            shape = jax.eval_shape(
                part.apply, params[str(i)], jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
            ).shape
        fits(whole, params, student_shape, teacher_shape)
        return params

    def apply(params: Params, x: jax.Array) -> jax.Array:
        for i, part in enumerate(parts):
            x = part.apply(params[str(i)], x)
        return x

    whole = Adapter(init, apply)
    return whole


# The parts most others are made of: linear maps of channels, and convolutions over positions.


def linear(width: int | None = None, *, bias: bool = True) -> Adapter:
    """Return a linear map of the channels at each position: a regressor for vectors, tokens and, as "1x1 conv", images.

    Args:
      width: channels it returns; None for the teacher's.
      bias: whether it adds one.

    Returns:
      A `Adapter` with params ``{"kernel": [channels, width], "bias": [width]}``. Its ``init`` raises a
      ShapeError if positions of student and teacher differ and no width is given.

    Example:
      >>> params = linear().init(jax.random.key(0), (8, 16), (8, 64))
      >>> params["kernel"].shape, params["bias"].shape
      ((16, 64), (64,))
    """
    return _convolution(width, bias, window=1, stride=1, transposed=False)


def conv(
    width: int | None = None, *, window: int = 3, stride: int = 1, bias: bool = True
) -> Adapter:
    """Return a convolution over up to three axes of positions, padded so that n positions become ``ceil(n / stride)``.

    On features without positions it is `linear`.

    Args:
      width: channels it returns; None for the teacher's.
      window: positions it sees along each axis.
      stride: 2 for a teacher with half the positions along each axis.
      bias: whether it adds one.

    Returns:
      A `Adapter` with params ``{"kernel": [*window, channels, width], "bias": [width]}``. Its ``init``
      raises a ShapeError if what comes out does not have the teacher's positions and no width is
      given.

    Example:
      >>> params = conv(stride=2).init(jax.random.key(0), (8, 16, 16, 4), (8, 8, 8, 6))
      >>> conv(stride=2).apply(params, jnp.ones((1, 16, 16, 4))).shape
      (1, 8, 8, 6)
    """
    return _convolution(width, bias, window, stride, transposed=False)


def deconv(
    width: int | None = None, *, window: int = 4, stride: int = 2, bias: bool = True
) -> Adapter:
    """Return a transposed convolution over the positions: n become ``n * stride``, for a teacher that has more of them.

    Args:
      width: channels it returns; None for the teacher's.
      window: positions that each one reaches along each axis; a multiple of the stride avoids
        checkerboards.
      stride: 2 for a teacher with twice the positions along each axis.
      bias: whether it adds one.

    Returns:
      A `Adapter` like `conv`.

    Example:
      >>> params = deconv().init(jax.random.key(0), (8, 4, 4, 4), (8, 8, 8, 6))
      >>> deconv().apply(params, jnp.ones((1, 4, 4, 4))).shape
      (1, 8, 8, 6)
    """
    return _convolution(width, bias, window, stride, transposed=True)


def _convolution(
    width: int | None, bias: bool, window: int, stride: int, transposed: bool
) -> Adapter:
    def init(key: jax.Array, student_shape: Shape, teacher_shape: Shape) -> Any:
        axes = 0 if window == stride == 1 else len(student_shape) - 2
        out = teacher_shape[-1] if width is None else width
        shape = (window,) * axes + (student_shape[-1], out)
        params = {"kernel": jax.nn.initializers.he_normal()(key, shape, jnp.float32)}
        params |= {"bias": jnp.zeros(out, jnp.float32)} if bias else {}
        if width is None:
            fits(Adapter(init, apply), params, student_shape, teacher_shape)
        return params

    def apply(params: Params, x: jax.Array) -> jax.Array:
        kernel = params["kernel"]
        x = bounded(x, 4)
        axes = kernel.ndim - 2
        if axes == 0:
            y = x @ kernel
        elif transposed:
            y = jax.lax.conv_transpose(
                x, kernel, (stride,) * axes, "SAME", dimension_numbers=_layout(axes)
            )
        else:
            y = jax.lax.conv_general_dilated(
                x, kernel, (stride,) * axes, "SAME", dimension_numbers=_layout(axes)
            )
        return y + per_channel(params["bias"], y.ndim) if "bias" in params else y

    return Adapter(init, apply)


def _layout(axes: int) -> tuple[str, str, str]:
    """Return JAX's names for ``[batch, *positions, channels]`` and ``[*window, in, out]``."""
    if not 1 <= axes <= 3:
        raise ShapeError(
            "a convolution takes [batch, *positions, channels] with up to 3 axes of positions, "
            f"got {axes}"
        )
    positions = "XYZ"[:axes]
    return f"N{positions}C", f"{positions}IO", f"N{positions}C"
