"""Mixed precision: share out a budget of bytes or bit-operations among the leaves of a model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from compress_jax.core.combine import rules
from compress_jax.core.compression import Compression
from compress_jax.core.errors import CompressError, ConfigError, NoMatchError
from compress_jax.core.table import aligned
from compress_jax.search._budget import Budget, byte_budget, work_budget
from compress_jax.search._sensitivity import Sensitivities

INFEASIBLE = 2  # a status of scipy's milp
EXACTLY = {"mip_rel_gap": 0.0}
SCALE = 1e3  # of the objective; the solver stops when it is within 1e-6 of the best
Table = Sequence[Sequence[float]]  # for each item, one number for each of its options


class Link(NamedTuple):
    """Two items whose chosen options must have equal labels.

    Attributes:
      items: their numbers.
      labels: for each of the two, a number for each of its options.

    Example:
      >>> Link((0, 1), ([0, 1], [0, 0, 1])).items
      (0, 1)
    """

    items: tuple[int, int]
    labels: tuple[Sequence[int], Sequence[int]]


def assign(
    values: Table, weights: Sequence[Table], limits: Sequence[int], links: Sequence[Link] = ()
) -> list[int] | None:
    r"""Choose one option of each item: the least total value within the limits.

    .. math:: \min_x \sum_{io} v_{io} x_{io} \quad \text{with} \quad \sum_o x_{io} = 1, \;
       \sum_{io} w_{io} x_{io} \le L

    The solver works in floating point with absolute tolerances, so small values need a small scale.
    An option whose value alone is above the total of a choice already found is in no best choice:
    such options are dropped, and the rest is solved again at the scale of that total. Limits are
    checked in exact integers, and a choice that misses one is cut off.

    Args:
      values: of each item's options.
      weights: for each limit, integers of each item's options.
      limits: one for each of ``weights``.
      links: between pairs of items.

    Returns:
      For each item which option, or None if no choice meets the limits and the links.

    Raises:
      CompressError: if the solver gives up.

    Example:
      >>> assign([[3.0, 1.0], [2.0, 0.5]], [[[1, 4], [1, 2]]], [5])
      [1, 0]

    References:
      Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11 (the multiple-choice
      knapsack problem).
    """
    if not values:
        return [] if all(limit >= 0 for limit in limits) else None
    program = _Program(values, weights, limits, links)
    best = program.solve(np.inf)
    # The solver's tolerances are absolute, so each round is solved at the scale of the last total.
    while best is not None and (reached := program.total(best)) > 0:
        better = program.solve(reached)
        if better is None or program.total(better) >= reached:
            break
        best = better
    return best


class _Program:
    """The options of all items in one row; values and weights above the least of each item."""

    def __init__(
        self,
        values: Table,
        weights: Sequence[Table],
        limits: Sequence[int],
        links: Sequence[Link],
    ) -> None:
        self.links = links
        self.sizes = [len(options) for options in values]
        self.item = np.repeat(np.arange(len(values)), self.sizes)
        self.values = np.concatenate([np.asarray(each, float) - min(each) for each in values])
        # Python's integers, which are exact.
        self.weights: list[list[float]] = []
        self.limits: list[float] = []
        for table, limit in zip(weights, limits, strict=True):
            least = [min(options) for options in table]
            # Every choice uses the least of each item; only what is above it is chosen.
            self.weights.append(_above(table, least))
            self.limits.append(limit - sum(least))

    def total(self, choice: Sequence[int]) -> float:
        return float(self.values[self._columns(choice)].sum())

    def _columns(self, choice: Sequence[int]) -> np.ndarray:
        return np.cumsum([0, *self.sizes[:-1]]) + np.asarray(choice)  # [items], places in the row

    def _meets(self, columns: np.ndarray) -> bool:
        pairs = zip(self.weights, self.limits, strict=True)
        return all(sum(w[c] for c in columns) <= limit for w, limit in pairs)

    def solve(self, ceiling: float) -> list[int] | None:
        """Return the best choice of options with values up to ``ceiling``.

        ``ceiling`` is also the scale of the objective.
        """
        if min(self.limits, default=0) < 0:
            return None
        allowed = self.values <= ceiling  # [options of all items]
        for row, limit in zip(self.weights, self.limits, strict=True):
            # Compared in exact integers: an option that alone exceeds a limit is in no choice.
            allowed &= np.array([w <= limit for w in row])
        top = ceiling if np.isfinite(ceiling) else self.values[allowed].max(initial=0) or 1.0
        objective = SCALE * (np.where(allowed, self.values, 0) / top)
        upper = allowed.astype(float)  # 0 drops an option
        constraints = self._constraints(allowed)
        while True:
            found = milp(
                objective,
                constraints=constraints,
                integrality=1,
                bounds=Bounds(0, upper),  # pyright: ignore[reportArgumentType]
                options=EXACTLY,
            )
            # Tolerances widen the limits, so what the solver finds infeasible is.
            if found.status == INFEASIBLE:
                return None
            if found.x is None:
                raise CompressError(f"the integer program could not be solved: {found.message}")
            # Of nearly whole x, the option of each item with the largest entry.
            choice = [int(part.argmax()) for part in np.split(found.x, np.cumsum(self.sizes)[:-1])]
            columns = self._columns(choice)
            if self._meets(columns):
                return choice
            # It misses a limit by less than the tolerance: cut off this choice and no other.
            taken = np.bincount(columns, minlength=len(self.item))  # [options of all items]
            constraints.append(LinearConstraint(taken, -np.inf, len(columns) - 1))

    def _constraints(self, allowed: np.ndarray) -> list[LinearConstraint]:
        """Return the constraints: one option an item, and each limit in units of itself."""
        columns = np.arange(len(self.item))
        one = csr_array((np.ones(len(self.item)), (self.item, columns)))  # [items, options]
        constraints = [LinearConstraint(one, 1, 1)]
        if self.links:
            rows = vstack([self._rows(link) for link in self.links], format="csr")
            constraints.append(LinearConstraint(rows, 0, 0))
        for row, limit in zip(self.weights, self.limits, strict=True):
            # In units of the limit, as the solver's tolerances are absolute.
            unit = max(limit, 1)
            used = np.where(allowed, row, 0) / unit
            constraints.append(LinearConstraint(used, -np.inf, limit / unit))
        return constraints

    def _rows(self, link: Link) -> csr_array:
        """Return a row for each label: the options of one item that have it, less the other's."""
        begins = np.cumsum([0, *self.sizes[:-1]])
        rows = np.concatenate([np.asarray(labels) for labels in link.labels])
        columns = [begins[i] + np.arange(self.sizes[i]) for i in link.items]
        signs = np.repeat([1.0, -1.0], [len(labels) for labels in link.labels])
        shape = (int(rows.max()) + 1, len(self.item))
        return csr_array((signs, (rows, np.concatenate(columns))), shape=shape)


def _above(table: Table, least: Sequence[float]) -> list[float]:
    """Return the weights of all options in one row, each above the least of its item."""
    row: list[float] = []
    for options, low in zip(table, least, strict=True):
        row.extend(w - low for w in options)
    return row


@dataclass(frozen=True)
class Allocation(Mapping[str, str]):
    """Which option each leaf takes, ``{path: option}``; prints as a table.

    Attributes:
      options: ``{path: option}``.
      score: the sum of the leaves' sensitivities.
      nbytes: stored bytes of all leaves, those that are left alone included.
      bitops: bit-operations of one call, everything included.
      left: ``{path: why}``, leaves that stay as they are.

    Example:
      >>> import compress_jax as cj
      >>> options = {"head/kernel": "int4"}
      >>> left = {"head/bias": "no product uses it"}
      >>> print(cj.search.Allocation(options, 0.5, 1250, 80_000, left))
      path         option
      head/kernel  int4
      head/bias    stays: no product uses it
      1,250 bytes, 80,000 bit-operations, 0.5
    """

    options: dict[str, str]
    score: float
    nbytes: int
    bitops: int
    left: dict[str, str]

    def __getitem__(self, path: str) -> str:
        """Return the option of a leaf."""
        if path not in self.options:
            raise NoMatchError(
                f"no option was allocated to {path!r}: "
                f"{self.left.get(path, 'it is no leaf of the model')}"
            )
        return self.options[path]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the leaves."""
        return iter(self.options)

    def __len__(self) -> int:
        """Return how many leaves take an option."""
        return len(self.options)

    def __str__(self) -> str:
        """Return a table of the leaves and the totals."""
        stays = [(path, f"stays: {why}") for path, why in self.left.items()]
        table = aligned([("path", "option"), *self.options.items(), *stays], left=2)
        total = f"{self.nbytes:,} bytes, {self.bitops:,} bit-operations, {self.score:.4g}"
        return f"{table}\n{total}"

    def compression(self, options: Mapping[str, Compression]) -> Compression:
        """Return the Compression that gives each leaf its option.

        Args:
          options: what `sensitivities` was given.

        Returns:
          `rules` with one rule for each option in use.

        Raises:
          ConfigError: if an option in use is not among them.

        Example:
          >>> import jax.numpy as jnp
          >>> import compress_jax as cj
          >>> mixed = cj.search.Allocation({"a": "int2", "b": "int8"}, 0.0, 0, 0, {})
          >>> options = {"int2": cj.quantize.uniform(2), "int8": cj.quantize.uniform(8)}
          >>> c = mixed.compression(options)
          >>> params = {"a": jnp.ones(8), "b": jnp.ones(8)}
          >>> packed = c.pack(params, c.init(params))
          >>> packed["a"].codes.bits, packed["b"].codes.bits
          (2, 8)
        """
        used = list(dict.fromkeys(self.options.values()))
        if missing := [name for name in used if name not in options]:
            raise ConfigError(
                f"the allocation uses {', '.join(missing)}, but only "
                f"{', '.join(options) or 'no option'} is given"
            )
        patterns: dict[str, tuple[str, ...]] = dict.fromkeys(used, ())
        for path, name in self.options.items():
            patterns[name] += (literal(path),)
        return rules([(patterns[name], options[name]) for name in used])


def allocate(
    sensitivities: Sensitivities, max_bytes: float | None = None, max_bitops: float | None = None
) -> Allocation:
    r"""Choose an option for each leaf: the least total sensitivity within the budgets.

    An integer program finds it.

    .. math:: \min_o \sum_p \Omega_p(o_p) \quad \text{with} \quad
       \sum_p bytes_p(o_p) \le B, \; \sum_p bitops_p(o_p) \le C

    Another budget needs no further measurements.

    Args:
      sensitivities: the table.
      max_bytes: largest number of bytes of all leaves together, skipped ones included; None for no
        limit.
      max_bitops: largest number of bit-operations of a call on the first batch, everything
        included; None for no limit.

    Returns:
      The choice; its `Allocation.compression` is ready to train, to calibrate or to pack with.

    Raises:
      ConfigError: if no choice meets the budgets; it says what can be reached.

    Example:
      >>> import compress_jax as cj
      >>> scores = {"a": {"int2": 9.0, "int8": 0.1}, "b": {"int2": 1.0, "int8": 0.2}}
      >>> sizes = {"a": {"int2": 2, "int8": 8}, "b": {"int2": 2, "int8": 8}}
      >>> macs = {"a": 1, "b": 1}
      >>> table = cj.search.Sensitivities("kl", scores, sizes, sizes, macs, {}, {}, 4, 0)
      >>> found = cj.search.allocate(table, max_bytes=14)
      >>> dict(found), found.nbytes
      ({'a': 'int8', 'b': 'int2'}, 14)
      >>> try:
      ...     cj.search.allocate(table, max_bytes=7)
      ... except cj.core.errors.ConfigError as error:
      ...     print(str(error).partition(", 4 of")[0])
      max_bytes=7 cannot be met: the least that the options reach is 8 bytes

    References:
      Dong et al., HAWQ-V2, NeurIPS 2020, section 3.3; Yao et al., HAWQ-V3, ICML 2021, equation 12
      (the integer program).
    """
    scores = sensitivities.scores
    names = {path: list(options) for path, options in scores.items()}
    budgets = (
        byte_budget(max_bytes, sensitivities.nbytes, sensitivities.left_nbytes),
        work_budget(max_bitops, sensitivities.bitops, sensitivities.left_bitops),
    )
    for budget in budgets:
        budget.check()
    limited = [budget for budget in budgets if budget.limit < math.inf]
    values = [[scores[path][name] for name in own] for path, own in names.items()]
    tables = [budget.table(names) for budget in limited]
    found = assign(values, tables, [budget.available for budget in limited])
    if found is None:
        raise _conflict(names, *limited)
    chosen = _named(names, found)
    score = sum(scores[path][name] for path, name in chosen.items())
    nbytes, bitops = (budget.total(chosen) for budget in budgets)
    return Allocation(chosen, score, nbytes, bitops, dict(sensitivities.left))


def _named(names: dict[str, list[str]], found: Sequence[int]) -> dict[str, str]:
    """Return the chosen option of each leaf by name."""
    return {path: own[which] for (path, own), which in zip(names.items(), found, strict=True)}


def _conflict(names: dict[str, list[str]], first: Budget, second: Budget) -> ConfigError:
    """Return the error of two budgets of which each can be met, but not both.

    It says what the first can reach while the second is met.
    """
    found = assign(first.table(names), [second.table(names)], [second.available]) or []
    least = first.total(_named(names, found))
    return first.refusal(least, f" together with {second.name}={second.limit}")


def literal(path: str) -> str:
    """Return the glob that matches a name and nothing else.

    Example:
      >>> literal("a*")
      'a[*]'
    """
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)
