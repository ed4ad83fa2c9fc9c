"""Which state of a run is the best, by a metric of its evaluations."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from compress_jax.core.arguments import flag, refused
from compress_jax.core.errors import ArgumentError


@dataclass(frozen=True)
class Best:
    """The metric by which one state of a run is the best.

    Attributes:
      metric: name of a metric that the run's ``evaluate`` returns.
      higher_is_better: True for accuracies, False for losses and errors.

    Raises:
      ArgumentError: if metric is no name, or higher_is_better neither True nor False.

    Example:
      >>> import compress_jax as cj
      >>> best = cj.train.Best("loss", higher_is_better=False)
      >>> best.step_of({10: {"loss": 0.5}, 20: {"loss": 0.4}, 30: {"loss": 0.4}, 40: {}})
      20
    """

    metric: str
    higher_is_better: bool

    def __post_init__(self) -> None:
        """Check types."""
        if not isinstance(self.metric, str) or not self.metric:
            refused("metric", self.metric, "the name of a metric, such as 'accuracy'")
        flag("higher_is_better", self.higher_is_better)

    def step_of(self, metrics: Mapping[int, Mapping[str, float]]) -> int | None:
        """Return the step with the best value, the earliest of equal ones.

        Args:
          metrics: by step; NaN and infinity are never the best.

        Returns:
          The step, or None if the metric has no finite value at any.
        """
        values = {step: each.get(self.metric, math.nan) for step, each in metrics.items()}
        known = sorted(step for step, value in values.items() if math.isfinite(value))
        sign = 1 if self.higher_is_better else -1
        # Of equal values `max` takes the first.
        return max(known, key=lambda step: sign * values[step], default=None)

    def require(self, metrics: Mapping[str, float]) -> None:
        """Raise an ArgumentError if an evaluation lacks the metric; it lists those there are."""
        if self.metric not in metrics:
            there = ", ".join(map(repr, metrics)) or "none at all"
            raise ArgumentError(
                f"best: evaluate returned no metric {self.metric!r}; it returned {there}"
            )
