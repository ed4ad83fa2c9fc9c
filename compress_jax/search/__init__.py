"""The automated loop: data, teacher, student, candidates; requirement met? Output, else again.

Mixed precision: `sensitivities` measures every option of every leaf once, `allocate` shares out as
many budgets as you like.
"""

from compress_jax.search._allocate import Allocation, allocate
from compress_jax.search._experiment import Candidate, Experiment, Network, Requirement, Training
from compress_jax.search._judge import Assessment, choose, finished, judge, reference
from compress_jax.search._loop import Result, compress
from compress_jax.search._sensitivity import Sensitivities, sensitivities

__all__ = [
    "Allocation",
    "Assessment",
    "Candidate",
    "Experiment",
    "Network",
    "Requirement",
    "Result",
    "Sensitivities",
    "Training",
    "allocate",
    "choose",
    "compress",
    "finished",
    "judge",
    "reference",
    "sensitivities",
]


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
