"""Every figure of a report that has data: as SVG for the page, as PNG for places that show no SVG, or as a file.

The same records give the same bytes: no date, no library version, and identifiers from a fixed salt. Text is drawn as
the outlines of DejaVu Sans, which comes with matplotlib, in SVG: a figure then looks the same where that font is
missing, and labels that were placed so that they do not overlap really do not. A PDF embeds the font, so its text can
be searched.

Two figures are of what is published alone: `forest`, estimates with their intervals, a row each, and a line where there
is no difference; `modes`, a line a policy across the position modes, as its paper describes it and as it was released.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, ScalarFormatter

from kvbench.measures import measure
from kvbench.report.figures import FIGURES, FigureKind
from kvbench.report.figures.costs import capacity_figure, latency_figure, memory_figure
from kvbench.report.figures.labels import DirectLabels, Named, labelled
from kvbench.report.figures.pareto import frontier_figure, pareto_figure
from kvbench.report.figures.quality import differences_figure, entries_figure, quality_figure
from kvbench.report.figures.style import LIGHT, Look, Palette, Theme, new_figure, style_of
from kvbench.report.load import CellResult, Group, Results

_NO_DATE: dict[str, dict[str, Any]] = {
    "svg": {"Date": None, "Creator": "kvbench"},
    "pdf": {"CreationDate": None, "ModDate": None, "Creator": "kvbench", "Producer": "kvbench"},
    "png": {"Software": "kvbench"},
}
_PNG_DPI = 200


def figure_bytes(figure: Figure, kind: str, rc: Any) -> bytes:
    """Return the figure as svg, pdf or png, drawn under the settings `rc`."""
    buffer = io.BytesIO()
    with rc_context(rc):
        figure.savefig(buffer, format=kind, metadata=_NO_DATE[kind], dpi=_PNG_DPI if kind == "png" else "figure")
    data = buffer.getvalue()
    if kind != "svg":
        return data
    # Without the spaces that matplotlib leaves at line ends.
    return ("\n".join(line.rstrip() for line in data.decode().splitlines()) + "\n").encode()


DRAW: Mapping[str, Callable[[Group, Look], Figure | None]] = {
    "quality": quality_figure,
    "pareto": pareto_figure,
    "latency": latency_figure,
    "memory": memory_figure,
    "entries": entries_figure,
    "differences": differences_figure,
    "capacity": capacity_figure,
    "frontier": frontier_figure,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One figure; `name` is a file name without suffix, `kind` its name in FIGURES."""

    name: str
    kind: str
    group_title: str
    title: str
    caption: str
    svg: str


def draw_plots(results: Results) -> tuple[Plot, ...]:
    """Return the figures of all groups, in table order; a figure without data is left out."""
    look = Look(palette=palette_of(results), frontiers=results.frontiers)
    return tuple(
        Plot(
            name=name, kind=kind.name, group_title=group.title, title=kind.title, caption=kind.caption,
            svg=svg.decode(),
        )
        for name, kind, group in every_figure(results)
        if (svg := draw_one(kind, group, look, "svg")) is not None
    )  # fmt: skip


def every_figure(results: Results) -> Iterator[tuple[str, FigureKind, Group]]:
    """Yield (file name without suffix, kind, group) of every figure that there could be, in table order."""
    for group, slug in zip(results.groups, group_slugs(results.groups), strict=True):
        for kind in FIGURES.values():
            yield f"{slug}-{kind.name}", kind, group


def palette_of(results: Results, theme: Theme = LIGHT) -> Palette:
    """Return looks for every policy of the records and searches, so that they are the same in all figures."""
    searched = [search.policy for frontier in results.frontiers for search in frontier.searches]
    return Palette([*results.policies, *searched], theme)


def draw_one(kind: FigureKind, group: Group, look: Look, file_format: str) -> bytes | None:
    """Return one figure as a file's bytes, or None if the group has no data for it."""
    with rc_context(look.rc):
        figure = DRAW[kind.name](group, look)
    return None if figure is None else figure_bytes(figure, file_format, look.rc)


def group_slugs(groups: tuple[Group, ...]) -> list[str]:
    """Return a file name per group; the index keeps two apart that differ only in characters it can not have."""
    return [
        f"{index + 1}-" + re.sub(r"[^A-Za-z0-9._]+", "-", f"{group.model}-{group.dataset}")
        for index, group in enumerate(groups)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Png:
    """One figure; `name` is that of the same figure on the page."""

    name: str
    caption: str
    data: bytes


def png_names(results: Results) -> list[str]:
    """Return the names of what `draw_pngs` would yield."""
    look = Look(palette=palette_of(results))
    with rc_context(look.rc):
        return [name for name, kind, group in every_figure(results) if DRAW[kind.name](group, look) is not None]


def draw_pngs(results: Results) -> Iterator[Png]:
    """Yield every figure of the cells that has data, in the order of the page."""
    look = Look(palette=palette_of(results))
    for name, kind, group in every_figure(results):
        data = draw_one(kind, group, look, "png")
        if data is not None:
            yield Png(name=name, caption=f"{group.title}: {kind.caption}", data=data)


_ROW_INCHES = 0.19
_WIDE = 8.0  # from a ratio of the largest to the middle size on, places far from 0 are drawn by their logarithm
_LEAST = 1e-3
_LABEL_SHARE = 0.11  # of an axis that a label and its gap take


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One estimate; `low` and `high` are None where it has no interval."""

    value: float
    low: float | None = None
    high: float | None = None


def forest_svg(names: Sequence[str], panels: Mapping[str, Mapping[str, Row]], *, label: str) -> bytes:
    """Return the rows `names`, from the top, in panels by their title, as SVG; `label` is of the common scale."""
    look = Look(palette=Palette([]))
    with rc_context(look.rc):
        height = 1.0 + _ROW_INCHES * max(1, len(names))
        figure, axes = new_figure(look, max(1, len(panels)), height, columns=3, sharey=True)
        for one, (title, rows) in zip(axes, panels.items(), strict=False):
            one.set_title(title)
            one.set_xlabel(label)
            _panel(one, names, rows, look)
        axes[0].set_yticks(range(len(names)), list(names))
        axes[0].set_ylim(len(names) - 0.5, -0.5)
    return figure_bytes(figure, "svg", look.rc)


def _panel(axes: Axes, names: Sequence[str], rows: Mapping[str, Row], look: Look) -> None:
    axes.axvline(0.0, color=look.theme.muted, linewidth=1.0, linestyle="--", zorder=1)
    axes.grid(axis="y", color=look.theme.grid, linewidth=0.6)
    for place, name in enumerate(names):
        if (row := rows.get(name)) is None:
            continue
        if row.low is not None and row.high is not None:
            axes.hlines(place, row.low, row.high, color=look.theme.blue, linewidth=1.6, zorder=2)
        axes.plot([row.value], [place], marker="o", markersize=4.5, color=look.theme.blue, linestyle="", zorder=3)
    sizes = sorted(abs(row.value) for row in rows.values())
    if sizes and sizes[-1] > _WIDE * max(_LEAST, sizes[len(sizes) // 2]):
        axes.set_xscale("symlog", linthresh=max(_LEAST, sizes[len(sizes) // 2]))
        axes.xaxis.set_major_locator(FixedLocator(_outward(axes)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # its own writes TeX


def _outward(axes: Axes) -> list[float]:
    """Return the ticks of a symmetric scale, from 0 outwards, without those too near to the last for two labels."""
    drawn = axes.xaxis.get_transform().transform
    low, high = drawn(list(axes.get_xlim()))
    shown = [0.0]
    for side in (1.0, -1.0):
        last = 0.0
        for tick in sorted((tick for tick in axes.get_xticks() if tick * side > 0), key=abs):
            if abs(drawn([tick])[0] - drawn([last])[0]) >= _LABEL_SHARE * (high - low):
                shown.append(float(tick))
                last = tick
    return shown


MODES = ("original", "in_cache", "released")
_PANELS = {"as described": False, "as released": True}


def positions_svg(cells: Sequence[CellResult], name: str) -> bytes:
    """Return the figure of `cells`, one budget and data set, as SVG; what was not measured has no mark."""
    look = Look(palette=Palette(cell.policy for cell in cells))
    with rc_context(look.rc):
        figure = labelled(lambda legend: _build(cells, name, look))
    return figure_bytes(figure, "svg", look.rc)


def _build(cells: Sequence[CellResult], name: str, look: Look) -> DirectLabels:
    figure, panels = new_figure(look, len(_PANELS), 2.9, columns=2, sharey=True)
    labels = DirectLabels(figure=figure, look=look)
    for axes, (title, released) in zip(panels, _PANELS.items(), strict=True):
        axes.set_title(title)
        axes.set_xlim(-0.2, len(MODES) - 0.8)
        axes.set_xticks(range(len(MODES)), [f"{mode}\npositions" for mode in MODES])
        shown = [cell for cell in cells if cell.is_full or ("_release" in cell.policy) == released]
        labels.right_of(axes, _lines(axes, shown, name, look))
    panels[0].set_ylabel(measure(name).label)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panels[0].yaxis.set_major_formatter(ScalarFormatter())
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    return labels


def _lines(axes: Axes, cells: Sequence[CellResult], name: str, look: Look) -> list[Named]:
    """Draw a line with intervals for every policy and return their right ends."""
    ends: list[Named] = []
    for policy in dict.fromkeys(cell.policy for cell in cells):
        found = {cell.positions: cell.estimate(name) for cell in cells if cell.policy == policy}
        points = [(MODES.index(mode), estimate) for mode, estimate in found.items() if mode in MODES and estimate]
        if not points:
            continue
        points.sort(key=lambda point: point[0])
        mark = look.palette.mark(policy)
        places, values = [place for place, _ in points], [estimate.value for _, estimate in points]
        lows, highs = zip(*(estimate.bounds for _, estimate in points), strict=True)
        axes.plot(places, values, linestyle=mark.line, linewidth=1.6, **style_of(mark, look.theme))
        axes.vlines(places, lows, highs, color=mark.colour, linewidth=1.6)
        ends.append(Named(text=policy, x=float(places[-1]), y=values[-1], colour=mark.colour))
    return ends
