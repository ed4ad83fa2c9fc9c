"""The integer program behind a budget: one option for each item, the least total value within the limits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from compress_jax.core.errors import CompressError

INFEASIBLE = 2  # a status of scipy's milp
EXACTLY = {"mip_rel_gap": 0.0}
SCALE = 1e3  # of the objective: the solver stops when it is within 1e-6 of the best
Table = Sequence[Sequence[float]]  # for each item, one number for each of its options


def assign(values: Table, weights: Sequence[Table], limits: Sequence[int]) -> list[int] | None:
    r"""Solve :math:`\min_x \sum_{io} v_{io} x_{io}` with :math:`\sum_o x_{io} = 1`, :math:`\sum_{io} w_{io} x_{io} \le L`.

    The solver works in floating point with absolute tolerances. So values are scaled to what is at stake: an option whose
    value alone is above the total of a choice already found is in no best choice; those are dropped and the rest is solved
    again at that scale. Limits are checked in exact integers, and a choice that misses one is cut off.

    Args:
      values: of each item's options.
      weights: for each limit, integers of each item's options.
      limits: one for each of ``weights``.

    Returns:
      For each item which option, or None if no choice meets the limits.

    Raises:
      CompressError: if the solver gives up.

    Example:
      >>> assign([[3.0, 1.0], [2.0, 0.5]], [[[1, 4], [1, 2]]], [5])
      [1, 0]

    References:
      Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11 (the multiple-choice knapsack problem).
    """
    if not values:
        return [] if all(limit >= 0 for limit in limits) else None
    program = _Program(values, weights, limits)
    best = program.solve(np.inf)
    while best is not None and (reached := program.total(best)) > 0:
        better = program.solve(reached)
        if better is None or program.total(better) >= reached:
            break
        best = better
    return best


class _Program:
    """The options of all items in one row; values and weights above the least of each item."""

    def __init__(self, values: Table, weights: Sequence[Table], limits: Sequence[int]) -> None:
        self.sizes = [len(options) for options in values]
        self.item = np.repeat(np.arange(len(values)), self.sizes)
        self.values = np.concatenate([np.asarray(each, float) - min(each) for each in values])
        self.weights = [[w - min(options) for options in table for w in options] for table in weights]  # exact integers
        least = [sum(min(options) for options in table) for table in weights]
        self.limits = [limit - low for limit, low in zip(limits, least, strict=True)]

    def total(self, choice: Sequence[int]) -> float:
        return float(self.values[self._columns(choice)].sum())

    def _columns(self, choice: Sequence[int]) -> np.ndarray:
        return np.cumsum([0, *self.sizes[:-1]]) + np.asarray(choice)

    def _meets(self, columns: np.ndarray) -> bool:
        return all(sum(w[c] for c in columns) <= limit for w, limit in zip(self.weights, self.limits, strict=True))

    def solve(self, ceiling: float) -> list[int] | None:
        """Return the best choice of options with values up to ``ceiling``, which is the scale of the objective too."""
        if min(self.limits, default=0) < 0:
            return None
        fits = np.all([[w <= limit for w in row] for row, limit in zip(self.weights, self.limits, strict=True)], axis=0)
        allowed = fits & (self.values <= ceiling)
        top = ceiling if np.isfinite(ceiling) else self.values[allowed].max(initial=0) or 1.0
        objective = SCALE * (np.where(allowed, self.values, 0) / top)
        upper: Any = allowed.astype(float)
        constraints = self._constraints(allowed)
        while True:
            found = milp(objective, constraints=constraints, integrality=1, bounds=Bounds(0, upper), options=EXACTLY)
            if found.status == INFEASIBLE:
                return None
            if found.x is None:
                raise CompressError(f"the integer program could not be solved: {found.message}")
            choice = [int(part.argmax()) for part in np.split(found.x, np.cumsum(self.sizes)[:-1])]
            columns = self._columns(choice)
            if self._meets(columns):
                return choice
            taken = np.bincount(columns, minlength=len(self.item))
            constraints.append(LinearConstraint(taken, -np.inf, len(columns) - 1))

    def _constraints(self, allowed: np.ndarray) -> list[LinearConstraint]:
        """Return that each item takes one option, and that each limit holds, in units of itself."""
        one = csr_array((np.ones(len(self.item)), (self.item, np.arange(len(self.item)))))
        limits = [
            LinearConstraint(np.where(allowed, row, 0) / max(limit, 1), -np.inf, limit / max(limit, 1))
            for row, limit in zip(self.weights, self.limits, strict=True)
        ]
        return [LinearConstraint(one, 1, 1), *limits]
