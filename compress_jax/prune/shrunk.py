"""What is left of a model: smaller parameters, the function that runs them, and a table of what went and what could not."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from compress_jax.core.paths import flatten
from compress_jax.prune.carry import Cut, carried, cuts
from compress_jax.prune.widths import widths
from compress_jax.trace import Cost, Groups, Number, cost, groups, resize, resized_numbers


class Row(NamedTuple):
    """One group: its name, how many channels it had and has, and why none went, if so."""

    group: str
    size: int
    kept: int
    reason: str = ""


class Removal(NamedTuple):
    """What was removed, and what was not and why; prints as a table.

    Attributes:
      rows: one for each group.
      frozen: ``(path, axis)`` of axes that are in no group, or not as a whole, and why.
      before: cost of the full model.
      after: cost of the smaller one.
      widths: ``(kernel and axes, width before, width after)`` of widths that several groups make up together.
      numbers: constants that count what got shorter, or look as if they did: what they were, what they are now, and why.
    """

    rows: tuple[Row, ...]
    frozen: dict[tuple[str, int], str]
    before: Cost
    after: Cost
    widths: tuple[tuple[str, int, int], ...] = ()
    numbers: tuple[Number, ...] = ()

    def __str__(self) -> str:
        """Return the table."""
        width = max([len(row.group) for row in self.rows], default=5)
        lines = [f"{'group':<{width}}   size   kept"]
        lines += [f"{row.group:<{width}}  {row.size:>5}  {row.kept:>5}  {row.reason}".rstrip() for row in self.rows]
        for reason in dict.fromkeys(self.frozen.values()):
            axes = ", ".join(f"{path}:{axis}" for (path, axis), why in self.frozen.items() if why == reason)
            lines.append(f"frozen ({reason}): {axes}")
        lines += [f"width {name}: {old} -> {new}" for name, old, new in self.widths if new < old]
        lines += [f"number {number}" for number in self.numbers]
        for name in ("macs", "params"):
            old, new = getattr(self.before, name), getattr(self.after, name)
            lines.append(f"{name}: {old:,} -> {new:,} ({old / max(new, 1):.2f}x fewer)")
        return "\n".join(lines)


class Shrunk(NamedTuple):
    """A smaller model.

    Attributes:
      params: the smaller parameters (or variables), of the same structure.
      fn: ``fn(params, *inputs)``, compiled; differentiate it, quantize its params, shrink it again.
      kept: by group the channels that stayed, ascending; JSON-able with ``.tolist()``, `narrow` takes them.
      table: what was removed, and what was not and why.
      cuts: by path of a parameter its old shape and, by axis, the indices that stayed.
    """

    params: Any
    fn: Callable[..., Any]
    kept: dict[str, np.ndarray]
    table: Removal
    cuts: dict[str, Cut]

    def carry(self, tree: Any) -> Any:
        """Return a tree that was made for the full parameters (an optimizer's state) as it is for the smaller ones.

        A leaf belongs to the parameter whose path its own ends in (``0/mu/params/conv/kernel``; also without the
        collection, ``0/mu/conv/kernel``), or a part of it does (SM3's ``0/mu/conv/kernel/1``, of axis 1). Axes of the
        parameter that it has, it loses the same indices of; leaves of no parameter (counts, rates) stay. Factored moments
        (adafactor's ``v_row``, ``v_col``) are known by name, and exchanged where a kernel's longest axis is another now.

        Args:
          tree: of any optax optimizer, of averages of parameters, or of gradients.

        Returns:
          The tree.

        Raises:
          ShapeError: if a leaf belongs to a parameter, but it cannot be told which of its axes it has, or if it holds all
            parameters in one vector (``optax.flatten``).
        """
        return carried(tree, self.cuts)


def narrow(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    kept: Mapping[str, Sequence[int] | np.ndarray],
    numbers: Mapping[str, bool] | None = None,
) -> Shrunk:
    """Keep given channels of given groups: `shrink` when the choice is made, or was made before (a checkpoint holds it).

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays.
      inputs: trees of arrays or ``ShapeDtypeStruct``.
      kept: by name of a group of `compress_jax.trace.groups` the channels to keep.
      numbers: as for `shrink`.

    Returns:
      The smaller model.

    Raises:
      NoMatchError: if there is no group of a name, or a glob matches no number.
      ShapeError: if a channel is not one of the group's or none is kept.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"w": jnp.eye(3), "v": jnp.ones((3, 1))}
      >>> small = narrow(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"], params, jnp.ones((2, 3)), kept={"w:1": [0, 2]})
      >>> small.params["w"].shape, small.fn(small.params, jnp.ones((2, 3))).tolist()
      ((3, 2), [[2.0], [2.0]])
    """
    return narrowed(fn, params, inputs, groups(fn, params, *inputs), kept, {}, numbers)


def narrowed(
    fn: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    found: Groups,
    kept: Mapping[str, Sequence[int] | np.ndarray],
    reasons: Mapping[str, str],
    numbers: Mapping[str, bool] | None = None,
) -> Shrunk:
    """Return `narrow` of groups that are known already, with a reason for each that stays whole."""
    indices = {name: np.unique(np.asarray(channels, int)) for name, channels in kept.items()}
    shorter = {name: left for name, left in indices.items() if not np.array_equal(left, np.arange(found[name].size))}
    smaller = found.keep(params, shorter)
    small_fn = resize(fn, params, found, shorter, numbers)
    listed = resized_numbers(fn, params, *inputs, groups=found, kept=shorter, numbers=numbers)
    rows = [
        Row(group.name, group.size, len(shorter[group.name]))
        if group.name in shorter
        else Row(group.name, group.size, group.size, reasons.get(group.name, "no channel is among those to go"))
        for group in found
    ]
    before, after = cost(fn, params, *inputs), cost(small_fn, smaller, *inputs)
    table = Removal(tuple(rows), dict(found.frozen), before, after, _widths(found, before, params, smaller), listed)
    every = {group.name: indices.get(group.name, np.arange(group.size)) for group in found}
    return Shrunk(smaller, small_fn, every, table, cuts(found, shorter, flatten(params)[0]))


def _widths(found: Groups, before: Cost, params: Any, smaller: Any) -> tuple[tuple[str, int, int], ...]:
    """Return the widths that several groups make up together, before and after."""
    old, new = flatten(params)[0], flatten(smaller)[0]
    every = widths(found, [each.site for each in before.by_site.values()], old)
    joint = [width for width in every if width.products]
    after = [math.prod(np.shape(new[width.path])[axis] for axis in width.axes) for width in joint]
    return tuple((str(width), width.size, size) for width, size in zip(joint, after, strict=True))
