"""A paired test of whether two groups of runs differ."""

from collections.abc import Sequence

import numpy as np

EXACT = 20  # pairs up to which all assignments of signs are counted: a million
DRAWS = 99_999  # assignments drawn at random for more pairs


def sign_flip_p(differences: Sequence[float]) -> float:
    r"""Return the p value of a two-sided paired permutation test.

    Under the null hypothesis the sign of each difference is a toss. With all :math:`2^n` signs,

    .. math:: p = 2^{-n} \sum_{s \in \{-1, 1\}^n}
        \left[\, |\textstyle\sum_i s_i d_i| \ge |\sum_i d_i| \,\right]

    For more than 20 differences, 99,999 assignments are drawn by a fixed seed, and the one that
    was observed is counted with them.

    Args:
      differences: of n pairs, in any unit.

    Returns:
      From ``smallest_p(n)`` to 1.

    Example:
      >>> sign_flip_p([0.1, 0.2, 0.3]), sign_flip_p([0.1, 0.2, -0.3])
      (0.25, 1.0)

    References:
      Fisher, The Design of Experiments, 1935, section 21.
    """
    values = np.asarray(differences, np.float64)
    # Sums in another order differ by rounding.
    least = abs(values.sum()) - 1e-9 * np.abs(values).sum()
    if len(values) > EXACT:
        signs = np.random.default_rng(0).integers(0, 2, (DRAWS, len(values)), np.int8) * 2 - 1
        return float((1 + np.sum(np.abs(signs @ values) >= least)) / (1 + DRAWS))
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return float(np.mean(np.abs(sums) >= least))


def smallest_p(pairs: int) -> float:
    """Return the smallest p value that so many pairs can have: all differences of one sign.

    Example:
      >>> smallest_p(5)
      0.0625
    """
    return min(1.0, 2.0 ** (1 - pairs)) if pairs <= EXACT else 1 / (1 + DRAWS)
