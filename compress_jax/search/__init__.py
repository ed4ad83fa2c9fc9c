"""The automated loop: data, teacher, student, candidates; requirement met? Output, else again.

Mixed precision: `sensitivities` measures every option of every leaf once, `allocate` shares out as
many budgets as you like.
"""

from compress_jax.search._allocate import Allocation, allocate
from compress_jax.search._candidate import Candidate, Rewrite, Subject
from compress_jax.search._experiment import Experiment, Requirement
from compress_jax.search._judge import Assessment, choose, finished, judge, reference
from compress_jax.search._loop import Result, compress
from compress_jax.search._network import Network, Training
from compress_jax.search._plan import CHIPS, Chip, Plan, plan
from compress_jax.search._rewrites import quantize_activations, rewrite, shrink
from compress_jax.search._sensitivity import Sensitivities, sensitivities

__all__ = [
    "CHIPS",
    "Allocation",
    "Assessment",
    "Candidate",
    "Chip",
    "Experiment",
    "Network",
    "Plan",
    "Requirement",
    "Result",
    "Rewrite",
    "Sensitivities",
    "Subject",
    "Training",
    "allocate",
    "choose",
    "compress",
    "finished",
    "judge",
    "plan",
    "quantize_activations",
    "reference",
    "rewrite",
    "sensitivities",
    "shrink",
]


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
