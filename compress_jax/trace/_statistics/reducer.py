"""A reducer: what to keep of the operands at a site, how two batches of it combine, and what comes of it in the end."""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from compress_jax.core.errors import ArgumentError
from compress_jax.core.types import PyTree
from compress_jax.trace._jaxpr.site import Site

MOST = 2**31 - 1


class Reducer(NamedTuple):
    """Three pure functions that make one statistic over any number of batches. Give it to `observe` as it is.

    Attributes:
      reduce: ``(site, lhs, rhs) -> statistics``, a tree of arrays, of one batch at one site.
      merge: ``(old, new) -> statistics`` of both, of one site. Takes statistics stacked over loops
        as well.
      finish: ``statistics -> result``, once all batches are in.
      masked: ``(site, lhs, rhs, masks) -> statistics`` of what counts: ``masks`` has booleans for
        operands of which not all does, by their index, of the operand's rank and 1 along axes that
        they do not tell apart. None refuses masks.
    """

    reduce: Callable[[Site, jax.Array, jax.Array], Any]
    merge: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any] = lambda statistics: statistics
    masked: Callable[[Site, jax.Array, jax.Array, dict[int, jax.Array]], Any] | None = None

    def __call__(
        self, site: Site, lhs: jax.Array, rhs: jax.Array, masks: dict[int, jax.Array] | None = None
    ) -> Any:
        """Return ``reduce(site, lhs, rhs)``, of what counts if there are masks of the operands, by their index."""
        if not masks:
            return self.reduce(site, lhs, rhs)
        if self.masked is None:
            raise ArgumentError(
                "this reducer does not know of masks, so padding would be in its statistics: make "
                "it by reducer.of_inputs "
                "with measure(site, index, x, mask), or as Reducer(..., masked=(site, lhs, rhs, "
                "masks) -> statistics)"
            )
        return self.masked(site, lhs, rhs, masks)


def blank(statistics: PyTree) -> Any:
    """Return statistics with NaN for every floating entry where ``count`` is 0: of nothing, no number means anything.

    Args:
      statistics: NamedTuple of arrays with a field ``count``, which may be stacked over loops.

    Returns:
      The like.
    """

    def fill(x: jax.Array) -> jax.Array:
        return (
            jnp.where(aligned(statistics.count, x) == 0, jnp.nan, x)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else x
        )

    return jax.tree.map(fill, statistics)


def of_inputs(
    measure: Callable[..., Any],
    combine: Callable[[Any, Any], Any],
    result: Callable[[Any], Any] = blank,
) -> Reducer:
    """Return the reducer that measures each activation of a site by itself.

    Its statistics are ``{"input": measured}`` beside a parameter, else
    ``{"lhs": measured, "rhs": measured}`` (`Site.inputs`). What has ``count`` 0 is neutral: the
    site did not run, in a branch not taken say, and whatever else its statistics hold is ignored.
    Arrays that carry an explicit sharding are measured under an automatic one.

    Args:
      measure: ``(site, index of the operand, operand, mask) -> NamedTuple`` of arrays, among them
        ``count``, int32 scalar. The mask is what `channels` and `windows` take, often None. A
        measure without this argument refuses masks.
      combine: ``(old, new) -> NamedTuple`` of both. In either, all arrays may have the axes of
        loops in front.
      result: ``NamedTuple -> result``; by default `blank`.

    Returns:
      The reducer.

    Example:
      >>> from compress_jax.trace import calibrate
      >>> class Most(NamedTuple):
      ...     value: jax.Array
      ...     count: jax.Array
      >>> def larger(old, new):
      ...     return Most(jnp.maximum(old.value, new.value), total(old.count, new.count))
      >>> most = of_inputs(lambda site, index, x: Most(x.max(), jnp.int32(1)), larger)
      >>> batches = [jnp.ones((3, 2)), jnp.zeros((3, 2))]
      >>> calibrate(lambda w, x: x @ w["kernel"], most, {"kernel": jnp.eye(2)}, batches)["kernel"]["input"]
      Most(value=Array(1., dtype=float32), count=Array(2, dtype=int32))
    """
    knows = len(inspect.signature(measure).parameters) > 3

    def masked(
        site: Site, lhs: jax.Array, rhs: jax.Array, masks: dict[int, jax.Array]
    ) -> dict[str, Any]:
        operands = {
            key: (index, jnp.asarray((lhs, rhs)[index]), masks.get(index))
            for key, index in site.inputs.items()
        }
        return {
            key: _unsharded(
                lambda *x, i=index: measure(site, i, *x, *(None,) * (knows and len(x) < 2)), x, mask
            )
            for key, (index, x, mask) in operands.items()
        }

    def reduce(site: Site, lhs: jax.Array, rhs: jax.Array) -> dict[str, Any]:
        return masked(site, lhs, rhs, {})

    def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        return {key: _skipping_empty(combine, old[key], new[key]) for key in old}

    def finish(statistics: dict[str, Any]) -> dict[str, Any]:
        return {key: result(each) for key, each in statistics.items()}

    return Reducer(reduce, merge, finish, masked if knows else None)


def total(old: jax.Array, new: jax.Array) -> jax.Array:
    """Return the sum of two counts, int32; it stays at 2**31 - 1 rather than overflow.

    Example:
      >>> int(total(jnp.int32(2**31 - 3), jnp.int32(9))) == 2**31 - 1
      True
    """
    return jnp.where(old > MOST - new, MOST, old + new)


def aligned(count: jax.Array, x: jax.Array) -> jax.Array:
    """Return a count, one for each turn of the loops, in the shape that broadcasts against ``x``, which has more axes."""
    return count.reshape(*count.shape, *(1,) * (x.ndim - count.ndim))


def _skipping_empty(combine: Callable[[Any, Any], Any], old: Any, new: Any) -> Any:
    def choose(both: jax.Array, old_leaf: jax.Array, new_leaf: jax.Array) -> jax.Array:
        some = jnp.where(aligned(old.count, both) == 0, new_leaf, both)
        return jnp.where(aligned(new.count, both) == 0, old_leaf, some)

    return jax.tree.map(choose, combine(old, new), old, new)


def _unsharded(measure: Callable[..., Any], x: jax.Array, mask: jax.Array | None) -> Any:
    """Sums over a sharded axis are ambiguous where shardings are explicit: leave them to the compiler, the result whole."""
    mesh = jax.typeof(x).sharding.mesh
    explicit = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )
    given = (x,) if mask is None else (x, mask)
    if not explicit:
        return measure(*given)
    with jax.sharding.use_abstract_mesh(mesh):
        automatic = jax.sharding.auto_axes(measure, axes=explicit, out_sharding=PartitionSpec())
        return automatic(*given)


# An operand of a site as a table: one row for each vector that is contracted, one column for each
# of its entries.


class Table(NamedTuple):
    """Values whose axes are in the order ``[*batch, *rows, *columns]``; none is merged, so none loses its sharding.

    Statistics are made by `reduced`, `sums` and `count`, to which nothing counts that the mask
    leaves out.

    Attributes:
      values: float32; zeros where the mask says so, be they NaN before.
      batch: how many axes are of the batch: each of their indices has a table of its own.
      columns: how many axes are of columns.
      there: booleans, which entries count, of the rank of ``values``, 1 along axes that it does not
        tell apart; None: all.
    """

    values: jax.Array
    batch: int
    columns: int
    there: jax.Array | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        """The axes of rows."""
        return tuple(range(self.batch, self.values.ndim - self.columns))

    @property
    def count(self) -> jax.Array:
        """How many rows count: int32 scalar; of tables whose numbers differ, the largest."""
        return self.numbers.max() if self.there is not None else self.numbers

    @property
    def numbers(self) -> jax.Array:
        """How many rows of each table count: int32, a scalar or ``[*batch]``."""
        rows = math.prod(self.values.shape[axis] for axis in self.rows)
        if self.there is None:
            return jnp.int32(min(rows, MOST))
        some = self.there.any(axis=tuple(range(self.values.ndim - self.columns, self.values.ndim)))
        repeated = math.prod(
            self.values.shape[axis] // self.there.shape[axis] for axis in self.rows
        )
        number = some.sum(self.rows, dtype=jnp.int32)
        return jnp.where(number > MOST // max(repeated, 1), MOST, number * repeated)

    def reduced(
        self, reduction: Callable[..., jax.Array], values: jax.Array, start: float, axes: Any = None
    ) -> jax.Array:
        """Return ``reduction(values, axes, initial=start)`` over what counts, ``start`` being what changes nothing."""
        shown = values if self.there is None else jnp.where(self.there, values, start)
        return reduction(shown, axis=axes, initial=start)

    def flat(self, x: jax.Array, repeats: int = 1) -> jax.Array:
        """Merge the column axes of what is left after the rows are reduced, ``[*batch, *columns (repeats times)]``."""
        width = math.prod(self.values.shape[self.values.ndim - self.columns :])
        return x.reshape(*x.shape[: self.batch], *(width,) * repeats)


def channels(site: Site, index: int, x: jax.Array, mask: jax.Array | None = None) -> Table:
    r"""Return an operand as the table of its channels: every entry of the operand is in it once.

    Columns are the contracting axes, in the order of ``site.contracting``, which pairs them with
    the other operand's. Of a convolution's input they are its channels, those of all groups side by
    side, whatever windows an entry falls into.

    Args:
      site: the contraction.
      index: 0 for the first operand, 1 for the second.
      x: the operand.
      mask: booleans of the rank of ``x``, which entries count, 1 along axes that it does not tell
        apart; None is all.

    Returns:
      ``[*batch axes, *all others, *contracting axes]``. The kernel of a grouped convolution has its
      groups as batch axis.

    Example:
      >>> site = Site("a", "dot", None, None, (2, 5, 3), (3, 4), (2, 5, 4), *["float32"] * 3, ((2,), (0,)))
      >>> channels(site, 0, jnp.ones((2, 5, 3))).rows
      (0, 1)
    """
    batch, columns = site.batch[index], site.contracting[index]
    if site.kind == "conv" and index == 1:
        return _kernel(site, x)
    rows = (axis for axis in range(x.ndim) if axis not in batch + columns)
    order = (*batch, *rows, *columns)
    return _table(
        x.transpose(order),
        len(batch),
        len(columns),
        None if mask is None else mask.transpose(order),
    )


def windows(site: Site, index: int, x: jax.Array, mask: jax.Array | None = None) -> Table:
    r"""Return an operand as the table whose product with the other operand's is the contraction.

    The same as `channels`, but for a convolution's input. There a row is a window: for each example
    and each position of the output, what the kernel meets (:math:`y = X W`, "im2col"), with
    padding, strides and holes of either dilation as the site has them. Columns are in the order of
    ``site.contracting[1]``, so that column j meets row j of

    ``jnp.moveaxis(kernel, site.contracting[1], range(n)).reshape(k, -1)``,
    ``n = len(site.contracting[1])``.

    In a grouped or depthwise convolution each group has its own table, with the columns of its own
    channels.

    Args:
      site: the contraction.
      index: 0 for the first operand, 1 for the second.
      x: the operand.
      mask: see `channels`. A window counts if the position does that it stands at, whole: it may
        reach into padding, as it does in the model, but for what is not finite there, which is 0.

    Returns:
      ``[*batch axes, *all others, *contracting axes]``; of a convolution's input ``[groups (if more than one), examples,
      *positions, *input channels and window]``.
    """
    if site.kind != "conv" or index == 1:
        return channels(site, index, x, mask)
    examples, features = _groups(site)
    lhs, rhs, *_ = site.params["dimension_numbers"]
    rows = None
    if mask is not None:
        x = jnp.where(mask | jnp.isfinite(x), x, jnp.zeros((), x.dtype))
        rows = _of_windows(mask.transpose(lhs), examples, features)
    x = _slide(site, x.transpose(lhs))
    x = x.reshape(examples, x.shape[0] // examples, features, x.shape[1] // features, *x.shape[2:])
    # Axes by now: groups of examples, example, groups of features, channel, and then position,
    # offset of each dimension.
    columns = [3 if axis == rhs[1] else 5 + 2 * rhs[2:].index(axis) for axis in site.contracting[1]]
    x = x.transpose(0, 2, 1, *range(4, x.ndim, 2), *columns)
    return _grouped(x.reshape(examples * features, *x.shape[2:]), len(columns), rows)


def _of_windows(mask: jax.Array, examples: int, features: int) -> jax.Array:
    """Return which windows count, ``[groups, examples, *positions]``, of an image's mask ``[example, channel, *space]``.

    Its positions are those of the output too, or are not told apart.
    """
    mask = mask.any(axis=1)
    each = max(mask.shape[0] // examples, 1)
    mask = mask.reshape(mask.shape[0] // each, 1, each, *mask.shape[1:])
    return jnp.repeat(mask, features, axis=1).reshape(-1, each, *mask.shape[3:])


def _slide(site: Site, x: jax.Array) -> jax.Array:
    """Return all windows, ``[example, channel, *(position, offset)]``, of an image, ``[example, channel, *space]``."""
    p, kernel = site.params, site.params["dimension_numbers"].rhs_spec[2:]
    holes = [
        (low, high, hole - 1)
        for (low, high), hole in zip(p["padding"], p["lhs_dilation"], strict=True)
    ]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *holes])
    for dimension, (stride, gap) in enumerate(
        zip(p["window_strides"], p["rhs_dilation"], strict=True)
    ):
        axis, starts = 2 + 2 * dimension, range(0, gap * site.rhs_shape[kernel[dimension]], gap)
        length = x.shape[axis] - starts[-1]
        x = jnp.stack(
            [jax.lax.slice_in_dim(x, start, start + length, stride, axis) for start in starts],
            axis + 1,
        )
    return x


def _kernel(site: Site, x: jax.Array) -> Table:
    """Return a convolution's second operand as a table: a row for each output channel."""
    groups, out = math.prod(_groups(site)), site.params["dimension_numbers"].rhs_spec[0]
    x = x.transpose(out, *site.contracting[1])
    return _grouped(x.reshape(groups, x.shape[0] // groups, *x.shape[1:]), x.ndim - 1)


def _grouped(x: jax.Array, columns: int, rows: jax.Array | None = None) -> Table:
    """Return the table of ``[groups, *rows, *columns]``; a single group needs no axis."""
    mask = None if rows is None else rows.reshape(*rows.shape, *(1,) * columns)
    if x.shape[0] > 1:
        return _table(x, 1, columns, mask)
    return _table(x[0], 0, columns, None if mask is None else mask[0])


def _table(values: jax.Array, batch: int, columns: int, there: jax.Array | None) -> Table:
    values = values.astype(jnp.float32)
    return Table(values if there is None else jnp.where(there, values, 0.0), batch, columns, there)


def _groups(site: Site) -> tuple[int, int]:
    """Return into how many groups a convolution splits its examples, and its channels."""
    return site.params["batch_group_count"], site.params["feature_group_count"]
