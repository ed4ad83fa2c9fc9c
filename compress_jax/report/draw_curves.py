"""Training curves of all stages."""

from compress_jax.report.figure import CYCLE, Axes, Figure, clean, new_figure, plain
from compress_jax.report.read import Run

METRICS = (("train/loss", "training loss"), ("train/accuracy", "accuracy on training batches"))


def curves(run: Run) -> Figure | None:
    """Draw loss and accuracy by step, a line for each stage.

    Args:
      run: the run.

    Returns:
      The figure, or None if the run kept no metrics.
    """
    shown = [(key, title) for key, title in METRICS if any(key in series for series in run.curves.values())]
    if not shown:
        return None
    figure = new_figure(9, 3.4)
    for axes, (key, title) in zip(figure.subplots(1, len(shown), squeeze=False).ravel(), shown, strict=True):
        _lines(clean(axes, title, "step"), run, key)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _lines(axes: Axes, run: Run, key: str) -> None:
    for i, (stage, series) in enumerate(run.curves.items()):
        points = series.get(key, [])
        steps, values = [step for step, _ in points], [value for _, value in points]
        axes.plot(
            steps,
            values,
            color=CYCLE[i % len(CYCLE)],
            label=f" {plain(stage)}",  # a label that begins with _ is left out
            linewidth=1.3,
        )
    if key.endswith("loss") and all(value > 0 for series in run.curves.values() for _, value in series.get(key, [])):
        axes.set_yscale("log")
