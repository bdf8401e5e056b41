"""Entries held at every decode step: whether a cache really stays within its budget, over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.report.cell import CellResult
from kvbench.report.load import Group
from kvbench.report.plots_axes import artist_name, footnote, marks_of, series_names
from kvbench.report.plots_direct import DirectLabels, Named, labelled
from kvbench.report.plots_policies import Mark
from kvbench.report.plots_style import Look, new_figure


def entries_curve(cell: CellResult) -> list[tuple[float, float, float]]:
    """Return (tokens seen, mean entries, most entries) per decode step; empty if the record has no such curve."""
    rows: Any = cell.curves.get("entries")
    if cell.failed or not isinstance(rows, list):
        return []
    return [(float(r[0]), float(r[1]), float(r[2])) for r in rows if isinstance(r, list) and len(r) == 3]


def entries_figure(group: Group, look: Look) -> Figure | None:
    """Draw a panel per policy with a line per budget, and the full cache in each."""
    series = {
        label: drawn for label, cells in group.by_series().items()
        if not cells[0].is_full and (drawn := [cell for cell in cells if entries_curve(cell)])
    }  # fmt: skip
    return labelled(lambda legend: _build(group, look, series)) if series else None


def _build(group: Group, look: Look, series: Mapping[str, list[CellResult]]) -> DirectLabels:
    columns = 4 if look.width == "page" else 3
    figure, panels = new_figure(look, len(series), 2.5, columns=columns, sharex=True, sharey=True)
    labels = DirectLabels(figure=figure, look=look)
    marks, called = marks_of(group, look.palette), series_names(group)
    fulls = [cell for cell in group.cells if cell.is_full and entries_curve(cell)]
    for place, (axes, (label, cells)) in enumerate(zip(panels, series.items(), strict=True)):
        ends = [_curve(axes, group, cell, marks[group.series_label(cell)]) for cell in (*fulls, *cells)]
        labels.right_of(axes, ends)
        axes.set_title(called[label])
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("tokens seen")
        if place % columns == 0 or look.width == "single":
            axes.set_ylabel("entries per layer and KV head")
        axes.set_ylim(bottom=0)
    footnote(figure, group, look)
    return labels


def _curve(axes: Axes, group: Group, cell: CellResult, mark: Mark) -> Named:
    """Draw one cell: a line for the mean, a shade up to the fullest head, layer and row."""
    title = artist_name("entries", group.cell_label(cell))
    seen, mean, most = (list(column) for column in zip(*entries_curve(cell), strict=True))
    axes.plot(seen, mean, color=mark.colour, linestyle=mark.line, linewidth=1.5, label=title)
    axes.fill_between(seen, mean, most, color=mark.colour, alpha=0.15, linewidth=0, label=title)
    axes.plot(seen[-1:], mean[-1:], color=mark.colour, marker=mark.marker, markersize=4, linestyle="none")
    text = "full" if cell.is_full else cell.budget.removesuffix(" of seen")
    return Named(text=text, x=seen[-1], y=mean[-1], colour=mark.colour)
