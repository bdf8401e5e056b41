"""Quality against budget: one panel per measure, a line with its 95 % band per policy, full dashed."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from kvbench.report.cell import CellResult
from kvbench.report.load import Group
from kvbench.report.plots_axes import (
    BudgetAxis,
    Scale,
    axis_scale,
    budget_axis,
    hide_ticks_outside,
    marks_of,
    note_missing,
    panel_title,
)
from kvbench.report.plots_style import Mark, Palette, failed_key, key_line, legend_above, new_figure
from kvbench.units import measure

QUALITY_PANELS = ("rougeL_vs_full", "objects_recalled_fraction", "ppl")
_LOG_RATIO = 5.0


def quality_figure(group: Group, palette: Palette) -> Figure:
    """Draw the three panels; failed cells stand as crosses at the bottom with their status."""
    figure, panels = new_figure(3.9, len(QUALITY_PANELS))
    marks = marks_of(group, palette)
    axis = budget_axis(group.budgeted)
    for axes, name in zip(panels, QUALITY_PANELS, strict=True):
        axes.set_title(panel_title(name, group.cells))
        if not any(cell.estimate(name) for cell in group.cells):
            note_missing(axes, name)
            continue
        _panel(axes, group, name, marks, axis)
    keys = [key_line(label, mark, line="--" if label == "full" else None) for label, mark in marks.items()]
    legend_above(figure, keys + ([failed_key()] if any(cell.failed for cell in group.cells) else []))
    return figure


def _panel(axes: Axes, group: Group, name: str, marks: Mapping[str, Mark], axis: BudgetAxis) -> None:
    scale = axis_scale(name, group.cells)
    if group.budgeted:
        axis.apply(axes)
    else:
        axes.set_xticks([])
        axes.set_xlabel("no cell with a budget")
    for cell in group.cells:
        if cell.is_full:
            _full_line(axes, cell, name, scale, marks[group.series_label(cell)])
    for label, cells in group.by_series().items():
        _series(axes, cells, name, scale, marks[label], axis)
    _scale_y(axes, group, name, scale)
    _failed(axes, group, marks, axis)
    axes.set_ylabel(scale.label)


def _full_line(axes: Axes, cell: CellResult, name: str, scale: Scale, mark: Mark) -> None:
    found = cell.estimate(name)
    if found is None:
        return
    low, high = (bound / scale.factor for bound in found.bounds)
    axes.axhline(found.value / scale.factor, color=mark.colour, linestyle="--", linewidth=1.4, zorder=2)
    axes.axhspan(low, high, color=mark.colour, alpha=0.10, linewidth=0, zorder=1)


def _series(axes: Axes, cells: list[CellResult], name: str, scale: Scale, mark: Mark, axis: BudgetAxis) -> None:
    points = sorted(
        (axis.places[cell.key], found.value / scale.factor, *(bound / scale.factor for bound in found.bounds))
        for cell in cells
        if (found := cell.estimate(name)) and cell.key in axis.places
    )
    if not points:
        return
    places, values, lows, highs = (list(column) for column in zip(*points, strict=True))
    axes.plot(places, values, color=mark.colour, marker=mark.marker, linestyle=mark.line, markersize=6, linewidth=1.8)
    # A band needs two places; a single one gets a bar, or its interval would be invisible.
    if len(set(places)) > 1:
        axes.fill_between(places, lows, highs, color=mark.colour, alpha=0.18, linewidth=0, zorder=3)
    else:
        axes.vlines(places, lows, highs, color=mark.colour, linewidth=1.6, zorder=3)


def _scale_y(axes: Axes, group: Group, name: str, scale: Scale) -> None:
    """Scores stay inside 0 to 1; a perplexity that explodes gets a logarithmic axis."""
    found = [estimate for cell in group.cells if (estimate := cell.estimate(name))]
    low = min(estimate.bounds[0] for estimate in found) / scale.factor
    high = max(estimate.bounds[1] for estimate in found) / scale.factor
    smallest = min(estimate.value for estimate in found) / scale.factor
    if name == "ppl" and smallest > 0 and high / smallest > _LOG_RATIO:
        axes.set_yscale("log")
        bottom = max(low, smallest / 2)
        room = (high / bottom) ** (0.06 * (1 + min(sum(cell.failed for cell in group.budgeted), 2)))
        axes.set_ylim(bottom / room, high * 1.15)
        if high / smallest < 100:
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    num_failed = sum(cell.failed for cell in group.budgeted)
    below = room * (1 + min(num_failed, 4))
    axes.set_ylim((low - below) if num_failed else max(0.0, low - room), high + room)
    most = 1.0 / scale.factor if measure(name).unit in ("score", "fraction") else high + room
    hide_ticks_outside(axes, 0.0, most)


def _failed(axes: Axes, group: Group, marks: Mapping[str, Mark], axis: BudgetAxis) -> None:
    """Stack crosses from the bottom edge, so that several failures at one budget stay readable."""
    stacked: dict[float, int] = {}
    for cell in group.cells:
        if not cell.failed:
            continue
        place = axis.places.get(cell.key)
        if place is None:  # the full cache has no place on a budget axis
            axes.text(0.98, 0.97, f"full: {cell.status}", transform=axes.transAxes, ha="right", va="top", fontsize=8)
            continue
        height = 0.04 + 0.065 * stacked.get(place, 0)
        stacked[place] = stacked.get(place, 0) + 1
        colour = marks[group.series_label(cell)].colour
        across = axes.transAxes.inverted().transform(axes.transData.transform((place, axes.get_ylim()[0])))[0]
        side = across < 0.5
        at = axes.get_xaxis_transform()
        axes.plot([place], [height], transform=at, color=colour, marker="x", markersize=6, markeredgewidth=2, zorder=6)
        axes.annotate(
            cell.status, (place, height), xycoords=at, xytext=(6 if side else -6, 0), textcoords="offset points",
            ha="left" if side else "right", va="center", fontsize=8, zorder=6,
        )  # fmt: skip
