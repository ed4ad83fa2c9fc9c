"""PACT: activations clipped at a bound that is trained."""

import jax
import jax.numpy as jnp

from compress_jax.core.arguments import number
from compress_jax.core.paths import flatten
from compress_jax.core.types import PyTree
from compress_jax.quantize._activations import range_rules
from compress_jax.quantize._activations.quantizer import (
    ActivationQuantizer,
    OperandState,
    activation_grid,
)
from compress_jax.quantize._learned.learned_step import (
    pact_round,
    positive,
    scale_from_bound,
    zero_point_from_sign,
)
from compress_jax.quantize._scales.rules import Scale, safe_scale
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace.reducers import MinMax, minmax


def pact(bits: int = 4, alpha: float | None = None) -> ActivationQuantizer:
    r"""Quantize activations to ``2**bits`` levels from 0 to a trained bound.

    .. math:: \hat x = s \, round(clip(x, 0, \alpha) / s), \qquad s = \alpha / (2^{bits} - 1)

    The derivatives are the paper's (`learned_step.pact_round`). Where calibration has values below
    zero the grid is that of signed integers: it reaches alpha above zero, and one step more below
    it. Keep alpha from growing with `pact_decay` in the loss.

    Args:
      bits: 2 to 8.
      alpha: the first bound; the paper takes 10. By default the largest magnitude in
        calibration.

    Returns:
      The quantizer; the state of an operand is ``{"alpha", "zero_point"}``.

    Raises:
      ArgumentError: if bits is not such a number, or alpha not above 0.

    Example:
      >>> import compress_jax as cj
      >>> fn, params = lambda w, x: jax.nn.relu(x) @ w["kernel"], {"kernel": jnp.eye(2)}
      >>> x = jnp.array([[-3.0, 0.5], [1.2, 3.0]])
      >>> clipping = cj.quantize.activations(fn, cj.quantize.pact(bits=2, alpha=1.5))
      >>> ranges = clipping.init(params, [x])
      >>> clipping.apply(params, ranges, x).tolist()
      [[0.0, 0.5], [1.0, 1.5]]
      >>> slopes = jax.grad(lambda ranges: clipping.apply(params, ranges, x).sum())(ranges)
      >>> float(slopes["kernel"]["input"]["alpha"])
      1.0

    References:
      Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018,
      arXiv:1805.06085.
    """
    grid = activation_grid(bits, False)
    alpha = None if alpha is None else number("alpha", alpha, 0, above=True)

    def bound_and_zero(state: OperandState) -> tuple[jax.Array, jax.Array]:
        zero_point = jax.lax.stop_gradient(state["zero_point"]).astype(jnp.uint8)
        return positive(state["alpha"]), zero_point

    def scale_fn(site: Site, index: int, x: jax.Array, state: OperandState) -> Scale:
        bound, zero_point = bound_and_zero(state)
        return scale_from_bound(grid, bound, zero_point), zero_point

    def quantize_fn(site: Site, index: int, x: jax.Array, state: OperandState) -> jax.Array:
        return pact_round(grid, x, *bound_and_zero(state))

    def ranges(site: Site, statistics: MinMax) -> OperandState:
        low, high = range_rules.extremes(statistics, grid)
        # Where calibration has only zeros the bound starts at 1, by `safe_scale`.
        first = safe_scale(jnp.maximum(-low, high)) if alpha is None else jnp.full_like(high, alpha)
        return {
            "alpha": jnp.where(jnp.isfinite(high - low), first, jnp.nan),
            "zero_point": zero_point_from_sign(grid, low),
        }

    call = f"pact(bits={bits}, alpha={alpha})"
    return ActivationQuantizer(
        grid, scale_fn, quantize_fn, minmax(), ranges, learned=("alpha",), call=call
    )


def pact_decay(tree: PyTree, strength: float) -> jax.Array:
    r"""Return :math:`\frac{\lambda}{2} \sum \alpha^2`, the penalty to add to the loss.

    Its gradient is L2 weight decay of the bounds. An optimizer can do the same:
    ``optax.add_decayed_weights(strength, mask)`` with the mask on the leaves called alpha.

    Args:
      tree: ranges, or params that hold them: all leaves called ``alpha`` count.
      strength: lambda; the paper takes that of the weights.

    Returns:
      float32 scalar; 0 if there are none.

    Example:
      >>> import compress_jax as cj
      >>> float(cj.quantize.pact_decay({"kernel": {"input": {"alpha": jnp.float32(10)}}}, 0.01))
      0.5
    """
    leaves = flatten(tree)[0].items()
    # By name, in any tree: ranges alone, or beside the params in a train state.
    squares = [jnp.square(x).sum() for path, x in leaves if path.split("/")[-1] == "alpha"]
    return jnp.float32(0.5 * strength) * jnp.stack([jnp.zeros(()), *squares]).sum()
