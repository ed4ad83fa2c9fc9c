"""PACT: activations clipped at a bound that is trained."""

from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.arguments import number
from compress_jax.core.paths import flatten
from compress_jax.core.types import PyTree
from compress_jax.quantize._activations import range_rules
from compress_jax.quantize._activations.quantizer import ActivationQuantizer, Own, Placed, checked
from compress_jax.quantize._learned.learned_step import bounded, positive, step_of
from compress_jax.quantize._learned.lsq import zero_by_sign
from compress_jax.quantize._scales.rules import usable
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace.reducers import minmax


def pact(bits: int = 4, alpha: float | None = None) -> ActivationQuantizer:
    r"""Quantize activations to ``2**bits`` levels from 0 to a trained bound.

    :math:`\hat x = s \, round(clip(x, 0, \alpha) / s)` with :math:`s = \alpha / (2^{bits} - 1)`; the derivatives are the
    paper's (`learned_step.bounded`). Where calibration saw values below zero the grid is that of
    signed integers: it reaches alpha above zero, and one step more below it. Keep alpha from
    growing with `pact_decay` in the loss.

    Args:
      bits: 2 to 8.
      alpha: where the bound starts; the paper takes 10. By default the largest magnitude in
        calibration.

    Returns:
      The quantizer; what belongs to an operand is ``{"alpha", "zero_point"}``.

    Raises:
      ArgumentError: if bits is not such a number, or alpha not above 0.

    Example:
      >>> from compress_jax.quantize._activations.activations import activations
      >>> fn, params = lambda w, x: jax.nn.relu(x) @ w["kernel"], {"kernel": jnp.eye(2)}
      >>> x = jnp.array([[-3.0, 0.5], [1.2, 3.0]])
      >>> clipping = activations(fn, pact(bits=2, alpha=1.5))
      >>> ranges = clipping.init(params, [x])
      >>> clipping.apply(params, ranges, x).tolist()
      [[0.0, 0.5], [1.0, 1.5]]
      >>> float(jax.grad(lambda ranges: clipping.apply(params, ranges, x).sum())(ranges)["kernel"]["input"]["alpha"])
      1.0

    References:
      Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018,
      arXiv:1805.06085.
    """
    grid = checked(bits, False)
    alpha = None if alpha is None else number("alpha", alpha, 0, above=True)

    def own_of(own: Own) -> tuple[jax.Array, jax.Array]:
        return positive(own["alpha"]), jax.lax.stop_gradient(own["zero_point"]).astype(jnp.uint8)

    def place(site: Site, index: int, x: jax.Array, own: Own) -> Placed:
        bound, zero_point = own_of(own)
        return step_of(grid, bound, zero_point), zero_point

    def see(site: Site, index: int, x: jax.Array, own: Own) -> jax.Array:
        return bounded(grid, x, *own_of(own))

    def ranges(site: Site, seen: Any) -> Own:
        low, high = range_rules.widest(seen, grid)
        first = usable(jnp.maximum(-low, high)) if alpha is None else jnp.full_like(high, alpha)
        return {
            "alpha": jnp.where(jnp.isfinite(high - low), first, jnp.nan),
            "zero_point": zero_by_sign(grid, low),
        }

    call = f"pact(bits={bits}, alpha={alpha})"
    return ActivationQuantizer(grid, place, see, minmax(), ranges, learned=("alpha",), call=call)


def pact_decay(tree: PyTree, strength: float) -> jax.Array:
    r"""Return :math:`\frac{\lambda}{2} \sum \alpha^2`, the penalty to add to the loss: its gradient is L2 weight decay.

    An optimizer can do the same: ``optax.add_decayed_weights(strength, mask)`` with the mask on the
    leaves called alpha.

    Args:
      tree: ranges, or params that hold them: whatever leaves are called ``alpha``.
      strength: lambda; the paper takes that of the weights.

    Returns:
      float32 scalar; 0 if there are none.

    Example:
      >>> float(pact_decay({"kernel": {"input": {"alpha": jnp.float32(10)}}}, 0.01))
      0.5
    """
    alphas = [leaf for path, leaf in flatten(tree)[0].items() if path.split("/")[-1] == "alpha"]
    return (
        jnp.float32(0.5 * strength)
        * jnp.stack([jnp.zeros(()), *(jnp.square(leaf).sum() for leaf in alphas)]).sum()
    )
