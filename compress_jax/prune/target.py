"""How sparse each leaf shall be at each step: one share for all, a schedule, or a map by name."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import optax

from compress_jax.core.errors import ArgumentError
from compress_jax.core.paths import match, matches
from compress_jax.prune.structures import NofM, Structure

Sparsity: TypeAlias = float | optax.Schedule | Mapping[str, float | optax.Schedule]


@dataclass(frozen=True)
class Target:
    """A sparsity that was checked, and where it counts.

    Attributes:
      rules: ``(glob, schedule)``, first match wins.
      structure: what goes together, or None.
      scope: ``"leaf"`` or ``"global"``.
      floor: share of every leaf that stays under a global threshold, and at least one unit; 0 for none.
    """

    rules: tuple[tuple[str, Callable[[Any], Any]], ...]
    structure: Structure | None
    scope: str
    floor: float = 0.0

    @classmethod
    def of(
        cls, sparsity: Sparsity | None, structure: Structure | None = None, scope: str = "leaf", floor: float = 0.0
    ) -> "Target":
        """Return the target of a method's arguments.

        Args:
          sparsity: share to prune, 0 to 1; an optax schedule of the step; or ``{glob: either}``: leaves that none matches
            are left alone. None if an `n_m` structure says it.
          structure: from `n_m`, `block`, `channel` or `head`; None for single entries.
          scope: ``"leaf"``: each leaf reaches the sparsity by itself; ``"global"``: all leaves share one threshold.
          floor: with ``"global"``, the share of every leaf that stays, from 0 to below 1.

        Returns:
          The target.

        Raises:
          ValueError: if a share is outside [0, 1], the scope is unknown, or the arguments contradict each other.

        Example:
          >>> Target.of({"**/kernel": 0.5}).share("dense/kernel", 0)
          0.5
        """
        if scope not in ("leaf", "global"):
            raise ValueError(f"scope must be 'leaf' or 'global', got {scope!r}")
        if scope == "global" and (isinstance(sparsity, Mapping) or isinstance(structure, NofM)):
            raise ValueError("with scope='global' one threshold is shared, so give one sparsity, and no n:m structure")
        if not 0 <= floor < 1 or (floor and scope != "global"):
            raise ArgumentError(f"floor={floor} is a share of every leaf to keep, from 0 to below 1, with scope='global'")
        if isinstance(structure, NofM):
            return cls((("**", lambda step: _implied(sparsity, structure)),), structure, scope)._checked(sparsity)
        if sparsity is None:
            raise ValueError("give a sparsity; only an n_m structure says it by itself")
        pairs = sparsity.items() if isinstance(sparsity, Mapping) else [("**", sparsity)]
        return cls(tuple((glob, _schedule(share)) for glob, share in pairs), structure, scope, floor)

    def _checked(self, sparsity: Any) -> "Target":
        assert isinstance(self.structure, NofM)
        _implied(sparsity, self.structure)
        return self

    def why_not(self, path: str, x: Any) -> str | None:
        """Say why a leaf is not pruned, or return None."""
        if not any(matches(glob, path) for glob, _ in self.rules):
            return "no sparsity is given for it"
        return self.structure.why_not(x.shape) if self.structure else None

    def check(self, paths: Iterable[str]) -> None:
        """Raise NoMatchError if a glob matches none of the leaves."""
        paths = list(paths)
        for glob, _ in self.rules if [glob for glob, _ in self.rules] != ["**"] else ():
            match(glob, paths)

    def share(self, path: str, step: Any) -> Any:
        """Return the share to prune of a leaf at a step."""
        return next(schedule for glob, schedule in self.rules if matches(glob, path))(step)


def _schedule(sparsity: Any) -> Callable[[Any], Any]:
    if callable(sparsity):
        return sparsity
    share = float(sparsity)
    if not 0 <= share <= 1:
        raise ValueError(f"sparsity is the share of weights to prune, between 0 and 1, got {sparsity}")
    return lambda step: share


def _implied(sparsity: Any, structure: NofM) -> float:
    """Return the sparsity of an n:m structure; another one beside it is a contradiction."""
    if sparsity is not None and (callable(sparsity) or isinstance(sparsity, Mapping) or sparsity != structure.sparsity):
        raise ValueError(
            f"{structure.n}:{structure.m} sets the sparsity to {structure.sparsity:g}, so {sparsity!r} cannot be kept; give "
            "sparsity=None, and `between` to begin later"
        )
    return structure.sparsity
