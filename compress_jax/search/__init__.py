"""The automated loop: data, teacher, student, candidates; requirement met? Output, else again.

Mixed precision: `sensitivities` measures every option of every leaf once, `allocate` shares out as
many budgets as you like.
"""

from compress_jax.search._allocate import Allocation, allocate
from compress_jax.search._candidate import Candidate, Rewrite, Subject
from compress_jax.search._comparison import Comparison, compare_language
from compress_jax.search._drop_blocks import drop_blocks
from compress_jax.search._experiment import Experiment
from compress_jax.search._judge import Assessment, choose, finished, judge, reference
from compress_jax.search._loop import Result, compress
from compress_jax.search._network import Network, Training
from compress_jax.search._plan import Plan, plan
from compress_jax.search._requirement import Requirement
from compress_jax.search._reuse import reusing
from compress_jax.search._rewrites import quantize_activations, rewrite, shrink
from compress_jax.search._sensitivity import Sensitivities, sensitivities
from compress_jax.search._shared import sharing
from compress_jax.search._space import Search
from compress_jax.train._chips import CHIPS, Chip

__all__ = [
    "CHIPS",
    "Allocation",
    "Assessment",
    "Candidate",
    "Chip",
    "Comparison",
    "Experiment",
    "Network",
    "Plan",
    "Requirement",
    "Result",
    "Rewrite",
    "Search",
    "Sensitivities",
    "Subject",
    "Training",
    "allocate",
    "choose",
    "compare_language",
    "compress",
    "drop_blocks",
    "finished",
    "judge",
    "plan",
    "quantize_activations",
    "reference",
    "reusing",
    "rewrite",
    "sensitivities",
    "sharing",
    "shrink",
]


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
