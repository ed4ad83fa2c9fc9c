"""What importers of published weights share: names by pattern, and one error for all problems."""

import re
from collections.abc import Mapping, Sequence

from compress_jax.core.errors import WeightsError

Names = Sequence[tuple[str, str]]
"""Patterns of our names, and what a match is called elsewhere."""

# What Python raises where a description has something else than the number that is wanted.
WRONG_KIND = (TypeError, AttributeError, ZeroDivisionError, OverflowError, ValueError)


def renamed(name: str, names: Names) -> str | None:
    r"""Return what the first pattern that matches a whole name makes of it; None if none does.

    Example:
      >>> renamed("layer_3/norm", [(r"layer_(\d+)/norm", r"blocks.\1.ln")])
      'blocks.3.ln'
    """
    for pattern, theirs in names:
        if match := re.fullmatch(pattern, name):
            return match.expand(theirs)
    return None


def require_fit(subject: str, problems: Mapping[str, Sequence[str]]) -> None:
    """Raise a WeightsError that lists all problems, by kind, unless there are none.

    Example:
      >>> require_fit("the model", {"missing": []})
    """
    lists = [f"{kind}:\n  " + "\n  ".join(found) for kind, found in problems.items() if found]
    if lists:
        raise WeightsError(f"these weights do not fit {subject}. " + "\n".join(lists))
