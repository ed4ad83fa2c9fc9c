"""Which entries of a site's operands belong to padding: a mask of the inputs, followed along axes through the computation.

A mask has the leading axes of an input, ``[batch]`` or ``[batch, sequence]``. Axes are followed as `groups` follows those of
parameters, so that a mask finds its axes again after transposes, reshapes to heads or to ``batch * sequence`` rows, and
within layers under ``scan``. Where a reduction took the sequence away (a pooled feature) an example counts if any of its
tokens does. Where that cannot be told (a primitive without a rule, tokens sorted or sliced apart) it is said why.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from compress_jax.core.errors import ShapeError
from compress_jax.trace._analyse import Walk
from compress_jax.trace.axes import Axis
from compress_jax.trace.axis_moves import Dims
from compress_jax.trace.interpret import Where, interpret
from compress_jax.trace.primitives import INDEX_REDUCTIONS, REDUCTIONS
from compress_jax.trace.site import Position, Shape, Site
from compress_jax.trace.traced import Traced

REDUCE = REDUCTIONS | INDEX_REDUCTIONS | {"dot_general", "conv_general_dilated"}
SCAN = "a scan runs along it"
PICK = ("slice", "dynamic_slice", "squeeze", "gather")
REORDER = {"sort": "dimension", "rev": "dimensions"}


class Lost(NamedTuple):
    """Where an axis of the mask went: into the turns of a loop, if that is known, else beyond following."""

    reason: str
    loop: int | None = None
    axis: int | None = None


class Value(NamedTuple):
    """The axes of a value and, if it is made of what the mask is of, which axes of the mask are not among them any more."""

    dims: Dims
    reasons: frozenset[Lost] | None


@dataclass
class Followed:
    """The domain of the interpreter: `Walk`, and what becomes of the axes of the mask.

    Attributes:
      walk: what is known about axes.
      mask: the axes of the mask.
      operands: by position, the operands of a contraction.
    """

    mask: Dims = ()
    walk: Walk = field(default_factory=Walk)
    operands: dict[Position, list[Value]] = field(default_factory=dict)

    def constant(self, aval: Any, value: Any) -> Value:
        """Return the value of a literal or a captured array."""
        return Value(self.walk.constant(aval, value), None)

    def join(self, a: Value, b: Value) -> Value:
        """Return what may be either."""
        return Value(self.walk.join(a.dims, b.dims), _union((a, b)))

    def same(self, a: Value, b: Value) -> bool:
        """Tell whether nothing new was learned."""
        return a.reasons == b.reasons

    def unstack(self, a: Value, loop: int) -> Value:
        """Return one slice along the first axis."""
        lost: frozenset[Lost] = frozenset()
        if a.reasons is not None and self.holds(a.dims[0]):
            which = [i for i, axis in enumerate(self.mask) if self.walk.axes.find(axis) == self.walk.axes.find(a.dims[0])]
            lost = frozenset({Lost(SCAN, loop, which[0]) if len(which) == 1 else Lost(SCAN)})
        return Value(self.walk.unstack(a.dims, loop), None if a.reasons is None else a.reasons | lost)

    def stack(self, a: Value, length: int) -> Value:
        """Return slices put together."""
        dims = self.walk.stack(a.dims, length)
        turns = [each for each in a.reasons or () if each.axis is not None and self.mask[each.axis].size == length]
        if len(turns) != 1 or turns[0].axis is None:
            return Value(dims, a.reasons)
        return Value((self.mask[turns[0].axis], *dims[1:]), (a.reasons or frozenset()) - {turns[0]})  # turns are its entries

    def reshard(self, a: Value, aval: Any) -> Value:
        """Return a device's piece."""
        return Value(self.walk.reshard(a.dims, aval), a.reasons)

    def equation(self, eqn: JaxprEqn, args: list[Value], where: Where) -> Sequence[Value]:
        """Return the results of an equation, and note what it is given if it contracts."""
        results = self.walk.equation(eqn, [arg.dims for arg in args], where)
        self.operands[where.position] = args
        reasons = _union(args)
        if reasons is not None:
            reasons |= self._lost(eqn, args, results)
        return [Value(dims, reasons) for dims in results]

    def holds(self, axis: Axis) -> bool:
        """Tell whether an axis holds one of the mask's, or a part of it."""
        return any(set(self.walk.axes.leaves(axis)) & set(self.walk.axes.leaves(one)) for one in self.mask)

    def _lost(self, eqn: JaxprEqn, args: list[Value], results: Sequence[Dims]) -> frozenset[Lost]:
        name = eqn.primitive.name
        given = [axis for arg in args if arg.reasons is not None for axis in arg.dims if self.holds(axis)]
        if name in REORDER:
            along = eqn.params[REORDER[name]]
            chosen = (along,) if isinstance(along, int) else along
            if any(self.holds(arg.dims[i]) for arg in args if arg.dims for i in chosen):
                return frozenset({Lost(f"{name} reorders it")})
        if name == "slice" and any(step > 1 and self.holds(axis) for axis, step in _steps(eqn, args)):
            return frozenset({Lost("slice leaves out some of it")})
        made = {leaf for dims in results for axis in dims for leaf in self.walk.axes.leaves(axis)}
        gone = [axis for axis in given if not set(self.walk.axes.leaves(axis)) & made]
        picked = name in PICK and all(_one_less(eqn, arg) for arg in args[:1])
        return frozenset() if not gone or name in REDUCE or picked else frozenset({Lost(f"{name} mixes or reorders it")})


def _steps(eqn: JaxprEqn, args: list[Value]) -> list[tuple[Axis, int]]:
    """Return the axes of what is sliced, each with the step it is sliced in."""
    steps = eqn.params["strides"] or (1,) * len(args[0].dims)
    return list(zip(args[0].dims, steps, strict=True)) if args[0].dims else []


def _one_less(eqn: JaxprEqn, arg: Value) -> bool:
    """Tell whether what an equation leaves of each axis is all of it, or one index."""
    out = getattr(eqn.outvars[0].aval, "shape", ())
    sizes = [axis.size for axis in arg.dims]
    return len(out) < len(sizes) or (len(out) == len(sizes) and all(map(_all_or_one, out, sizes)))


def _all_or_one(new: int, old: int) -> bool:
    return new in (1, old)


def _union(values: Sequence[Value]) -> frozenset[Lost] | None:
    known = [value.reasons for value in values if value.reasons is not None]
    return frozenset().union(*known) if known else None


class Padding:
    """How a mask of some inputs meets the operands of every site.

    Args:
      traced: the function.
      shape: of the mask.
      given: for each leaf of the inputs, whether the mask is of it.
    """

    def __init__(self, traced: Traced, shape: Shape, given: Sequence[bool]):
        """Follow the axes."""
        self.traced, self.domain = traced, Followed()
        walk, count = self.domain.walk, len(traced.params)
        params = [Value(walk.fresh(leaf), None) for leaf in traced.params.values()]
        self.domain.mask = tuple(walk.axes.leaf(size) for size in shape)
        data = []
        for var, masked in zip(traced.jaxpr.jaxpr.invars[count:], given, strict=True):
            fresh = walk.fresh(var.aval)
            dims = (*self.domain.mask[: len(fresh)], *fresh[len(shape) :]) if masked else fresh
            data.append(Value(dims, frozenset() if masked else None))
        interpret(self.domain, traced.jaxpr, [*params, *data])

    def of(self, site: Site, index: int) -> Callable[[jax.Array], jax.Array] | None:
        """Return how the mask becomes one of an operand, 1 along axes that the mask does not tell apart.

        Args:
          site: the contraction.
          index: 0 or 1, which operand.

        Returns:
          The function, to booleans with the axes of the loops around the site, then those of the operand; None if the
          operand is not made of what the mask is of.

        Raises:
          ShapeError: if what counts of it is not known.
        """
        value = self.domain.operands[site.position][index]
        if value.reasons is None:
            return None
        turns = {each.loop: (each.axis, 0) for each in value.reasons if each.axis is not None}
        loops = [[(size, turns.get(loop))] for loop, size in enumerate(site.loops)]
        places = [*loops, *(list(self._factors(site, axis)) for axis in value.dims)]
        found = {label for axis in places for _, label in axis if label is not None}
        wanted = self._labels()
        beyond = sorted({each.reason for each in value.reasons if each.axis is None})
        if beyond:
            raise self._refuse(site, ", ".join(beyond))
        if any(label[0] == 0 and label not in found for label in wanted):
            raise self._refuse(site, "no axis of it is that of the examples")
        if site.kind == "conv" and index == 0:
            self._require_places(site, places[len(loops) :])
        return lambda mask: _placed(mask.reshape(self._sizes()), places, wanted)

    def _labels(self) -> list[tuple[int, int]]:
        """Return the parts of the mask's axes, ``(axis, factor of it)``, those of size 1 left out."""
        every = enumerate(self.domain.mask)
        return [(i, j) for i, axis in every for j, part in enumerate(self.domain.walk.axes.factors(axis)) if part.size > 1]

    def _sizes(self) -> list[int]:
        return [part.size for axis in self.domain.mask for part in self.domain.walk.axes.factors(axis) if part.size > 1]

    def _factors(self, site: Site, axis: Axis) -> Iterator[tuple[int, tuple[int, int] | None]]:
        """Yield the size of each factor of an axis, and which part of the mask it is."""
        axes = self.domain.walk.axes
        parts = {part: label for label in self._labels() for part in [axes.factors(self.domain.mask[label[0]])[label[1]]]}
        for factor in axes.factors(axis):
            whole = axes.find(factor)
            if whole not in parts and self.domain.holds(whole):
                raise self._refuse(site, "only a part of it is there, or it is put together with something else")
            yield factor.size, parts.get(whole)

    def _require_places(self, site: Site, places: list[list[tuple[int, Any]]]) -> None:
        """A window belongs to the position it stands at, where there are as many as before."""
        numbers = site.params["dimension_numbers"]
        for image, out, stride in zip(
            numbers.lhs_spec[2:], numbers.out_spec[2:], site.params["window_strides"], strict=True
        ):
            labelled = any(label is not None for _, label in places[image])
            if labelled and (stride != 1 or site.lhs_shape[image] != site.out_shape[out]):
                raise self._refuse(site, "its windows are fewer or more than the positions of the mask")

    def _refuse(self, site: Site, reason: str) -> ShapeError:
        return ShapeError(
            f"what counts of the input of site {site.name!r}, {site.lhs_shape} x {site.rhs_shape}, is not known: of the "
            f"mask {tuple(axis.size for axis in self.domain.mask)}, {reason}; leave the site out by where=..., or "
            "calibrate with batches that have no padding"
        )


def _placed(mask: jax.Array, places: list[list[tuple[int, Any]]], labels: list[tuple[int, int]]) -> jax.Array:
    """Return the mask in the axes of an operand: an entry counts if all that it belongs to does."""
    flat = [(axis, size, label) for axis, factors in enumerate(places) for size, label in factors]
    where = {label: [i for i, (*_, own) in enumerate(flat) if own == label] for label in labels}
    gone = tuple(i for i, label in enumerate(labels) if not where[label])
    left = [label for label in labels if where[label]]
    mask, result = mask.any(axis=gone), None
    for turn in range(max((len(where[label]) for label in left), default=1)):
        at = [where[label][min(turn, len(where[label]) - 1)] for label in left]
        order = sorted(range(len(at)), key=lambda i: at[i])
        one = _spread(mask.transpose(order), flat, sorted(at), len(places))
        result = one if result is None else result & one
    assert result is not None
    return result


def _spread(mask: jax.Array, flat: list[tuple[int, int, Any]], at: list[int], axes: int) -> jax.Array:
    """Return a mask, whose axes are some factors, with an axis for each of the operand's, 1 where it says nothing."""
    told = {flat[i][0] for i in at}
    thin = mask.reshape([size if i in at else 1 for i, (_, size, _) in enumerate(flat)])
    full = jnp.broadcast_to(thin, [size if axis in told else 1 for axis, size, _ in flat])
    sizes = [1] * axes
    for axis, size, _ in flat:
        sizes[axis] *= size if axis in told else 1
    return full.reshape(sizes)
