"""The automated loop: data, teacher, student, candidates; requirements met? Output, else choose again."""

from compress_jax.search.experiment import Candidate, Experiment, Network, Requirement, Training
from compress_jax.search.judge import Assessment, choose, finished, judge, reference
from compress_jax.search.loop import Result, compress

__all__ = [
    "Assessment",
    "Candidate",
    "Experiment",
    "Network",
    "Requirement",
    "Result",
    "Training",
    "choose",
    "compress",
    "finished",
    "judge",
    "reference",
]
