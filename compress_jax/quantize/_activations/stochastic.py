"""Stochastic rounding, which is right on average, and backward passes that compute in integers with it."""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.types import ModelFn, Params, PyTree
from compress_jax.quantize._activations.quantizer import checked, spanned
from compress_jax.quantize._scales.grid import Grid
from compress_jax.trace import rewrite, sites
from compress_jax.trace._jaxpr.site import Site


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    r"""Round up with the probability of the fractional part, so that the expectation is x: :math:`\lfloor x + u \rfloor`.

    Args:
      x: float array; whole numbers stay as they are.
      key: typed PRNG key.

    Returns:
      Whole numbers in the dtype of ``x``.

    Example:
      >>> rounded = stochastic_round(jnp.full(10_000, 0.25), jax.random.key(0))
      >>> sorted(set(rounded.tolist())), round(float(rounded.mean()), 2)
      ([0.0, 1.0], 0.25)

    References:
      Gupta et al., "Deep Learning with Limited Numerical Precision", 2015, arXiv:1502.02551,
      section 3.
    """
    down = jnp.floor(x)
    # Not floor(x + u): near 1 the sum is rounded, and a whole number would be too.
    return down + (jax.random.uniform(key, x.shape, jnp.float32) < (x - down)).astype(x.dtype)


def quantized_backward(
    fn: ModelFn,
    key: jax.Array,
    bits: int = 8,
    where: str | tuple[str, ...] | None = None,
) -> Callable[..., Any]:
    r"""Return ``fn`` with the gradients of its contractions computed from integers.

    Forward nothing changes. Backward, each of the two contractions that a contraction's gradient
    consists of has both its operands, the incoming gradient and the saved operand, rounded
    stochastically to the symmetric grid that spans them, is computed on the int8 codes with int32
    sums, and multiplied by both scales. As the two roundings are independent the gradients'
    expectation is exact for a given incoming gradient. Quantized operands (`activations`) are saved
    as they were seen. Reverse mode only.

    Args:
      fn: a pure function of params and inputs.
      key: typed PRNG key; a new one for each training step.
      bits: 2 to 8.
      where: a glob, or several, over names of sites; by default all but ragged products, which stay
        as they are.

    Returns:
      ``(params, *inputs) -> out``.

    Raises:
      ValueError: if bits is not such a number.
      NoMatchError: when called, if no site's name matches ``where``.

    Example:
      >>> fn, params, x = lambda w, x: x @ w["kernel"], {"kernel": jnp.ones((2, 2))}, jnp.array([[1.0, 0.5]])
      >>> noisy = quantized_backward(fn, jax.random.key(0))
      >>> bool((noisy(params, x) == fn(params, x)).all())
      True
      >>> jax.grad(lambda w: noisy(w, x).sum())(params)["kernel"].round(1).tolist()
      [[1.0, 1.0], [0.5, 0.5]]

    References:
      Banner et al., "Scalable Methods for 8-bit Training of Neural Networks", 2018,
      arXiv:1805.11046, section 4.
    """
    grid = checked(bits, True)._replace(narrow=True)

    def rule(site: Site, lhs: jax.Array, rhs: jax.Array, own: jax.Array) -> Any:
        return (lhs, rhs) if site.kind == "ragged_dot" else _contraction(site, grid)(lhs, rhs, own)

    def run(params: Params, *inputs: PyTree) -> Any:
        keys = {}
        for site in sites(fn, params, *inputs):
            own = jax.random.fold_in(key, zlib.crc32(site.name.encode()))
            keys[site.name] = jax.random.split(own, site.loops) if site.loops else own
        return rewrite(fn, rule, where, keys)(params, *inputs)

    return run


def _contraction(site: Site, grid: Grid) -> Callable[..., jax.Array]:
    """Return ``(lhs, rhs, key) -> out`` with a derivative computed from integers."""

    def exact(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return site.contract(lhs, rhs, site.params["preferred_element_type"])

    def pull(_: None, lhs: jax.Array, rhs: jax.Array, gradient: jax.Array) -> Any:
        return jax.vjp(exact, lhs, rhs)[1](gradient)

    def backward(
        saved: tuple[jax.Array, ...], gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array, None]:
        *operands, key = saved
        inside = sites(pull, None, *operands, gradient)
        keys = dict(
            zip((each.name for each in inside), jax.random.split(key, len(inside)), strict=True)
        )
        return *rewrite(pull, partial(_integer, grid), given=keys)(None, *operands, gradient), None

    contract = jax.custom_vjp(lambda lhs, rhs, key: exact(lhs, rhs))
    contract.defvjp(lambda *operands: (exact(*operands[:2]), operands), backward)
    return contract


def _integer(grid: Grid, site: Site, lhs: jax.Array, rhs: jax.Array, key: jax.Array) -> jax.Array:
    """Contract the stochastically rounded codes of both operands."""
    (a, left), (b, right) = (
        _codes(grid, x, each) for x, each in zip((lhs, rhs), jax.random.split(key), strict=True)
    )
    return (site.contract(a, b, jnp.int32).astype(jnp.float32) * (left * right)).astype(
        site.out_dtype
    )


def _codes(grid: Grid, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.float32)
    scale, _ = spanned(x.min(initial=0), x.max(initial=0), grid)
    codes = jnp.clip(stochastic_round(x * (1 / scale), key), -grid.qmax, grid.qmax)
    return codes.astype(jnp.int8), scale
