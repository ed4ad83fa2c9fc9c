"""One number for each channel of each group: what a criterion says about its members, put together and made comparable."""

from collections.abc import Callable
from typing import Any

import numpy as np

from compress_jax.core.errors import ConfigError, NonFiniteError
from compress_jax.prune.members import Importance, members
from compress_jax.trace import Groups

Reduction = Callable[[np.ndarray], np.ndarray]
REDUCTIONS: dict[str, Reduction] = {
    "mean": lambda scores: scores.mean(0),
    "sum": lambda scores: scores.sum(0),
    "max": lambda scores: scores.max(0),
}
NORMALISATIONS: dict[str, Callable[[np.ndarray], Any]] = {
    "none": lambda score: 1.0,
    "mean": lambda score: score.mean(),
    "sum": lambda score: score.sum(),
    "max": lambda score: score.max(),
    "l2": lambda score: np.sqrt(np.square(score).sum()),
}


def channel_scores(
    groups: Groups,
    leaves: dict[str, Any],
    contracted: set[str],
    importance: Importance,
    reduction: str = "mean",
    normalise: str = "mean",
) -> dict[str, np.ndarray]:
    r"""Score the channels of each group.

    :math:`I_c = \mathrm{reduce}_m I_{m c}` over the members m that the criterion has something to say about, then divided
    by its mean (or another size) over the group, so that groups of different widths can compete.

    Args:
      groups: of channels.
      leaves: parameters by path.
      contracted: paths of parameters of products.
      importance: the criterion.
      reduction: ``"mean"``, ``"sum"`` or ``"max"``.
      normalise: ``"mean"``, ``"sum"``, ``"max"``, ``"l2"`` or ``"none"``.

    Returns:
      By name of the group a float64 array ``[size]``; groups about which the criterion says nothing are missing.

    Raises:
      ConfigError: if a reduction or a normalisation is not known.
      NonFiniteError: if a score is NaN or infinite.
    """
    for name, given, known in (("reduction", reduction, REDUCTIONS), ("normalise", normalise, NORMALISATIONS)):
        if given not in known:
            raise ConfigError(f"{name}={given!r} is not known; use one of {', '.join(map(repr, known))}")
    found = {}
    for group in groups:
        scores = []
        for member in members(group, leaves, contracted):
            if (score := importance(member)) is not None:
                scores.append(np.asarray(score, np.float64))
                if not np.isfinite(scores[-1]).all():
                    raise NonFiniteError(f"the importance of {member.path!r} along axis {member.axis} is NaN or infinite")
        if scores:
            score = REDUCTIONS[reduction](np.stack(scores))
            size = NORMALISATIONS[normalise](score)
            found[group.name] = score / size if size else score
    return found
