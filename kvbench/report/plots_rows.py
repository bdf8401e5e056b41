"""Figures with one row per cell: latency beside its ratio to full, and memory by phase beside KV bytes."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

from kvbench.report.cell import CellResult
from kvbench.report.load import Group
from kvbench.report.plots_axes import axis_scale, marks_of, note_missing, panel_title
from kvbench.report.plots_style import BLUE, GRID, INK, PAPER, Mark, Palette, legend_above, new_figure
from kvbench.units import MISSING

_LATENCY = ("ttft_ms", "ttft_ratio_to_full", "tpot_ms", "tpot_ratio_to_full")
_PHASES = (
    ("peak_load_bytes", "load", "<", "#56b4e9"),
    ("peak_vision_bytes", "vision", "^", "#e69f00"),
    ("peak_prefill_bytes", "prefill", "D", "#009e73"),
    ("peak_decode_bytes", "decode", "o", BLUE),
)
_PROCESS = ("peak_rss_bytes", "whole process (RSS)", "s", "#cc79a7")


def latency_figure(group: Group, palette: Palette) -> Figure:
    """Draw TTFT and TPOT of every cell with intervals, and their ratios to full around a line at 1."""
    figure, panels = new_figure(_height(group), len(_LATENCY), sharey=True)
    marks = marks_of(group, palette)
    for axes, name in zip(panels, _LATENCY, strict=True):
        if not any(cell.estimate(name) for cell in group.cells):
            note_missing(axes, name)
        else:
            _latency_panel(axes, group, name, marks)
    _row_labels(panels[0], group)
    return figure


def memory_figure(group: Group, palette: Palette) -> Figure:
    """Draw the peak of every phase, and KV bytes stored (bar) against the theory (black tick)."""
    figure, panels = new_figure(_height(group) + 0.3, 2, sharey=True)
    phases = [phase for phase in _PHASES if any(cell.estimate(phase[0]) for cell in group.cells)]
    # The whole process is several times larger, so it would hide the phases; it stands in where there are none.
    phases = phases or [phase for phase in (_PROCESS,) if any(cell.estimate(phase[0]) for cell in group.cells)]
    if phases:
        _phase_panel(panels[0], group, phases)
    else:
        note_missing(panels[0], "peak_memory_bytes")
    panels[0].set_title("Peak memory by phase")
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=f"peak, {label}", markersize=7)
        for _, label, marker, colour in phases
    ]
    kv_names = ("kv_stored_bytes", "kv_theoretical_bytes")
    if any(cell.estimate(name) for cell in group.cells for name in kv_names):
        _kv_panel(panels[1], group, marks_of(group, palette))
        handles.append(Line2D([], [], color=INK, marker="|", linestyle="none", label="KV in theory", markersize=11))
    else:
        note_missing(panels[1], "kv_stored_bytes")
    panels[1].set_title("KV cache: stored (bar) and in theory (tick)")
    _row_labels(panels[0], group)
    legend_above(figure, handles) if handles else None
    return figure


def _height(group: Group) -> float:
    return 1.3 + 0.27 * max(len(group.cells), 2)


def _row_labels(axes: Axes, group: Group) -> None:
    """Name the rows, full on top, and draw a line between policies."""
    axes.set_ylim(len(group.cells) - 0.4, -0.6)
    axes.yaxis.set_major_locator(FixedLocator(list(range(len(group.cells)))))
    axes.set_yticklabels([group.cell_label(cell) for cell in group.cells])
    axes.tick_params(axis="y", length=0, left=True, labelleft=True)


def _rows(axes: Axes, group: Group) -> None:
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, min_n_ticks=2))
    for row, (cell, above) in enumerate(zip(group.cells[1:], group.cells, strict=False), start=1):
        if cell.series != above.series:
            axes.axhline(row - 0.5, color=GRID, linewidth=0.9, zorder=1)


def _status(axes: Axes, row: int, cell: CellResult) -> None:
    """Write the status of a failed cell, or a dash, in the place of a number that is not there."""
    box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}
    at = axes.get_yaxis_transform()
    axes.text(
        0.02,
        row,
        cell.status if cell.failed else MISSING,
        transform=at,
        va="center",
        fontsize=8,
        style="italic",
        bbox=box,
        zorder=6,
    )


def _latency_panel(axes: Axes, group: Group, name: str, marks: Mapping[str, Mark]) -> None:
    scale = axis_scale(name, group.cells)
    _rows(axes, group)
    for row, cell in enumerate(group.cells):
        found = cell.estimate(name)
        if found is None:
            _status(axes, row, cell)
            continue
        mark = marks[group.series_label(cell)]
        low, high = found.bounds
        axes.hlines([row], [low], [high], color=mark.colour, linewidth=2.0, zorder=3)
        axes.plot([found.value], [row], color=mark.colour, marker=mark.marker, markersize=6.5, zorder=4)
    if name.endswith("_ratio_to_full"):
        axes.axvline(1.0, color=INK, linestyle="--", linewidth=1.0, zorder=2)
    axes.set_title(panel_title(name, group.cells))
    axes.set_xlabel(scale.label)


def _phase_panel(axes: Axes, group: Group, phases: list[tuple[str, str, str, str]]) -> None:
    _rows(axes, group)
    found = [(row, cell, cell.estimate(phase[0]), phase) for row, cell in enumerate(group.cells) for phase in phases]
    largest = max((est.value, phase[0]) for _, _, est, phase in found if est)[1]
    scale = axis_scale(largest, group.cells)
    for row, cell in enumerate(group.cells):
        values = [est.value / scale.factor for phase in phases if (est := cell.estimate(phase[0]))]
        if values:
            axes.hlines([row], [min(values)], [max(values)], color=GRID, linewidth=2.0, zorder=1)
        else:
            _status(axes, row, cell)
    for row, _, est, (_, _, marker, colour) in found:
        if est is not None:
            axes.plot([est.value / scale.factor], [row], color=colour, marker=marker, markersize=6, zorder=3)
    axes.set_xlabel(scale.label)


def _kv_panel(axes: Axes, group: Group, marks: Mapping[str, Mark]) -> None:
    stored_any = any(cell.estimate("kv_stored_bytes") for cell in group.cells)
    scale = axis_scale("kv_stored_bytes" if stored_any else "kv_theoretical_bytes", group.cells)
    _rows(axes, group)
    for row, cell in enumerate(group.cells):
        stored, theory = cell.estimate("kv_stored_bytes"), cell.estimate("kv_theoretical_bytes")
        colour = marks[group.series_label(cell)].colour
        if stored:
            axes.barh(row, stored.value / scale.factor, height=0.55, color=colour, alpha=0.75, zorder=2)
        if theory:
            axes.plot([theory.value / scale.factor], [row], color=INK, marker="|", markersize=13, zorder=4)
        if stored is None and theory is None:
            _status(axes, row, cell)
    axes.set_xlim(left=0)
    axes.set_xlabel(scale.label)
