"""Stochastic rounding, which is unbiased, and backward passes in integers that use it."""

import zlib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from compress_jax.core.types import ModelFn, Params, PyTree
from compress_jax.quantize._activations.quantizer import activation_grid, stable_scale_from_range
from compress_jax.quantize._scales.grid import Grid
from compress_jax.trace import rewrite, sites
from compress_jax.trace._jaxpr.site import Site


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    r"""Round up with the probability of the fractional part: :math:`\lfloor x + u \rfloor`.

    The expectation is x.

    Args:
      x: float array; whole numbers stay as they are.
      key: typed PRNG key.

    Returns:
      Whole numbers in the dtype of ``x``.

    Example:
      >>> import compress_jax as cj
      >>> rounded = cj.quantize.stochastic_round(jnp.full(10_000, 0.25), jax.random.key(0))
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
) -> ModelFn:
    r"""Return ``fn`` with the gradients of its contractions computed from integers.

    The forward pass does not change. The gradient of a contraction consists of two contractions.
    Both operands of each, the incoming gradient and the saved operand, are rounded stochastically
    to the symmetric grid that spans them; the product is computed on the int8 codes with int32 sums
    and multiplied by both scales. As the two roundings are independent, the gradients' expectation
    is exact for a given incoming gradient. Quantized operands (`activations`) are saved as
    quantized. Reverse mode only.

    Args:
      fn: a pure function of params and inputs.
      key: typed PRNG key; a new one for each training step.
      bits: 2 to 8.
      where: a glob, or several, over names of sites; by default all but ragged products, which stay
        as they are.

    Returns:
      ``(params, *inputs) -> out``.

    Raises:
      ArgumentError: if bits is not such a number.
      NoMatchError: when called, if no site's name matches ``where``.

    Example:
      >>> import compress_jax as cj
      >>> fn, params = lambda w, x: x @ w["kernel"], {"kernel": jnp.ones((2, 2))}
      >>> x = jnp.array([[1.0, 0.5]])
      >>> noisy = cj.quantize.quantized_backward(fn, jax.random.key(0))
      >>> bool((noisy(params, x) == fn(params, x)).all())
      True
      >>> jax.grad(lambda w: noisy(w, x).sum())(params)["kernel"].round(1).tolist()
      [[1.0, 1.0], [0.5, 0.5]]

    References:
      Banner et al., "Scalable Methods for 8-bit Training of Neural Networks", 2018,
      arXiv:1805.11046, section 4.
    """
    grid = activation_grid(bits, True)._replace(narrow=True)

    def rule(site: Site, lhs: jax.Array, rhs: jax.Array, site_key: jax.Array) -> PyTree:
        if site.kind == "ragged_dot":
            return lhs, rhs
        return _contraction(site, grid)(lhs, rhs, site_key)

    def run(params: Params, *inputs: PyTree) -> PyTree:
        keys = {}
        for site in sites(fn, params, *inputs):
            # By name: adding a layer leaves the random numbers of all others as they are.
            site_key = jax.random.fold_in(key, zlib.crc32(site.name.encode()))
            # Inside loops every iteration has a key of its own.
            keys[site.name] = jax.random.split(site_key, site.loops) if site.loops else site_key
        return rewrite(fn, rule, where, keys)(params, *inputs)

    return run


def _contraction(site: Site, grid: Grid) -> Callable[..., jax.Array]:
    """Return ``(lhs, rhs, key) -> out``, exact, with a derivative computed from integers."""

    def exact(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return site.contract(lhs, rhs, site.params["preferred_element_type"])

    @jax.custom_vjp
    def contract(lhs: jax.Array, rhs: jax.Array, key: jax.Array) -> jax.Array:
        return exact(lhs, rhs)

    def forward(
        lhs: jax.Array, rhs: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return exact(lhs, rhs), (lhs, rhs, key)

    def exact_backward(_: None, lhs: jax.Array, rhs: jax.Array, gradient: jax.Array) -> PyTree:
        return jax.vjp(exact, lhs, rhs)[1](gradient)

    def backward(
        saved: tuple[jax.Array, ...], gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array, None]:
        *operands, key = saved
        # The contractions inside the exact gradient, each replaced by one of integers.
        names = [site.name for site in sites(exact_backward, None, *operands, gradient)]
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        integer_backward = rewrite(exact_backward, partial(_integer_contraction, grid), given=keys)
        return *integer_backward(None, *operands, gradient), None

    contract.defvjp(forward, backward)
    return contract


def _integer_contraction(
    grid: Grid, site: Site, lhs: jax.Array, rhs: jax.Array, key: jax.Array
) -> jax.Array:
    """Contract the stochastically rounded codes of both operands."""
    lhs_key, rhs_key = jax.random.split(key)
    lhs_codes, lhs_scale = _stochastic_codes(grid, lhs, lhs_key)
    rhs_codes, rhs_scale = _stochastic_codes(grid, rhs, rhs_key)
    # One scale for each operand, so that both can be taken out of the sum.
    total = site.contract(lhs_codes, rhs_codes, jnp.int32).astype(jnp.float32)
    return (total * (lhs_scale * rhs_scale)).astype(site.out_dtype)


def _stochastic_codes(grid: Grid, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return int8 codes and the float32 scale of the symmetric grid that spans ``x``."""
    x = x.astype(jnp.float32)
    scale, _ = stable_scale_from_range(x.min(initial=0), x.max(initial=0), grid)
    codes = jnp.clip(stochastic_round(x * (1 / scale), key), -grid.qmax, grid.qmax)
    return codes.astype(jnp.int8), scale
