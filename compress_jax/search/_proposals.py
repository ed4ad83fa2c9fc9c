"""Which budgets are proposed, and what measuring whole proposals says of single leaves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from compress_jax.core.errors import ConfigError
from compress_jax.search._allocate import Allocation, allocate
from compress_jax.search._sensitivity import Sensitivities

TRUST = 0.3  # in the scores of single leaves, beside what was measured of whole proposals


def budgets(table: Sensitivities, count: int, max_bytes: float) -> list[int]:
    """Return numbers of bytes to share out, evenly in their logarithms, ascending.

    Args:
      table: what the options take.
      count: how many.
      max_bytes: the largest.

    Returns:
      From the least that the options reach to the most, or ``max_bytes`` if that is less.

    Example:
      >>> sizes = {"a": {"int2": 100, "int8": 400}}
      >>> table = Sensitivities("kl", sizes, sizes, sizes, {"a": 1}, {}, {}, 0, 0)
      >>> budgets(table, 3, math.inf), budgets(table, 3, 225)
      ([100, 200, 400], [100, 150, 225])
    """
    least = table.left_nbytes + sum(min(own.values()) for own in table.nbytes.values())
    most = table.left_nbytes + sum(max(own.values()) for own in table.nbytes.values())
    top = max(min(most, max_bytes), least)
    found = np.geomspace(max(least, 1), max(top, 1), count)
    return sorted({math.floor(x + 1e-6) for x in found})


def restricted(table: Sensitivities, names: Sequence[str]) -> Sensitivities:
    """Return a table with some of its options alone.

    Raises:
      ConfigError: if a leaf can take none of them.

    Example:
      >>> sizes = {"a": {"int2": 100, "int8": 400}}
      >>> table = Sensitivities("kl", sizes, sizes, sizes, {"a": 1}, {}, {}, 0, 0)
      >>> restricted(table, ["int8"]).nbytes
      {'a': {'int8': 400}}
    """

    def some(amounts: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        return {p: {o: x for o, x in own.items() if o in names} for p, own in amounts.items()}

    scores = some(table.scores)
    for path, own in scores.items():
        if not own:
            raise ConfigError(f"{path} can take none of {', '.join(names)}")
    nbytes: dict[str, dict[str, int]] = some(table.nbytes)  # pyright: ignore
    bitops: dict[str, dict[str, int]] = some(table.bitops)  # pyright: ignore
    return replace(table, scores=scores, nbytes=nbytes, bitops=bitops)


def shared_out(table: Sensitivities, max_bytes: float, max_bitops: float) -> Allocation | None:
    """Return the best choice within the budgets, or None if there is none."""
    try:
        return allocate(table, max_bytes, max_bitops if math.isfinite(max_bitops) else None)
    except ConfigError:
        return None


def corrected(
    table: Sensitivities, measured: Sequence[tuple[Mapping[str, str], float]]
) -> Sensitivities:
    r"""Return a table whose scores add up to what whole proposals were measured to score.

    Scores of single leaves are added up as if leaves did not act on each other. Each option gets a
    factor m, the least squares of relative errors with some trust in 1:

    .. math:: \min_{m \ge 0} \sum_j \Big(\frac{\sum_o m_o \sum_{p: o_j(p) = o} s_{po}}{y_j} - 1
       \Big)^2 + \lambda \sum_o (m_o - 1)^2

    Args:
      table: scores of single leaves.
      measured: pairs of a proposal, ``{path: option}``, and its score y as a whole.

    Returns:
      The table with scores ``m_o * s_po``.

    Example:
      >>> scores = {"a": {"int2": 1.0, "int8": 0.1}, "b": {"int2": 1.0, "int8": 0.1}}
      >>> table = Sensitivities("kl", scores, scores, scores, {}, {}, {}, 0, 0)
      >>> seen = [({"a": "int2", "b": "int2"}, 8.0)] * 20
      >>> factor = corrected(table, seen).scores["a"]["int2"]
      >>> 3 < factor < 4
      True
    """
    names = sorted({o for own in table.scores.values() for o in own})
    rows = []
    for options, score in measured:
        sums = dict.fromkeys(names, 0.0)
        for path, option in options.items():
            sums[option] += table.scores[path][option]
        if score > 0:
            rows.append([sums[name] / score for name in names])
    if not rows:
        return table
    trust = math.sqrt(TRUST) * np.eye(len(names))
    system = np.concatenate([np.asarray(rows), trust])
    wanted = np.concatenate([np.ones(len(rows)), trust.sum(axis=1)])
    factors = dict(zip(names, nnls(system, wanted)[0].tolist(), strict=True))
    scores = {p: {o: x * factors[o] for o, x in own.items()} for p, own in table.scores.items()}
    return replace(table, scores=scores)


@dataclass(frozen=True)
class Overhead:
    """How many bytes a file takes, from what its leaves do: header, other leaves, coding.

    Attributes:
      factor: of the leaves' bytes.
      fixed: what is added.

    Example:
      >>> Overhead.of([(1000, 1500), (2000, 2500)]).leaves(1250)
      750
    """

    factor: float = 1.0
    fixed: float = 0.0

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]]) -> "Overhead":
        """Return the one of files that were written: pairs of the leaves' bytes and the file's."""
        if not pairs:
            return cls()
        leaves, files = np.asarray(pairs, float).T
        if len(set(leaves.tolist())) < 2:
            return cls(1.0, float((files - leaves).max()))
        factor, fixed = np.polyfit(leaves, files, 1)
        factor = float(factor) if factor > 0 else 1.0
        # No known file takes more than is predicted: a budget must hold.
        return cls(factor, max(float(fixed), float((files - factor * leaves).max())))

    def leaves(self, file: float) -> float:
        """Return the bytes that leaves may take in a file of at most so many."""
        if not math.isfinite(file):
            return file
        # A fit of whole numbers is off by less than that.
        return math.floor((file - self.fixed) / self.factor + 1e-6)
