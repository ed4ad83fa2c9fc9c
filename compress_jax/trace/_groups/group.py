"""A group: everything along which a network's parameters must be permuted or removed together; and doing so."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import NoMatchError, ShapeError
from compress_jax.core.paths import flatten

Member = tuple[str, int]  # the path of a parameter and one of its axes


@dataclass(frozen=True)
class Group:
    """Channels, heads, features: indices that the same ones of every member belong to.

    Attributes:
      name: where they are produced, such as ``"params/conv/kernel:3"`` for axis 3 of that kernel; a second group produced
        along the same axis ends in ``#2``. It depends neither on shapes nor on the run.
      size: how many there are.
      members: the parameter axes they lie in, in the order of the tree.
      coordinates: for each member, which of them each index of the axis belongs to, -1 for none: int array of the axis'
        length. Where one occurs several times (a flattened feature map), its first occurrences correspond to the others'
        first ones, the second ones to the second ones, and so on.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    coordinates: dict[Member, np.ndarray] = field(repr=False, compare=False)

    def mask(self, member: Member, kept: Iterable[int]) -> np.ndarray:
        """Return which indices of a member's axis are left if only some of the group are kept.

        Args:
          member: path and axis.
          kept: the coordinates to keep.

        Returns:
          bool array of the axis' length.

        Example:
          >>> flat = Group("conv/kernel:3", 2, (("dense/kernel", 0),), {("dense/kernel", 0): np.array([0, 1, 0, 1])})
          >>> flat.mask(("dense/kernel", 0), [1]).tolist()
          [False, True, False, True]
        """
        place = self.coordinates[member]
        return (place < 0) | np.isin(place, np.asarray(list(kept), int))

    def order(self, member: Member, permutation: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return which old index every index of a member's axis takes over if the group is permuted.

        Args:
          member: path and axis.
          permutation: coordinate ``i`` becomes what ``permutation[i]`` was.

        Returns:
          int array of the axis' length.

        Example:
          >>> flat = Group("conv/kernel:3", 2, (("dense/kernel", 0),), {("dense/kernel", 0): np.array([0, 1, 0, 1])})
          >>> flat.order(("dense/kernel", 0), [1, 0]).tolist()
          [1, 0, 3, 2]
        """
        place = self.coordinates[member]
        inside = np.flatnonzero(place >= 0)
        occurrences = inside[np.argsort(place[inside], kind="stable")].reshape(self.size, -1)  # of each coordinate, in order
        order = np.arange(len(place))
        order[occurrences] = occurrences[np.asarray(permutation)]
        return order


@dataclass(frozen=True)
class Groups:
    """The groups of a function's parameters, in the order in which it produces them; a read-only list.

    Attributes:
      frozen: why parameter axes stay as they are, or a part or a factor of them does, by ``(path, axis)``; axes of size 1
        left out. Every index of an axis that is not listed lies in a group.
      unknown: how often each primitive occurs that no rule is known for; all it touches is frozen.
    """

    items: tuple[Group, ...]
    frozen: dict[Member, str]
    unknown: dict[str, int]

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self.items)

    def __iter__(self):
        """Go through the groups."""
        return iter(self.items)

    def __getitem__(self, which: Any) -> Any:
        """Return a group by its place or its name, or several by a slice."""
        if not isinstance(which, str):
            return self.items[which]
        for group in self.items:
            if group.name == which:
                return group
        listing = "\n  ".join(group.name for group in self.items) or "(none)"
        raise NoMatchError(f"no group is called {which!r}. The groups are:\n  {listing}")

    def keep(self, variables: Any, kept: Mapping[str, Sequence[int] | np.ndarray]) -> Any:
        """Return smaller variables, of which only some coordinates of some groups are left.

        Args:
          variables: the tree that was analysed, of arrays.
          kept: by name of a group the coordinates to keep, in any order; other groups stay whole.

        Returns:
          The tree with shorter axes; the order of what is left is as before.

        Raises:
          NoMatchError: if there is no group of a name.
          ShapeError: if a coordinate is not one of the group's, or none is kept.

        Example:
          >>> from compress_jax.trace._groups.groups import groups
          >>> params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
          >>> smaller = groups(lambda p, x: (x @ p["w"]) @ p["v"], params, jnp.ones((1, 3))).keep(params, {"w:1": [0, 2]})
          >>> {path: w.shape for path, w in smaller.items()}
          {'v': (2, 2), 'w': (3, 2)}
        """
        leaves, rebuild = flatten(variables)
        masks: dict[Member, np.ndarray] = {}
        for name, coordinates in kept.items():
            group = self[name]
            _check(group, coordinates)
            for member in group.members:
                masks[member] = masks.get(member, True) & group.mask(member, coordinates)
        for (path, axis), mask in masks.items():
            leaves[path] = jnp.take(leaves[path], np.flatnonzero(mask), axis=axis)
        return rebuild(leaves)

    def permute(self, variables: Any, group: Group | str, permutation: Sequence[int] | np.ndarray) -> Any:
        """Return variables of which the members of one group are permuted; the function they give is the same.

        Args:
          variables: the tree that was analysed, of arrays.
          group: one of the groups, or its name.
          permutation: of ``range(group.size)``; coordinate ``i`` becomes what ``permutation[i]`` was.

        Returns:
          The tree.

        Raises:
          NoMatchError: if there is no group of that name.
          ShapeError: if it is not a permutation of the group's coordinates.

        Example:
          >>> from compress_jax.trace._groups.groups import groups
          >>> params = {"w": jnp.array([[1.0, 2.0]]), "v": jnp.array([[3.0], [4.0]])}
          >>> found = groups(lambda p, x: (x @ p["w"]) @ p["v"], params, jnp.ones((1, 1)))
          >>> {path: w.tolist() for path, w in found.permute(params, "w:1", [1, 0]).items()}
          {'v': [[4.0], [3.0]], 'w': [[2.0, 1.0]]}
        """
        found: Group = group if isinstance(group, Group) else self[group]
        if sorted(np.asarray(permutation).tolist()) != list(range(found.size)):
            raise ShapeError(f"{found.name!r} needs a permutation of range({found.size}), not {list(permutation)}")
        leaves, rebuild = flatten(variables)
        return rebuild(permuted(leaves, found, permutation, found.members))

    def __str__(self) -> str:
        """Return a table: every group, then what is frozen and why, then unknown primitives."""
        return "\n".join([*_table(self.items), *_frozen(self.frozen), *_unknown(self.unknown)])


def permuted(leaves: dict[str, Any], group: Group, permutation: Any, members: Iterable[Member]) -> dict[str, Any]:
    """Return leaves of which certain members of a group are permuted.

    Args:
      leaves: arrays by path.
      group: the group.
      permutation: of its coordinates.
      members: those of its members to permute.

    Returns:
      All leaves.
    """
    leaves = dict(leaves)
    for path, axis in members:
        leaves[path] = jnp.take(leaves[path], group.order((path, axis), permutation), axis=axis)
    return leaves


def _check(group: Group, kept: Sequence[int] | np.ndarray) -> None:
    if not len(kept) or not set(np.asarray(kept).tolist()) <= set(range(group.size)):
        raise ShapeError(
            f"{group.name!r} has coordinates 0 to {group.size - 1}; keep at least one of them, not {list(kept)}"
        )


def _table(groups: Sequence[Group]) -> list[str]:
    """Return a line for each group: name, size, members."""
    width = max([len(group.name) for group in groups], default=5)
    rows = [f"{group.name:<{width}}  {group.size:>5}  {', '.join(map(show, group.members))}" for group in groups]
    return [f"{'group':<{width}}  {'size':>5}  members", *rows] if rows else ["no groups"]


def _frozen(frozen: dict[Member, str]) -> list[str]:
    """Return a line for each reason: what is frozen for it."""
    reasons = dict.fromkeys(frozen.values())
    return [f"frozen ({reason}): {', '.join(show(m) for m, why in frozen.items() if why == reason)}" for reason in reasons]


def _unknown(unknown: dict[str, int]) -> list[str]:
    """Return a line that lists the primitives without a rule."""
    return ["unknown ops: " + ", ".join(f"{name} x{count}" for name, count in unknown.items())] if unknown else []


def show(member: Member) -> str:
    """Return a member as text.

    Example:
      >>> show(("dense/kernel", 1))
      'dense/kernel:1'
    """
    return f"{member[0]}:{member[1]}"
