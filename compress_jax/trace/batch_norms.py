"""Batch norms that follow a site directly: recognised by what is computed, not by the names of modules."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import JaxprEqn

from compress_jax.trace.biases import MOVES
from compress_jax.trace.interpret import Where, interpret
from compress_jax.trace.site import Position, Site
from compress_jax.trace.traced import trace


@dataclass(frozen=True)
class BatchNorm:
    r"""What follows a site, :math:`(y + c - \mu) / \sqrt{v + \epsilon} \cdot \gamma + \beta`, by the paths of parameters.

    Attributes:
      site: name of the site that gives y.
      mean: path of the mean.
      variance: path of the variance.
      epsilon: the number that is added to it.
      scale: path of the scale, if there is one.
      bias: path of the bias, if there is one.
      before: path of a bias of the site itself, c.
    """

    site: str
    mean: str
    variance: str
    epsilon: float
    scale: str | None = None
    bias: str | None = None
    before: str | None = None


@dataclass(frozen=True)
class _Value:
    """What is known of a value.

    Attributes:
      kind: ``"param"``, ``"number"``, ``"spread"`` (variance and epsilon), ``"root"`` and ``"inverse"`` of it, perhaps times
        a scale, ``"out"`` of a site, ``"centred"``, ``"normed"``, or nothing.
      norm: the parts of the batch norm so far.
      number: the value of a number, the path of a parameter.
      key: where the norm was noted.
    """

    kind: str = ""
    norm: BatchNorm = BatchNorm("", "", "", 0.0)
    number: Any = None
    key: Position = ()


NOTHING = _Value()


@dataclass
class _Norms:
    """The domain for the interpreter."""

    sites: dict[Position, Site]
    found: dict[Position, BatchNorm] = field(default_factory=dict)
    elsewhere: set[str] = field(default_factory=set)

    def constant(self, aval: Any, value: Any) -> _Value:
        if not jnp.issubdtype(aval.dtype, jnp.floating) or isinstance(value, Tracer):
            return NOTHING
        entries = np.unique(np.asarray(value, np.float64))
        return _Value("number", number=float(entries[0])) if len(entries) == 1 else NOTHING

    def join(self, a: _Value, b: _Value) -> _Value:
        return a if a == b else self.lost([a, b])

    def same(self, a: _Value, b: _Value) -> bool:
        return a == b

    def unstack(self, a: _Value, loop: int) -> _Value:
        return a if a.kind == "param" else self.lost([a])

    def stack(self, a: _Value, length: int) -> _Value:
        return a if a.kind == "normed" else self.lost([a])

    def reshard(self, a: _Value, aval: Any) -> _Value:
        return self.lost([a])

    def lost(self, args: Sequence[_Value]) -> _Value:
        """Note that what a site gives is used in another way."""
        self.elsewhere |= {arg.norm.site for arg in args if arg.kind in ("out", "centred")}
        return NOTHING

    def equation(self, eqn: JaxprEqn, args: list[_Value], where: Where) -> Sequence[_Value]:
        name, position = eqn.primitive.name, where.position
        if position in self.sites:
            self.lost(args)
            return [_Value("out", BatchNorm(self.sites[position].name, "", "", 0.0))]
        if name in MOVES or name in ("sqrt", "rsqrt"):
            return [self._one(name, args[0])]
        if name in ("add", "sub", "mul", "div") and len(args) == 2:
            for one, other in (args, args[::-1]) if name in ("add", "mul") else (args,):
                if (made := self._two(name, one, other, position)) is not None:
                    return [made]
        self.lost(args)
        return [NOTHING] * len(eqn.outvars)

    def _one(self, name: str, value: _Value) -> _Value:
        if name in MOVES:
            return value
        if value.kind != "spread":
            return self.lost([value])
        return replace(value, kind="root" if name == "sqrt" else "inverse")

    def _two(self, name: str, one: _Value, other: _Value, position: Position) -> _Value | None:
        norm, path = one.norm, other.number
        match name, one.kind, other.kind:
            case "add", "out", "param" if norm.before is None:
                return replace(one, norm=replace(norm, before=path))
            case "sub", "out", "param":
                return replace(one, kind="centred", norm=replace(norm, mean=path))
            case "add", "param", "number":
                return _Value("spread", BatchNorm("", "", one.number, other.number))
            case "mul", "inverse", "param" if norm.scale is None:
                return replace(one, norm=replace(norm, scale=path))
            case ("mul", "centred", "inverse") | ("div", "centred", "root"):
                norm = replace(other.norm, site=norm.site, mean=norm.mean, before=norm.before)
                self.found[position] = norm
                return _Value("normed", norm, key=position)
            case "mul", "normed", "param" if norm.scale is None and norm.bias is None:
                self.found[one.key] = replace(norm, scale=path)
                return replace(one, norm=self.found[one.key])
            case "add", "normed", "param" if norm.bias is None:
                self.found[one.key] = replace(norm, bias=path)
                return NOTHING
        return None


def batch_norms(fn: Callable[..., Any], params: Any, *inputs: Any) -> dict[str, BatchNorm]:
    """Return the batch norms, with statistics that are parameters, to which alone a site's result goes.

    Args:
      fn: a pure function of ``(params, *inputs)``, in evaluation mode.
      params: tree of arrays or ``ShapeDtypeStruct``.
      inputs: trees of the same.

    Returns:
      ``{name of a site: its batch norm}``.

    Example:
      >>> p = {name: jnp.ones(2) for name in ("mean", "var", "gain")} | {"kernel": jnp.ones((3, 2))}
      >>> def fn(p, x):
      ...     return (x @ p["kernel"] - p["mean"]) / jnp.sqrt(p["var"] + 0.25) * p["gain"]
      >>> batch_norms(fn, p, jnp.ones((1, 3)))["kernel"]
      BatchNorm(site='kernel', mean='mean', variance='var', epsilon=0.25, scale='gain', bias=None, before=None)
    """
    traced = trace(fn, params, *inputs)
    domain = _Norms(traced.sites)
    rest = [NOTHING] * (len(traced.jaxpr.jaxpr.invars) - len(traced.params))
    results = interpret(domain, traced.jaxpr, [*(_Value("param", number=path) for path in traced.params), *rest])
    domain.lost(results)
    return {norm.site: norm for norm in domain.found.values() if norm.site not in domain.elsewhere}
