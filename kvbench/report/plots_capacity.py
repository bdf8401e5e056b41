"""What eviction buys when memory is the limit: throughput against batch, and the largest batch that fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from kvbench.report.cell import CellResult, Estimate
from kvbench.report.load import Group
from kvbench.report.plots_axes import artist_name, marks_of, measured, panel_title
from kvbench.report.plots_direct import DirectLabels, Named, labelled
from kvbench.report.plots_policies import Mark
from kvbench.report.plots_style import Look, key_line, legend_above, new_figure, style_of

_RATE, _LARGEST, _RATE_THERE = "throughput_tokens_per_s", "capacity_prompts", "capacity_throughput_tokens_per_s"


def capacity_figure(group: Group, look: Look) -> Figure | None:
    """Draw throughput over batch where it was measured at several, and the largest batches."""
    lines = {label: _points(cells) for label, cells in _lines(group).items()}
    batches = {batch for points in lines.values() for batch, _ in points}
    largest = bool(measured(group.cells, _LARGEST))
    if len(batches) < 2 and not largest:
        return None
    return labelled(lambda legend: _build(group, look, lines, legend, largest))


def _lines(group: Group) -> dict[tuple[str, str], list[CellResult]]:
    found: dict[tuple[str, str], list[CellResult]] = {}
    for cell in group.cells:
        found.setdefault((group.series_label(cell), cell.budget), []).append(cell)
    return found


def batch_size(cell: CellResult) -> int | None:
    """Return how many prompts the speed pass ran together."""
    task: Any = cell.settings.get("task")
    speed: Any = task.get("speed") if isinstance(task, dict) else None
    size = speed.get("batch_size") if isinstance(speed, dict) else None
    return size if isinstance(size, int) and size > 0 else None


def _points(cells: list[CellResult]) -> list[tuple[float, Estimate]]:
    """Return (prompts together, throughput) by growing batch."""
    found: list[tuple[float, Estimate]] = []
    for cell in cells:
        rate, size = cell.estimate(_RATE), batch_size(cell)
        if rate and size:
            found.append((float(size), rate))
        there, largest = cell.estimate(_RATE_THERE), cell.estimate(_LARGEST)
        if there and largest:
            found.append((largest.value, there))
    return sorted(found, key=lambda point: (point[0], point[1].value))


def _build(
    group: Group, look: Look, lines: Mapping[tuple[str, str], list[tuple[float, Estimate]]], legend: bool, largest: bool
) -> DirectLabels:
    drawn = {key: points for key, points in lines.items() if points}
    figure, panels = new_figure(look, bool(drawn) + largest, 3.4 if look.width == "page" else 2.6, columns=2)
    labels = DirectLabels(figure=figure, look=look)
    marks = marks_of(group, look.palette)
    if drawn:
        ends = _throughput(panels[0], drawn, marks, look)
        panels[0].set_title(panel_title(_RATE if measured(group.cells, _RATE) else _RATE_THERE, group.cells))
        if not legend:
            labels.right_of(panels[0], ends)
    if largest:
        ends = _largest(panels[-1], group, marks, look)
        if not legend:
            labels.right_of(panels[-1], ends)
    if legend:
        legend_above(figure, [key_line(label, mark, look.theme) for label, mark in marks.items()], look)
    return labels


def _throughput(
    axes: Axes, lines: Mapping[tuple[str, str], list[tuple[float, Estimate]]], marks: Mapping[str, Mark], look: Look
) -> list[Named]:
    axes.set_xscale("log", base=2)
    ends = []
    for (label, budget), points in lines.items():
        mark = marks[label]
        xs, ys = [batch for batch, _ in points], [rate.value for _, rate in points]
        text = label if budget == "-" else f"{label}, {budget.removesuffix(' of seen')}"
        axes.vlines(xs, [rate.bounds[0] for _, rate in points], [rate.bounds[1] for _, rate in points],
                    color=mark.colour, linewidth=1.3, label=artist_name(_RATE, text))  # fmt: skip
        axes.plot(xs, ys, linestyle=mark.line, linewidth=1.4, label=artist_name(_RATE, text),
                  **style_of(mark, look.theme))  # fmt: skip
        ends.append(Named(text=text, x=xs[-1], y=ys[-1], colour=mark.colour))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prompts together (batch)")
    axes.set_ylabel("tokens/s, higher is better")
    return ends


def _largest(axes: Axes, group: Group, marks: Mapping[str, Mark], look: Look) -> list[Named]:
    """Draw the largest batch of every cell over its budget setting; full as a reference line."""
    budgets = list(group.by_budget)
    axes.set_xlim(-0.5, max(len(budgets), 1) - 0.5)
    ends = []
    for label, cells in group.by_series().items():
        mark = marks[label]
        found = [(cell, size.value) for cell in cells if (size := cell.estimate(_LARGEST))]
        if not found:
            continue
        title = artist_name(_LARGEST, label)
        if cells[0].is_full:
            axes.axhline(found[0][1], color=mark.colour, linestyle=mark.line, linewidth=1.4, label=title)
            ends.append(Named(text=label, x=axes.get_xlim()[1], y=found[0][1], colour=mark.colour))
            continue
        xs, ys = [float(budgets.index(cell.budget)) for cell, _ in found], [size for _, size in found]
        axes.plot(xs, ys, linestyle=mark.line, linewidth=1.2, label=title, **style_of(mark, look.theme))
        ends.append(Named(text=label, x=xs[-1], y=ys[-1], colour=mark.colour))
    axes.set_xticks(range(len(budgets)), [budget.removesuffix(" of seen") for budget in budgets])
    axes.set_ylim(bottom=0)
    axes.set_title("Largest batch that fits")
    axes.set_xlabel("budget")
    axes.set_ylabel("prompts, higher is better")
    return ends
