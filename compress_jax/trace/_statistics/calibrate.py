"""Run a function and return statistics of the operands at its sites."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from compress_jax.core.errors import DataError, ShapeError
from compress_jax.core.types import Batch, ModelFn, Params, PyTree
from compress_jax.trace._groups.analyze import Walk
from compress_jax.trace._groups.axes import Axis, Dims
from compress_jax.trace._jaxpr.evaluate import Hooks, Values, bind
from compress_jax.trace._jaxpr.find_sites import Traced, trace
from compress_jax.trace._jaxpr.interpret import Where, interpret
from compress_jax.trace._jaxpr.primitives import INDEX_REDUCTIONS, REDUCTIONS
from compress_jax.trace._jaxpr.rewrite import hooked
from compress_jax.trace._jaxpr.site import Position, Shape, Site
from compress_jax.trace._statistics.calibration import Calibration
from compress_jax.trace._statistics.reducer import Reducer

# Which entries of a site's operands belong to padding: a mask of the inputs, followed along axes
# through the computation.


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
            which = [
                i
                for i, axis in enumerate(self.mask)
                if self.walk.axes.find(axis) == self.walk.axes.find(a.dims[0])
            ]
            lost = frozenset({Lost(SCAN, loop, which[0]) if len(which) == 1 else Lost(SCAN)})
        return Value(
            self.walk.unstack(a.dims, loop), None if a.reasons is None else a.reasons | lost
        )

    def stack(self, a: Value, length: int) -> Value:
        """Return slices put together."""
        dims = self.walk.stack(a.dims, length)
        turns = [
            each
            for each in a.reasons or ()
            if each.axis is not None and self.mask[each.axis].size == length
        ]
        if len(turns) != 1 or turns[0].axis is None:
            return Value(dims, a.reasons)
        return Value(
            (self.mask[turns[0].axis], *dims[1:]), (a.reasons or frozenset()) - {turns[0]}
        )  # turns are its entries

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
        return any(
            set(self.walk.axes.leaves(axis)) & set(self.walk.axes.leaves(one)) for one in self.mask
        )

    def _lost(self, eqn: JaxprEqn, args: list[Value], results: Sequence[Dims]) -> frozenset[Lost]:
        name = eqn.primitive.name
        given = [
            axis for arg in args if arg.reasons is not None for axis in arg.dims if self.holds(axis)
        ]
        if name in REORDER:
            along = eqn.params[REORDER[name]]
            chosen = (along,) if isinstance(along, int) else along
            if any(self.holds(arg.dims[i]) for arg in args if arg.dims for i in chosen):
                return frozenset({Lost(f"{name} reorders it")})
        if name == "slice" and any(
            step > 1 and self.holds(axis) for axis, step in _steps(eqn, args)
        ):
            return frozenset({Lost("slice leaves out some of it")})
        made = {leaf for dims in results for axis in dims for leaf in self.walk.axes.leaves(axis)}
        gone = [axis for axis in given if not set(self.walk.axes.leaves(axis)) & made]
        picked = name in PICK and all(_one_less(eqn, arg) for arg in args[:1])
        return (
            frozenset()
            if not gone or name in REDUCE or picked
            else frozenset({Lost(f"{name} mixes or reorders it")})
        )


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
          The function, to booleans with the axes of the loops around the site, then those of the
          operand; None if the operand is not made of what the mask is of.

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
        return [
            (i, j)
            for i, axis in every
            for j, part in enumerate(self.domain.walk.axes.factors(axis))
            if part.size > 1
        ]

    def _sizes(self) -> list[int]:
        return [
            part.size
            for axis in self.domain.mask
            for part in self.domain.walk.axes.factors(axis)
            if part.size > 1
        ]

    def _factors(self, site: Site, axis: Axis) -> Iterator[tuple[int, tuple[int, int] | None]]:
        """Yield the size of each factor of an axis, and which part of the mask it is."""
        axes = self.domain.walk.axes
        parts = {
            part: label
            for label in self._labels()
            for part in [axes.factors(self.domain.mask[label[0]])[label[1]]]
        }
        for factor in axes.factors(axis):
            whole = axes.find(factor)
            if whole not in parts and self.domain.holds(whole):
                raise self._refuse(
                    site, "only a part of it is there, or it is put together with something else"
                )
            yield factor.size, parts.get(whole)

    def _require_places(self, site: Site, places: list[list[tuple[int, Any]]]) -> None:
        """A window belongs to the position it stands at, where there are as many as before."""
        numbers = site.params["dimension_numbers"]
        for image, out, stride in zip(
            numbers.lhs_spec[2:], numbers.out_spec[2:], site.params["window_strides"], strict=True
        ):
            labelled = any(label is not None for _, label in places[image])
            if labelled and (stride != 1 or site.lhs_shape[image] != site.out_shape[out]):
                raise self._refuse(
                    site, "its windows are fewer or more than the positions of the mask"
                )

    def _refuse(self, site: Site, reason: str) -> ShapeError:
        return ShapeError(
            f"what counts of the input of site {site.name!r}, {site.lhs_shape} x "
            f"{site.rhs_shape}, is not known: of the "
            f"mask {tuple(axis.size for axis in self.domain.mask)}, {reason}; leave the site out "
            "by where=..., or "
            "calibrate with batches that have no padding"
        )


def _placed(
    mask: jax.Array, places: list[list[tuple[int, Any]]], labels: list[tuple[int, int]]
) -> jax.Array:
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


def _spread(
    mask: jax.Array, flat: list[tuple[int, int, Any]], at: list[int], axes: int
) -> jax.Array:
    """Return a mask, whose axes are some factors, with an axis for each of the operand's, 1 where it says nothing."""
    told = {flat[i][0] for i in at}
    thin = mask.reshape([size if i in at else 1 for i, (_, size, _) in enumerate(flat)])
    full = jnp.broadcast_to(thin, [size if axis in told else 1 for axis, size, _ in flat])
    sizes = [1] * axes
    for axis, size, _ in flat:
        sizes[axis] *= size if axis in told else 1
    return full.reshape(sizes)


def observe(
    fn: ModelFn,
    reduce: Callable[[Site, Any, Any], Any],
    where: str | tuple[str, ...] | None = None,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Return ``(params, *inputs) -> (out, {site name: statistics})``.

    ``reduce`` runs inside the computation, so a Gram matrix or a histogram is made without ever
    keeping the activations. A site inside ``scan`` returns its statistics stacked, one entry a turn
    (`Site.loops` is the leading shape); inside ``shard_map``, one a device. Inside a ``while`` loop
    the turns are merged by ``reduce.merge``, or the last one stays if it has none. Where a branch
    of ``cond`` was not taken, statistics are NaN if floating, else 0.

    Args:
      fn: a pure function of params and inputs.
      reduce: ``(site, lhs, rhs) -> tree of arrays``, or one of the ready `Reducer`.
      where: a glob, or several, over the names of sites; by default all.

    Returns:
      The observing function; jit it. `out` is that of ``fn`` bit for bit. Nothing is differentiated
      through statistics.

    Raises:
      NoMatchError: when called, if no site's name matches ``where``.

    Example:
      >>> import jax.numpy as jnp
      >>> seen = observe(lambda params, x: x @ params["kernel"], lambda site, lhs, rhs: jnp.abs(lhs).max())
      >>> out, statistics = seen({"kernel": jnp.ones((2, 2))}, jnp.array([[-3.0, 1.0]]))
      >>> float(statistics["kernel"])
      3.0
    """
    return _observing(fn, reduce, where, None)


def observe_masked(
    fn: ModelFn, reduce: Reducer, where: str | tuple[str, ...] | None, mask: Any
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Return `observe` of what counts.

    Args:
      fn: see `observe`.
      reduce: a reducer that knows of masks.
      where: see `observe`.
      mask: see `masks_of`.

    Returns:
      The observing function; when called it raises a ShapeError that names a site if what counts of
      it is not known.
    """

    def run(params: Params, *inputs: PyTree) -> tuple[Any, dict[str, Any]]:
        names = [site.name for site in trace(fn, params, *inputs).choose(where).values()]
        return _observing(fn, reduce, where, masks_of(fn, names, mask, params, *inputs))(
            params, *inputs
        )

    return run


def masks_of(
    fn: ModelFn, names: Iterable[str], mask: Any, params: Params, *inputs: PyTree
) -> dict[str, Any]:
    """Return for each of some sites the masks of its activations, by operand; none of one that does not depend on the mask.

    Args:
      fn: see `observe`.
      names: of the sites.
      mask: booleans or numbers, of which 0 does not count, with the leading axes of those inputs
        that they are of.
      params: tree of arrays.
      inputs: trees of arrays.

    Returns:
      ``{site name: {operand: booleans}}``, the loops around a site as leading axes.

    Raises:
      ShapeError: if the mask fits no input, or what counts of a site is not known.
    """
    mask = jnp.asarray(mask)
    mask = mask if mask.dtype == bool else mask != jnp.zeros((), mask.dtype)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)]
    given = [len(shape) > 0 and shape[: mask.ndim] == mask.shape[: len(shape)] for shape in shapes]
    if mask.ndim == 0 or not any(given):
        raise ShapeError(
            f"a mask of shape {mask.shape} fits the leading axes of no input, which have the "
            f"shapes {shapes}"
        )
    traced = trace(fn, params, *inputs)
    padding = Padding(traced, mask.shape, given)
    sites = {site.name: site for site in traced.sites.values()}
    return {name: _masks(padding, sites[name], mask) for name in names}


def _observing(
    fn: ModelFn,
    reduce: Callable[..., Any],
    where: str | tuple[str, ...] | None,
    masks: dict[str, Any] | None,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    def apply(
        site: Site, eqn: JaxprEqn, operands: list[Any], own: dict[int, jax.Array] | None
    ) -> Values:
        seen = [jax.lax.stop_gradient(x) for x in operands[:2]]
        statistics = reduce(site, *seen, own) if own else reduce(site, *seen)
        return bind(eqn, operands), {site.name: jax.tree.map(_strong, statistics)}

    def hooks(sites: dict[Position, Site]) -> Hooks:
        return Hooks(sites, apply, getattr(reduce, "merge", lambda old, new: new))

    return hooked(fn, hooks, where, masks)


def _masks(padding: Padding, site: Site, mask: jax.Array) -> dict[int, jax.Array]:
    """Return the masks of the operands that are activations, with the loops around the site as leading axes."""
    found = {index: padding.of(site, index) for index in site.inputs.values()}
    made = {index: place(mask) for index, place in found.items() if place is not None}
    loops = len(site.loops)
    return {
        index: jnp.broadcast_to(x, (*site.loops, *x.shape[loops:])) for index, x in made.items()
    }


def _strong(x: Any) -> jax.Array:
    """Drop the weak type of Python's numbers: what branches and turns of a loop return must agree."""
    return jax.lax.convert_element_type(x, jax.numpy.result_type(x))


# Statistics of many batches, one batch at a time.


Masks: TypeAlias = str | Callable[[Any], Any] | Iterable[Any]
"""The name of a batch's entry, a function of a batch, or a mask for each batch."""


def calibrate(
    fn: ModelFn,
    reduce: Reducer,
    params: Params,
    batches: Iterable[Any],
    where: str | tuple[str, ...] | None = None,
    *,
    mask: Masks | None = None,
) -> Calibration:
    """Return the finished statistics of many batches; memory does not grow with their number.

    Batches may differ in length. A site whose statistics then differ in shape (attention's own
    products, which hold the length) is left out, and listed as such; if ``where`` asks for it, that
    is an error.

    With a mask, examples or tokens that do not count enter no statistic, be they NaN: no maximum,
    histogram, moment, Gram matrix or count. The mask is followed along axes to every site
    (`trace.padding`); where it cannot be, the site is refused by name. What padding does inside the
    model, through attention to it say, is the model's affair.

    Args:
      fn: a pure function of params and one batch.
      reduce: what to observe.
      params: tree of arrays.
      batches: what ``fn`` takes after params, one after the other; a tuple is several arguments.
      where: a glob, or several, over the names of sites; by default all.
      mask: which examples or tokens of a batch count: ``batch -> mask``, or a mask for each batch,
        or the name of an entry of batches that are dicts. Booleans (or numbers, of which 0 does not
        count) with the leading axes of the inputs they are of: ``[batch]`` or
        ``[batch, sequence]``; inputs with other leading axes have none.

    Returns:
      ``{site name: reduce.finish(statistics)}``, with the sites.

    Raises:
      DataError: if there is no batch, or not one mask for each.
      NoMatchError: if no site's name matches ``where``.
      ShapeError: if a mask fits no input, if what counts of a site is not known, or if statistics
        of a site that was asked for differ in shape from batch to batch.
      ArgumentError: if there is a mask and the reducer knows of none.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.trace.reducers import absmax
      >>> batches = [jnp.ones((4, 2)), -2 * jnp.ones((4, 2))]
      >>> ranges = calibrate(lambda params, x: x @ params["kernel"], absmax(), {"kernel": jnp.ones((2, 3))}, batches)
      >>> float(ranges["kernel"]["input"]), ranges.sites["kernel"].param_axes
      (2.0, (0,))
      >>> ranges = calibrate(lambda params, x: x @ params["kernel"], absmax(), {"kernel": jnp.ones((2, 3))}, batches,
      ...                    mask=lambda x: x[:, 0] > 0)
      >>> float(ranges["kernel"]["input"])
      1.0
    """
    seen = observe(fn, reduce, where)

    @jax.jit
    def first(params: Params, inputs: tuple[Any, ...], mask: Any) -> dict[str, Any]:
        if mask is None:
            return seen(params, *inputs)[1]
        return observe_masked(fn, reduce, where, mask)(params, *inputs)[1]

    @jax.jit
    def following(total: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        return {site: reduce.merge(total[site], new[site]) for site in total}

    total, sites, left_out = None, {}, {}
    for batch, own in _with_masks(batches, mask):
        inputs = batch if isinstance(batch, tuple) else (batch,)
        new = first(params, inputs, own)
        if total is None:
            total = new
            sites = {site.name: site for site in trace(fn, params, *inputs).choose(where).values()}
            continue
        for name in [name for name in total if _shapes(total[name]) != _shapes(new[name])]:
            left_out[name] = _differ(name, total.pop(name), new[name], where)
        total = following(total, {name: new[name] for name in total})
    if total is None:
        raise DataError("there is no batch to calibrate with")
    kept = {name: site for name, site in sites.items() if name not in left_out}
    return Calibration(
        {site: reduce.finish(statistics) for site, statistics in total.items()}, kept, left_out
    )


def _with_masks(
    batches: Iterable[Any], mask: Masks | None
) -> Iterator[tuple[Any, jax.Array | None]]:
    """Yield each batch with its mask as booleans."""
    if mask is None or callable(mask) or isinstance(mask, str):
        for batch in batches:
            own = None if mask is None else mask(batch) if callable(mask) else _entry(batch, mask)
            yield batch, None if mask is None else jnp.asarray(own)
        return
    try:
        for batch, own in zip(batches, mask, strict=True):
            yield batch, jnp.asarray(own)
    except ValueError as error:
        raise DataError(
            "there must be a mask for each batch: give as many, or a function of a batch"
        ) from error


def _entry(batch: Batch, name: str) -> Any:
    inputs = batch if isinstance(batch, tuple) else (batch,)
    found = [each for each in inputs if isinstance(each, Mapping) and name in each]
    if not found:
        raise DataError(
            f"a batch has no entry {name!r} to be its mask: give mask=... a function of a batch, "
            "or one a batch"
        )
    return found[0][name]


def _shapes(tree: PyTree) -> list[Any]:
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def _differ(name: str, old: Any, new: Any, where: str | tuple[str, ...] | None) -> str:
    pair = next((a, b) for a, b in zip(_shapes(old), _shapes(new), strict=True) if a != b)
    why = f"its statistics have the shape {pair[0]} for one batch and {pair[1]} for another, and cannot be merged"
    if where is not None:
        raise ShapeError(
            f"site {name!r}: {why}; leave it out of where={where!r}, or give batches of one shape"
        )
    return why
