"""Scales and shifts of what sites return, as polynomials of the parameters.

`walk` follows the result of every site through elementwise scales and shifts, and notes how every
such value and every parameter is used: what batch norms can be folded into which kernels.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from compress_jax.core.types import Aval
from compress_jax.trace._jaxpr import origin
from compress_jax.trace._jaxpr.find_sites import Traced
from compress_jax.trace._jaxpr.interpret import ConstantValue, Where, interpret
from compress_jax.trace._jaxpr.origin import PARAMETER, Origin
from compress_jax.trace._jaxpr.primitives import CASTS, PASS_THROUGH
from compress_jax.trace._jaxpr.site import Position, Shape, Site
from compress_jax.trace._symmetry import polynomials as poly
from compress_jax.trace._symmetry.polynomials import (
    Atom,
    Dims,
    Polynomial,
    combined,
    itself,
    laid_out,
    lifted,
    scalar,
    scaled_and_shifted,
    sliced,
    uniform_result,
)

MOVES = ("transpose", "squeeze", "expand_dims", "broadcast_in_dim", "reshape", "rev")


def arranged(eqn: JaxprEqn, dims: Dims, stored: Shape) -> Dims | None:
    """Return the stored axes in each axis of the result of an equation that moves entries.

    Args:
      eqn: the equation.
      dims: for each axis of the operand, the stored axes in it, the slower first; ``~axis`` for one
        that is reversed.
      stored: shape of the stored array.

    Returns:
      The same for the result; None if the equation is no move, or splits a stored axis.
    """
    before: Aval = eqn.invars[0].aval
    after: Aval = eqn.outvars[0].aval
    name = eqn.primitive.name
    if name == "rev":
        reversed_dims = list(dims)
        for i in eqn.params["dimensions"]:
            reversed_dims[i] = tuple(~axis for axis in dims[i])
        return tuple(reversed_dims)
    if name not in MOVES:
        return None
    # The same rule that follows parameters to sites; here the "parameter" is the stored array.
    start = Origin(PARAMETER, (), dims)
    moved = origin.MOVE_RULES[name](eqn.params, start, before.shape, after.shape).dims
    if moved is None:
        return None
    # A stored axis that a reshape splits is longer than the axis of the result that it lies in.
    for axes, n in zip(moved, after.shape, strict=True):
        if axes and math.prod(_size(stored, axis) for axis in axes) != n:
            return None
    return moved


def output_axes(eqn: JaxprEqn, side: int, dims: Dims) -> Dims | None:
    """Return the stored axes of a contraction's operand in each axis of its result.

    Args:
      eqn: a product or a convolution.
      side: which operand.
      dims: for each axis of that operand, the stored axes in it.

    Returns:
      For each axis of the result the stored axes, ``()`` for axes of the other operand or a window;
      None for contractions that are not followed.
    """
    result: Aval = eqn.outvars[0].aval
    operands: list[Aval] = [var.aval for var in eqn.invars[:2]]
    out: list[tuple[int, ...]] = [()] * len(result.shape)
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        # Only a kernel as the second operand has an axis of output channels.
        if side != 1 or eqn.params["batch_group_count"] != 1:
            return None
        out[numbers.out_spec[1]] = dims[numbers.rhs_spec[0]]
    elif eqn.primitive.name == "dot_general":
        contracting, batch = eqn.params["dimension_numbers"]
        free = []  # by operand, the axes that are neither contracted nor batch axes
        for s, operand in enumerate(operands):
            gone = (*contracting[s], *batch[s])
            free.append([axis for axis in range(len(operand.shape)) if axis not in gone])
        # The result has the batch axes, then the free axes of the left operand, then of the right.
        for i, axis in enumerate(batch[side]):
            out[i] = dims[axis]
        start = len(batch[0]) + (len(free[0]) if side else 0)
        for i, axis in enumerate(free[side]):
            out[start + i] = dims[axis]
    else:
        return None
    # An axis is written ~axis where it is reversed: its scales would have to be reversed as well.
    reversed_axes = any(axis < 0 for axis in itertools.chain.from_iterable(out))
    return None if reversed_axes else tuple(out)


def _size(stored: Shape, axis: int) -> int:
    return stored[axis if axis >= 0 else ~axis]


SAME = CASTS | PASS_THROUGH
UNARY = {"sqrt": 0.5, "rsqrt": -0.5, "square": 2.0}
BINARY = ("add", "add_any", "sub", "mul", "div", "max", "pow")
LARGEST = 2**16  # entries of a captured array that is looked into


@dataclass(frozen=True)
class Known:
    """A value that depends on parameters and constants only.

    Attributes:
      poly: the polynomial that it is; None if that is not known.
      paths: the parameters it depends on.
      value: the number that all its entries have, if that is known.
    """

    poly: Polynomial | None
    paths: frozenset[str]
    value: float | None = None


@dataclass(frozen=True)
class Mapped:
    r"""The result y of a site, scaled and shifted: :math:`y a + b`, polynomials of parameters.

    Attributes:
      key: position of the equation that returns it.
      site: position of the site.
      scale: a.
      shift: b.
      dims: for each axis, the stored axes of the site's parameter that it runs along.
    """

    key: Position
    site: Position
    scale: Polynomial
    shift: Polynomial
    dims: Dims


@dataclass(frozen=True)
class Use:
    """A use of a value.

    Attributes:
      position: of the equation that uses it.
      name: of its primitive.
      step: whether it is a step of a scale and shift.
    """

    position: Position
    name: str
    step: bool = False


class Other:
    """A value of which nothing is known, such as data; `OTHER` is the only one."""


OTHER = Other()
Value = Known | Mapped | Other


@dataclass
class Walk:
    """The domain for the interpreter, and what it has found.

    Attributes:
      traced: the function.
      values: mapped values by the position that computes them, each with its operand's position.
      kernels: by site, its parameter, where the site takes it up to moves and factors.
      goes: the uses of each mapped value.
      uses: the uses of each parameter and of values computed from it.
      arrays: captured constants, by a name that no parameter has.
      fixed: parameters whose present values were read (such as a step counter) and must not change.
    """

    traced: Traced
    values: dict[Position, tuple[Mapped, Position | None]] = field(default_factory=dict)
    kernels: dict[Position, Atom] = field(default_factory=dict)
    goes: dict[Position, set[Use]] = field(default_factory=dict)
    uses: dict[str, set[Use]] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)

    def constant(self, aval: Aval, value: ConstantValue) -> Value:
        """Return a number, or a captured array of them."""
        entries = None if math.prod(getattr(aval, "shape", ())) > LARGEST else value.real
        if entries is None:
            return Known(None, frozenset())
        array = entries.astype(np.float64)  # the dtype that folding computes in
        if array.size and (array == array.reshape(-1)[0]).all():
            first = float(array.reshape(-1)[0])
            return Known(poly.number(first), frozenset(), first)
        # The same array captured twice has the same name, so that factors of it cancel.
        name = f"\0{hash((array.shape, array.tobytes()))}"
        self.arrays[name] = array
        return Known(poly.parameter(name, array.ndim), frozenset())

    def join(self, a: Value, b: Value) -> Value:
        """Return the value if both are equal; else nothing is known of it."""
        return a if a == b else self.lost([a, b], Use((), "a branch or a loop"))

    def same(self, a: Value, b: Value) -> bool:
        """Return whether two values are equal."""
        return a == b

    def unstack(self, a: Value, loop: int) -> Value:
        """Return one layer of a parameter that is stacked for a loop."""
        if not isinstance(a, Known):
            return self.lost([a], Use((), "a loop"))
        # Every iteration has a layer of its own; its atoms remember the loop.
        return replace(a, poly=a.poly and a.poly.moved(lambda atom: sliced(atom, loop)))

    def stack(self, a: Value, length: int) -> Value:
        """Return that nothing is known of the slices that a loop stacks."""
        return self.lost([a], Use((), "a loop"))

    def reshard(self, a: Value, aval: Aval) -> Value:
        """Return that nothing is known of devices' shards."""
        return self.lost([a], Use((), "shard_map"))

    def lost(self, args: Sequence[Value], use: Use) -> Value:
        """Note a use of values; of its result nothing is known."""
        for arg in args:
            if isinstance(arg, Mapped):
                self.goes.setdefault(arg.key, set()).add(use)
            if isinstance(arg, Known):
                self._used(arg.paths, use)
        return OTHER

    def decides(self, args: Sequence[Value]) -> None:
        """Note values that choose a branch or end a loop."""
        self.lost(args, Use((), "a choice of branches"))

    def equation(self, eqn: JaxprEqn, args: list[Value], where: Where) -> Sequence[Value]:
        """Return the results of an equation, and note how it uses mapped values and parameters."""
        position = where.position
        name = eqn.primitive.name
        self.values.pop(position, None)  # from an earlier iteration, in which more was known
        if position in self.traced.sites:
            return [self._site(eqn, args, self.traced.sites[position])]
        known = [arg for arg in args if isinstance(arg, Known)]
        if len(known) == len(args):
            return self._known(eqn, known)
        made = self._mapped(eqn, args, position)
        if made is None:
            self.lost(args, Use(position, name))
            return [OTHER] * len(eqn.outvars)
        self.values[position] = (made, next(arg.key for arg in args if isinstance(arg, Mapped)))
        # A step of a scale and shift may be folded away; any other use of its operands may not.
        for arg in args:
            self.lost([arg], Use(position, name, step=True))
        return [made]

    def _site(self, eqn: JaxprEqn, args: list[Value], site: Site) -> Value:
        side = 0 if site.operand == "lhs" else 1
        use = Use(site.position, f"site {site.name!r}")
        self.lost(args, use)
        kernel = args[side]
        data = args[1 - side]
        # The kernel may be scaled only where it enters as it is stored, and multiplies data.
        atom = None
        if site.param is not None and isinstance(kernel, Known) and not isinstance(data, Known):
            atom = itself(kernel.poly, site.param)
        dims = None if atom is None else output_axes(eqn, side, atom.dims)
        if atom is None or dims is None:
            self.kernels.pop(site.position, None)
            return OTHER
        self.kernels[site.position] = atom
        made = Mapped(site.position, site.position, poly.number(1), poly.number(0), dims)  # y 1 + 0
        self.values[site.position] = (made, None)
        return made

    def _known(self, eqn: JaxprEqn, args: list[Known]) -> Sequence[Known]:
        paths = frozenset().union(*(arg.paths for arg in args))
        polys = [arg.poly for arg in args if arg.poly is not None]
        out = eqn.outvars
        found = None
        if len(out) == 1 and polys and len(polys) == len(args):
            found = self._computed(eqn, eqn.primitive.name, polys)
        if found is not None:
            return [Known(found, paths, poly.as_number(found))]
        # What no polynomial expresses (of a step counter, say) is computed from the present values,
        # which then must stay.
        value = uniform_result(eqn, [arg.value for arg in args])
        if value is not None:
            self.fixed |= paths
            return [Known(poly.number(value), paths, value)]
        return [Known(None, paths)] * len(out)

    def _computed(self, eqn: JaxprEqn, name: str, polys: list[Polynomial]) -> Polynomial | None:
        if not _is_float(eqn.outvars[0].aval):  # integers divide with a remainder
            return None
        if name in UNARY:
            return poly.power(polys[0], UNARY[name])
        if name == "integer_pow":
            return poly.power(polys[0], eqn.params["y"])
        if name == "neg":
            return poly.multiply(polys[0], poly.number(-1))
        if name == "exp":
            return poly.stepped(polys[0], "exp")
        if name in BINARY:
            aval: Aval = eqn.outvars[0].aval
            one = lifted(polys[0], len(aval.shape))
            other = lifted(polys[1], len(aval.shape))
            if one is None or other is None:
                return None
            return combined(name, one, other)
        return self._moved(eqn, polys[0])

    def _moved(self, eqn: JaxprEqn, p: Polynomial) -> Polynomial | None:
        if eqn.primitive.name in SAME:
            return p
        if eqn.primitive.name not in MOVES:
            return None
        return p.moved(
            lambda atom: laid_out(atom, arranged(eqn, atom.dims, self._shape(atom.path)))
        )

    def _shape(self, path: str) -> Shape:
        return (self.arrays[path] if path in self.arrays else self.traced.params[path]).shape

    def _mapped(self, eqn: JaxprEqn, args: list[Value], position: Position) -> Mapped | None:
        mapped = [arg for arg in args if isinstance(arg, Mapped)]
        name = eqn.primitive.name
        aval: Aval = eqn.outvars[0].aval
        # Of two mapped values (a residual sum) the result is no scale and shift of either.
        if len(mapped) != 1 or len(eqn.outvars) != 1 or not _is_float(aval):
            return None
        old = replace(mapped[0], key=position)
        if len(args) == 1:
            return self._moved_map(eqn, old, name)
        known = next((arg for arg in args if isinstance(arg, Known)), None)
        if len(args) != 2 or known is None or known.poly is None:
            return None
        # A site's output that is a scalar, broadcast.
        if len(old.dims) != len(aval.shape):
            return None
        other = lifted(known.poly, len(aval.shape))
        if other is None:
            return None
        scale, shift = scaled_and_shifted(
            name, old.scale, old.shift, other, first=args[0] is mapped[0]
        )
        return None if scale is None or shift is None else replace(old, scale=scale, shift=shift)

    def _moved_map(self, eqn: JaxprEqn, old: Mapped, name: str) -> Mapped | None:
        if name in SAME:
            return old
        if name == "neg":
            scale = poly.multiply(old.scale, poly.number(-1))
            shift = poly.multiply(old.shift, poly.number(-1))
            dims = old.dims
        else:
            # Scale and shift lie in the axes of the value, and are moved as it is.
            scale = self._moved(eqn, old.scale)
            shift = self._moved(eqn, old.shift)
            dims = arranged(eqn, old.dims, self._shape(self.kernels[old.site].path))
        if scale is None or shift is None or dims is None:
            return None
        return replace(old, scale=scale, shift=shift, dims=dims)

    def _used(self, paths: frozenset[str], use: Use) -> None:
        for path in paths:
            self.uses.setdefault(path, set()).add(use)


def walk(traced: Traced) -> Walk:
    """Walk over a function, following the results of its sites and its parameters.

    Args:
      traced: the function.

    Returns:
      The walk, with all values and uses that were found.
    """
    found = Walk(traced)
    params = [
        Known(
            poly.parameter(path, len(x.shape)) if _is_float(x) else None,
            frozenset([path]),
            scalar(x),
        )
        for path, x in traced.params.items()
    ]
    rest = [OTHER] * (len(traced.jaxpr.jaxpr.invars) - len(traced.params))
    found.lost(interpret(found, traced.jaxpr, [*params, *rest]), Use((), "the function's result"))
    return found


def _is_float(aval: Aval) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)
