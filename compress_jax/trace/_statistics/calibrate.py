"""Run a function and return statistics of the operands at its sites: `calibrate` and `observe`.

A mask of padding is a mask of inputs. `MaskDomain` follows its axes through the computation, so
that `masks_of` can give every site the mask of its operands.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.typing import ArrayLike

from compress_jax.core.errors import DataError, ShapeError
from compress_jax.core.paths import Patterns
from compress_jax.core.types import Array, Aval, Batch, ModelFn, Params, PyTree
from compress_jax.trace._groups.analyze import Walk
from compress_jax.trace._groups.axes import Axis, Dims, Leaf
from compress_jax.trace._jaxpr.evaluate import Hooks, Statistics, Values, bind
from compress_jax.trace._jaxpr.find_sites import Traced, trace
from compress_jax.trace._jaxpr.interpret import ConstantValue, Where, interpret
from compress_jax.trace._jaxpr.primitives import INDEX_REDUCTIONS, REDUCTIONS
from compress_jax.trace._jaxpr.rewrite import hooked
from compress_jax.trace._jaxpr.site import Position, Shape, Site
from compress_jax.trace._statistics.calibration import Calibration
from compress_jax.trace._statistics.reducer import Reducer

Observing: TypeAlias = Callable[..., tuple[PyTree, Statistics]]
"""``(params, *inputs) -> (out, {site name: statistics})``."""

Masks: TypeAlias = str | Callable[[Batch], Array] | Iterable[Array]
"""The name of a batch's entry, a function of a batch, or a mask for each batch."""

OperandMasks: TypeAlias = dict[int, jax.Array]
"""Which entries of a site's operands count, by index of the operand."""


def calibrate(
    fn: ModelFn,
    reduce: Reducer,
    params: Params,
    batches: Iterable[Batch],
    where: Patterns | None = None,
    *,
    mask: Masks | None = None,
) -> Calibration:
    """Return the finished statistics of many batches; memory does not grow with their number.

    Batches may differ in length. A site whose statistics then differ in shape (the scores of
    attention, whose shape holds the length) is left out, and listed as such; if ``where`` asks for
    it, that is an error.

    With a mask, examples or tokens that do not count enter no statistic, even if they are NaN: no
    maximum, histogram, moment, Gram matrix or count. The mask is followed along axes to every site;
    where it cannot be, the site is refused by name. The mask does not change the model: attention
    to padding is masked by the model itself.

    Args:
      fn: a pure function of params and one batch.
      reduce: what to observe.
      params: tree of arrays.
      batches: each the argument of ``fn`` after params; a tuple is several arguments.
      where: a glob, or several, over the names of sites; by default all.
      mask: which examples or tokens of a batch count: ``batch -> mask``, or a mask for each batch,
        or the name of an entry of batches that are dicts. Booleans (or numbers, of which 0 does not
        count) ``[batch]`` or ``[batch, sequence]``: the leading axes of the inputs that they mask;
        inputs with other leading axes have no mask.

    Returns:
      ``{site name: reduce.finish(statistics)}``, with the sites.

    Raises:
      DataError: if there is no batch, or not one mask for each.
      NoMatchError: if no site's name matches ``where``.
      ShapeError: if a mask fits no input, if what counts of a site is not known, or if statistics
        of a site that was asked for differ in shape from batch to batch.
      ArgumentError: if there is a mask and the reducer takes none.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> batches = [jnp.ones((4, 2)), -2 * jnp.ones((4, 2))]
      >>> absmax = cj.trace.reducers.absmax()
      >>> ranges = cj.trace.calibrate(fn, absmax, params, batches)
      >>> float(ranges["kernel"]["input"]), ranges.sites["kernel"].param_axes
      (2.0, (0,))
      >>> positive = lambda x: x[:, 0] > 0
      >>> ranges = cj.trace.calibrate(fn, absmax, params, batches, mask=positive)
      >>> float(ranges["kernel"]["input"])
      1.0
    """
    observed = observe(fn, reduce, where)

    @jax.jit
    def measure(params: Params, inputs: tuple[PyTree, ...], mask: jax.Array | None) -> Statistics:
        if mask is None:
            return observed(params, *inputs)[1]
        return observe_masked(fn, reduce, where, mask)(params, *inputs)[1]

    @jax.jit
    def merge(total: Statistics, new: Statistics) -> Statistics:
        return {site: reduce.merge(total[site], new[site]) for site in total}

    total = None
    sites: dict[str, Site] = {}
    left_out: dict[str, str] = {}
    for batch, own in _with_masks(batches, mask):
        inputs = batch if isinstance(batch, tuple) else (batch,)
        new = measure(params, inputs, own)
        if total is None:
            # The first batch decides which sites there are.
            total = new
            sites = {site.name: site for site in trace(fn, params, *inputs).choose(where).values()}
            continue
        # Attention scores have the length in their shape: batches of other lengths do not merge.
        for name in [name for name in total if _shapes(total[name]) != _shapes(new[name])]:
            left_out[name] = _refuse_or_explain(name, total.pop(name), new[name], where)
        total = merge(total, {name: new[name] for name in total})
    if total is None:
        raise DataError("there is no batch to calibrate with")
    kept = {name: site for name, site in sites.items() if name not in left_out}
    finished = {site: reduce.finish(statistics) for site, statistics in total.items()}
    return Calibration(finished, kept, left_out)


def _with_masks(
    batches: Iterable[Batch], mask: Masks | None
) -> Iterator[tuple[Batch, jax.Array | None]]:
    """Yield each batch with its mask as booleans."""
    if mask is None:
        for batch in batches:
            yield batch, None
        return
    if callable(mask) or isinstance(mask, str):
        for batch in batches:
            own = _entry(batch, mask) if isinstance(mask, str) else mask(batch)
            yield batch, jnp.asarray(own)
        return
    # No try: what the caller's iterators raise is theirs.
    for batch, own in itertools.zip_longest(batches, mask, fillvalue=_Missing()):
        if isinstance(batch, _Missing) or isinstance(own, _Missing):
            raise DataError(
                "there must be a mask for each batch: give as many, or a function of a batch"
            )
        yield batch, jnp.asarray(own)


class _Missing:
    """Stands for the batch or the mask that there is none of."""


def _entry(batch: Batch, name: str) -> Array:
    inputs = batch if isinstance(batch, tuple) else (batch,)
    found = [each for each in inputs if isinstance(each, Mapping) and name in each]
    if not found:
        raise DataError(
            f"a batch has no entry {name!r} to be its mask: give mask=... a function of a batch, "
            "or one a batch"
        )
    return found[0][name]


def _shapes(tree: PyTree) -> list[Shape]:
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def _refuse_or_explain(name: str, old: PyTree, new: PyTree, where: Patterns | None) -> str:
    """Return why statistics that differ in shape are left out; raise if they were asked for."""
    one, other = next((a, b) for a, b in zip(_shapes(old), _shapes(new), strict=True) if a != b)
    why = (
        f"its statistics have the shape {one} for one batch and {other} for another, and cannot "
        "be merged"
    )
    if where is not None:
        raise ShapeError(
            f"site {name!r}: {why}; leave it out of where={where!r}, or give batches of one shape"
        )
    return why


def observe(
    fn: ModelFn,
    reduce: Callable[[Site, jax.Array, jax.Array], PyTree],
    where: Patterns | None = None,
) -> Observing:
    """Return ``(params, *inputs) -> (out, {site name: statistics})``.

    ``reduce`` runs inside the computation, so a Gram matrix or a histogram is made without ever
    keeping the activations. A site inside ``scan`` returns its statistics stacked, one entry for
    each iteration (`Site.loops` is the leading shape); inside ``shard_map``, one for each device.
    Inside a ``while`` loop the iterations are merged by ``reduce.merge``; without one the last
    remains. Where a branch of ``cond`` was not taken, statistics are NaN if floating, else 0.

    Args:
      fn: a pure function of params and inputs.
      reduce: ``(site, lhs, rhs) -> tree of arrays``, or one of the ready `Reducer`.
      where: a glob, or several, over the names of sites; by default all.

    Returns:
      The observing function; jit it. ``out`` is that of ``fn`` bit for bit. Nothing is
      differentiated through statistics.

    Raises:
      NoMatchError: when called, if no site's name matches ``where``.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> observed = cj.trace.observe(fn, lambda site, lhs, rhs: jnp.abs(lhs).max())
      >>> out, statistics = observed({"kernel": jnp.ones((2, 2))}, jnp.array([[-3.0, 1.0]]))
      >>> float(statistics["kernel"])
      3.0
    """
    return _observing(fn, reduce, where, None)


def _observing(
    fn: ModelFn,
    reduce: Callable[..., PyTree],
    where: Patterns | None,
    masks: dict[str, OperandMasks] | None,
) -> Observing:
    def apply(
        site: Site, eqn: JaxprEqn, operands: list[jax.Array], own: OperandMasks | None
    ) -> Values:
        # The third operand of a ragged product, its group sizes, is not observed.
        lhs = jax.lax.stop_gradient(operands[0])
        rhs = jax.lax.stop_gradient(operands[1])
        statistics = reduce(site, lhs, rhs, own) if own else reduce(site, lhs, rhs)
        return bind(eqn, operands), {site.name: jax.tree.map(_strong, statistics)}

    def hooks(sites: dict[Position, Site]) -> Hooks:
        # A plain function has no merge: in a while loop the last iteration's statistics remain.
        return Hooks(sites, apply, getattr(reduce, "merge", lambda old, new: new))

    return hooked(fn, hooks, where, masks)


def _masks(padding: "Padding", site: Site, mask: jax.Array) -> OperandMasks:
    """Return the masks of the activations, with the loops around the site as leading axes."""
    loops = len(site.loops)
    masks = {}
    for index in site.inputs.values():
        place = padding.operand(site, index)
        if place is not None:
            own = place(mask)  # [*loops or 1, *axes of the operand or 1]
            # Whole along the loops, each of which takes its own slice.
            masks[index] = jnp.broadcast_to(own, (*site.loops, *own.shape[loops:]))
    return masks


def _strong(x: ArrayLike) -> jax.Array:
    """Drop the weak type of Python's numbers: results of branches and iterations must agree."""
    return jax.lax.convert_element_type(x, jnp.result_type(x))


def observe_masked(
    fn: ModelFn, reduce: Reducer, where: Patterns | None, mask: jax.Array
) -> Observing:
    """Return `observe` of the entries that a mask of inputs does not leave out.

    Args:
      fn: see `observe`.
      reduce: a reducer that takes masks.
      where: see `observe`.
      mask: see `masks_of`.

    Returns:
      The observing function; when called it raises a ShapeError that names a site if the mask
      cannot be followed to it.
    """

    def run(params: Params, *inputs: PyTree) -> tuple[PyTree, Statistics]:
        names = [site.name for site in trace(fn, params, *inputs).choose(where).values()]
        masks = masks_of(fn, names, mask, params, *inputs)
        return _observing(fn, reduce, where, masks)(params, *inputs)

    return run


def masks_of(
    fn: ModelFn, names: Iterable[str], mask: Array, params: Params, *inputs: PyTree
) -> dict[str, OperandMasks]:
    """Return the masks of the activations of some sites, where they depend on masked inputs.

    Args:
      fn: see `observe`.
      names: names of the sites.
      mask: booleans or numbers, of which 0 does not count, with the leading axes of those inputs
        that they mask.
      params: tree of arrays.
      inputs: trees of arrays.

    Returns:
      ``{site name: {operand: booleans}}``, the loops around a site as leading axes.

    Raises:
      ShapeError: if the mask fits no input, or cannot be followed to a site.
    """
    mask = jnp.asarray(mask)
    mask = mask if mask.dtype == bool else mask != jnp.zeros((), mask.dtype)
    # An input of fewer axes than the mask (a label for each example) has the mask's first ones.
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)]
    masked = [len(shape) > 0 and shape[: mask.ndim] == mask.shape[: len(shape)] for shape in shapes]
    if mask.ndim == 0 or not any(masked):
        raise ShapeError(
            f"a mask of shape {mask.shape} fits the leading axes of no input, which have the "
            f"shapes {shapes}"
        )
    traced = trace(fn, params, *inputs)
    padding = Padding(traced, mask.shape, masked)
    sites = {site.name: site for site in traced.sites.values()}
    return {name: _masks(padding, sites[name], mask) for name in names}


# What a primitive does to the axes of the mask that its result no longer has. Any other mixes their
# entries with those of other positions.
SUMMED = REDUCTIONS | INDEX_REDUCTIONS | {"dot_general", "conv_general_dilated"}
PICKED = ("slice", "dynamic_slice", "squeeze", "gather")  # one index, where the size is 1 then
REORDERED = {"sort": "dimension", "rev": "dimensions"}  # the parameter that names the axes
SCANNED = "a scan runs along it"


class LostAxis(NamedTuple):
    """An axis of the mask that a value no longer has.

    Attributes:
      reason: why.
      loop: the loop that runs along it, if one does.
      axis: which axis of the mask it is then.
    """

    reason: str
    loop: int | None = None
    axis: int | None = None


class Followed(NamedTuple):
    """An abstract value: its axes, and the axes of the mask that it no longer has.

    Attributes:
      dims: the axes.
      lost: None if the value does not depend on masked inputs.
    """

    dims: Dims
    lost: frozenset[LostAxis] | None


@dataclass
class MaskDomain:
    """The domain of axes (`Walk`), with the axes of the mask.

    Attributes:
      mask: the axes of the mask.
      walk: the axes known so far.
      operands: by position, the operands of an equation.
    """

    mask: Dims = ()
    walk: Walk = field(default_factory=Walk)
    operands: dict[Position, list[Followed]] = field(default_factory=dict)

    def constant(self, aval: Aval, value: ConstantValue) -> Followed:
        """Return the value of a literal or a captured array."""
        return Followed(self.walk.constant(aval, value), None)

    def join(self, a: Followed, b: Followed) -> Followed:
        """Join two abstract values."""
        return Followed(self.walk.join(a.dims, b.dims), _all_lost((a, b)))

    def same(self, a: Followed, b: Followed) -> bool:
        """Tell whether two abstract values are equal; to join axes has changed both already."""
        return a.lost == b.lost

    def unstack(self, a: Followed, loop: int) -> Followed:
        """Return one slice along the first axis."""
        lost = a.lost
        # The loop runs along an axis of the mask: the slice lacks it, and the loop has it instead.
        if lost is not None and self.holds(a.dims[0]):
            find = self.walk.axes.find
            which = [i for i, axis in enumerate(self.mask) if find(axis) == find(a.dims[0])]
            # A part of an axis, or one of two that are the same, cannot be put back.
            own = LostAxis(SCANNED, loop, which[0]) if len(which) == 1 else LostAxis(SCANNED)
            lost |= {own}
        return Followed(self.walk.unstack(a.dims, loop), lost)

    def stack(self, a: Followed, length: int) -> Followed:
        """Return slices put together; an axis of the mask that the loop ran along is back."""
        dims = self.walk.stack(a.dims, length)
        scanned = [each for each in a.lost or () if each.axis is not None]
        scanned = [each for each in scanned if self.mask[each.axis or 0].size == length]
        # With two candidates it is not known which one this loop ran along.
        if a.lost is None or len(scanned) != 1 or scanned[0].axis is None:
            return Followed(dims, a.lost)
        return Followed((self.mask[scanned[0].axis], *dims[1:]), a.lost - {scanned[0]})

    def reshard(self, a: Followed, aval: Aval) -> Followed:
        """Return a device's shard, or the whole."""
        return Followed(self.walk.reshard(a.dims, aval), a.lost)

    def equation(self, eqn: JaxprEqn, args: list[Followed], where: Where) -> Sequence[Followed]:
        """Return the results of an equation, and note its operands."""
        results = self.walk.equation(eqn, [arg.dims for arg in args], where)
        self.operands[where.position] = args
        lost = _all_lost(args)
        if lost is not None:
            reason = self._lost_by(eqn, args, results)
            lost = lost if reason is None else lost | {LostAxis(reason)}
        return [Followed(dims, lost) for dims in results]

    def holds(self, axis: Axis) -> bool:
        """Tell whether an axis is one of the mask's, or has a part of one."""
        leaves = set(self.walk.axes.leaves(axis))
        return any(leaves & set(self.walk.axes.leaves(one)) for one in self.mask)

    def _lost_by(self, eqn: JaxprEqn, args: list[Followed], results: Sequence[Dims]) -> str | None:
        """Return how an equation loses an axis of the mask, if it does."""
        name = eqn.primitive.name
        # The axes are still there, but their entries are those of other positions.
        if name in REORDERED:
            along = eqn.params[REORDERED[name]]
            along = (along,) if isinstance(along, int) else along
            for dims in (arg.dims for arg in args if arg.dims):
                if any(self.holds(dims[i]) for i in along):
                    return f"{name} reorders it"
        if name == "slice" and self._skips(eqn, args[0].dims):
            return "slice leaves out some of it"
        if name in SUMMED or (name in PICKED and _all_or_one(eqn, args[0].dims)):
            return None
        # An axis is lost if no leaf of it is in a result.
        leaves = self.walk.axes.leaves
        left: set[Leaf] = set()
        for axis in itertools.chain.from_iterable(results):
            left.update(leaves(axis))
        masked = itertools.chain.from_iterable(arg.dims for arg in args if arg.lost is not None)
        gone = [axis for axis in masked if self.holds(axis) and not set(leaves(axis)) & left]
        return f"{name} mixes or reorders it" if gone else None

    def _skips(self, eqn: JaxprEqn, dims: Dims) -> bool:
        """Tell whether a slice takes an axis of the mask in steps."""
        steps = eqn.params["strides"]
        if steps is None or not dims:
            return False
        return any(step > 1 and self.holds(axis) for axis, step in zip(dims, steps, strict=True))


def _all_or_one(eqn: JaxprEqn, dims: Dims) -> bool:
    """Tell whether what an equation leaves of each axis is all of it, or one index."""
    out = getattr(eqn.outvars[0].aval, "shape", ())
    if len(out) != len(dims):
        return len(out) < len(dims)
    return all(new in (1, axis.size) for new, axis in zip(out, dims, strict=True))


def _all_lost(values: Sequence[Followed]) -> frozenset[LostAxis] | None:
    known = [value.lost for value in values if value.lost is not None]
    return frozenset().union(*known) if known else None


Label = tuple[int, int]
"""``(axis of the mask, factor of that axis)``: a part of the mask."""
Factors = list[tuple[int, Label | None]]
"""``(size, part of the mask)`` of each factor of an operand's axis."""


class Padding:
    """The masks of the operands of every site, made from a mask of some inputs.

    Args:
      traced: the function.
      shape: shape of the mask.
      masked: for each leaf of the inputs, whether it is masked.
    """

    def __init__(self, traced: Traced, shape: Shape, masked: Sequence[bool]):
        """Follow the axes."""
        self.domain = MaskDomain()
        walk = self.domain.walk
        # Masked inputs have the mask's own axes in front; what unifies with them is followed.
        self.domain.mask = tuple(walk.axes.leaf(size) for size in shape)
        params = [Followed(walk.fresh(leaf), None) for leaf in traced.params.values()]
        inputs = []
        rest = traced.jaxpr.jaxpr.invars[len(params) :]
        for var, has_mask in zip(rest, masked, strict=True):
            dims = walk.fresh(var.aval)
            if has_mask:
                dims = (*self.domain.mask[: len(dims)], *dims[len(shape) :])
            inputs.append(Followed(dims, frozenset() if has_mask else None))
        interpret(self.domain, traced.jaxpr, [*params, *inputs])

    def operand(self, site: Site, index: int) -> Callable[[jax.Array], jax.Array] | None:
        """Return how the mask of the inputs becomes that of an operand.

        Args:
          site: the contraction.
          index: 0 or 1, which operand.

        Returns:
          The function, to booleans with the axes of the loops around the site, then those of the
          operand, 1 along axes that the mask does not depend on; None if the operand does not
          depend on masked inputs.

        Raises:
          ShapeError: if the mask cannot be followed to the operand.
        """
        value = self.domain.operands[site.position][index]
        if value.lost is None:
            return None
        # The mask's axes in the operand: those a loop runs along, then those of its own axes.
        scanned = {each.loop: (each.axis, 0) for each in value.lost if each.axis is not None}
        loops: list[Factors] = [[(n, scanned.get(loop))] for loop, n in enumerate(site.loops)]
        axes = [self._factors(site, axis) for axis in value.dims]
        unknown = sorted({each.reason for each in value.lost if each.axis is None})
        if unknown:
            raise self._refusal(site, ", ".join(unknown))
        labels = self._labels()
        factors = itertools.chain(*loops, *axes)
        found = {label for _, label in factors if label is not None}
        if any(label[0] == 0 and label not in found for label in labels):
            raise self._refusal(site, "no axis of it is that of the examples")
        if site.kind == "conv" and index == 0:
            self._require_positions(site, axes)
        sizes = [part.size for part in self._parts().values()]
        return lambda mask: _placed(mask.reshape(sizes), [*loops, *axes], labels)

    def _parts(self) -> dict[Label, Axis]:
        """Return the factors of the mask's axes; those of size 1 are left out."""
        parts = {}
        for i, axis in enumerate(self.domain.mask):
            for j, part in enumerate(self.domain.walk.axes.factors(axis)):
                if part.size > 1:
                    parts[i, j] = part
        return parts

    def _labels(self) -> list[Label]:
        return list(self._parts())

    def _factors(self, site: Site, axis: Axis) -> Factors:
        """Return the size of each factor of an axis, and which part of the mask it is."""
        axes = self.domain.walk.axes
        labels = {part: label for label, part in self._parts().items()}
        factors: Factors = []
        for factor in axes.factors(axis):
            whole = axes.find(factor)
            if whole not in labels and self.domain.holds(whole):
                raise self._refusal(
                    site, "only a part of it is there, or it is put together with something else"
                )
            factors.append((factor.size, labels.get(whole)))
        return factors

    def _require_positions(self, site: Site, axes: list[Factors]) -> None:
        """Raise unless the windows along a masked axis are as many as the mask's positions.

        A window belongs to the position it stands at.
        """
        numbers = site.params["dimension_numbers"]
        strides = site.params["window_strides"]
        space = zip(numbers.lhs_spec[2:], numbers.out_spec[2:], strides, strict=True)
        for image, out, stride in space:
            masked = any(label is not None for _, label in axes[image])
            if masked and (stride != 1 or site.lhs_shape[image] != site.out_shape[out]):
                reason = "its windows are fewer or more than the positions of the mask"
                raise self._refusal(site, reason)

    def _refusal(self, site: Site, reason: str) -> ShapeError:
        mask = tuple(axis.size for axis in self.domain.mask)
        return ShapeError(
            f"what counts of the input of site {site.name!r}, {site.lhs_shape} x "
            f"{site.rhs_shape}, is not known: of the mask {mask}, {reason}; leave the site out by "
            "where=..., or calibrate with batches that have no padding"
        )


def _placed(mask: jax.Array, axes: list[Factors], labels: list[Label]) -> jax.Array:
    """Return the mask in the axes of an operand.

    A part of the mask may be in several of the operand's axes (positions by positions, in
    attention): an entry counts if each of them does.

    Args:
      mask: booleans, an axis for each label.
      axes: the factors of each of the operand's axes.
      labels: the parts of the mask.

    Returns:
      Booleans, an axis for each of the operand's, 1 where the mask does not depend on it.
    """
    # All factors of all axes in a row, and the places among them of each part of the mask.
    flat: list[tuple[int, int, Label | None]] = []
    for axis, factors in enumerate(axes):
        flat += [(axis, size, label) for size, label in factors]
    places: dict[Label, list[int]] = {label: [] for label in labels}
    for i, (*_, label) in enumerate(flat):
        if label is not None:
            places[label].append(i)
    gone = tuple(i for i, label in enumerate(labels) if not places[label])
    left = [label for label in labels if places[label]]
    # What has no axis here counts if any of its entries does.
    mask = mask.any(axis=gone)
    # Once with each part at its first place, once at its second, ...: all of them must count.
    uses = max((len(places[label]) for label in left), default=1)
    result = None
    for use in range(uses):
        at = [places[label][min(use, len(places[label]) - 1)] for label in left]
        order = sorted(range(len(at)), key=lambda i: at[i])  # parts as the operand has them
        one = _spread(mask.transpose(order), flat, sorted(at), len(axes))
        result = one if result is None else result & one
    assert result is not None
    return result


def _spread(
    mask: jax.Array, flat: list[tuple[int, int, Label | None]], at: list[int], axes: int
) -> jax.Array:
    """Return a mask of some factors with an axis for each of the operand's.

    Args:
      mask: booleans, an axis for each entry of ``at``.
      flat: the axis of the operand, the size and the label of each factor.
      at: the factors that the mask has.
      axes: how many axes the operand has.

    Returns:
      Booleans, of size 1 along the operand's axes that have none of the factors.
    """
    masked = {flat[i][0] for i in at}
    # [factors], then each masked axis whole, then factors merged to the operand's axes.
    thin = mask.reshape([size if i in at else 1 for i, (_, size, _) in enumerate(flat)])
    full = jnp.broadcast_to(thin, [size if axis in masked else 1 for axis, size, _ in flat])
    sizes = [1] * axes
    for axis, size, _ in flat:
        if axis in masked:
            sizes[axis] *= size
    return full.reshape(sizes)
