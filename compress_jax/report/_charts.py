"""The interactive charts of a report as Vega-Lite: fronts, layers and curves."""

import math
from typing import Any, NamedTuple

import numpy as np

from compress_jax.core import coverage
from compress_jax.core.packed import LowRank, Sum
from compress_jax.core.paths import flatten
from compress_jax.core.types import JsonObject
from compress_jax.report._asked import limits
from compress_jax.report._read import COSTS, Run
from compress_jax.report._rows import ACCURACY, value_text, verdict
from compress_jax.report._stages import measured_names

GREY = "#7d8794"
BLUE = "#3d7fc7"
GREEN = "#1f9d61"
ORANGE = "#d9622b"
VERDICTS = ("reference", "accepted", "refused", "chosen")
POINTS = 400  # of one line; more are not seen
LEAVES = 60  # bars of one chart
SELECT: JsonObject = {"type": "interval", "zoom": "wheel![event.shiftKey]"}
GRID: JsonObject = {"name": "grid", "select": SELECT, "bind": "scales"}
LEGEND: JsonObject = {"orient": "bottom", "title": None, "columns": {"signal": "columns"}}
PALETTE = ("#3d7fc7", "#d9622b", "#1f9d61", "#a06be0", "#b38f1f", "#2fa0a8", "#d2578c", GREY)
TICKS: JsonObject = {"signal": "max(2, floor(width / 55))"}  # as many as have room


class Chart(NamedTuple):
    """One chart.

    Attributes:
      name: of its files; letters, digits and dashes.
      title: above it.
      description: what it shows, for who does not see it.
      spec: Vega-Lite, without size and colors of the theme.
      zoom: fields of the axes that can be moved, x and y; empty if they stay.
      labels: whether its layer ``labels`` names the marks of its layer ``points``.
    """

    name: str
    title: str
    description: str
    spec: JsonObject
    zoom: tuple[str, ...] = ()
    labels: bool = False


def fronts(run: Run) -> list[Chart]:
    """Return the metric against bytes, and against every other cost that two rows have.

    Args:
      run: the run.

    Returns:
      One chart a cost.
    """
    charts = [_front(run, "nbytes", "bytes on disk")]
    for key, title in COSTS.items():
        if sum(bool(row.get(key)) for row in run.results["rows"]) > 1:
            charts.append(_front(run, key, title))
    return charts


def _front(run: Run, key: str, title: str) -> Chart:
    metric = run.results.get("metric") or ACCURACY
    rows = [row for row in run.results["rows"] if row.get(key)]
    points = [_point(row, key, run) for row in rows]
    best = efficient(rows, key, higher=metric["higher_is_better"])
    names = [rows[i]["name"] for i in best]
    unit = ", %" if metric["percent"] else ""
    x: JsonObject = {"field": "x", "type": "quantitative", "title": title}
    x |= {
        "scale": _log_scale([row[key] for row in rows]),
        "axis": {"format": ".3~s", "tickCount": TICKS},
    }
    y = _vertical(points, f"validation {metric['name']}{unit}", _corner_limit(run))
    spec = {
        "data": {"values": points},
        "encoding": {"x": x},
        "layer": [*_corner(run, key, y), *_front_line(points, best, y), *_marks(y)],
    }
    description = (
        f"Validation {metric['name']} against {title} of {len(rows)} networks. On the front, where "
        f"none is better in both: {', '.join(names)}. The table of results has the numbers."
    )
    heading = f"{metric['name'].capitalize()} against {title}"
    return Chart(f"front-{key.replace('_', '-')}", heading, description, spec, ("x", "y"), True)


def efficient(rows: list[JsonObject], key: str, *, higher: bool) -> list[int]:
    """Return which rows lie on the Pareto front, the cheapest first.

    Args:
      rows: with ``validation`` and the cost.
      key: name of the cost.
      higher: whether larger validation values are better.

    Returns:
      Positions: rows that no other equals or beats in both, and beats in one.

    Example:
      >>> rows = [{"n": 3, "validation": 0.9}, {"n": 1, "validation": 0.8}]
      >>> efficient([*rows, {"n": 2, "validation": 0.7}], "n", higher=True)
      [1, 0]
    """
    sign = 1 if higher else -1
    # By cost, and at one cost the best first: each that beats all cheaper ones is on the front.
    order = sorted(range(len(rows)), key=lambda i: (rows[i][key], -sign * rows[i]["validation"]))
    best = -math.inf
    found = []
    for i in order:
        if sign * rows[i]["validation"] > best:
            best = sign * rows[i]["validation"]
            found.append(i)
    return found


def _point(row: JsonObject, key: str, run: Run) -> JsonObject:
    metric = run.results.get("metric") or ACCURACY
    scale = 100 if metric["percent"] else 1
    chosen = row["name"] == run.results["chosen"]
    tested = None if row["test"] is None else scale * row["test"]
    return {
        "name": row["name"],
        "x": row[key],
        "y": scale * row["validation"],
        "test": tested,
        "verdict": "chosen" if chosen else verdict(row, run.results["chosen"]),
        "order": 0 if chosen else 1 if row["accepted"] is None else 2,  # who is named first
        "cost": f"{row[key]:,}",
        "validation": value_text(row["validation"], metric),
        "test metric": value_text(row["test"], metric),
        "why": row["reason"],
    }


def _log_scale(values: list[float]) -> JsonObject:
    """Return a logarithmic scale with room beside the points for their labels."""
    room = max((max(values) / min(values)) ** 0.12, 1.3)
    return {"type": "log", "domain": [min(values) / room, max(values) * room], "nice": False}


def _vertical(points: list[JsonObject], title: str, limit: float | None) -> JsonObject:
    found = [each[name] for each in points for name in ("y", "test")] + [limit]
    values = [value for value in found if value is not None]
    room = 0.12 * (max(values) - min(values)) or 0.05 * abs(values[0]) or 1.0
    domain = [min(values) - room, max(values) + room]
    scale = {"domain": domain, "zero": False, "nice": False}
    return {"field": "y", "type": "quantitative", "title": title, "scale": scale}


def _corner_limit(run: Run) -> float | None:
    """Return the limit of the metric as the chart has it, or None where none is drawn."""
    found = limits(run)
    metric = run.results.get("metric") or ACCURACY
    return None if found is None else found.metric * (100 if metric["percent"] else 1)


def _corner(run: Run, key: str, y: JsonObject) -> list[JsonObject]:
    """Return the layers of the region that the requirement allows: shade and edges."""
    found = limits(run)
    limit = _corner_limit(run)
    if found is None or limit is None:
        return []
    metric = run.results.get("metric") or ACCURACY
    far = {"value": 0} if metric["higher_is_better"] else {"value": "height"}
    edge = {"type": "rule", "strokeDash": [5, 4], "color": GREEN, "aria": False}
    across = {"x": {"value": 0}, "x2": {"value": "width"}}
    level = {"datum": limit, "type": "quantitative", "scale": y["scale"]}
    horizontal = {"mark": edge, "encoding": {**across, "y": level}}
    if key != "nbytes" or not math.isfinite(found.nbytes):
        return [horizontal]
    one = {"data": {"values": [{"x": found.nbytes, "y": limit}]}}
    shade = {"type": "rect", "color": GREEN, "opacity": 0.1, "aria": False, "clip": True}
    region = {"x2": {"value": 0}, "y": y, "y2": far}
    vertical = {"y": {"value": 0}, "y2": {"value": "height"}}
    return [
        {**one, "mark": shade, "encoding": region},
        {**one, "mark": {**edge, "clip": True}, "encoding": vertical},
        horizontal,
    ]


def _front_line(points: list[JsonObject], best: list[int], y: JsonObject) -> list[JsonObject]:
    line = {"type": "line", "interpolate": "step-after", "color": GREY, "opacity": 0.7}
    values = [points[i] for i in best]
    mark = {**line, "clip": True, "aria": False}
    return [{"data": {"values": values}, "mark": mark, "encoding": {"y": y}}]


def _marks(y: JsonObject) -> list[JsonObject]:
    """Return the layers of the networks: test data hollow, validation data filled, names."""
    colors = {"domain": VERDICTS, "range": [GREY, BLUE, ORANGE, GREEN]}
    forms = {"domain": VERDICTS, "range": ["circle", "triangle-up", "cross", "diamond"]}
    color = {"field": "verdict", "type": "nominal", "scale": colors, "legend": LEGEND}
    shape = {"field": "verdict", "type": "nominal", "scale": forms, "legend": LEGEND}
    fields = ("name", "cost", "validation", "test metric", "verdict", "why")
    tooltip = [{"field": each, "type": "nominal"} for each in fields]
    tested = {"color": color, "y": {**y, "field": "test"}}
    hollow = {"type": "point", "filled": False, "size": 60, "clip": True}
    return [
        {
            "transform": [{"filter": "isValid(datum.test)"}],
            "layer": [
                {"mark": {"type": "rule", "opacity": 0.4, "clip": True},
                 "encoding": {"y": y, "y2": {"field": "test"}, "color": color}},
                {"name": "tested", "mark": hollow, "encoding": {**tested, "tooltip": tooltip}},
            ],
        },
        {
            "name": "points",
            "params": [GRID],
            "mark": {"type": "point", "filled": True, "size": 130, "opacity": 1, "clip": True},
            "encoding": {"y": y, "color": color, "shape": shape, "tooltip": tooltip},
        },
        {
            "name": "labels",
            "mark": {"type": "text", "fontSize": 12, "clip": True},
            "encoding": {"y": y, "text": {"field": "name"}},
        },
    ]  # fmt: skip


def layers(run: Run) -> list[Chart]:
    """Return bars of each leaf of the artifact: bits, zeros, bytes and, where there are, ranks.

    Args:
      run: the run.

    Returns:
      One chart a measure; of a deep network, the 60 largest leaves in the order of the network.
    """
    every = coverage(None, run.packed["params"]).rows
    largest = {row.path for row in sorted(every, key=lambda row: -math.prod(row.shape))[:LEAVES]}
    rows = [row for row in every if row.path in largest]
    nodes = flatten(run.packed["params"])[0]
    values = [
        {
            "leaf": row.path,
            "form": row.form,
            "bits": row.bits,
            "zeros": 100 * row.sparsity,
            "bytes": _bytes_of(run, row.path),
            "rank": _rank(nodes[row.path]),
        }
        for row in rows
    ]
    measures = {"bits": "stored bits for each entry", "zeros": "share of exact zeros, %"}
    measures |= {"bytes": "bytes in the file"}
    if any(each["rank"] for each in values):
        measures["rank"] = "rank"
    return [_bars(key, title, values, len(every)) for key, title in measures.items()]


def _rank(node: object) -> int | None:
    node = node.delta if isinstance(node, Sum) else node
    return int(node.left.shape[-1]) if isinstance(node, LowRank) else None


def _bytes_of(run: Run, path: str) -> int:
    return round(sum(part.nbytes for part in run.parts if part.path == f"params/{path}"))


def _bars(key: str, title: str, values: list[JsonObject], leaves: int) -> Chart:
    fields = ("leaf", "form", key)
    leaf: JsonObject = {"field": "leaf", "type": "nominal", "sort": None, "title": None}
    forms = sorted({each["form"] for each in values} - {"dense"})
    scale = {"domain": [*forms, "dense"], "range": [*PALETTE[: len(forms)], GREY]}
    color = {"field": "form", "type": "nominal", "scale": scale, "legend": LEGEND}
    tooltip = [{"field": each, "type": "nominal"} for each in fields[:2]]
    tooltip.append({"field": key, "type": "quantitative", "format": ",.4~g"})
    spec = {
        "data": {"values": [{name: each[name] for name in fields} for each in values]},
        "height": 20 * len(values),
        "mark": {"type": "bar", "cornerRadiusEnd": 2},
        "encoding": {
            "y": {**leaf, "axis": {"labelLimit": 130, "grid": False}},
            "x": {
                "field": key, "type": "quantitative", "title": title,
                "axis": {"tickCount": TICKS},
            },
            "color": color,
            "tooltip": tooltip,
        },
    }  # fmt: skip
    largest = max(values, key=lambda each: each[key] or 0)
    which = f"{leaves} leaves"
    if len(values) < leaves:
        which = f"the {len(values)} largest of {which}"
    description = (
        f"{title.capitalize()} of {which}, the most {largest[key]:,.4g} of "
        f"{largest['leaf']}. The table of leaves has the numbers."
    )
    return Chart(f"leaf-{key}", title.capitalize(), description, spec)


def curves(run: Run) -> list[Chart]:
    """Return each metric of training and validation by step, a line for each stage.

    Args:
      run: the run.

    Returns:
      One chart a metric; training and validation data share it.
    """
    metrics: dict[str, list[str]] = {}
    for name in measured_names(run):
        metrics.setdefault(name.rpartition("/")[2], []).append(name)
    return [_lines(run, metric, names) for metric, names in metrics.items()]


def _lines(run: Run, metric: str, names: list[str]) -> Chart:
    values: list[dict[str, Any]] = []
    for stage, series in run.curves.items():
        for name in names:
            split = name.rpartition("/")[0] or "train"
            own = {"stage": stage, "split": split}
            values += [{**own, "step": x, "value": v} for x, v in _thinned(series.get(name, []))]
    positive = min(each["value"] for each in values) > 0
    kind = "log" if metric.endswith("loss") and positive else "linear"
    scale = {"type": kind, "zero": False} if kind == "linear" else {"type": kind}
    # One color a stage in all charts.
    stages = {"domain": list(run.curves), "range": PALETTE}
    encoding: JsonObject = {
        "x": {
            "field": "step", "type": "quantitative", "title": "step",
            "scale": {"zero": False}, "axis": {"tickCount": TICKS},
        },
        "y": {
            "field": "value", "type": "quantitative", "title": metric, "scale": scale,
            "axis": {"tickCount": 6},
        },
        "color": {"field": "stage", "type": "nominal", "scale": stages, "legend": LEGEND},
        "tooltip": [{"field": each} for each in ("stage", "split", "step", "value")],
    }  # fmt: skip
    if len(names) > 1:
        encoding["strokeDash"] = {"field": "split", "type": "nominal", "legend": LEGEND}
    point = {"size": 30, "opacity": 0 if len(values) > 200 else 0.9}
    mark = {"type": "line", "clip": True, "strokeWidth": 1.6, "point": point}
    spec = {"data": {"values": values}, "params": [GRID], "mark": mark, "encoding": encoding}
    ends = ", ".join(_last(values, stage) for stage in dict.fromkeys(v["stage"] for v in values))
    description = f"{metric} by training step. Last values: {ends}."
    safe = "".join(each if each.isalnum() else "-" for each in metric)
    return Chart(f"curve-{safe}", metric, description, spec, ("step", "value"))


def _last(values: list[dict[str, Any]], stage: str) -> str:
    last = [each for each in values if each["stage"] == stage][-1]
    return f"{stage} {last['value']:.4g}"


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most so many points, evenly spread, first and last among them."""
    if len(points) <= POINTS:
        return points
    return [points[i] for i in np.linspace(0, len(points) - 1, POINTS).round().astype(int)]
