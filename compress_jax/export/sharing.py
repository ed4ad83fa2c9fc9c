"""Which streams of symbols share a table: merged while the table saved costs more than the bits lost."""

from collections.abc import Hashable, Sequence

import numpy as np

from compress_jax.export.entropy import NEVER, probabilities, quantized

HEAD = 4  # bytes of a table beside its entries


def share(counts: Sequence[np.ndarray], kinds: Sequence[Hashable]) -> list[int]:
    """Return the group of each stream; streams of one group are described by the sum of their histograms.

    From every stream by itself on, the two groups whose union saves most are joined, until no union saves anything. The cost
    of a group is that of its symbols under its quantized table, and of the table.

    Args:
      counts: a histogram for each stream.
      kinds: only streams of equal kind, whose histograms have equal lengths, may share.

    Returns:
      A number for each stream, from 0 on in order of first appearance.

    Example:
      >>> share([np.array([5, 5]), np.array([50, 50]), np.array([9000, 10])], ["bits"] * 3)
      [0, 0, 1]
    """
    members = [[i] for i in range(len(counts))]
    histograms = [np.asarray(each, np.int64) for each in counts]
    costs = [cost(each) for each in histograms]
    savings = {(i, j): _saved(histograms, costs, i, j) for j in range(len(counts)) for i in range(j) if kinds[i] == kinds[j]}
    while savings and max(savings.values()) > 0:
        i, j = max(savings, key=lambda pair: (savings[pair], pair))
        members[i] += members[j]
        histograms[i] = histograms[i] + histograms[j]
        costs[i], members[j] = cost(histograms[i]), []
        savings = {pair: value for pair, value in savings.items() if j not in pair}
        savings |= {pair: _saved(histograms, costs, *pair) for pair in savings if i in pair}
    group = {stream: which for which, of in enumerate(members) for stream in of}
    order = {which: number for number, which in enumerate(dict.fromkeys(group[i] for i in range(len(counts))))}
    return [order[group[i]] for i in range(len(counts))]


def cost(histogram: np.ndarray) -> float:
    """Return the bytes of symbols with this histogram, and of their table.

    Example:
      >>> cost(np.array([80, 80])), cost(np.array([80, 0]))
      (26.0, 6.0)
    """
    table = quantized(histogram)
    used = table != NEVER
    bits = -np.log2(probabilities(table[used])) @ histogram[used] if used.any() else 0.0
    return float(bits / 8 + HEAD + table.size)


def _saved(histograms: list[np.ndarray], costs: list[float], i: int, j: int) -> float:
    return costs[i] + costs[j] - cost(histograms[i] + histograms[j])
