"""Tell whether two jaxprs are one program, so that blocks that are alike are compiled once."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from compress_jax.core.types import Array

# How a call is differentiated, which does not enter its values.
DERIVATIVES = {
    "custom_jvp_call": ("jvp_jaxpr_fun", "jvp_jaxpr_thunk", "symbolic_zeros"),
    "custom_vjp_call": ("fwd_jaxpr_thunk", "bwd", "out_trees", "symbolic_zeros", "optimize_remat"),
    "custom_vjp_call_jaxpr": ("fwd_jaxpr_thunk", "bwd", "out_trees", "symbolic_zeros"),
}

ARRAYS = (jax.Array, np.ndarray, np.generic)


def same_program(a: ClosedJaxpr, b: ClosedJaxpr) -> bool:
    """Tell whether two jaxprs compute the same from the same inputs.

    Names of variables, derivative rules and places in the source do not count. Programs that are
    equal in another order of equations are told to be different.

    Args:
      a: one.
      b: the other.

    Returns:
      Whether they agree in equations, types, literals and constants.

    Example:
      >>> import jax.numpy as jnp
      >>> made = [jax.make_jaxpr(lambda x, n=n: x * n)(jnp.ones(2)) for n in (2.0, 2.0, 3.0)]
      >>> same_program(made[0], made[1]), same_program(made[0], made[2])
      (True, False)
    """
    if not _same_sequence(a.consts, b.consts):
        return False
    return _same_jaxpr(a.jaxpr, b.jaxpr)


def _same_jaxpr(a: Jaxpr, b: Jaxpr) -> bool:
    names: dict[Var, Var] = {}

    def bound(ones: Sequence[Var], others: Sequence[Var]) -> bool:
        """Take variables for the same from here on, if they have one type."""
        names.update(zip(ones, others, strict=False))
        return len(ones) == len(others) and all(
            one.aval == other.aval for one, other in zip(ones, others, strict=True)
        )

    def used(ones: Sequence[Var | Literal], others: Sequence[Var | Literal]) -> bool:
        return len(ones) == len(others) and all(map(one_used, ones, others))

    def one_used(one: Var | Literal, other: Var | Literal) -> bool:
        if isinstance(one, Literal) and isinstance(other, Literal):
            return one.aval == other.aval and _same(one.val, other.val)
        return isinstance(one, Var) and names.get(one) is other

    if not bound((*a.constvars, *a.invars), (*b.constvars, *b.invars)):
        return False
    if len(a.eqns) != len(b.eqns):
        return False
    for one, other in zip(a.eqns, b.eqns, strict=True):
        if not (_same_operation(one, other) and used(one.invars, other.invars)):
            return False
        if not bound(one.outvars, other.outvars):
            return False
    return used(a.outvars, b.outvars)


def _same_operation(a: JaxprEqn, b: JaxprEqn) -> bool:
    if a.primitive is not b.primitive or set(a.params) != set(b.params):
        return False
    ignored = DERIVATIVES.get(a.primitive.name, ())
    return all(_same(a.params[name], b.params[name]) for name in a.params if name not in ignored)


def _same(a: object, b: object) -> bool:
    """Tell whether two parameters of equations, literals or constants are the same."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, ClosedJaxpr) and isinstance(b, ClosedJaxpr):
        return same_program(a, b)
    if isinstance(a, Jaxpr) and isinstance(b, Jaxpr):
        return _same_jaxpr(a, b)
    if isinstance(a, ARRAYS) and isinstance(b, ARRAYS):
        return _same_array(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and _same_sequence(list(a.values()), list(b.values()))
    # A NamedTuple of dimension numbers is a tuple as well.
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return _same_sequence(a, b)
    # Functions are the same only if they are one.
    return not callable(a) and bool(a == b)


def _same_sequence(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(map(_same, a, b))


def _same_array(a: Array | np.generic, b: Array | np.generic) -> bool:
    if jax.typeof(a) != jax.typeof(b):
        return False
    if jnp.issubdtype(a.dtype, jax.dtypes.extended):
        return False
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()
