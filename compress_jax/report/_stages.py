"""The trainings of a run as a table: steps and last values."""

from compress_jax.report._read import Curves, Run
from compress_jax.report._tables import Table

NUMBERS = ("teacher_id", "step")  # endings of what is recorded and measures nothing


def measured_names(run: Run) -> list[str]:
    """Return the names of the metrics that any training of a run recorded, in their order."""
    names = dict.fromkeys(name for series in run.curves.values() for name in series)
    return [name for name in names if not name.endswith(NUMBERS)]


def stages_table(run: Run) -> Table:
    """Return the last value of each metric of each training.

    Args:
      run: the run.

    Returns:
      One row a stage; without rows if the run kept no metrics.
    """
    names = measured_names(run)
    rows = [_row(stage, series, names) for stage, series in run.curves.items()]
    head = ("stage", "steps", *(f"{name}, last" for name in names))
    return Table("Trainings", head, tuple(rows) if names else ())


def _row(stage: str, series: Curves, names: list[str]) -> tuple[str, ...]:
    steps = max((step for points in series.values() for step, _ in points), default=0)
    lasts = [series[name][-1][1] if name in series else None for name in names]
    cells = ["-" if last is None else f"{last:.4g}" for last in lasts]
    return (stage, f"{steps:,}", *cells)
