"""Which stored axes of a parameter lie in which axes of a value, exactly: through moves and out of contractions."""

import math
from typing import Any

from jax.extend.core import JaxprEqn

from compress_jax.trace import origin
from compress_jax.trace.origin import PARAMETER, Origin
from compress_jax.trace.polynomials import Dims
from compress_jax.trace.site import Shape

MOVES = ("transpose", "squeeze", "expand_dims", "broadcast_in_dim", "reshape", "rev")


def arranged(eqn: JaxprEqn, dims: Dims, stored: Shape) -> Dims | None:
    """Return where stored axes lie after an equation that moves entries.

    Args:
      eqn: the equation; of its operand.
      dims: for each axis of the operand, the stored axes in it, the slower first; ``~axis`` for one that is reversed.
      stored: shape of what is stored.

    Returns:
      The same of the result; None if it is no move, or leaves an axis with a part of a stored one.
    """
    before: Any = eqn.invars[0].aval
    after: Any = eqn.outvars[0].aval
    name, shape, out = eqn.primitive.name, before.shape, after.shape
    if name == "rev":
        return tuple(tuple(~axis for axis in axes) if i in eqn.params["dimensions"] else axes for i, axes in enumerate(dims))
    if name not in MOVES:
        return None
    moved = origin.MOVES[name](eqn.params, Origin(PARAMETER, (), dims), shape, out)["dims"]
    whole = all(not axes or math.prod(_size(stored, axis) for axis in axes) == n for axes, n in zip(moved, out, strict=True))
    return moved if whole else None


def output_axes(eqn: JaxprEqn, side: int, dims: Dims) -> Dims | None:
    """Return the stored axes of a contraction's operand that lie in each axis of its result.

    Args:
      eqn: a product or a convolution.
      side: which operand.
      dims: for each axis of that operand, the stored axes in it.

    Returns:
      ``()`` for axes of the result that come from the other operand or a window; None for what is not followed.
    """
    result: Any = eqn.outvars[0].aval
    operands: list[Any] = [var.aval for var in eqn.invars[:2]]
    out: list[tuple[int, ...]] = [()] * len(result.shape)
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        if side != 1 or eqn.params["batch_group_count"] != 1:
            return None
        out[numbers.out_spec[1]] = dims[numbers.rhs_spec[0]]
    elif eqn.primitive.name == "dot_general":
        contracting, batch = eqn.params["dimension_numbers"]
        ranks = [len(operand.shape) for operand in operands]
        free = [[a for a in range(n) if a not in (*contracting[s], *batch[s])] for s, n in enumerate(ranks)]
        places = [*enumerate(batch[side])]
        start = len(batch[0]) + (len(free[0]) if side else 0)
        places += [(start + i, axis) for i, axis in enumerate(free[side])]
        for place, axis in places:
            out[place] = dims[axis]
    else:
        return None
    return None if any(axis < 0 for axes in out for axis in axes) else tuple(out)


def _size(stored: Any, axis: int) -> int:
    return stored[axis if axis >= 0 else ~axis]
