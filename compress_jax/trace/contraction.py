"""The equations that contract, and their axes in one form for products, convolutions and ragged products."""

from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from compress_jax.trace.site import Axes

KINDS = {
    "dot_general": "dot",
    "conv_general_dilated": "conv",
    "ragged_dot": "ragged_dot",
    "ragged_dot_general": "ragged_dot",
}


def kind(eqn: JaxprEqn) -> str | None:
    """Return ``"dot"``, ``"conv"`` or ``"ragged_dot"``, or None for an equation that does not contract.

    A product that sums over no axis (``einsum("bd,dn->bdn")``) multiplies entry by entry: it is no layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> kind(jax.make_jaxpr(jnp.outer)(jnp.ones(2), jnp.ones(3)).jaxpr.eqns[0]) is None
      True
    """
    found = KINDS.get(eqn.primitive.name)
    return None if found == "dot" and not eqn.params["dimension_numbers"][0][0] else found


def axes(eqn: JaxprEqn) -> tuple[tuple[Axes, Axes], tuple[Axes, Axes]]:
    """Return the contracting and the batch axes of a contraction, each of lhs and of rhs.

    Args:
      eqn: an equation that contracts.

    Returns:
      ``(contracting, batch)``. A convolution contracts the kernel's input channels and window, in the order of the
      kernel's own axes, with the image's channels; a ragged product contracts as a product does and has no batch axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> axes(jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 3)), jnp.ones((3, 4))).jaxpr.eqns[0])
      (((1,), (0,)), ((), ()))
    """
    if kind(eqn) == "conv":
        numbers = eqn.params["dimension_numbers"]
        return ((numbers.lhs_spec[1],), tuple(sorted(numbers.rhs_spec[1:]))), ((), ())
    numbers = eqn.params.get("ragged_dot_dimension_numbers")
    pairs = eqn.params["dimension_numbers"] if numbers is None else numbers.dot_dimension_numbers
    (left, right), (left_batch, right_batch) = pairs
    return (tuple(left), tuple(right)), (tuple(left_batch), tuple(right_batch))


def hidden(eqn: JaxprEqn) -> bool:
    """Tell whether an equation that nobody looks into (a Pallas kernel, a custom solver) contracts somewhere inside."""
    return any(_contracts(value) for value in eqn.params.values())


def _contracts(value: Any) -> bool:
    if isinstance(value, (Jaxpr, ClosedJaxpr)):  # one class in newer JAX
        return any(kind(eqn) is not None or hidden(eqn) for eqn in value.eqns)
    return isinstance(value, (tuple, list)) and any(map(_contracts, value))
