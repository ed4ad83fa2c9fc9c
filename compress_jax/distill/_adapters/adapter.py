"""Adapters: small learned maps between student and teacher features, as pairs of pure functions.

The params of an adapter are a plain tree of float32 arrays: `train.distillation` trains them with
the student, under an optimizer label of their own, saves and resumes them with the run, and exports
none of them. No adapter has a state or averages over the batch. They compute in float32, finite
with finite gradients at any finite features.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ShapeError
from compress_jax.core.types import Params, PyTree
from compress_jax.distill._losses.shapes import bounded, per_channel

Shape = Sequence[int]


class Adapter(NamedTuple):
    """A learned map from the student's features towards the teacher's.

    Attributes:
      init: ``(key, student_shape, teacher_shape) -> params``; shapes with the batch,
        ``[batch, *positions, channels]`` (lists of them in `fusion`).
      apply: ``(params, features) -> features``, of any batch.

    Example:
      >>> adapter = norm()
      >>> params = adapter.init(jax.random.key(0), (32, 8, 8, 16), (32, 8, 8, 16))
      >>> adapter.apply(params, jnp.ones((2, 8, 8, 16))).shape
      (2, 8, 8, 16)
    """

    init: Callable[[jax.Array, PyTree, PyTree], Params]
    apply: Callable[[Params, PyTree], PyTree]


def require_fit(
    adapter: Adapter, params: Params, student_shape: Shape, teacher_shape: Shape
) -> None:
    """Raise a ShapeError unless an adapter maps the student's shape to the teacher's.

    Example:
      >>> require_fit(activation(), {}, (8, 4, 4, 2), (8, 4, 4, 2))
    """
    given = _shape_after(adapter, params, student_shape)
    if given[1:] != tuple(teacher_shape[1:]):  # any batch
        raise ShapeError(
            f"this adapter maps features {tuple(student_shape)} to {given}, the teacher's are "
            f"{tuple(teacher_shape)}: take conv(stride=...) for fewer positions, "
            "deconv(stride=...) for more, or use distill.resize_features on one of them"
        )


def _shape_after(adapter: Adapter, params: Params, shape: Shape) -> tuple[int, ...]:
    features = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    return jax.eval_shape(adapter.apply, params, features).shape


def activation(function: Callable[[jax.Array], jax.Array] = jax.nn.relu) -> Adapter:
    """Return an adapter without params that applies a function of one array.

    Args:
      function: ``features -> features``.

    Returns:
      An `Adapter` with params ``{}``.

    Example:
      >>> activation().apply({}, jnp.array([[-1.0, 2.0]])).tolist()
      [[0.0, 2.0]]
    """
    return Adapter(lambda key, student_shape, teacher_shape: {}, lambda params, x: function(x))


def norm(epsilon: float = 1e-5) -> Adapter:
    """Return a layer norm: it normalizes the channels at each position.

    ``scale * (x - mean(x)) / sqrt(var(x) + epsilon) + bias``, mean and variance over channels, in
    float32. Where the published adapters have batch norm, ours have this: it needs no batch and
    keeps no averages.

    Args:
      epsilon: added to the variance.

    Returns:
      An `Adapter` with params ``{"scale": [channels], "bias": [channels]}``.

    Example:
      >>> params = norm().init(jax.random.key(0), (8, 2), (8, 2))
      >>> abs(norm().apply(params, jnp.array([[1.0, 3.0]]))).round(2).tolist()
      [[1.0, 1.0]]
    """

    def init(key: jax.Array, student_shape: Shape, teacher_shape: Shape) -> Params:
        width = student_shape[-1]
        return {"scale": jnp.ones(width, jnp.float32), "bias": jnp.zeros(width, jnp.float32)}

    def apply(params: Params, x: jax.Array) -> jax.Array:
        x = bounded(x, 4)  # so that the variance is finite
        x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + epsilon)
        return per_channel(params["scale"], x.ndim) * x + per_channel(params["bias"], x.ndim)

    return Adapter(init, apply)


def sequential(*adapters: Adapter) -> Adapter:
    """Return adapters one after the other.

    Args:
      *adapters: each takes what the one before returns; a width of None means the teacher's.

    Returns:
      An `Adapter` with params ``{"0": ..., "1": ...}``. Its ``init`` raises a ShapeError if the
      result has another shape than the teacher's features.

    Example:
      >>> adapter = sequential(norm(), activation())
      >>> params = adapter.init(jax.random.key(0), (8, 16), (8, 16))
      >>> sorted(params), adapter.apply(params, jnp.ones((2, 16))).shape
      (['0', '1'], (2, 16))
    """

    def init(key: jax.Array, student_shape: Shape, teacher_shape: Shape) -> Params:
        params = {}
        shape = student_shape
        keys = jax.random.split(key, len(adapters))
        # Each adapter is made for the shape that the one before it returns.
        for i, (adapter, own_key) in enumerate(zip(adapters, keys, strict=True)):
            params[str(i)] = adapter.init(own_key, shape, teacher_shape)
            shape = _shape_after(adapter, params[str(i)], shape)
        require_fit(whole, params, student_shape, teacher_shape)
        return params

    def apply(params: Params, x: jax.Array) -> jax.Array:
        for i, adapter in enumerate(adapters):
            x = adapter.apply(params[str(i)], x)
        return x

    whole = Adapter(init, apply)
    return whole


def linear(width: int | None = None, *, bias: bool = True) -> Adapter:
    """Return a linear map of the channels at each position: a regressor for any features.

    For images it is a 1x1 convolution.

    Args:
      width: channels it returns; None for the teacher's.
      bias: whether it adds one.

    Returns:
      An `Adapter` with params ``{"kernel": [channels, width], "bias": [width]}``. Its ``init``
      raises a ShapeError if positions of student and teacher differ and no width is given.

    Example:
      >>> params = linear().init(jax.random.key(0), (8, 16), (8, 64))
      >>> params["kernel"].shape, params["bias"].shape
      ((16, 64), (64,))
    """
    return _convolution(width, bias, window=1, stride=1, transposed=False)


def conv(
    width: int | None = None, *, window: int = 3, stride: int = 1, bias: bool = True
) -> Adapter:
    """Return a convolution over up to three axes of positions, with "SAME" padding.

    n positions become ``ceil(n / stride)``. On features without positions it is `linear`.

    Args:
      width: channels it returns; None for the teacher's.
      window: positions it covers along each axis.
      stride: 2 for a teacher with half the positions along each axis.
      bias: whether it adds one.

    Returns:
      An `Adapter` with params ``{"kernel": [*window, channels, width], "bias": [width]}``. Its
      ``init`` raises a ShapeError if the result does not have the teacher's positions and no width
      is given.

    Example:
      >>> params = conv(stride=2).init(jax.random.key(0), (8, 16, 16, 4), (8, 8, 8, 6))
      >>> conv(stride=2).apply(params, jnp.ones((1, 16, 16, 4))).shape
      (1, 8, 8, 6)
    """
    return _convolution(width, bias, window, stride, transposed=False)


def deconv(
    width: int | None = None, *, window: int = 4, stride: int = 2, bias: bool = True
) -> Adapter:
    """Return a transposed convolution: n positions become ``n * stride``.

    Args:
      width: channels it returns; None for the teacher's.
      window: positions that each input reaches along each axis; a multiple of the stride avoids
        checkerboards.
      stride: 2 for a teacher with twice the positions along each axis.
      bias: whether it adds one.

    Returns:
      An `Adapter` like `conv`.

    Example:
      >>> params = deconv().init(jax.random.key(0), (8, 4, 4, 4), (8, 8, 8, 6))
      >>> deconv().apply(params, jnp.ones((1, 4, 4, 4))).shape
      (1, 8, 8, 6)
    """
    return _convolution(width, bias, window, stride, transposed=True)


def _convolution(
    width: int | None, bias: bool, window: int, stride: int, transposed: bool
) -> Adapter:
    def init(key: jax.Array, student_shape: Shape, teacher_shape: Shape) -> Params:
        # A window of one position is a matrix product, whatever the number of axes.
        axes = 0 if window == stride == 1 else len(student_shape) - 2
        out = teacher_shape[-1] if width is None else width
        shape = (window,) * axes + (student_shape[-1], out)  # [*window, in, out]
        params = {"kernel": jax.nn.initializers.he_normal()(key, shape, jnp.float32)}
        if bias:
            params["bias"] = jnp.zeros(out, jnp.float32)
        # With a width of its own it may be followed by others: `sequential` checks the last shape.
        if width is None:
            require_fit(Adapter(init, apply), params, student_shape, teacher_shape)
        return params

    def apply(params: Params, x: jax.Array) -> jax.Array:
        kernel = params["kernel"]
        x = bounded(x, 4)  # so that the sum of products is finite, and its square in a loss
        axes = kernel.ndim - 2
        if axes == 0:
            y = x @ kernel  # [batch, *positions, out]
        else:
            convolve = jax.lax.conv_transpose if transposed else jax.lax.conv_general_dilated
            strides = (stride,) * axes
            y = convolve(x, kernel, strides, "SAME", dimension_numbers=_layout(axes))
        if "bias" in params:
            y = y + per_channel(params["bias"], y.ndim)
        return y

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
