"""Change the operands of contractions, or replace contractions, inside any function."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun

from compress_jax.core.errors import NoMatchError, ShapeError
from compress_jax.core.paths import Patterns
from compress_jax.core.types import Array, ModelFn, Params, PyTree, Shape
from compress_jax.trace._jaxpr.evaluate import Hooks, Statistics, Values, bind, evaluate
from compress_jax.trace._jaxpr.find_sites import trace
from compress_jax.trace._jaxpr.site import Position, Site

CACHED = 16  # shapes of arguments kept for calls outside jit


def hooked(
    fn: ModelFn,
    hooks: Callable[[dict[Position, Site]], Hooks],
    where: Patterns | None,
    given: Mapping[str, PyTree] | None = None,
) -> Callable[..., tuple[PyTree, Statistics]]:
    """Return ``(params, *inputs) -> (out, statistics)``: ``fn`` with hooks at the chosen sites.

    Args:
      fn: a pure function of params and inputs.
      hooks: makes the hooks of the chosen sites.
      where: a glob, or several, over the names of sites; None chooses all.
      given: a tree for each chosen site by name, an argument of its hook.

    Returns:
      The function. Inside ``jit`` or another transformation it is part of the trace; outside, it is
      traced once for each shape of arguments, like a function under ``jit``.
    """
    # A jaxpr is a key by identity: JAX returns the same one for the same `fn` and shapes.
    cache: dict[ClosedJaxpr, tuple[ClosedJaxpr, PyTree]] = {}

    def run(params: Params, *inputs: PyTree) -> tuple[PyTree, Statistics]:
        traced = trace(fn, params, *inputs)
        flat = jax.tree.leaves((params, inputs))
        tree = jax.tree.structure(traced.out)

        def with_hooks(*flat: jax.Array) -> tuple[PyTree, Statistics]:
            chosen = traced.choose(where)
            own = _by_position(chosen, given)
            results, statistics = evaluate(traced.jaxpr, flat, hooks(chosen), own)
            return jax.tree.unflatten(tree, results), statistics

        # Under jit or another transformation: part of the surrounding trace.
        if any(isinstance(x, Tracer) for x in (*flat, *traced.jaxpr.consts)):
            return with_hooks(*flat)
        cached = cache.get(traced.jaxpr)
        made, shape = cached or jax.make_jaxpr(with_hooks, return_shape=True)(*flat)
        # A tracer that a hook captured belongs to a trace that ends: its jaxpr must not be kept.
        if not any(isinstance(x, Tracer) for x in made.consts):
            if len(cache) >= CACHED:
                cache.clear()
            cache[traced.jaxpr] = (made, shape)
        return jax.tree.unflatten(jax.tree.structure(shape), jaxpr_as_fun(made)(*flat))

    return run


def _by_position(
    chosen: dict[Position, Site], given: Mapping[str, PyTree] | None
) -> dict[Position, PyTree]:
    """Return the trees that are given by position, after a check of their leading axes."""
    if given is None:
        return {}
    for site in chosen.values():
        if site.name not in given:
            raise NoMatchError(
                f"nothing is given for site {site.name!r}, only for: {', '.join(given) or 'none'}"
            )
        for leaf in jax.tree.leaves(given[site.name]):
            if jnp.shape(leaf)[: len(site.loops)] != site.loops:
                raise ShapeError(
                    f"what is given for site {site.name!r} has shape {jnp.shape(leaf)}, but the "
                    f"loops around the site need leading axes {site.loops}"
                )
    return {position: given[site.name] for position, site in chosen.items()}


Rule = Callable[..., Array | tuple[Array, Array]]
"""``(site, lhs, rhs) -> (lhs, rhs)``, or ``-> result``; see `rewrite`."""


def rewrite(
    fn: ModelFn,
    rule: Rule,
    where: Patterns | None = None,
    given: Mapping[str, PyTree] | None = None,
) -> ModelFn:
    """Return ``fn`` with the contractions' operands, or whole contractions, replaced.

    Everything else is evaluated as it stands: gradients, vmap, jit, sharding, random numbers and
    custom derivative rules are those of the original, and with a rule that changes nothing values
    and gradients are the original's bit for bit under ``jit``. (Outside ``jit`` JAX runs either one
    operation at a time; where it fuses them differently, the last bit may differ.)

    Args:
      fn: a pure function of params and inputs.
      rule: ``(site, lhs, rhs) -> (lhs, rhs)`` of the same shapes and dtypes, or an array that
        replaces the contraction's result (`Site.contract` runs it on other operands). It is called
        when the function is traced, as under ``jit``.
      where: a glob, or several, over the names of sites; the other contractions stay. By default
        the rule is called for all.
      given: a tree of arrays for each such site, by name: the scale of its activations, say. The
        rule is then called as ``rule(site, lhs, rhs, given[site.name])``. Inside loops every
        iteration has its own: their leading axes are `Site.loops`, as `observe` returns them. They
        are differentiated like any array.

    Returns:
      ``(params, *inputs) -> out``.

    Raises:
      ShapeError: when called, if the rule returns another shape or dtype; it names the site.
      NoMatchError: when called, if no site's name matches ``where``, or nothing is given for one.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> halved = cj.trace.rewrite(fn, lambda site, lhs, rhs: (lhs, rhs / 2))
      >>> halved(params, jnp.ones((1, 2))).tolist()
      [[2.0, 3.0]]
    """

    def apply(site: Site, eqn: JaxprEqn, operands: list[jax.Array], own: PyTree) -> Values:
        answer = rule(site, *operands[:2]) if given is None else rule(site, *operands[:2], own)
        if not isinstance(answer, tuple):
            result = jnp.asarray(answer)
            return [_checked(site, "result", result, site.out_shape, site.out_dtype)], {}
        if len(answer) != 2:
            raise ShapeError(
                f"the rule returned {len(answer)} values at site {site.name!r}; return (lhs, rhs) "
                "or an array"
            )
        lhs = _checked(site, "lhs", answer[0], site.lhs_shape, site.lhs_dtype)
        rhs = _checked(site, "rhs", answer[1], site.rhs_shape, site.rhs_dtype)
        return bind(eqn, [lhs, rhs, *operands[2:]]), {}  # a ragged product's group sizes stay

    run = hooked(fn, lambda sites: Hooks(sites, apply), where, given)
    return lambda params, *inputs: run(params, *inputs)[0]


def _checked(site: Site, what: str, x: Array, shape: Shape, dtype: str) -> jax.Array:
    if x.shape == shape and str(x.dtype) == dtype:
        return jax.lax.convert_element_type(x, x.dtype)  # drops the weak type of Python's numbers
    raise ShapeError(
        f"the rule's {what} at site {site.name!r} is {x.dtype}{list(x.shape)}, but "
        f"{dtype}{list(shape)} is needed there; cast it back, or return an array in the result's "
        "shape to replace the whole contraction"
    )
