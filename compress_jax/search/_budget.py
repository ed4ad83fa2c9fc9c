"""A budget of mixed precision, and the least of it that can be reached."""

import math
from dataclasses import dataclass

from compress_jax.core.errors import ConfigError

Amounts = dict[str, dict[str, int]]  # of each option of each leaf


@dataclass(frozen=True)
class Budget:
    """One limit on the whole model.

    ``amounts`` is the use of each option; ``anyway`` is the use that no option changes.
    """

    name: str
    unit: str
    most: float
    amounts: Amounts
    anyway: int

    @property
    def room(self) -> int:
        """Return what the options may take."""
        return int(self.most) - self.anyway

    def table(self, names: dict[str, list[str]]) -> list[list[int]]:
        """Return what each option takes, as rows."""
        return [[self.amounts[path][name] for name in own] for path, own in names.items()]

    def least(self) -> int:
        """Return the least that can be reached."""
        return self.anyway + sum(min(options.values()) for options in self.amounts.values())

    def total(self, chosen: dict[str, str]) -> int:
        """Return what a choice takes, with all that is taken anyway."""
        return self.anyway + sum(self.amounts[path][name] for path, name in chosen.items())

    def check(self) -> None:
        """Refuse a limit that no choice meets.

        Raises:
          ConfigError: if it is below the least that can be reached.
        """
        if self.most < (least := self.least()):
            raise self.refusal(least)

    def refusal(self, least: int, beside: str = "") -> ConfigError:
        """Return the error that says what can be reached."""
        return ConfigError(
            f"{self.name}={self.most} cannot be met{beside}: the least that the options reach is "
            f"{least} {self.unit}, "
            f"{self.anyway} of them in what no option changes. Raise the budget, or add smaller "
            "options."
        )


def byte_budget(most: float | None, amounts: Amounts, anyway: int) -> Budget:
    """Return the budget of stored bytes."""
    return Budget("max_bytes", "bytes", _limit(most), amounts, anyway)


def work_budget(most: float | None, amounts: Amounts, anyway: int) -> Budget:
    """Return the budget of bit-operations."""
    return Budget("max_bitops", "bit-operations", _limit(most), amounts, anyway)


def _limit(most: float | None) -> float:
    return math.inf if most is None else math.floor(most) if math.isfinite(most) else most
