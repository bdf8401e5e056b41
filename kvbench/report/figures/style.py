"""One look for every figure: colours, marks and sizes, quiet axes, names of series, panels with a row per cell.

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
import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from matplotlib import rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from kvbench.measures import MISSING, measure, printed_scale
from kvbench.report.compare import declared_budget, leading_quality, timing_noise
from kvbench.report.figures import STYLES, WIDTHS
from kvbench.report.load import CellResult, Group
from kvbench.report.tables import samples_text
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


_LOG_FROM = 8.0
_SHARES = {"tokens kept": "tokens kept (%)", "prompt tokens kept": "prompt tokens kept (%)"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetAxis:
    """A common x axis for the budgeted cells of a group."""

    title: str
    places: dict[str, float]
    ticks: tuple[tuple[float, str], ...]
    is_log: bool

    def apply(self, axes: Axes) -> None:
        """Set scale, ticks and label."""
        if self.is_log:
            axes.set_xscale("log")
        places = [*self.places.values(), *(place for place, _ in self.ticks)]
        low, high = min(places), max(places)
        room = 0.08 * (high - low) or 0.25 * abs(high) or 0.5
        limits = (low / 1.2, high * 1.2) if self.is_log else (low - room, high + room)
        axes.set_xlim(*limits)
        axes.xaxis.set_major_locator(FixedLocator([place for place, _ in self.ticks]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels(sparse(self.ticks, self.is_log, 0.11))
        axes.set_xlabel(self.title)


def budget_axis(cells: Sequence[CellResult]) -> BudgetAxis:
    """Return shares of the tokens seen, or tokens; names in order where the cells mix both.

    Points stand at the realised budget where it is near the setting; ticks are the settings.
    """
    if cells and all(cell.budget_fraction is not None for cell in cells):
        shares = {cell.key: cell.budget_fraction or 0.0 for cell in cells}
        kinds = {cell.budget.partition("% ")[2] for cell in cells}
        what = _SHARES.get(kinds.pop() if len(kinds) == 1 else "", "budget (%)")
        places = {cell.key: _realised(cell, shares[cell.key]) for cell in cells}
        return _numeric(what, places, sorted(set(shares.values())), 100.0)
    if cells and all(cell.budget_tokens is not None for cell in cells):
        places = {cell.key: float(cell.budget_tokens or 0) for cell in cells}
        return _numeric("budget (entries per layer and KV head)", places, sorted(set(places.values())), 1.0)
    names = list(dict.fromkeys(cell.budget for cell in sorted(cells, key=lambda cell: cell.budget_order)))
    places = {cell.key: float(names.index(cell.budget)) for cell in cells}
    ticks = tuple((float(place), name) for place, name in enumerate(names))
    return BudgetAxis(title="budget setting", places=places, ticks=ticks, is_log=False)


def _numeric(title: str, places: dict[str, float], settings: list[float], factor: float) -> BudgetAxis:
    is_log = settings[0] > 0 and settings[-1] / settings[0] >= _LOG_FROM
    ticks = tuple((setting, f"{setting * factor:.4g}") for setting in settings)
    return BudgetAxis(title=title, places=places, ticks=ticks, is_log=is_log)


def _realised(cell: CellResult, setting: float) -> float:
    found = cell.estimate("realised_budget_fraction")
    return found.value if found and setting > 0 and 0.67 < found.value / setting < 1.5 else setting


def marks_of(group: Group, palette: Palette) -> dict[str, Mark]:
    """Return how each series label of the group is drawn."""
    marks: dict[str, Mark] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for label, cells in group.by_series().items():
        one = cells[0]
        # Twins differ in a setting that has no look of its own: they are told apart by their order.
        marks[label] = palette.mark(one.policy, one.positions, seen[one.policy, one.positions])
        seen[one.policy, one.positions] += 1
    return marks


def sparse(ticks: Sequence[tuple[float, str]], is_log: bool, gap_share: float) -> list[str]:
    """Return the labels of rising ticks, without those nearer to the last one shown than a share of the axis."""
    places = [math.log(place) if is_log else place for place, _ in ticks]
    shown, last = [], -math.inf
    for place, (_, label) in zip(places, ticks, strict=True):
        keep = place - last >= gap_share * (places[-1] - places[0])
        shown.append(label if keep else "")
        last = place if keep else last
    return shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """What an axis divides base units by, and its label: unit and better direction."""

    factor: float
    label: str


def axis_scale(name: str, cells: Iterable[CellResult]) -> Scale:
    """Return the scale in which the largest value among `cells` is printed."""
    values = [abs(found.value) for cell in cells if (found := cell.estimate(name))]
    factor, unit = printed_scale(name, max(values, default=0.0))
    known = measure(name)
    notes = [unit or {"score": "score from 0 to 1", "ppl": "perplexity"}.get(known.unit, "")]
    notes += [f"{known.better} is better"] if known.better != "none" else []
    return Scale(factor=factor, label=", ".join(note for note in notes if note))


def panel_title(name: str, cells: Iterable[CellResult]) -> str:
    """Return label and sample count of a measurement."""
    n_text = samples_text(cells, name)
    label = measure(name).label
    return f"{label[:1].upper()}{label[1:]}{f' ({n_text})' if n_text else ''}"


def hide_ticks_outside(axes: Axes, low: float, high: float) -> None:
    """Keep a share's axis from showing ticks below nothing or above all."""
    bottom, top = axes.get_ylim()
    shown = [tick for tick in axes.get_yticks() if max(low, bottom) <= tick <= min(high, top) + 1e-9]
    axes.yaxis.set_major_locator(FixedLocator(shown))
    axes.set_ylim(bottom, top)


def measured(cells: Iterable[CellResult], *names: str) -> list[str]:
    """Return those of `names` that any cell has, in the order given."""
    cells = list(cells)
    return [name for name in names if any(cell.estimate(name) for cell in cells)]


def series_names(group: Group) -> dict[str, str]:
    """Return what each series label is called in a figure: the policy alone where that says which one is meant."""
    by_series = group.by_series()
    num = Counter(cells[0].policy for cells in by_series.values())
    short = {
        label: shortened(cells[0].policy if num[cells[0].policy] == 1 else label) for label, cells in by_series.items()
    }
    return short if len(set(short.values())) == len(short) else {label: label for label in by_series}


def footnote(figure: Figure, group: Group, look: Look, *more: str) -> None:
    """Say below a figure what its short names leave out, that cells failed, and `more`."""
    modes: dict[str, list[str]] = {}
    called = series_names(group)
    for label, cells in group.by_series().items():
        if cells[0].positions != "original" and called[label] != label:
            modes.setdefault(cells[0].positions, []).append(called[label])
    notes = [f"positions {mode}: {listed(names)}" for mode, names in modes.items()]
    failed = [f"{group.cell_label(cell)}: {cell.status}" for cell in group.cells if cell.failed]
    notes += [f"failed, no number: {listed(failed)}"] if failed else []
    if notes or more:
        text = ". ".join([*notes, *more])
        figure.supxlabel(text, fontsize=look.small_points, x=0.01, ha="left", color=look.theme.muted, wrap=True)


def artist_name(measure_name: str, what: str) -> str:
    """Return the label of the artist that holds a measure of `what` (a cell or series), so that it can be found."""
    return f"{measure_name}: {what}"


def keys_above(
    figure: Figure, keys: Sequence[Line2D | Patch], look: Look, columns: Mapping[str, int], **style: float
) -> None:
    """Explain above the panels what their marks and bars are, in so many columns at the figure's width."""
    figure.legend(handles=list(keys), loc="outside upper left", ncols=columns[look.width], **style)


_MOST_NARROW_ROWS = 18
MANY, _BEST = 12, 6  # series that a reader tells apart, and how many of more than those are named


def emphasised(group: Group, name: str | None = None) -> frozenset[str]:
    """Return the series to draw in their colours: all, of very many full, random and the best at the headline's budget.

    name: the measure by which they are the best, by default the leading one.
    """
    series = group.by_series()
    name = name or leading_quality(group)
    if len(series) <= MANY or name is None:
        return frozenset(series)
    sign, budget = -1.0 if measure(name).better == "higher" else 1.0, declared_budget(group)
    here = [(sign * found.value, cell) for cell in group.budgeted
            if cell.budget == budget and (found := cell.estimate(name))]  # fmt: skip
    best = [cell for _, cell in sorted(here, key=lambda pair: (pair[0], pair[1].sort_key))[:_BEST]]
    kept = {group.series_label(cell) for cell in best}
    return frozenset({*kept, *(label for label, cells in series.items() if cells[0].policy in ("full", "random"))})


def rest_text(group: Group, shown: Collection[str]) -> tuple[str, ...]:
    """Return what a footnote says of series that are grey; nothing where none is."""
    count = len(group.by_series()) - len(shown)
    return (f"grey: {count} other policies; named: the best at {declared_budget(group)}",) if count > 0 else ()


def narrowed(group: Group, look: Look) -> Group:
    """Return the group, for a single column the full cache and the headline's budget alone, the best of very many."""
    if look.width != "single":
        return group
    budget, name = declared_budget(group), leading_quality(group)
    kept = [cell for cell in group.cells if cell.is_full or cell.budget == budget]
    if name is not None and len(kept) > _MOST_NARROW_ROWS:
        sign = -1.0 if measure(name).better == "higher" else 1.0
        values = {cell.key: sign * found.value if (found := cell.estimate(name)) else math.inf for cell in kept}
        best = {cell.key for cell in sorted(kept, key=lambda cell: values[cell.key])[:_MOST_NARROW_ROWS]}
        kept = [cell for cell in kept if cell.key in best or cell.is_full]
    return replace(group, cells=tuple(kept)) if kept else group


def row_inches(group: Group, look: Look) -> float:
    """Return the height of a panel with a row per cell."""
    least, by_row = (0.85, 0.024) if look.width == "single" else (1.1, 0.03)
    return least + by_row * look.font_points * max(len(group.cells), 2)


def row_figure(group: Group, look: Look, num_panels: int) -> tuple[Figure, list[Axes]]:
    """Return panels side by side that share the rows of `group`; below each other in a single column."""
    columns = {"page": num_panels, "double": min(num_panels, 3), "single": 1}[look.width]
    height = row_inches(group, look)
    figure, panels = new_figure(look, num_panels, height, columns=columns)
    called = series_names(group)
    names = [called[group.series_label(cell)] for cell in group.cells]
    for row, cell in enumerate(group.cells):
        names[row] += "" if cell.is_full else f", {cell.budget.removesuffix(' tokens kept')}"
    for index, axes in enumerate(panels):
        axes.set_ylim(len(group.cells) - 0.4, -0.6)
        axes.yaxis.set_major_locator(FixedLocator(list(range(len(group.cells)))))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
        for row, (above, cell) in enumerate(itertools.pairwise(group.cells), start=1):
            if cell.series != above.series:
                axes.axhline(row - 0.5, color=axes.xaxis.get_gridlines()[0].get_color(), linewidth=0.9, zorder=1)
        axes.set_yticklabels(names if index % columns == 0 else [])
    return figure, panels


def status_text(axes: Axes, row: int, cell: CellResult, look: Look) -> None:
    """Write the status of a failed cell, or a dash, in the place of a number that is not there."""
    axes.text(
        0.02, row, cell.status if cell.failed else MISSING, transform=axes.get_yaxis_transform(), va="center",
        fontsize=look.small_points, style="italic", zorder=6,
        bbox={"facecolor": look.theme.paper, "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def interval_dots(
    axes: Axes, group: Group, name: str, factor: float, marks: Mapping[str, Mark], look: Look, *, shift: float = 0.0,
    tick: bool = False,
) -> None:  # fmt: skip
    """Draw a measure of every cell as its mark, or an upright tick, with its interval; noisy times are pale."""
    for row, cell in enumerate(group.cells):
        found = cell.estimate(name)
        if found is None:
            continue
        mark = marks[group.series_label(cell)]
        noisy = timing_noise(cell, name)
        pale = 0.35 if noisy else 1.0
        value, low, high = (number / factor for number in (found.value, *found.bounds))
        title, wide = artist_name(name, group.cell_label(cell)), 1.0 if tick else 1.8
        axes.hlines([row + shift], [low], [high], color=mark.colour, linewidth=wide, zorder=3, alpha=pale, label=title)
        style = style_of(mark, look.theme)
        if tick:
            style |= {"marker": "|", "markersize": 7.0, "markeredgewidth": 1.4}
        axes.plot([value], [row + shift], linestyle="none", zorder=4, alpha=pale, label=title, **style)
