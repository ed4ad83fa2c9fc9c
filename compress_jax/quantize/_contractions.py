"""Every contraction of a function with the formats of its operands, or the reason why it computes in floats."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from compress_jax.core.errors import NoMatchError
from compress_jax.core.packed import is_packed
from compress_jax.core.paths import flatten
from compress_jax.quantize.choice import How, Where
from compress_jax.quantize.decide import Step, decide
from compress_jax.trace.table import aligned, units
from compress_jax.trace.traced import trace


@dataclass(frozen=True)
class Contraction:
    """One contraction.

    Attributes:
      name: of its site.
      kind: ``"dot"``, ``"conv"`` or ``"ragged_dot"``.
      weight: the format of the parameter, such as ``"int4 channel"`` or ``"float32"``; empty if there is none.
      activation: the format of the activations, such as ``"int8 token dynamic"`` or ``"float32"``.
      compute: what is multiplied and added, such as ``"int8 x int8 -> int32"``.
      macs: multiply-accumulate operations of one call.
      reason: why it is not computed in integers; empty if it is.
    """

    name: str
    kind: str
    weight: str
    activation: str
    compute: str
    macs: int
    reason: str = ""


@dataclass(frozen=True)
class Contractions:
    """The table of all contractions; prints as text.

    Attributes:
      rows: one for each contraction, in program order.
    """

    rows: tuple[Contraction, ...]

    @property
    def integer(self) -> float:
        """The share of multiply-accumulate operations that are of integers, 0 to 1."""
        return sum(row.macs for row in self.rows if not row.reason) / max(sum(row.macs for row in self.rows), 1)

    def __getitem__(self, name: str) -> Contraction:
        """Return the row of a site by name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise NoMatchError(f"no contraction is named {name!r}; there are: {', '.join(row.name for row in self.rows)}")

    def __str__(self) -> str:
        """Return the table as aligned text."""
        head = ("contraction", "kind", "weight", "activation", "compute", "why in floats", "MACs")
        body = [(r.name, r.kind, r.weight, r.activation, r.compute, r.reason, units(r.macs)) for r in self.rows]
        total = ("total", "", "", "", f"{self.integer:.1%} in integers", "", units(sum(row.macs for row in self.rows)))
        return aligned([head, *body, total], left=6)


def contractions(
    fn: Callable[..., Any], params: Any, *inputs: Any, how: How | None = None, where: Where = None
) -> Contractions:
    """List every contraction with its operands' formats, as `integer` would compute it, or the reason why in floats.

    Args:
      fn: a pure function of params and inputs.
      params: packed params, or plain ones.
      inputs: trees of arrays or ``ShapeDtypeStruct``.
      how: the quantizers of activations, as in `activations`; None for none.
      where: as in `activations`.

    Returns:
      The table. ``print`` shows it.

    Raises:
      NoMatchError: if a glob matches no site.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.quantize import uniform
      >>> from compress_jax.quantize._dynamic import dynamic
      >>> c, params = uniform(bits=4, granularity="channel"), {"up": jnp.ones((2, 8)), "down": jnp.ones((8, 2))}
      >>> packed = c.pack(params, c.init(params))
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ (2 * p["down"])
      >>> for row in contractions(fn, packed, jnp.ones((4, 2)), how=dynamic()).rows:
      ...     print(row.compute, "|", row.reason or "nothing")
      int8 x int4 -> int32 | nothing
      float32, weights unpacked, activations rounded | the parameter is changed on its way (mul)
    """
    leaves, rebuild = flatten(params)
    traced = trace(fn, rebuild({path: shape_of(x) for path, x in leaves.items()}), *inputs)
    return tabulated(decide(traced, leaves, how, where)[1])


def shape_of(x: Any) -> Any:
    """Return a leaf as a shape, packed ones as the array they stand for; what is no array stays."""
    if is_packed(x):
        return jax.eval_shape(lambda: x.unpack())
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") and hasattr(x, "dtype") else x


def tabulated(steps: dict[str, Step]) -> Contractions:
    """Return the table of what was decided for each site."""
    return Contractions(
        tuple(
            Contraction(name, s.site.kind, s.weight, s.activation, s.compute, s.site.macs, s.reason)
            for name, s in steps.items()
        )
    )
