"""The target sparsity of each leaf at each step: one number, a schedule, or a map by path."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

import optax

from compress_jax.core._leafwise import why_not_float
from compress_jax.core.arguments import number, one_of, patterns, refused
from compress_jax.core.axes import Axes
from compress_jax.core.errors import ArgumentError
from compress_jax.core.paths import flatten, match, matches
from compress_jax.core.types import Leaf, Params, Scalar, Schedule, Step
from compress_jax.prune._masks.structures import NofM, Structure

Sparsity: TypeAlias = float | optax.Schedule | Mapping[str, float | optax.Schedule]


@dataclass(frozen=True)
class Target:
    """A checked sparsity: how much is pruned of which leaf, in which units.

    Attributes:
      rules: ``(glob, schedule)``, first match wins.
      structure: which entries are pruned together, or None.
      scope: ``"leaf"`` or ``"global"``.
      floor: the least share of each leaf that stays under a global threshold, and at least one
        unit; 0 for none.
    """

    rules: tuple[tuple[str, Schedule], ...]
    structure: Structure | None
    scope: str
    floor: float = 0.0

    @classmethod
    def of(
        cls,
        sparsity: Sparsity | None,
        structure: Structure | None = None,
        scope: str = "leaf",
        floor: float = 0.0,
    ) -> "Target":
        """Return the target of a method's arguments.

        Args:
          sparsity: share to prune, 0 to 1; an optax schedule of the step; or ``{glob: either}``:
            leaves that no glob matches are not pruned. None if an `n_m` structure sets it.
          structure: from `n_m`, `block`, `channel` or `head`; None for single entries.
          scope: ``"leaf"``: each leaf reaches the sparsity by itself; ``"global"``: all leaves
            share one threshold.
          floor: with ``"global"``, the share of every leaf that stays, from 0 to below 1.

        Returns:
          The target.

        Raises:
          ArgumentError: if a share is outside [0, 1], the scope is unknown, or the arguments
            contradict each other.

        Example:
          >>> Target.of({"**/kernel": 0.5}).share("dense/kernel", 0)
          0.5
        """
        _check(sparsity, structure, scope, floor)
        # The structure fixes the share, so there is no rule to choose.
        if isinstance(structure, NofM):
            share = Constant(_implied(sparsity, structure))
            return cls((("**", share),), structure, scope)
        pairs = sparsity.items() if isinstance(sparsity, Mapping) else [("**", sparsity)]
        rules = tuple((str(patterns("a glob", glob)), _schedule(share)) for glob, share in pairs)
        return cls(rules, structure, scope, floor)

    def why_not(self, path: str, x: Leaf, axes: Axes | None = None) -> str | None:
        """Return why a leaf is not pruned, or None."""
        if not any(matches(glob, path) for glob, _ in self.rules):
            return "no sparsity is given for it"
        if self.structure is None:
            return None
        return self.structure.why_not(axes or Axes.convention(x.shape))

    def check(self, paths: Iterable[str]) -> None:
        """Raise NoMatchError if a glob matches none of the paths."""
        # "**" is what a single number means: it may match no leaf of an empty tree.
        paths = list(paths)
        globs = [glob for glob, _ in self.rules]
        if globs != ["**"]:
            for glob in globs:
                match(glob, paths)

    def check_leaves(self, params: Params) -> None:
        """Raise NoMatchError if a glob matches none of the floating-point leaves."""
        leaves = flatten(params)[0]
        self.check(path for path, x in leaves.items() if why_not_float(path, x) is None)

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The schedules among the rules, without the constants."""
        return tuple(schedule for _, schedule in self.rules if not isinstance(schedule, Constant))

    def share(self, path: str, step: Step) -> Scalar:
        """Return the share to prune of a leaf at a step."""
        return self.schedule(path)(step)

    def schedule(self, path: str) -> Schedule:
        """Return the schedule of a leaf's share; equal constants are equal."""
        return next(schedule for glob, schedule in self.rules if matches(glob, path))


def _check(
    sparsity: Sparsity | None, structure: Structure | None, scope: str, floor: float
) -> None:
    """Raise ArgumentError for arguments that are impossible or contradict each other."""
    one_of("scope", scope, ("leaf", "global"))
    if structure is not None and not isinstance(structure, Structure):
        refused("structure", structure, "n_m(...), block(...), channel(...), head(...) or None")
    if scope == "global" and (isinstance(sparsity, Mapping) or isinstance(structure, NofM)):
        raise ArgumentError(
            "with scope='global' one threshold is shared, so give one sparsity, and no n:m "
            "structure"
        )
    if not 0 <= number("floor", floor) < 1 or (floor and scope != "global"):
        raise ArgumentError(
            f"floor={floor} is a share of every leaf to keep, from 0 to below 1, with "
            "scope='global'"
        )
    if sparsity is None and not isinstance(structure, NofM):
        raise ArgumentError("give a sparsity, got None; only an n_m structure sets it by itself")


@dataclass(frozen=True)
class Constant:
    """The schedule that is the same number at every step."""

    share: float

    def __call__(self, step: Step) -> float:
        """Return the number."""
        return self.share


def _schedule(sparsity: float | optax.Schedule | None) -> Schedule:
    # The values of a schedule are not known here; `amount` clips them to [0, 1].
    if callable(sparsity):
        return cast(Schedule, sparsity)
    if isinstance(sparsity, (int, float)) and not 0 <= sparsity <= 1:
        raise ArgumentError(
            f"sparsity is the share of weights to prune, between 0 and 1, got {sparsity}"
        )
    what = "sparsity (the share of weights to prune, a number or a schedule of the step)"
    return Constant(number(what, sparsity, 0, 1))


def _implied(sparsity: Sparsity | None, structure: NofM) -> float:
    """Return the sparsity of an n:m structure; raise ArgumentError if another one is given."""
    if sparsity is None:
        return structure.sparsity
    # Groups keep n of m at every step, so a schedule or a map would have no effect.
    if callable(sparsity) or isinstance(sparsity, Mapping) or sparsity != structure.sparsity:
        raise ArgumentError(
            f"{structure.n}:{structure.m} sets the sparsity to {structure.sparsity:g}, so "
            f"{sparsity!r} is impossible; give sparsity=None, and `between` to begin later"
        )
    return structure.sparsity
