"""A budget of bytes or bit-operations, and the least that the options of the leaves can reach."""

import math
from dataclasses import dataclass

from compress_jax.core.errors import ConfigError

Amounts = dict[str, dict[str, int]]  # {path: {option: amount}}


@dataclass(frozen=True)
class Budget:
    """One limit on the whole model.

    Attributes:
      name: of the argument.
      unit: of the amounts.
      limit: the largest total.
      amounts: ``{path: {option: amount}}``.
      fixed: the amount that no option changes.
    """

    name: str
    unit: str
    limit: float
    amounts: Amounts
    fixed: int

    @property
    def available(self) -> int:
        """Return the amount that the options may use together."""
        return int(self.limit) - self.fixed

    def table(self, names: dict[str, list[str]]) -> list[list[int]]:
        """Return the amounts of each leaf's options, one row a leaf."""
        return [[self.amounts[path][name] for name in own] for path, own in names.items()]

    def least(self) -> int:
        """Return the least total that can be reached."""
        return self.fixed + sum(min(options.values()) for options in self.amounts.values())

    def total(self, chosen: dict[str, str]) -> int:
        """Return the total of a choice, the fixed amount included."""
        return self.fixed + sum(self.amounts[path][name] for path, name in chosen.items())

    def check(self) -> None:
        """Refuse a limit that no choice meets.

        Raises:
          ConfigError: if it is below the least total that can be reached.
        """
        least = self.least()
        if self.limit < least:
            raise self.refusal(least)

    def refusal(self, least: int, condition: str = "") -> ConfigError:
        """Return the error that names the least total that can be reached."""
        return ConfigError(
            f"{self.name}={self.limit} cannot be met{condition}: the least that the options reach "
            f"is {least} {self.unit}, {self.fixed} of them in what no option changes. Raise the "
            "budget, or add smaller options."
        )


def byte_budget(limit: float | None, amounts: Amounts, fixed: int) -> Budget:
    """Return the budget of stored bytes."""
    return Budget("max_bytes", "bytes", _rounded(limit), amounts, fixed)


def work_budget(limit: float | None, amounts: Amounts, fixed: int) -> Budget:
    """Return the budget of bit-operations."""
    return Budget("max_bitops", "bit-operations", _rounded(limit), amounts, fixed)


def _rounded(limit: float | None) -> float:
    if limit is None:
        return math.inf
    # Amounts are whole, so nothing is lost; the solver's limits are compared in exact integers.
    return math.floor(limit) if math.isfinite(limit) else limit
