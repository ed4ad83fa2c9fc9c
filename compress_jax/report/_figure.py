"""Figures without pyplot: no global state, no window, one style."""

import contextlib
import io
import warnings
from collections.abc import Iterator

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from compress_jax.core.table import printable

GREY = "#8a94a3"
BLUE = "#2f6fb3"
GREEN = "#1f9d61"
ORANGE = "#d9622b"
INK = "#1c2430"
CYCLE = (GREY, BLUE, GREEN, ORANGE, "#7a52b3", "#b38f1f", "#2fa8a8", "#b3437a")

__all__ = [
    "BLUE",
    "CYCLE",
    "GREEN",
    "GREY",
    "INK",
    "ORANGE",
    "Axes",
    "Figure",
    "clean",
    "drawing",
    "new_figure",
    "plain",
    "png",
]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure.

    Args:
      width: in inches.
      height: in inches.

    Returns:
      The figure, whose parts are laid out without overlap when it is drawn.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(text: str) -> str:
    r"""Return text for a picture: a dollar is a dollar, not the start of a formula.

    Example:
      >>> plain("$a$"), plain("a\x1b")
      ('\\$a\\$', 'a\\x1b')
    """
    return printable(text).replace("$", r"\$")


def clean(axes: Axes, title: str = "", x: str = "", y: str = "") -> Axes:
    """Style axes: labels, no box, a faint grid behind.

    Args:
      axes: the axes.
      title: above, at the left.
      x: label of the x axis.
      y: label of the y axis.

    Returns:
      The axes.
    """
    axes.set_title(plain(title), loc="left", fontsize=10, color=INK)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, color=GREY)
    axes.grid(color="#e3e6eb", linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw with default settings, whatever the user's are.

    A glyph that the font lacks gives no warning; the tables show the name.
    """
    with matplotlib.rc_context(matplotlib.rcParamsDefault), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        yield


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file; no date or version goes into it."""
    buffer = io.BytesIO()
    with drawing():
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
