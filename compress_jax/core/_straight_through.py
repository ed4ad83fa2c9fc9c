"""Straight-through estimators: the value of a step function with the derivative of the identity."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from compress_jax.core.types import PyTree


def straight_through(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Give ``fn(x, *rest)`` the derivative of the identity in ``x`` and none in ``rest``.

    The value is exactly that of ``fn``; only its derivative is replaced, ``d fn(x, *rest) = dx``.
    The common ``x + stop_gradient(fn(x) - x)`` is not equal to ``fn(x)`` in floating point, so what
    is trained with it is not what is shipped.

    Args:
      fn: a function of an array ``x`` and any further arrays, returning an array of the shape and
        dtype of ``x``.

    Returns:
      The function with the straight-through derivative.

    Example:
      >>> import compress_jax as cj
      >>> import jax.numpy as jnp
      >>> rounded = cj.straight_through(jnp.round)
      >>> x = jnp.array([0.4, 1.6])
      >>> rounded(x), jax.grad(lambda x: rounded(x).sum())(x)
      (Array([0., 2.], dtype=float32), Array([1., 1.], dtype=float32))

    References:
      Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic
      Neurons", 2013, section 3.
    """

    @jax.custom_jvp
    def through(x: jax.Array, *rest: PyTree) -> jax.Array:
        return fn(x, *rest)

    @through.defjvp
    def _(primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]) -> tuple[jax.Array, jax.Array]:
        # The tangent of x passes; those of the rest are dropped.
        return through(*primals), tangents[0]

    return through


def pass_within(x: jax.Array, bound: float | None) -> jax.Array:
    """Return ``x`` itself, with a derivative that is 1 where ``abs(x) <= bound`` and 0 elsewhere.

    Before a straight-through step function this is the estimator of BinaryConnect and XNOR-Net: a
    weight far beyond the last level gets no gradient, as moving it changes nothing.

    Args:
      x: any float array.
      bound: where the derivative ends; None for nowhere.

    Returns:
      The very bits of ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> jax.grad(lambda x: pass_within(x, 1.0).sum())(jnp.array([0.5, -1.0, 1.5]))
      Array([1., 1., 0.], dtype=float32)

    References:
      Courbariaux, Bengio and David, "BinaryConnect", 2015, section 2.4.
      Hubara et al., "Binarized Neural Networks", 2016, equation 4.
    """
    if bound is None:
        return x
    # Both branches hold the bits of x, so only the derivative depends on the bound.
    return jnp.where(jnp.abs(x) <= bound, x, jax.lax.stop_gradient(x))
