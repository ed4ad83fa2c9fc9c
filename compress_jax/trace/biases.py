"""Which parameter is added to what comes out of a site: its bias."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import JaxprEqn

from compress_jax.trace.interpret import Where, interpret
from compress_jax.trace.primitives import CASTS
from compress_jax.trace.site import Position, Site
from compress_jax.trace.traced import trace

MOVES = CASTS | {"broadcast_in_dim", "expand_dims", "reshape", "squeeze", "transpose"}


@dataclass(frozen=True)
class Origin:
    """A value that is a parameter, or what a site gave, but for moves and casts."""

    param: str | None = None
    site: str | None = None


NOTHING = Origin()


@dataclass
class _Biases:
    """The domain for the interpreter: a value is an `Origin`."""

    sites: dict[Position, Site]
    found: dict[str, str] = field(default_factory=dict)

    def constant(self, aval: Any, value: Any) -> Origin:
        return NOTHING

    def join(self, a: Origin, b: Origin) -> Origin:
        return a if a == b else NOTHING

    def same(self, a: Origin, b: Origin) -> bool:
        return a == b

    def unstack(self, a: Origin, loop: int) -> Origin:
        return a if a.param is not None else NOTHING

    def stack(self, a: Origin, length: int) -> Origin:
        return NOTHING

    def reshard(self, a: Origin, aval: Any) -> Origin:
        return NOTHING

    def equation(self, eqn: JaxprEqn, args: list[Origin], where: Where) -> Sequence[Origin]:
        if where.position in self.sites:
            return [Origin(site=self.sites[where.position].name)]
        name = eqn.primitive.name
        if name in MOVES:
            return [args[0]]
        if name in ("add", "add_any"):
            for one, other in (args, args[::-1]):
                if one.site is not None and other.param is not None:
                    self.found.setdefault(one.site, other.param)
        return [NOTHING] * len(eqn.outvars)


def biases(fn: Callable[..., Any], params: Any, *inputs: Any) -> dict[str, str]:
    """Return the parameter that is added to each site's result.

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays or ``ShapeDtypeStruct``.
      inputs: trees of the same.

    Returns:
      ``{name of a site: path of its bias}``.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((3, 4)), "shift": jnp.ones(4)}
      >>> biases(lambda p, x: x @ p["kernel"] + p["shift"], params, jnp.ones((2, 3)))
      {'kernel': 'shift'}
    """
    traced = trace(fn, params, *inputs)
    domain = _Biases(traced.sites)
    rest = [NOTHING] * (len(traced.jaxpr.jaxpr.invars) - len(traced.params))
    interpret(domain, traced.jaxpr, [*(Origin(param=path) for path in traced.params), *rest])
    return domain.found
