"""Find the sites of a jaxpr: one walk over origins, then one over names."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn

from compress_jax.trace import contraction
from compress_jax.trace.interpret import Where, interpret
from compress_jax.trace.numbers import numbers
from compress_jax.trace.origin import CONSTANT, DATA, PARAMETER, Origin, data, join, parameter, transfer
from compress_jax.trace.site import Axes, Position, Site

LEAVES = ("kernel", "embedding", "weight", "w")  # what the parameter of a layer is called: left out where names are joined
CONSTANT_ROWS = "rows of it are read at constant indices"
NO_SUM = "its products are summed over no axis: it scales entry by entry"


@dataclass
class Found:
    """What a walk over a jaxpr saw; the domain of origins for the interpreter.

    Attributes:
      contractions: by position, the equation, the origins of its operands, and its place.
      lookups: by position, the table that rows were gathered from.
      otherwise: by path of a parameter, how it is used where no contraction and no lookup is.
      sums: positions of contractions of which an operand is one number throughout (``ones``): sums, not layers.
      hidden: by position, the primitive that contracts where nobody looks.
      stacked: by path, the axes of a parameter that loops take one slice of at a time.
    """

    contractions: dict[Position, tuple[JaxprEqn, Origin, Origin, Where]] = field(default_factory=dict)
    lookups: dict[Position, str] = field(default_factory=dict)
    otherwise: dict[str, str] = field(default_factory=dict)
    hidden: dict[Position, str] = field(default_factory=dict)
    stacked: dict[str, set[int]] = field(default_factory=dict)
    sums: frozenset[Position] = frozenset()

    def constant(self, aval: Any, value: Any) -> Origin:
        """Return the origin of a literal or a captured array."""
        return Origin()

    def join(self, a: Origin, b: Origin) -> Origin:
        """Return the origin of what may be either."""
        return join((a, b))

    def same(self, a: Origin, b: Origin) -> bool:
        """Tell whether two origins are equal."""
        return a == b

    def unstack(self, a: Origin, loop: int) -> Origin:
        """Return the origin of one slice along the first axis, and which loop it is that slices."""
        if a.dims is None:
            return a
        sliced = (*a.sliced, *((axis, loop) for axis in a.dims[0]))
        if a.level == PARAMETER and len(a.paths) == 1:
            self.stacked.setdefault(a.paths[0], set()).update(a.dims[0])
        return Origin(a.level, a.paths, a.dims[1:], sliced, a.maker, a.label)

    def stack(self, a: Origin, length: int) -> Origin:
        """Return the origin of slices put together."""
        return a if a.dims is None else Origin(a.level, a.paths, ((), *a.dims), a.sliced, a.maker, a.label)

    def reshard(self, a: Origin, aval: Any) -> Origin:
        """Return the origin itself: a device's piece comes from where the whole does."""
        return a

    def equation(self, eqn: JaxprEqn, args: list[Origin], where: Where) -> Sequence[Origin]:
        """Return the origins of an equation's results; note it if it contracts or looks up."""
        if contraction.kind(eqn) is not None:
            if where.position in self.sums:
                args = [replace(arg, paths=()) for arg in args]
            self.contractions[where.position] = (eqn, args[0], args[1], where)
            return [_product(args, where.position)]
        if contraction.hidden(eqn):
            self.hidden[where.position] = eqn.primitive.name
        result = transfer(eqn, args)
        if eqn.primitive.name == "gather" and args[0].paths:
            if result.level == DATA:
                self.lookups[where.position] = args[0].paths[0]
            elif args[0].level == PARAMETER:
                self.otherwise.setdefault(args[0].paths[0], CONSTANT_ROWS)
        if eqn.primitive.name == "dot_general":
            self.otherwise |= {arg.paths[0]: NO_SUM for arg in args if arg.level == PARAMETER and arg.paths}
        return [result] * len(eqn.outvars)


def _product(args: list[Origin], position: Position) -> Origin:
    """A product with data is data; of a parameter with constants (a rotation) it is still that parameter."""
    level = max(arg.level for arg in args)
    if level == DATA:
        return Origin(DATA, maker=position)
    views = [arg for arg in args if arg.level == PARAMETER]
    return Origin(level, views[0].paths if len(views) == 1 else ())


def find(closed: ClosedJaxpr, params: dict[str, Any], inputs: Sequence[str]) -> Found:
    """Walk over a jaxpr whose first inputs are the parameters.

    Args:
      closed: the jaxpr.
      params: shapes by path, ``{path: array or ShapeDtypeStruct}``.
      inputs: a label for each further input.

    Returns:
      What was seen.
    """
    found = Found(sums=frozenset(numbers(closed)))
    interpret(found, closed, [*(parameter(path, x.shape) for path, x in params.items()), *map(data, inputs)])
    return found


def name(found: Found) -> dict[Position, Site]:
    """Return the sites of a walk by position, in program order, with unique names."""
    names: dict[Position, str] = {}
    seen: Counter[str] = Counter()
    for position, (eqn, lhs, rhs, _) in found.contractions.items():
        paths = _paths(eqn, lhs, rhs)
        base = paths[0] if paths else _pair(_label(lhs, names), _label(rhs, names))
        seen[base] += 1
        names[position] = base if seen[base] == 1 else f"{base}#{seen[base]}"
    uses: dict[str, list[str]] = {}
    for position, (eqn, lhs, rhs, _) in found.contractions.items():
        for path in _paths(eqn, lhs, rhs)[:1]:
            uses.setdefault(path, []).append(names[position])
    for path in found.lookups.values():
        uses.setdefault(path, []).append("gather")
    return {position: _site(names[position], *found.contractions[position], uses) for position in names}


def _paths(eqn: JaxprEqn, lhs: Origin, rhs: Origin) -> tuple[str, ...]:
    """Return the parameters of a contraction, the main one first: of two operands the one that is not also data's."""
    order = (lhs, rhs) if _operand(eqn, lhs, rhs) == "lhs" else (rhs, lhs)
    return tuple(dict.fromkeys(path for origin in order if origin.level == PARAMETER for path in origin.paths))


def _operand(eqn: JaxprEqn, lhs: Origin, rhs: Origin) -> str | None:
    """Return which operand is the parameter; of two, the one that looks more like a kernel, then the second."""
    if not (rhs.paths or lhs.paths):
        return None
    if not (rhs.paths and lhs.paths):
        return "rhs" if rhs.paths else "lhs"
    left, right = (_kernel(origin, var.aval) for origin, var in zip((lhs, rhs), eqn.invars, strict=False))
    return "lhs" if left > right else "rhs"


def _kernel(origin: Origin, aval: Any) -> tuple[bool, bool, int]:
    """Return how much a value looks like a kernel: one parameter, not repeated along an axis, of many axes longer than 1.

    Learned queries, positions or tokens that are fed to a kernel are sums of parameters, or repeated for every example.
    """
    if origin.dims is None:
        return False, False, 0
    long = [axes for axes, size in zip(origin.dims, aval.shape, strict=True) if size > 1]
    return len(origin.paths) == 1, all(long), sum(map(bool, long))


def _label(origin: Origin, names: dict[Position, str]) -> str:
    if origin.level == CONSTANT:
        return "constant"
    if origin.level == PARAMETER:
        return "parameters"
    return origin.label or names.get(origin.maker, "carry")


def _pair(a: str, b: str) -> str:
    """Join two names: what they share in front once, then the rest by ``@``, without the leaf names of layers."""
    first, second = (_short(each).split("/") for each in (a, b))
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    return "/".join([*first[:shared], "@".join(("/".join(first[shared:]), "/".join(second[shared:])))])


def _short(label: str) -> str:
    head, _, leaf = label.rpartition("/")
    return head if head and leaf.partition("#")[0] in LEAVES else label


def _site(name: str, eqn: JaxprEqn, lhs: Origin, rhs: Origin, where: Where, uses: dict[str, list[str]]) -> Site:
    contracting, batch = contraction.axes(eqn)
    operand, paths = _operand(eqn, lhs, rhs), _paths(eqn, lhs, rhs)
    side = 0 if operand == "lhs" else 1
    origin = (lhs, rhs)[side]
    left, right, out = (cast(jax.ShapeDtypeStruct, var.aval) for var in (*eqn.invars[:2], eqn.outvars[0]))
    return Site(
        name=name,
        kind=contraction.kind(eqn) or "",
        param=paths[0] if paths else None,
        operand=operand,
        lhs_shape=left.shape,
        rhs_shape=right.shape,
        out_shape=out.shape,
        lhs_dtype=str(left.dtype),
        rhs_dtype=str(right.dtype),
        out_dtype=str(out.dtype),
        contracting=contracting,
        batch=batch,
        param_axes=_stored(origin, contracting[side]) if paths else None,
        batch_axes=_stored(origin, batch[side]) if paths else None,
        stack_axes=tuple(axis for axis, _ in origin.sliced) if paths else (),
        stack_loops=tuple(loop for _, loop in origin.sliced) if paths else (),
        also=paths[1:],
        uses=tuple(use for use in uses.get(paths[0], ()) if use != name) if paths else (),
        loops=where.loops,
        conditional=where.conditional,
        params=dict(eqn.params),
        position=where.position,
    )


def _stored(origin: Origin, contracting: Axes) -> Axes | None:
    """Return the stored axes that are summed over, or None if one of them also lies in an axis that is not."""
    if origin.dims is None or len(origin.paths) != 1:
        return None
    summed = tuple(dict.fromkeys(axis for i in contracting for axis in origin.dims[i]))
    kept = {axis for i, axes in enumerate(origin.dims) if i not in contracting for axis in axes}
    return None if kept & set(summed) else summed
