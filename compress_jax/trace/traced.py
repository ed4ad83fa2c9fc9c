"""Trace a function once for the shapes it is called with: its jaxpr, its sites and how to call it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from compress_jax.core.errors import CompressError, ShapeError
from compress_jax.core.paths import flatten, match
from compress_jax.trace.find import Found, find, name
from compress_jax.trace.pieces import Laid, Lost, pieces
from compress_jax.trace.site import Position, Site


@dataclass(frozen=True)
class Traced:
    """A function's trace for certain shapes.

    Attributes:
      jaxpr: its jaxpr; the inputs are the leaves of params, then those of the inputs.
      params: the leaves of params by path: arrays or shapes.
      labels: a name for each other input.
      out: the tree of what it returns, as shapes.
    """

    jaxpr: ClosedJaxpr
    params: dict[str, Any]
    labels: Sequence[str]
    out: Any

    @cached_property
    def found(self) -> Found:
        """What the walk over origins saw."""
        return find(self.jaxpr, self.params, self.labels)

    @cached_property
    def sites(self) -> dict[Position, Site]:
        """The sites by position, in program order."""
        laid = pieces(self.jaxpr, self.params)
        return {position: _with_pieces(site, laid[position]) for position, site in name(self.found).items()}

    def choose(self, where: str | tuple[str, ...] | None) -> dict[Position, Site]:
        """Return the sites whose names match a glob; matching none is an error that lists the names."""
        if where is None:
            return self.sites
        names = set(match(where, [site.name for site in self.sites.values()]))
        return {position: site for position, site in self.sites.items() if site.name in names}


def _with_pieces(site: Site, operands: Sequence[Any]) -> Site:
    """Return a site with the parts of parameters that lie in its operand, or why they cannot be told."""
    if site.operand is None:
        return site
    operand = operands[site.operand == "rhs"]
    if isinstance(operand, Laid):
        return replace(site, pieces=operand.pieces)
    return replace(site, lost=operand.reason if isinstance(operand, Lost) else "")


def trace(fn: Callable[..., Any], params: Any, *inputs: Any) -> Traced:
    """Trace ``fn(params, *inputs)`` without running it.

    Args:
      fn: a pure function. What is not an array (a flag, a module) is bound before: ``functools.partial``, a closure.
      params: tree of arrays or ``ShapeDtypeStruct``.
      inputs: trees of arrays or ``ShapeDtypeStruct``.

    Returns:
      The trace.

    Raises:
      ShapeError: if an argument has a leaf that is not an array, or the function does not take such arrays.
    """
    leaves = flatten(params)[0]
    labels = flatten({"inputs": list(inputs)})[0]
    for path, leaf in {**leaves, **labels}.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) and not isinstance(leaf, (bool, int, float, complex)):
            raise ShapeError(
                f"{path!r} is a {type(leaf).__name__}, not an array: bind what is not an array before, as in "
                "lambda params, x: fn(params, x, train=False)"
            )
    try:
        jaxpr, out = jax.make_jaxpr(fn, return_shape=True)(params, *inputs)
    except CompressError:
        raise
    except (TypeError, ValueError) as error:
        shapes = ", ".join(f"{path} {jax.typeof(leaf)}" for path, leaf in labels.items()) or "no inputs"
        raise ShapeError(f"the function cannot be traced on these params with {shapes}: {error}") from error
    return Traced(jaxpr, leaves, list(labels), out)
