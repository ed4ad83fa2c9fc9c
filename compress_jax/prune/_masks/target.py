"""How sparse each leaf shall be at each step: one share for all, a schedule, or a map by name."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import optax

from compress_jax.core.arguments import number, one_of, patterns, refused
from compress_jax.core.axes import Axes
from compress_jax.core.errors import ArgumentError
from compress_jax.core.paths import match, matches
from compress_jax.core.types import Step
from compress_jax.prune._masks.structures import NofM, Structure

Sparsity: TypeAlias = float | optax.Schedule | Mapping[str, float | optax.Schedule]


@dataclass(frozen=True)
class Target:
    """A sparsity that was checked, and where it counts.

    Attributes:
      rules: ``(glob, schedule)``, first match wins.
      structure: what goes together, or None.
      scope: ``"leaf"`` or ``"global"``.
      floor: share of every leaf that stays under a global threshold, and at least one unit; 0 for
        none.
    """

    rules: tuple[tuple[str, Callable[[Any], Any]], ...]
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
            leaves that none matches are left alone. None if an `n_m` structure says it.
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
        if isinstance(structure, NofM):
            return cls((("**", Constant(_implied(sparsity, structure))),), structure, scope)
        if sparsity is None:
            raise ArgumentError(
                "give a sparsity, got None; only an n_m structure says it by itself"
            )
        pairs = sparsity.items() if isinstance(sparsity, Mapping) else [("**", sparsity)]
        rules = tuple((str(patterns("a glob", glob)), _schedule(share)) for glob, share in pairs)
        return cls(rules, structure, scope, floor)

    def why_not(self, path: str, x: Any, axes: Axes | None = None) -> str | None:
        """Say why a leaf is not pruned, or return None."""
        if not any(matches(glob, path) for glob, _ in self.rules):
            return "no sparsity is given for it"
        return self.structure.why_not(axes or Axes.convention(x.shape)) if self.structure else None

    def check(self, paths: Iterable[str]) -> None:
        """Raise NoMatchError if a glob matches none of the leaves."""
        paths = list(paths)
        for glob, _ in self.rules if [glob for glob, _ in self.rules] != ["**"] else ():
            match(glob, paths)

    @property
    def schedules(self) -> tuple[Callable[[Any], Any], ...]:
        """The schedules among its shares; those that are numbers left out."""
        return tuple(schedule for _, schedule in self.rules if not isinstance(schedule, Constant))

    def share(self, path: str, step: Step) -> Any:
        """Return the share to prune of a leaf at a step."""
        return next(schedule for glob, schedule in self.rules if matches(glob, path))(step)


@dataclass(frozen=True)
class Constant:
    """The schedule of a number: it is the same at every step."""

    share: float

    def __call__(self, step: Step) -> float:
        """Return the number."""
        return self.share


def _schedule(sparsity: Any) -> Callable[[Any], Any]:
    if callable(sparsity):
        return sparsity
    if isinstance(sparsity, (int, float)) and not 0 <= sparsity <= 1:
        raise ArgumentError(
            f"sparsity is the share of weights to prune, between 0 and 1, got {sparsity}"
        )
    return Constant(
        number(
            "sparsity (the share of weights to prune, a number or a schedule of the step)",
            sparsity,
            0,
            1,
        )
    )


def _implied(sparsity: Any, structure: NofM) -> float:
    """Return the sparsity of an n:m structure; another one beside it is a contradiction."""
    if sparsity is not None and (
        callable(sparsity) or isinstance(sparsity, Mapping) or sparsity != structure.sparsity
    ):
        raise ArgumentError(
            f"{structure.n}:{structure.m} sets the sparsity to {structure.sparsity:g}, so "
            f"{sparsity!r} cannot be kept; give "
            "sparsity=None, and `between` to begin later"
        )
    return structure.sparsity
