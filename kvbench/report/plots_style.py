"""One look for every figure: a colour and marker per policy, quiet axes, and bytes that reproduce.

Colours are those of Okabe and Ito, which readers with colour-blindness can tell apart; the marker
says the same thing a second time. The page swaps the ink, grid and paper colours for its own in dark mode.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK, MUTED, GRID, PAPER = "#1f2933", "#5f6b7a", "#d9dee5", "#ffffff"
BLUE, GREY = "#0072b2", "#808080"
WIDTH_INCHES = 10.0
_KNOWN = {
    "full": (INK, "s"),
    "random": (GREY, "X"),
    "streaming_llm": ("#e69f00", "^"),
    "h2o": (BLUE, "o"),
    "elastic": ("#009e73", "D"),
    "oracle": ("#cc79a7", "*"),
}
_COLOURS = ("#d55e00", "#56b4e9", "#cc79a7", "#009e73", BLUE, "#e69f00")
_MARKERS = ("v", "P", "h", "<", ">", "p", "d", "8")
_LINES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
RC: Any = {
    "svg.hashsalt": "kvbench",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """How a series is drawn; `line` tells apart series of one policy."""

    colour: str
    marker: str
    line: Any


class Palette:
    """Gives every policy its own colour and marker, the same in all figures of a report."""

    def __init__(self, policies: Iterable[str]) -> None:
        names = sorted(set(policies))
        taken = [_KNOWN[name][0] for name in names if name in _KNOWN]
        free = [colour for colour in _COLOURS if colour not in taken] + list(_COLOURS)
        others = [name for name in names if name not in _KNOWN]
        self._marks = {name: _KNOWN[name] for name in names if name in _KNOWN}
        for index, name in enumerate(others):
            self._marks[name] = (free[index % len(free)], _MARKERS[index % len(_MARKERS)])

    def mark(self, policy: str, variant: int = 0) -> Mark:
        """Return the look of the `variant`-th series of `policy`."""
        colour, marker = self._marks[policy]
        return Mark(colour=colour, marker=marker, line=_LINES[variant % len(_LINES)])


def new_figure(height_inches: float, num_columns: int, **layout: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure of the common width with one row of axes; call it inside `rc_context(RC)`."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    axes = figure.subplots(1, num_columns, squeeze=False, **layout)[0]
    return figure, list(axes)


def legend_above(figure: Figure, handles: list[Line2D]) -> None:
    """Put one legend for all axes above them, in as few rows as fit."""
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    num_columns = max(1, min(len(handles), int(WIDTH_INCHES * 11.5) // (longest + 6)))
    figure.legend(handles=handles, loc="outside upper left", ncols=num_columns, handlelength=2.4, columnspacing=1.6)


def key_line(label: str, mark: Mark, *, line: Any = None) -> Line2D:
    """Return a legend entry that looks like the series."""
    return Line2D([], [], color=mark.colour, marker=mark.marker, linestyle=line or mark.line, label=label, markersize=6)


def failed_key() -> Line2D:
    """Return the legend entry of failed cells."""
    return Line2D([], [], color=MUTED, marker="x", linestyle="none", label="failed (status beside it)", markersize=6)


def svg_text(figure: Figure) -> str:
    """Return the figure as SVG: no date, text as paths, the same bytes every time."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure)
    with rc_context(RC):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "kvbench"})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
