"""Change the operands of contractions, or replace contractions, inside any function."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from compress_jax.core.errors import ShapeError
from compress_jax.trace.evaluate import Hooks, Results
from compress_jax.trace.rebuild import bind
from compress_jax.trace.site import Site
from compress_jax.trace.transform import hooked

Rule = Callable[..., Any]


def rewrite(
    fn: Callable[..., Any],
    rule: Rule,
    where: str | tuple[str, ...] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Return ``fn`` with the contractions' operands, or whole contractions, replaced.

    Everything else is evaluated as it stands: gradients, vmap, jit, sharding, random numbers and custom derivative rules are
    those of the original, and with a rule that changes nothing values and gradients are the original's bit for bit under
    ``jit``. (Outside ``jit`` JAX runs either one operation at a time; where it fuses them differently, the last bit may
    differ.)

    Args:
      fn: a pure function of params and inputs.
      rule: ``(site, lhs, rhs) -> (lhs, rhs)`` of the same shapes and dtypes, or an array that replaces the contraction's
        result (`Site.contract` runs it on other operands). It is called when the function is traced, as under ``jit``.
      where: a glob, or several, over the names of sites; the other contractions stay. By default the rule sees all.
      given: a tree of arrays for each such site, by name: the scale of its activations, say. The rule is then called as
        ``rule(site, lhs, rhs, given[site.name])``. Inside loops every turn has its own: their leading axes are `Site.loops`,
        as `observe` returns them. They are differentiated like any array.

    Returns:
      ``(params, *inputs) -> out``.

    Raises:
      ShapeError: when called, if the rule returns another shape or dtype; it names the site.
      NoMatchError: when called, if no site's name matches ``where``, or nothing is given for one.

    Example:
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> halved = rewrite(lambda params, x: x @ params["kernel"], lambda site, lhs, rhs: (lhs, rhs / 2))
      >>> halved(params, jnp.ones((1, 2))).tolist()
      [[2.0, 3.0]]
    """

    def apply(site: Site, eqn: JaxprEqn, operands: list[Any], own: Any) -> Results:
        answer = rule(site, *operands[:2]) if given is None else rule(site, *operands[:2], own)
        if not isinstance(answer, tuple):
            return [_checked(site, "result", jnp.asarray(answer), site.out_shape, site.out_dtype)], {}
        if len(answer) != 2:
            raise ShapeError(f"the rule returned {len(answer)} values at site {site.name!r}; return (lhs, rhs) or an array")
        lhs = _checked(site, "lhs", answer[0], site.lhs_shape, site.lhs_dtype)
        rhs = _checked(site, "rhs", answer[1], site.rhs_shape, site.rhs_dtype)
        return bind(eqn, [lhs, rhs, *operands[2:]]), {}

    run = hooked(fn, lambda sites: Hooks(sites, apply), where, given)
    return lambda params, *inputs: run(params, *inputs)[0]


def _checked(site: Site, what: str, x: Any, shape: tuple[int, ...], dtype: str) -> Any:
    if x.shape == shape and str(x.dtype) == dtype:
        return jax.lax.convert_element_type(x, x.dtype)  # drops the weak type of Python's numbers
    raise ShapeError(
        f"the rule's {what} at site {site.name!r} is {x.dtype}{list(x.shape)}, but {dtype}{list(shape)} is needed there; "
        "cast it back, or return an array in the result's shape to replace the whole contraction"
    )
