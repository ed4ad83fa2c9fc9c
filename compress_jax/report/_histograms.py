"""The interactive charts of distributions: weights, activations, predictions, sensitivities."""

import numpy as np

from compress_jax.core import coverage
from compress_jax.core.types import JsonObject
from compress_jax.report._charts import GREY, LEGEND, TICKS, Chart
from compress_jax.report._read import Run

MOST = 24  # leaves or sites that are drawn
BINS = 61  # odd, so that zero is the middle of one
CLASSES = 40  # a larger confusion is not readable as a picture


def weights(run: Run) -> list[Chart]:
    """Return the weights of the float32 student and of the artifact, one chart a leaf.

    Args:
      run: the run.

    Returns:
      The charts; of a deep network, the 24 largest leaves in the order of the network.
    """
    forms = {row.path: row.form for row in coverage(None, run.packed["params"]).rows}
    paths = [path for path, form in forms.items() if form != "dense" and path in run.before]
    largest = sorted(paths, key=lambda path: -run.before[path].size)[:MOST]
    return [_weights(run, path, i) for i, path in enumerate(p for p in paths if p in largest)]


def _weights(run: Run, path: str, number: int) -> Chart:
    before = np.asarray(run.before[path], np.float32).ravel()
    after = np.asarray(run.after[path], np.float32).ravel()
    reach = max(float(np.abs(before).max()), float(np.abs(after).max()), 1e-12)
    edges = np.linspace(-reach, reach, BINS + 1)
    nonzero = after[after != 0]
    shares = {
        "student in float32": 100 * np.histogram(before, edges)[0] / before.size,
        "artifact": 100 * np.histogram(nonzero, edges)[0] / after.size,
    }
    zeros = 1 - nonzero.size / after.size
    facts = f"{zeros:.1%} zeros, {np.unique(nonzero).size:,} other values"
    values = [row for name, own in shares.items() for row in _steps(name, edges, own)]
    description = f"Histogram of {path} before and after. In the artifact: {facts}."
    spec = _areas(values, "weight", list(shares))
    return Chart(f"weights-{number}", path, description, spec)


def activations(run: Run) -> list[Chart]:
    """Return what enters each site, before and after compression, one chart a site.

    Args:
      run: the run.

    Returns:
      The charts; empty if nothing was measured.
    """
    found = run.extra.measured.get("activations", {})
    sites = list(found.items())[:MOST]
    return [_activations(site, own, i) for i, (site, own) in enumerate(sites)]


def _activations(site: str, found: JsonObject, number: int) -> Chart:
    values: list[JsonObject] = []
    for name, own in found.items():
        edges = np.linspace(own["low"], own["high"], len(own["shares"]) + 1)
        values += _steps(name, edges, 100 * np.asarray(own["shares"]))
    spans = [f"{name} {own['low']:.3g} to {own['high']:.3g}" for name, own in found.items()]
    description = f"Histogram of what enters {site}: {'; '.join(spans)}."
    spec = _areas(values, "activation", list(found))
    return Chart(f"activations-{number}", site, description, spec)


def _steps(name: str, edges: np.ndarray, shares: np.ndarray) -> list[JsonObject]:
    """Return one bin a row, of three significant digits: a picture shows no more."""
    bins = zip(edges[:-1], edges[1:], shares, strict=True)
    return [
        {"of": name, "x": float(f"{low:.3g}"), "to": float(f"{high:.3g}"), "y": float(f"{y:.3g}")}
        for low, high, y in bins
        if y > 0
    ]


def _areas(values: list[JsonObject], what: str, names: list[str]) -> JsonObject:
    colors = {"domain": names, "range": [GREY, "#3d7fc7"]}
    return {
        "data": {"values": values},
        "height": 130,
        "mark": {"type": "rect", "opacity": 0.6, "aria": False},
        "encoding": {
            "x": {
                "field": "x", "type": "quantitative", "title": what,
                "scale": {"zero": False, "nice": False}, "axis": {"tickCount": TICKS},
            },
            "x2": {"field": "to"},
            "y": {
                "field": "y", "type": "quantitative", "title": "% of entries", "stack": None,
                "scale": {"zero": True}, "axis": {"tickCount": 4},
            },
            "y2": {"datum": 0},
            "color": {"field": "of", "type": "nominal", "scale": colors, "legend": LEGEND},
            "tooltip": [{"field": each} for each in ("of", "x", "to", "y")],
        },
    }  # fmt: skip


def confusion(run: Run) -> list[Chart]:
    """Return how often reference and artifact answer alike, if that was measured.

    Args:
      run: the run.

    Returns:
      One chart, or none: without a measurement, or with more classes than can be read.
    """
    counts = run.extra.measured.get("confusion") or []
    if not counts or len(counts) > CLASSES:
        return []
    name = run.extra.measured["reference"]
    total = sum(map(sum, counts))
    agreed = sum(row[i] for i, row in enumerate(counts) if i < len(row))
    values = [
        {"reference": i, "artifact": k, "examples": n, "share": n / max(sum(row), 1)}
        for i, row in enumerate(counts)
        for k, n in enumerate(row)
    ]
    axis = {"labelAngle": 0, "grid": False}
    kinds = ("reference", "artifact", "examples")
    spec = {
        "data": {"values": values},
        "height": 24 * len(counts),
        "encoding": {
            "x": {"field": "artifact", "type": "ordinal", "title": "artifact says", "axis": axis},
            "y": {"field": "reference", "type": "ordinal", "title": f"{name} says", "axis": axis},
        },
        "layer": [
            {"mark": {"type": "rect"}, "encoding": _shades(kinds)},
            {"mark": {"type": "text", "fontSize": 11}, "encoding": _counts()},
        ],
    }
    description = f"Of {total:,} test examples {name} and artifact answer {agreed:,} alike."
    return [Chart("confusion", f"Answers of {name} and artifact", description, spec)]


def _shades(kinds: tuple[str, ...]) -> JsonObject:
    scale = {"range": ["#3d7fc700", "#3d7fc7"], "domain": [0, 1]}
    color = {"field": "share", "type": "quantitative", "scale": scale, "legend": None}
    return {"color": color, "tooltip": [{"field": kind} for kind in kinds]}


def _counts() -> JsonObject:
    """Return the encoding of numbers; those of 0 are not written."""
    return {"text": {"condition": {"test": "datum.examples > 0", "field": "examples"}, "value": ""}}


def sensitivities(run: Run) -> list[Chart]:
    """Return the score of every option for every leaf, if the folder has them.

    Args:
      run: the run.

    Returns:
      One chart, or none.
    """
    table = run.extra.sensitivities
    scores = table.get("scores", {})
    values = [
        {"leaf": path, "option": option, "score": score, "bytes": table["nbytes"][path].get(option)}
        for path, own in scores.items()
        for option, score in own.items()
    ]
    if not values:
        return []
    # A score of 0, of an option that changes nothing, has no place on a logarithmic axis.
    kind = "log" if min(each["score"] for each in values) > 0 else "sqrt"
    measure = f"{table['measure']}: smaller is better"
    axis = {"labelLimit": 130}
    spec = {
        "data": {"values": values},
        "height": 22 * len(scores),
        "mark": {"type": "point", "filled": True, "size": 80, "opacity": 0.85},
        "encoding": {
            "y": {"field": "leaf", "type": "nominal", "sort": None, "title": None, "axis": axis},
            "x": {
                "field": "score", "type": "quantitative", "title": measure,
                "scale": {"type": kind}, "axis": {"format": ".2~g", "tickCount": TICKS},
            },
            "color": {"field": "option", "type": "nominal", "sort": None, "legend": LEGEND},
            "shape": {"field": "option", "type": "nominal", "sort": None, "legend": LEGEND},
            "tooltip": [{"field": each} for each in ("leaf", "option", "score", "bytes")],
        },
    }  # fmt: skip
    most = max(values, key=lambda each: each["score"])
    description = (
        f"Sensitivity of {len(scores)} leaves. The largest: {most['leaf']} as {most['option']}, "
        f"{most['score']:.3g}. The table has all."
    )
    return [Chart("sensitivities", "Sensitivity by leaf and option", description, spec)]
