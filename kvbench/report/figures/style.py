"""One look for every figure: colours, marks and sizes, quiet axes, and nobody's own matplotlib settings.

Two palettes for one drawing: light for paper, dark for a dark page; and how a page switches between them. Both were
found by searching near the hues of Okabe and Ito for the largest smallest distance (in Oklab) between any two colours,
as seen with normal vision and with protanopia, deuteranopia and tritanopia. A test simulates those again. No colour
says anything alone: marker and line style say it a second time.

A policy is drawn with a colour, a marker and a line style that are its own in every figure and report. They follow from
its name alone, so they do not change with what else is shown. What a paper describes and what its release does share a
colour and differ in marker and line. Policies that are not in `BUNDLED` (no shipped experiment names them) draw theirs
from colours and markers that no policy there has.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from matplotlib import rcParamsDefault
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from kvbench.report.figures.kinds import STYLES, WIDTHS
from kvbench.results.frontier import Frontier


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """Colours as #rrggbb; `paper` is what a figure lies on."""

    ink: str
    muted: str
    grid: str
    paper: str
    grey: str
    orange: str
    blue: str
    green: str
    purple: str
    sky: str
    vermilion: str
    brown: str


LIGHT = Theme(
    ink="#1f2933", muted="#5f6b7a", grid="#d9dee5", paper="#ffffff", grey="#8f8f8f", orange="#eb8900",
    blue="#004a8c", green="#027b6a", purple="#a71de5", sky="#6599fb", vermilion="#c7470d", brown="#693b05",
)  # fmt: skip
DARK = Theme(
    ink="#e6e9ee", muted="#a3adba", grid="#39424e", paper="#1a1f26", grey="#969696", orange="#f9c020",
    blue="#3d89fe", green="#39d8a8", purple="#974fad", sky="#c0b4ff", vermilion="#f0731f", brown="#b34827",
)  # fmt: skip
THEMES = dict(zip(STYLES, (LIGHT, DARK), strict=True))
_NAMES = tuple(field.name for field in fields(Theme))
# The page names its colours, so that its figures follow light and dark.
COLOUR_NAMES = {getattr(LIGHT, name): name for name in _NAMES}


_LIGHT_STYLE, _DARK_STYLE = (
    " ".join(f"--plot-{name}: {getattr(theme, name)};" for name in _NAMES) for theme in (LIGHT, DARK)
)
# Follows the system; a root with data-theme follows that; paper is printed light.
PLOT_STYLE = f"""
:root {{ {_LIGHT_STYLE} }}
@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ {_DARK_STYLE} }} }}
:root[data-theme=dark] {{ {_DARK_STYLE} }}
@media print {{ :root, :root:not([data-theme=light]), :root[data-theme=dark] {{ {_LIGHT_STYLE} }} }}
"""

_SOLID, _DASHED, _DOTTED = "-", (0, (6, 1.6)), (0, (1, 1.1))
_DASH_DOT, _SHORT, _DASH_DOT_DOT = (0, (5, 1.2, 1, 1.2)), (0, (2.5, 1.1)), (0, (4, 1, 1, 1, 1, 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """How a series is drawn; `fill` (a fill style of markers) tells apart series of one policy."""

    colour: str
    marker: Any
    line: Any
    fill: str = "full"


@dataclass(frozen=True, slots=True)
class Shape:
    """A look whose colour is still a name of the theme."""

    colour: str
    marker: Any
    line: Any


BUNDLED = {
    "full": Shape("ink", "s", "--"),
    "random": Shape("grey", "X", _DOTTED),
    "streaming_llm": Shape("orange", "^", _DASH_DOT),
    "h2o": Shape("blue", "o", _SOLID),
    "elastic": Shape("green", "D", _DASHED),
    "snapkv": Shape("purple", "P", _DASH_DOT_DOT),
    "elastic_released": Shape("green", "d", _SHORT),
    "h2o_released": Shape("blue", "p", _SHORT),
    "h2o_elastic_release": Shape("blue", "h", _DASH_DOT_DOT),
    "streaming_llm_released": Shape("orange", "v", _SHORT),
    "local_elastic_release": Shape("orange", "<", _DASH_DOT_DOT),
}
# 3 colours x 6 markers x 2 lines; neighbours in this order differ in as much as they can.
_COLOURS = ("vermilion", "sky", "brown")
_MARKERS: tuple[Any, ...] = (">", "*", (4, 1, 0), (3, 1, 0), (8, 1, 0), "H")
OTHERS = tuple(Shape(_COLOURS[i % 3], _MARKERS[i // 3 % 6], (_SOLID, _DASHED)[(i + i // 18) % 2]) for i in range(36))
_FILLS = {"original": "full", "in_cache": "none", "released": "left"}
_VARIANT_FILLS = ("full", "none", "left", "top", "right", "bottom")


class Palette:
    """The looks of `policies`; only names that are not bundled and meet in one look move on to the next free one."""

    def __init__(self, policies: Iterable[str], theme: Theme = LIGHT) -> None:
        self.theme = theme
        self._shapes: dict[str, Shape] = {}
        taken: set[int] = set()
        for name in sorted(set(policies)):
            if name in BUNDLED:
                self._shapes[name] = BUNDLED[name]
                continue
            # A place that depends on the name alone, not on the process or the machine.
            place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % len(OTHERS)
            if len(taken) < len(OTHERS):
                while place in taken:
                    place = (place + 1) % len(OTHERS)
            taken.add(place)
            self._shapes[name] = OTHERS[place]

    def mark(self, policy: str, positions: str = "original", variant: int = 0) -> Mark:
        """Return the look of `policy`: its fill says the position mode, or which of several variants it is."""
        shape = self._shapes[policy]
        fill = _VARIANT_FILLS[variant % len(_VARIANT_FILLS)] if variant else _FILLS.get(positions, "full")
        return Mark(colour=getattr(self.theme, shape.colour), marker=shape.marker, line=shape.line, fill=fill)


FAILED = "$\\dagger$"  # no policy's marker: a cell without a number is not a number
MOST_HEIGHT_INCHES = 4.0  # of a figure in a column, so that it fits a page with its caption
_Panel = TypeVar("_Panel")
_PROCESS_WIDE = (
    *("backend", "interactive", "toolbar", "timezone", "datapath", "webagg", "docstring", "savefig.directory"),
)
_INKED = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor")
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
            **dict.fromkeys(_INKED, theme.ink),
            **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), theme.muted),
            **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor"), theme.paper),
            "grid.color": theme.grid,
            "grid.linewidth": 0.7,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "text.parse_math": False,  # a name with dollar signs is a name
        }


def fitting(look: Look, panels: Sequence[_Panel], inches: float) -> Sequence[_Panel]:
    """Return the first panels of this height that fit below each other in a column; all where there is more room."""
    return panels[: max(1, int(MOST_HEIGHT_INCHES / inches))] if look.width == "single" else panels


def new_figure(
    look: Look, num_panels: int, panel_inches: float, *, columns: int, narrow: int = 1, **layout: Any
) -> tuple[Figure, Any]:
    """Return a figure with rows of at most `columns` panels (`narrow` in a single column), and its axes in order."""
    columns = min(narrow if look.width == "single" else columns, num_panels)
    rows = math.ceil(num_panels / columns)
    engine = ConstrainedLayoutEngine(h_pad=0.05, w_pad=0.05)
    figure = Figure(figsize=(look.width_inches, rows * panel_inches), layout=engine)
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
        "clip_on": False, "markerfacecoloralt": theme.paper, "markeredgecolor": mark.colour, "markeredgewidth": edge,
    }  # fmt: skip


def legend_above(figure: Figure, marks: Mapping[str, Mark], look: Look) -> None:
    """Put one legend for all axes above them, an entry that looks like it for each series, in as few rows as fit."""
    handles = [
        Line2D([], [], linestyle=mark.line, label=label, **style_of(mark, look.theme)) for label, mark in marks.items()
    ]
    letters = int(look.width_inches * 72 / (0.6 * look.font_points))
    num_columns = max(1, min(len(handles), letters // (max(map(len, marks), default=1) + 6)))
    rows = math.ceil(len(handles) / num_columns)
    height = figure.get_figheight() + rows * look.font_points * 1.5 / 72
    figure.set_figheight(min(height, MOST_HEIGHT_INCHES) if look.width == "single" else height)
    figure.legend(handles=handles, loc="outside upper left", ncols=num_columns, handlelength=2.4, columnspacing=1.6)


def shortened(text: str, most: int = 30) -> str:
    """Cut a long name in its middle, where two names of one family differ least."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}...{text[-(most // 2 - 2) :]}"


def listed(texts: Iterable[str], most: int = 4) -> str:
    """Join texts, the first few of many."""
    found = list(texts)
    return "; ".join(found if len(found) <= most else [*found[:most], f"and {len(found) - most} more"])
