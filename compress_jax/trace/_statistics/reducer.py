"""A reducer: the statistics of the operands at a site, how they merge, and what they end as.

`per_input` makes one from a measure of a single activation; `channels` and `windows` lay an operand
out as a `Table`, one row for each vector that is contracted.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from compress_jax.core.errors import ArgumentError
from compress_jax.core.types import PyTree
from compress_jax.trace._jaxpr.site import Site

INT32_MAX = 2**31 - 1


class Counted(Protocol):
    """Statistics of rows: a NamedTuple of arrays, among them their number."""

    @property
    def count(self) -> jax.Array:
        """How many rows there were: int32, a scalar, or one for each iteration of the loops."""
        ...


S = TypeVar("S", bound=Counted)


class Reducer(NamedTuple):
    """Pure functions that make one statistic over any number of batches; an argument of `observe`.

    Attributes:
      reduce: ``(site, lhs, rhs) -> statistics``, a tree of arrays, of one batch at one site.
      merge: ``(old, new) -> statistics`` of both, of one site. Takes statistics stacked over loops
        as well.
      finish: ``statistics -> result``, once all batches are in.
      masked: ``(site, lhs, rhs, masks) -> statistics`` of the entries that count. ``masks`` has
        booleans for the operands with padding, by their index: of the operand's rank, 1 along axes
        that the mask does not depend on. None refuses masks.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> largest = cj.trace.Reducer(lambda site, lhs, rhs: jnp.abs(lhs).max(), jnp.maximum)
      >>> batches = [jnp.ones((4, 2)), -2 * jnp.ones((4, 2))]
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> found = cj.trace.calibrate(fn, largest, {"kernel": jnp.ones((2, 3))}, batches)
      >>> float(found["kernel"])
      2.0
    """

    reduce: Callable[[Site, jax.Array, jax.Array], PyTree]
    merge: Callable[[PyTree, PyTree], PyTree]
    finish: Callable[[PyTree], PyTree] = lambda statistics: statistics
    masked: Callable[[Site, jax.Array, jax.Array, dict[int, jax.Array]], PyTree] | None = None

    def __call__(
        self, site: Site, lhs: jax.Array, rhs: jax.Array, masks: dict[int, jax.Array] | None = None
    ) -> PyTree:
        """Return ``reduce(site, lhs, rhs)``, or with masks the statistics of what counts."""
        if not masks:
            return self.reduce(site, lhs, rhs)
        if self.masked is None:
            raise ArgumentError(
                "this reducer takes no masks, so padding would be in its statistics: make it by "
                "reducers.per_input with measure(site, index, x, mask), or as Reducer(..., "
                "masked=(site, lhs, rhs, masks) -> statistics)"
            )
        return self.masked(site, lhs, rhs, masks)


def nan_if_empty(statistics: S) -> S:
    """Return statistics with NaN for every floating entry where ``count`` is 0.

    Args:
      statistics: NamedTuple of arrays with a field ``count``, which may be stacked over loops.

    Returns:
      The same kind of tree.
    """

    def fill(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.where(expand_count(statistics.count, x) == 0, jnp.nan, x)

    return jax.tree.map(fill, statistics)


def per_input(
    measure: Callable[..., S],
    combine: Callable[[S, S], S],
    result: Callable[[S], PyTree] = nan_if_empty,
) -> Reducer:
    """Return the reducer that measures each activation of a site by itself.

    Its statistics are ``{"input": measured}`` beside a parameter, else
    ``{"lhs": measured, "rhs": measured}`` (`Site.inputs`). Statistics with ``count`` 0 are neutral:
    the site did not run (it is in a branch that was not taken), and whatever else they hold is
    ignored. Arrays that carry an explicit sharding are measured under an automatic one.

    Args:
      measure: ``(site, index of the operand, operand, mask) -> NamedTuple`` of arrays, among them
        ``count``, int32 scalar. The mask is what `channels` and `windows` take, often None. A
        measure without this argument refuses masks.
      combine: ``(old, new) -> NamedTuple`` of both. In either, all arrays may have the axes of
        loops in front.
      result: ``NamedTuple -> result``; by default `nan_if_empty`.

    Returns:
      The reducer.

    Example:
      >>> from typing import NamedTuple
      >>> import jax, jax.numpy as jnp
      >>> import compress_jax as cj
      >>> class Largest(NamedTuple):
      ...     value: jax.Array
      ...     count: jax.Array
      >>> def larger(old, new):
      ...     return Largest(jnp.maximum(old.value, new.value), old.count + new.count)
      >>> measure = lambda site, index, x: Largest(x.max(), jnp.int32(1))
      >>> largest = cj.trace.reducers.per_input(measure, larger)
      >>> batches = [jnp.ones((3, 2)), jnp.zeros((3, 2))]
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> found = cj.trace.calibrate(fn, largest, {"kernel": jnp.eye(2)}, batches)
      >>> found["kernel"]["input"]
      Largest(value=Array(1., dtype=float32), count=Array(2, dtype=int32))
    """
    takes_mask = len(inspect.signature(measure).parameters) > 3

    def measured(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> S:
        def run(x: jax.Array, mask: jax.Array | None = None) -> S:
            return measure(site, index, x, mask) if takes_mask else measure(site, index, x)

        return _unsharded(run, x, mask)

    def masked(
        site: Site, lhs: jax.Array, rhs: jax.Array, masks: dict[int, jax.Array]
    ) -> dict[str, S]:
        operands = (jnp.asarray(lhs), jnp.asarray(rhs))
        return {
            key: measured(site, index, operands[index], masks.get(index))
            for key, index in site.inputs.items()
        }

    def reduce(site: Site, lhs: jax.Array, rhs: jax.Array) -> dict[str, S]:
        return masked(site, lhs, rhs, {})

    def merge(old: dict[str, S], new: dict[str, S]) -> dict[str, S]:
        return {key: _skipping_empty(combine, old[key], new[key]) for key in old}

    def finish(statistics: dict[str, S]) -> dict[str, PyTree]:
        return {key: result(each) for key, each in statistics.items()}

    return Reducer(reduce, merge, finish, masked if takes_mask else None)


def add_counts(old: jax.Array, new: jax.Array) -> jax.Array:
    """Return the sum of two counts, int32; it stays at 2**31 - 1 rather than overflow.

    Example:
      >>> int(add_counts(jnp.int32(2**31 - 3), jnp.int32(9))) == 2**31 - 1
      True
    """
    # The sum itself would wrap around, so it is not compared.
    return jnp.where(old > INT32_MAX - new, INT32_MAX, old + new)


def expand_count(count: jax.Array, x: jax.Array) -> jax.Array:
    """Return a count, one for each iteration of the loops, so that it broadcasts against ``x``."""
    return count.reshape(*count.shape, *(1,) * (x.ndim - count.ndim))  # [*loops, 1, ..., 1]


def _skipping_empty(combine: Callable[[S, S], S], old: S, new: S) -> S:
    def choose(both: jax.Array, old_leaf: jax.Array, new_leaf: jax.Array) -> jax.Array:
        # The other one's statistics where one of the two is empty: those of a branch that was not
        # taken are NaN, which no sum forgets.
        some = jnp.where(expand_count(old.count, both) == 0, new_leaf, both)
        return jnp.where(expand_count(new.count, both) == 0, old_leaf, some)

    return jax.tree.map(choose, combine(old, new), old, new)


def _unsharded(measure: Callable[..., PyTree], x: jax.Array, mask: jax.Array | None) -> PyTree:
    """Measure under automatic shardings, with a replicated result.

    Where shardings are explicit, sums over a sharded axis would be ambiguous.
    """
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    given = (x,) if mask is None else (x, mask)
    if not explicit:
        return measure(*given)
    with jax.sharding.use_abstract_mesh(mesh):
        automatic = jax.sharding.auto_axes(measure, axes=explicit, out_sharding=PartitionSpec())
        return automatic(*given)


class Table(NamedTuple):
    """An operand of a site: one row for each vector that is contracted, a column for each entry.

    The axes of the values are in the order ``[*batch, *rows, *columns]``; none is merged, so none
    loses its sharding. `reduced` and `count` leave out what the mask does.

    Attributes:
      values: float32; zeros where the mask is False, even where they were NaN.
      batch: how many axes are of the batch: each of their indices has a table of its own.
      columns: how many axes are of columns.
      mask: booleans, which entries count, of the rank of ``values``, 1 along axes that it does not
        depend on; None: all.
    """

    values: jax.Array
    batch: int
    columns: int
    mask: jax.Array | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        """The axes of rows."""
        return tuple(range(self.batch, self.values.ndim - self.columns))

    @property
    def count(self) -> jax.Array:
        """How many rows count: int32 scalar; of tables whose numbers differ, the largest."""
        return self.counts if self.mask is None else self.counts.max()

    @property
    def counts(self) -> jax.Array:
        """How many rows of each table count: int32, a scalar or ``[*batch]``."""
        rows = math.prod(self.values.shape[axis] for axis in self.rows)
        if self.mask is None:
            return jnp.int32(min(rows, INT32_MAX))
        columns = tuple(range(self.values.ndim - self.columns, self.values.ndim))
        # A row counts if any entry of it does: [*batch, *rows, *columns] -> [*batch].
        count = self.mask.any(axis=columns).sum(self.rows, dtype=jnp.int32)
        # A mask of size 1 along an axis stands for as many rows as the values have there.
        sizes = [(self.values.shape[axis], self.mask.shape[axis]) for axis in self.rows]
        repeated = math.prod(whole // own for whole, own in sizes)
        return jnp.where(count > INT32_MAX // max(repeated, 1), INT32_MAX, count * repeated)

    def reduced(
        self,
        reduction: Callable[..., jax.Array],
        values: jax.Array,
        start: float,
        axes: tuple[int, ...] | None = None,
    ) -> jax.Array:
        """Return ``reduction(values, axes, initial=start)`` over what counts.

        Args:
          reduction: ``jnp.max`` or the like.
          values: of the table's shape.
          start: its neutral element, which replaces what does not count.
          axes: those to reduce; by default all.

        Returns:
          The reduced values.
        """
        counted = values if self.mask is None else jnp.where(self.mask, values, start)
        return reduction(counted, axis=axes, initial=start)

    def flat(self, x: jax.Array, repeats: int = 1) -> jax.Array:
        """Merge the column axes of ``[*batch, *columns (repeats times)]``, rows being reduced."""
        width = math.prod(self.values.shape[self.values.ndim - self.columns :])
        return x.reshape(*x.shape[: self.batch], *(width,) * repeats)  # [*batch, k (, k)]


def channels(site: Site, index: int, x: jax.Array, mask: jax.Array | None = None) -> Table:
    r"""Return an operand as the table of its channels: every entry of the operand is in it once.

    Columns are the contracting axes, in the order of ``site.contracting``, which pairs them with
    the other operand's. In a convolution's input they are its channels, those of all groups side by
    side, whatever windows an entry falls into.

    Args:
      site: the contraction.
      index: 0 for the first operand, 1 for the second.
      x: the operand.
      mask: booleans of the rank of ``x``, which entries count, 1 along axes that it does not depend
        on; None is all.

    Returns:
      ``[*batch axes, *all others, *contracting axes]``. The kernel of a grouped convolution has its
      groups as batch axis.

    Example:
      >>> from compress_jax.trace import sites
      >>> x = jnp.ones((2, 5, 3))
      >>> (site,) = sites(lambda w, x: x @ w, jnp.ones((3, 4)), x)
      >>> channels(site, 0, x).rows
      (0, 1)
    """
    batch = site.batch[index]
    columns = site.contracting[index]
    # A convolution contracts the kernel's window as well, group by group.
    if site.kind == "conv" and index == 1:
        return _kernel(site, x)
    # [*batch, *rows, *columns]
    rows = (axis for axis in range(x.ndim) if axis not in batch + columns)
    order = (*batch, *rows, *columns)
    mask = None if mask is None else mask.transpose(order)
    return _table(x.transpose(order), len(batch), len(columns), mask)


def windows(site: Site, index: int, x: jax.Array, mask: jax.Array | None = None) -> Table:
    r"""Return an operand as the table whose product with the other operand's is the contraction.

    The same as `channels`, but for a convolution's input. There a row is a window: for each example
    and each position of the output, the entries that the kernel is multiplied by (:math:`y = X W`,
    "im2col"), with padding, strides and holes of either dilation as the site has them. Columns are
    in the order of ``site.contracting[1]``, so that column j is multiplied by row j of
    ``jnp.moveaxis(kernel, axes, range(len(axes))).reshape(k, -1)``, ``axes`` being
    ``site.contracting[1]``.

    In a grouped or depthwise convolution each group has its own table, with the columns of its own
    channels.

    Args:
      site: the contraction.
      index: 0 for the first operand, 1 for the second.
      x: the operand.
      mask: see `channels`. A window counts as a whole if the position that it stands at does: it
        may reach into padding, as it does in the model, where what is not finite is taken as 0.

    Returns:
      ``[*batch axes, *all others, *contracting axes]``; for a convolution's input
      ``[groups (if more than one), examples, *positions, *input channels and window]``.
    """
    if site.kind != "conv" or index == 1:
        return channels(site, index, x, mask)
    examples, features = _groups(site)
    lhs, rhs, *_ = site.params["dimension_numbers"]
    rows = None
    if mask is not None:
        # NaN in padding that a counted window reaches into would spoil the window.
        x = jnp.where(mask | jnp.isfinite(x), x, jnp.zeros((), x.dtype))
        rows = _window_mask(mask.transpose(lhs), examples, features)
    x = _slide(site, x.transpose(lhs))  # [example, channel, *(position, offset)]
    x = x.reshape(examples, x.shape[0] // examples, features, x.shape[1] // features, *x.shape[2:])
    # [groups of examples, example, groups of features, channel, *(position, offset)]
    columns = [3 if axis == rhs[1] else 5 + 2 * rhs[2:].index(axis) for axis in site.contracting[1]]
    x = x.transpose(0, 2, 1, *range(4, x.ndim, 2), *columns)
    # [groups of examples, groups of features, example, *position, *columns]
    return _grouped(x.reshape(examples * features, *x.shape[2:]), len(columns), rows)


def _window_mask(mask: jax.Array, examples: int, features: int) -> jax.Array:
    """Return which windows count, by the mask of the image.

    Args:
      mask: ``[example, channel, *space]``; its positions are those of the output too, or of size 1.
      examples: groups of examples.
      features: groups of channels.

    Returns:
      Booleans ``[groups, examples, *positions]``.
    """
    mask = mask.any(axis=1)  # [example, *space]
    each = max(mask.shape[0] // examples, 1)
    # [groups of examples, groups of features (1), example, *space]
    mask = mask.reshape(mask.shape[0] // each, 1, each, *mask.shape[1:])
    return jnp.repeat(mask, features, axis=1).reshape(-1, each, *mask.shape[3:])


def _slide(site: Site, x: jax.Array) -> jax.Array:
    """Return the windows of an image ``[example, channel, *space]``, an axis for each offset.

    The result is ``[example, channel, *(position, offset)]``.
    """
    p = site.params
    padded = zip(p["padding"], p["lhs_dilation"], strict=True)
    holes = [(low, high, dilation - 1) for (low, high), dilation in padded]
    # A dilated input has holes of zeros between its entries; negative padding crops.
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *holes])
    window = [site.rhs_shape[axis] for axis in p["dimension_numbers"].rhs_spec[2:]]
    along = zip(window, p["window_strides"], p["rhs_dilation"], strict=True)
    for dimension, (size, stride, dilation) in enumerate(along):
        axis = 2 + 2 * dimension
        starts = range(0, dilation * size, dilation)
        length = x.shape[axis] - starts[-1]
        # One slice for each offset in the window: the size of the input, as often as it is long.
        slices = [jax.lax.slice_in_dim(x, i, i + length, stride, axis) for i in starts]
        x = jnp.stack(slices, axis + 1)
    return x


def _kernel(site: Site, x: jax.Array) -> Table:
    """Return a convolution's second operand as a table: a row for each output channel."""
    groups = math.prod(_groups(site))
    out = site.params["dimension_numbers"].rhs_spec[0]
    x = x.transpose(out, *site.contracting[1])  # [out, *input channels and window]
    return _grouped(x.reshape(groups, x.shape[0] // groups, *x.shape[1:]), x.ndim - 1)


def _grouped(x: jax.Array, columns: int, rows: jax.Array | None = None) -> Table:
    """Return the table of ``[groups, *rows, *columns]``; a single group needs no axis."""
    mask = None if rows is None else rows.reshape(*rows.shape, *(1,) * columns)
    if x.shape[0] > 1:
        return _table(x, 1, columns, mask)
    return _table(x[0], 0, columns, None if mask is None else mask[0])


def _table(values: jax.Array, batch: int, columns: int, mask: jax.Array | None) -> Table:
    values = values.astype(jnp.float32)
    # Selected, not multiplied: 0 * NaN is NaN.
    if mask is not None:
        values = jnp.where(mask, values, 0.0)
    return Table(values, batch, columns, mask)


def _groups(site: Site) -> tuple[int, int]:
    """Return into how many groups a convolution splits its examples, and its channels."""
    return site.params["batch_group_count"], site.params["feature_group_count"]
