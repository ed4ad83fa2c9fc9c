"""Count the operations of a jaxpr that are not contractions: element by element, reductions, windows."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn

from compress_jax.trace import contraction
from compress_jax.trace import primitives as p
from compress_jax.trace.nested import Branches, Call, Scan, While, nested

FREE = (  # they move, cut, name or make numbers, and compute none
    p.PASSED | p.MOVES | p.JOINS | p.INDEXED | p.NUMBERS | p.SILENT | p.CONTRACTIONS | {"dynamic_update_slice", "scatter"}
) | frozenset(
    "all_gather all_gather_invariant all_gather_reduced all_to_all bitcast_convert_type ppermute ragged_all_to_all"
    " random_clone random_seed random_unwrap random_wrap".split()
)
TRANSCENDENTAL = frozenset(  # one transcendental function an element of the result
    "acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf erf_inv erfc exp expm1 lgamma"
    " log log1p pow rsqrt sin sinh sqrt tan tanh".split()
)
BOTH = {"logistic": 3, "exp2": 1, "log2": 1, "cumlogsumexp": 1}  # a function and so many operations: 1 / (1 + exp(-x))
EACH = p.CASTS | p.SUMS | p.SIGNS | p.COMPARISONS | p.ARITHMETIC | p.COLLECTIVES | p.RUNNING | {"reduce_scatter"}
EACH = EACH - FREE - BOTH.keys()  # one operation an element of the result
SCATTERS = p.UPDATES - FREE


@dataclass
class Operations:
    """Operations of a computation besides its contractions.

    Attributes:
      flops: one for each result of an operation on elements, and each element that a reduction takes in.
      transcendentals: one for each result of exp, log, tanh, rsqrt, ...
      uncounted: primitives whose operations are not known here, and how often they run.
      loops: while loops met: they are counted for one turn.
      choices: choices of branches met: every branch is counted.
      products: multiplications of products that sum over no axis (``einsum("bd,dn->bdn")``), of which there is no site.
    """

    flops: int = 0
    transcendentals: int = 0
    uncounted: Counter[str] = field(default_factory=Counter)
    loops: int = 0
    choices: int = 0
    products: int = 0


def operations(jaxpr: Jaxpr) -> Operations:
    """Count the operations of a jaxpr, those nested in it as often as they run.

    They are counted as XLA's cost analysis does: an addition, a comparison, a cast is one operation for each element of its
    result; a sum over ``n`` elements is ``n - 1``; a window of ``w`` elements is ``w - 1``; moving numbers is free.

    Args:
      jaxpr: the computation.

    Returns:
      The counts.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> jaxpr = jax.make_jaxpr(lambda x: jnp.exp(x).sum() + 1)(jnp.ones((2, 3))).jaxpr
      >>> counted = operations(jaxpr)
      >>> counted.flops, counted.transcendentals
      (6, 6)
    """
    total = Operations()
    _walk(jaxpr, 1, total)
    return total


def _walk(jaxpr: Jaxpr, times: int, total: Operations) -> None:
    for eqn in jaxpr.eqns:
        match nested(eqn):
            case Call(body, shards):
                _walk(body.jaxpr, times * (shards or 1), total)
            case Scan() as scan:
                _walk(scan.body.jaxpr, times * scan.length, total)
            case While(condition, body):
                total.loops += 1
                _walk(condition.jaxpr, times, total)
                _walk(body.jaxpr, times, total)
            case Branches(bodies):
                total.choices += 1
                for body in bodies:
                    _walk(body.jaxpr, times, total)
            case _:
                _count(eqn, times, total)


def _count(eqn: JaxprEqn, times: int, total: Operations) -> None:
    name = eqn.primitive.name
    if name == "dot_general" and contraction.kind(eqn) is None:
        total.products += times * _out(eqn)
    if name in FREE and name not in RULES:
        return
    rule, function = RULES.get(name) or _kind(name), name in TRANSCENDENTAL or name in BOTH
    if rule is None and not function:
        total.uncounted[name] += times
        return
    total.flops += times * rule(eqn) if rule else 0
    total.transcendentals += times * _out(eqn) if function else 0


def _kind(name: str) -> Callable[[JaxprEqn], int] | None:
    """Return the rule of a family of primitives."""
    if name in EACH:
        return _out
    if name.startswith("reduce_window") or name == "select_and_gather_add":
        return _window
    return _reduced if name.startswith(("reduce_", "argm")) or name == "reduce" else None


def _out(eqn: JaxprEqn) -> int:
    return math.prod(_shape(eqn.outvars[0]))


def _reduced(eqn: JaxprEqn) -> int:
    """All elements but the first of each result."""
    return max(0, math.prod(_shape(eqn.invars[0])) - _out(eqn))


def _window(eqn: JaxprEqn) -> int:
    return _out(eqn) * (math.prod(eqn.params["window_dimensions"]) - 1)


def _spread(eqn: JaxprEqn) -> int:
    """The gradient of a window's maximum: the choice in each window, then an addition."""
    return math.prod(_shape(eqn.invars[0])) * math.prod(eqn.params["window_dimensions"])


def _power(eqn: JaxprEqn) -> int:
    """Multiplications by repeated squaring, and a division if the exponent is negative."""
    exponent = abs(eqn.params["y"])
    products = exponent.bit_length() + exponent.bit_count() - 2 if exponent else 0
    return _out(eqn) * (products + (eqn.params["y"] < 0))


def _reduced_precision(eqn: JaxprEqn) -> int:
    """Nothing is rounded where as many digits are asked for as there are."""
    info = jnp.finfo(getattr(eqn.invars[0].aval, "dtype", jnp.float32))
    return 0 if eqn.params["exponent_bits"] >= info.nexp and eqn.params["mantissa_bits"] >= info.nmant else _out(eqn)


def _convert(eqn: JaxprEqn) -> int:
    """A cast to the same dtype only forgets that a number was a Python number."""
    before, after = (getattr(var.aval, "dtype", None) for var in (eqn.invars[0], eqn.outvars[0]))
    return _out(eqn) if before != after else 0


RULES: dict[str, Callable[[JaxprEqn], int]] = {
    "integer_pow": _power,
    "convert_element_type": _convert,
    "reduce_precision": _reduced_precision,
    "select_and_scatter_add": _spread,
    **dict.fromkeys(SCATTERS, lambda eqn: math.prod(_shape(eqn.invars[2]))),
    **{name: (lambda eqn, each=each: each * _out(eqn)) for name, each in BOTH.items()},
}


def _shape(var: Any) -> tuple[int, ...]:
    return getattr(var.aval, "shape", ())
