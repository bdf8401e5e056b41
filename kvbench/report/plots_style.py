"""One look for every figure: sizes for a page and for papers, quiet axes, and nobody's own matplotlib settings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib import rcParamsDefault
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from kvbench.report.figures import WIDTHS
from kvbench.report.frontier import Frontier
from kvbench.report.plots_policies import Mark, Palette
from kvbench.report.plots_theme import Theme

_PROCESS_WIDE = (
    "backend",
    "interactive",
    "toolbar",
    "timezone",
    "datapath",
    "webagg",
    "docstring",
    "savefig.directory",
)
# A user's matplotlibrc must not change a figure, so what ours does not set comes from matplotlib's own defaults.
_DEFAULTS = {name: value for name, value in rcParamsDefault.items() if not name.startswith(_PROCESS_WIDE)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """How one figure is drawn; `measures` are those asked for, by default the figure's own choice.

    `frontiers` are the searches for a smallest safe budget that lie beside the records.
    """

    palette: Palette
    width: str = "page"
    measures: tuple[str, ...] = ()
    frontiers: tuple[Frontier, ...] = ()

    @property
    def theme(self) -> Theme:
        """Return the colours."""
        return self.palette.theme

    @property
    def width_inches(self) -> float:
        """Return the width of the figure."""
        return WIDTHS[self.width][0]

    @property
    def font_points(self) -> float:
        """Return the size of ordinary text."""
        return WIDTHS[self.width][1]

    @property
    def small_points(self) -> float:
        """Return the size of labels inside axes."""
        return self.font_points - 1.0

    @property
    def rc(self) -> Any:
        """Return every setting of matplotlib that a figure may depend on."""
        theme, size = self.theme, self.font_points
        return _DEFAULTS | {
            "svg.hashsalt": "kvbench",
            "svg.fonttype": "path",
            "pdf.fonttype": 42,
            "font.family": ["DejaVu Sans"],
            "font.size": size,
            "axes.titlesize": size + (1.0 if self.width == "page" else 0.0),
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": size,
            "xtick.labelsize": size - 0.5,
            "ytick.labelsize": size - 0.5,
            "legend.fontsize": size,
            "legend.frameon": False,
            "text.color": theme.ink,
            "axes.labelcolor": theme.ink,
            "axes.titlecolor": theme.ink,
            "axes.edgecolor": theme.muted,
            "xtick.color": theme.muted,
            "ytick.color": theme.muted,
            "xtick.labelcolor": theme.ink,
            "ytick.labelcolor": theme.ink,
            "grid.color": theme.grid,
            "grid.linewidth": 0.7,
            "figure.facecolor": theme.paper,
            "savefig.facecolor": theme.paper,
            "axes.facecolor": theme.paper,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "text.parse_math": False,  # a name with dollar signs is a name
        }


def new_figure(look: Look, num_panels: int, panel_inches: float, *, columns: int, **layout: Any) -> tuple[Figure, Any]:
    """Return a figure with rows of at most `columns` panels (one a row in a single column), and its axes in order."""
    columns = 1 if look.width == "single" else min(columns, num_panels)
    rows = math.ceil(num_panels / columns)
    figure = Figure(
        figsize=(look.width_inches, rows * panel_inches), layout=ConstrainedLayoutEngine(h_pad=0.05, w_pad=0.05)
    )
    axes = list(figure.subplots(rows, columns, squeeze=False, **layout).flat)
    for unused in axes[num_panels:]:
        unused.set_visible(False)
        unused.set_in_layout(False)
    return figure, axes[:num_panels]


def style_of(mark: Mark, theme: Theme, *, size: float = 6.0) -> dict[str, Any]:
    """Return the marker part of a line's style; a hollow part shows the paper."""
    edge = 1.4 if mark.fill != "full" else 0.6
    return {
        "color": mark.colour, "marker": mark.marker, "markersize": size, "fillstyle": mark.fill,
        "markerfacecolor": mark.colour if mark.fill != "none" else theme.paper,
        "markerfacecoloralt": theme.paper, "markeredgecolor": mark.colour, "markeredgewidth": edge,
    }  # fmt: skip


def legend_above(figure: Figure, handles: list[Line2D], look: Look) -> None:
    """Put one legend for all axes above them, in as few rows as fit."""
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    letters = int(look.width_inches * 72 / (0.6 * look.font_points))
    num_columns = max(1, min(len(handles), letters // (longest + 6)))
    rows = math.ceil(len(handles) / num_columns)
    figure.set_figheight(figure.get_figheight() + rows * look.font_points * 1.5 / 72)
    figure.legend(handles=handles, loc="outside upper left", ncols=num_columns, handlelength=2.4, columnspacing=1.6)


def key_line(label: str, mark: Mark, theme: Theme, *, joined: bool = True) -> Line2D:
    """Return a legend entry that looks like the series."""
    return Line2D([], [], linestyle=mark.line if joined else "none", label=label, **style_of(mark, theme))


def shortened(text: str, most: int = 30) -> str:
    """Cut a long name in its middle, where two names of one family differ least."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}...{text[-(most // 2 - 2) :]}"


def listed(texts: Iterable[str], most: int = 4) -> str:
    """Join texts, the first few of many."""
    found = list(texts)
    return "; ".join(found if len(found) <= most else [*found[:most], f"and {len(found) - most} more"])
