"""Timing on a machine that others use too.

Variants take turns, and each is compared with the baseline of its own round.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

RESULTS = Path(__file__).parent / "results"


class Run(NamedTuple):
    """One timed run: seconds on the wall, and of the processor, which load disturbs less."""

    wall: float
    cpu: float


def interleaved(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Run]]:
    """Run every variant once a round, each round starting with the next variant.

    A first round does not count, unless it is the only one.

    Args:
      variants: functions of no arguments, compiled already, by name.
      rounds: how many rounds count.

    Returns:
      The runs, by name, in the order of the rounds.
    """
    runs, names = {name: [] for name in variants}, list(variants)
    for i in range(rounds + (rounds > 1)):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(variants[name]())
            runs[name].append(Run(time.perf_counter() - wall, time.process_time() - cpu))
    return {name: of[-rounds:] for name, of in runs.items()}


def milliseconds(seconds: Iterable[float]) -> str:
    """Return the median, printed in milliseconds."""
    return f"{1e3 * statistics.median(seconds):,.1f}"


def ratio(times: Iterable[float], baseline: Iterable[float]) -> str:
    """Return the median and quartiles of the ratios to the baseline of the same round."""
    ratios = [a / b for a, b in zip(times, baseline, strict=True)]
    if len(ratios) == 1:
        return f"{ratios[0]:.3g}"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def report(name: str, head: list[str], rows: list[list[Any]], **details: Any) -> None:
    """Print a Markdown table; write it, with the machine, as ``.md`` and ``.json`` in results."""
    cells = [head, ["---"] * len(head), *rows]
    table = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in cells)
    devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {devices}"
    load = round(
        os.getloadavg()[1], 1
    )  # of the last 5 minutes; one process of two threads makes 1 to 2
    where = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "load": load,
        "jax": jax.__version__,
        **details,
    }
    print(table, where, sep="\n\n")
    RESULTS.mkdir(exist_ok=True)
    note = ", ".join(f"{key}: {value}" for key, value in where.items())
    (RESULTS / f"{name}.md").write_text(f"{table}\n\n{note}\n")
    records = [dict(zip(head, row, strict=True)) for row in rows]
    (RESULTS / f"{name}.json").write_text(json.dumps({**where, "rows": records}, indent=1) + "\n")
