"""A walk over a function that follows what its sites give, and what is made of its parameters, as polynomials of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import JaxprEqn

from compress_jax.trace._jaxpr import origin
from compress_jax.trace._jaxpr.find_sites import Traced
from compress_jax.trace._jaxpr.interpret import Where, interpret
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

# Which stored axes of a parameter lie in which axes of a value, exactly: through moves and out of
# contractions.


MOVES = ("transpose", "squeeze", "expand_dims", "broadcast_in_dim", "reshape", "rev")


def arranged(eqn: JaxprEqn, dims: Dims, stored: Shape) -> Dims | None:
    """Return where stored axes lie after an equation that moves entries.

    Args:
      eqn: the equation; of its operand.
      dims: for each axis of the operand, the stored axes in it, the slower first; ``~axis`` for one
        that is reversed.
      stored: shape of what is stored.

    Returns:
      The same of the result; None if it is no move, or leaves an axis with a part of a stored one.
    """
    before: Any = eqn.invars[0].aval
    after: Any = eqn.outvars[0].aval
    name, shape, out = eqn.primitive.name, before.shape, after.shape
    if name == "rev":
        return tuple(
            tuple(~axis for axis in axes) if i in eqn.params["dimensions"] else axes
            for i, axes in enumerate(dims)
        )
    if name not in MOVES:
        return None
    moved: Any = origin.MOVE_RULES[name](eqn.params, Origin(PARAMETER, (), dims), shape, out).dims
    whole = all(
        not axes or math.prod(_size(stored, axis) for axis in axes) == n
        for axes, n in zip(moved, out, strict=True)
    )
    return moved if whole else None


def output_axes(eqn: JaxprEqn, side: int, dims: Dims) -> Dims | None:
    """Return the stored axes of a contraction's operand that lie in each axis of its result.

    Args:
      eqn: a product or a convolution.
      side: which operand.
      dims: for each axis of that operand, the stored axes in it.

    Returns:
      ``()`` for axes of the result that come from the other operand or a window; None for what is
      not followed.
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
        free = [
            [a for a in range(n) if a not in (*contracting[s], *batch[s])]
            for s, n in enumerate(ranks)
        ]
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


SAME = CASTS | PASS_THROUGH
UNARY = {"sqrt": 0.5, "rsqrt": -0.5, "square": 2.0}
BINARY = ("add", "add_any", "sub", "mul", "div", "max", "pow")
LARGEST = 2**16  # entries of a captured array that is looked into


@dataclass(frozen=True)
class Known:
    """A value that depends on parameters and constants only.

    Attributes:
      poly: what it is; None if that is not known.
      paths: the parameters it depends on.
      value: the number that all its entries are, if that is known.
    """

    poly: Polynomial | None
    paths: frozenset[str]
    value: float | None = None


@dataclass(frozen=True)
class Mapped:
    r"""What a site gives, y, scaled and shifted: :math:`y a + b`, a and b polynomials of parameters.

    Attributes:
      key: position of the equation that gives it.
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
    """Where a value goes: a position and the primitive there, and whether it is a step of a scale and shift."""

    position: Position
    name: str
    step: bool = False


OTHER = object()
"""A value of which nothing is known: data."""


@dataclass
class Walk:
    """The domain for the interpreter, and what it has found.

    Attributes:
      traced: the function.
      values: mapped values by the position that makes them, each with the one it is made of.
      kernels: the parameter of each site that sees it as it is stored, but for moves and factors.
      goes: for each mapped value, where it goes.
      uses: for each parameter, where what is made of it goes.
      arrays: captured constants, by a name that no parameter has.
      fixed: parameters whose present values were looked at (a counter of steps, say): they must
        stay.
    """

    traced: Traced
    values: dict[Position, tuple[Mapped, Position | None]] = field(default_factory=dict)
    kernels: dict[Position, Atom] = field(default_factory=dict)
    goes: dict[Position, set[Use]] = field(default_factory=dict)
    uses: dict[str, set[Use]] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)

    def constant(self, aval: Any, value: Any) -> Any:
        """Return a number, or a captured array of them."""
        if isinstance(value, Tracer) or not jnp.issubdtype(
            getattr(aval, "dtype", np.dtype(object)), jnp.number
        ):
            return Known(None, frozenset())
        if jnp.issubdtype(aval.dtype, jnp.complexfloating) or np.size(value) > LARGEST:
            return Known(None, frozenset())
        array = np.asarray(value).astype(np.float64)
        if array.size and (array == array.reshape(-1)[0]).all():
            first = float(array.reshape(-1)[0])
            return Known(poly.number(first), frozenset(), first)
        name = f"\0{hash((array.shape, array.tobytes()))}"
        self.arrays[name] = array
        return Known(poly.parameter(name, array.ndim), frozenset())

    def join(self, a: Any, b: Any) -> Any:
        """Return a value that is the same both ways, or that nothing is known."""
        return a if a == b else self.lost([a, b], Use((), "a branch or a loop"))

    def same(self, a: Any, b: Any) -> bool:
        """Tell whether two values are equal."""
        return a == b

    def unstack(self, a: Any, loop: int) -> Any:
        """Return one layer of a parameter that is stacked for a loop."""
        if not isinstance(a, Known):
            return self.lost([a], Use((), "a loop"))
        return replace(a, poly=a.poly and a.poly.moved(lambda atom: sliced(atom, loop)))

    def stack(self, a: Any, length: int) -> Any:
        """Return that nothing is known of what a loop puts together."""
        return self.lost([a], Use((), "a loop"))

    def reshard(self, a: Any, aval: Any) -> Any:
        """Return that nothing is known of the pieces of devices."""
        return self.lost([a], Use((), "shard_map"))

    def lost(self, args: Sequence[Any], use: Use) -> Any:
        """Note that values are used in another way than scales and shifts are."""
        for arg in args:
            if isinstance(arg, Mapped):
                self.goes.setdefault(arg.key, set()).add(use)
            if isinstance(arg, Known):
                self._used(arg.paths, use)
        return OTHER

    def decides(self, args: Sequence[Any]) -> None:
        """Note values that choose a branch or end a loop."""
        self.lost(args, Use((), "a choice of branches"))

    def equation(self, eqn: JaxprEqn, args: list[Any], where: Where) -> Sequence[Any]:
        """Return the results of an equation, and note what it does to mapped values and parameters."""
        position, name = where.position, eqn.primitive.name
        self.values.pop(position, None)  # of an earlier turn of a loop, in which more was known
        if position in self.traced.sites:
            return [self._site(eqn, args, self.traced.sites[position])]
        if all(isinstance(arg, Known) for arg in args):
            return self._known(eqn, args)
        made = self._mapped(eqn, args, position)
        if made is None:
            self.lost(args, Use(position, name))
            return [OTHER] * len(eqn.outvars)
        self.values[position] = (made, next(arg.key for arg in args if isinstance(arg, Mapped)))
        for arg in args:
            self.lost([arg], Use(position, name, step=True))
        return [made]

    def _site(self, eqn: JaxprEqn, args: list[Any], site: Site) -> Any:
        side = 0 if site.operand == "lhs" else 1
        use = Use(site.position, f"site {site.name!r}")
        self.lost(args, use)
        kernel = (
            args[side] if site.param is not None and not isinstance(args[1 - side], Known) else None
        )
        atom = itself(kernel.poly if isinstance(kernel, Known) else None, site.param)
        dims = None if atom is None else output_axes(eqn, side, atom.dims)
        if atom is None or dims is None:
            self.kernels.pop(site.position, None)
            return OTHER
        self.kernels[site.position] = atom
        made = Mapped(site.position, site.position, poly.number(1), poly.number(0), dims)
        self.values[site.position] = (made, None)
        return made

    def _known(self, eqn: JaxprEqn, args: list[Known]) -> Sequence[Known]:
        paths = frozenset().union(*(arg.paths for arg in args))
        polys, name, out = [arg.poly for arg in args], eqn.primitive.name, eqn.outvars
        found = (
            None
            if len(out) != 1 or None in polys or not polys
            else self._computed(eqn, name, polys)
        )
        if found is not None:
            return [Known(found, paths, poly.as_number(found))]
        value = uniform_result(eqn, [arg.value for arg in args])
        if value is not None:
            self.fixed |= paths
            return [Known(poly.number(value), paths, value)]
        return [Known(None, paths)] * len(out)

    def _computed(self, eqn: JaxprEqn, name: str, polys: list[Any]) -> Polynomial | None:
        if not _is_float(eqn.outvars[0].aval):  # whole numbers divide otherwise
            return None
        if name in UNARY:
            return poly.power(polys[0], UNARY[name])
        if name == "integer_pow":
            return poly.power(polys[0], eqn.params["y"])
        if name in ("neg", "exp"):
            return (
                poly.multiply(polys[0], poly.number(-1))
                if name == "neg"
                else poly.stepped(polys[0], "exp")
            )
        if name in BINARY:
            aval: Any = eqn.outvars[0].aval
            one, other = (lifted(p, len(aval.shape)) for p in polys)
            return None if one is None or other is None else combined(name, one, other)
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

    def _mapped(self, eqn: JaxprEqn, args: list[Any], position: Position) -> Mapped | None:
        mapped = [arg for arg in args if isinstance(arg, Mapped)]
        name = eqn.primitive.name
        aval: Any = eqn.outvars[0].aval
        if len(mapped) != 1 or len(eqn.outvars) != 1 or not _is_float(aval):
            return None
        old = replace(mapped[0], key=position)
        if len(args) == 1:
            return self._moved_map(eqn, old, name)
        known = next((arg for arg in args if isinstance(arg, Known)), None)
        if (
            len(args) != 2
            or known is None
            or known.poly is None
            or len(old.dims) != len(aval.shape)
        ):
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
            scale, shift = (poly.multiply(each, poly.number(-1)) for each in (old.scale, old.shift))
        else:
            scale, shift = (self._moved(eqn, each) for each in (old.scale, old.shift))
        dims = (
            old.dims
            if name == "neg"
            else arranged(eqn, old.dims, self._shape(self.kernels[old.site].path))
        )
        return (
            None
            if scale is None or shift is None or dims is None
            else replace(old, scale=scale, shift=shift, dims=dims)
        )

    def _used(self, paths: frozenset[str], use: Use) -> None:
        for path in paths:
            self.uses.setdefault(path, set()).add(use)


def walk(traced: Traced) -> Walk:
    """Walk over a function, following what its sites give and what is made of its parameters.

    Args:
      traced: the function.

    Returns:
      What was found.
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


def _is_float(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)
