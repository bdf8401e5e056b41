"""Quality against KV bytes: what a byte buys. The front is drawn, points that another one beats are faded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from kvbench.report.cell import CellResult, Estimate
from kvbench.report.load import Group
from kvbench.report.paired import is_worse
from kvbench.report.plots_axes import axis_scale, hide_ticks_outside, marks_of, note_missing, panel_title
from kvbench.report.plots_style import INK, MUTED, Mark, Palette, key_line, legend_above, new_figure
from kvbench.units import measure

_QUALITIES = ("rougeL_vs_full", "objects_recalled_fraction", "ppl")
_BYTES = ("kv_stored_bytes", "kv_valid_bytes", "kv_theoretical_bytes")
_LABEL_STEP_POINTS = 11.0
_LOG_RATIO = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Point:
    cell: CellResult
    num_bytes: float
    quality: Estimate


def pareto_figure(group: Group, palette: Palette) -> Figure:
    """Draw one panel per quality measure over the KV bytes stored."""
    names = [name for name in _QUALITIES if any(cell.estimate(name) for cell in group.cells)] or [_QUALITIES[0]]
    names = names[:2]
    figure, panels = new_figure(4.4, len(names))
    marks = marks_of(group, palette)
    cost = next((name for name in _BYTES if any(cell.estimate(name) for cell in group.cells)), _BYTES[0])
    for axes, name in zip(panels, names, strict=True):
        axes.set_title(panel_title(name, group.cells))
        _panel(axes, group, name, cost, marks)
    keys = [key_line(label, mark, line="none") for label, mark in marks.items()]
    legend_above(figure, keys)
    failed = [f"{group.cell_label(cell)}: {cell.status}" for cell in group.cells if cell.failed]
    if failed:
        figure.supxlabel("not drawn, failed: " + "; ".join(_shortened(failed)), fontsize=8, x=0.01, ha="left")
    return figure


def _shortened(texts: list[str], most: int = 4) -> list[str]:
    return texts if len(texts) <= most else [*texts[:most], f"and {len(texts) - most} more"]


def _panel(axes: Axes, group: Group, name: str, cost: str, marks: Mapping[str, Mark]) -> None:
    points = [
        _Point(cell=cell, num_bytes=size.value, quality=quality)
        for cell in group.cells
        if (size := cell.estimate(cost)) and (quality := cell.estimate(name))
    ]
    if not points:
        note_missing(axes, name)
        return
    across, up = axis_scale(cost, group.cells), axis_scale(name, group.cells)
    front = pareto_front(points, name)
    for point in points:
        on_front = point in front
        mark = marks[group.series_label(point.cell)]
        x, y = point.num_bytes / across.factor, point.quality.value / up.factor
        low, high = (bound / up.factor for bound in point.quality.bounds)
        shade = 1.0 if on_front else 0.38
        axes.vlines([x], [low], [high], color=mark.colour, linewidth=1.4, alpha=shade, zorder=3)
        axes.plot([x], [y], color=mark.colour, marker=mark.marker, markersize=8 if on_front else 6.5, alpha=shade,
                  markeredgecolor=INK if on_front else mark.colour, zorder=5 if on_front else 4)  # fmt: skip
    xs = [point.num_bytes / across.factor for point in front]
    ys = [point.quality.value / up.factor for point in front]
    axes.plot(xs, ys, color=MUTED, linewidth=1.2, zorder=2, drawstyle="steps-post")
    _frame(axes, points, across.factor, up.factor, name)
    _front_labels(axes, front, list(zip(xs, ys, strict=True)), name)
    axes.set_xlabel(f"{measure(cost).label} ({across.label})")
    axes.set_ylabel(up.label)


def pareto_front(points: Sequence[_Point], name: str) -> list[_Point]:
    """Return the points that no other one beats in both bytes and quality, by growing bytes."""
    front: list[_Point] = []
    worst_first = measure(name).better == "higher"
    order = sorted(points, key=lambda p: (p.num_bytes, -p.quality.value if worst_first else p.quality.value))
    for point in order:
        if not front or is_worse(name, front[-1].quality.value, point.quality.value):
            front.append(point)
    return front


def _frame(axes: Axes, points: Sequence[_Point], across: float, up: float, name: str) -> None:
    """Leave room on the side where the front's labels go."""
    xs = [point.num_bytes / across for point in points]
    lows, highs = zip(*(point.quality.bounds for point in points), strict=True)
    low, high = min(lows) / up, max(highs) / up
    room = (high - low) or 0.1 * abs(high) or 1.0
    below, above = (0.05, 0.16) if measure(name).better == "higher" else (0.16, 0.05)
    axes.set_ylim(low - below * room, high + above * room)
    most = 1.0 / up if measure(name).unit in ("score", "fraction") else high + room
    hide_ticks_outside(axes, 0.0, most)
    if min(xs) > 0 and max(xs) / min(xs) > _LOG_RATIO:
        # Budgets grow by factors, so do bytes; the extra room on the left holds the first label.
        spread = max(xs) / min(xs)
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(xs) / spread**0.30, max(xs) * spread**0.06)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        return
    width = (max(xs) - min(xs)) or max(xs) or 1.0
    axes.set_xlim(min(xs) - 0.30 * width, max(xs) + 0.06 * width)


def _front_labels(axes: Axes, front: Sequence[_Point], places: Sequence[tuple[float, float]], name: str) -> None:
    """Label the front on its empty side: nothing has fewer bytes and better quality there."""
    up = 1.0 if measure(name).better == "higher" else -1.0
    pixels_to_points = 72.0 / axes.figure.get_dpi()
    last: float | None = None
    for point, place in zip(front, places, strict=True):
        height = up * float(axes.transData.transform(place)[1]) * pixels_to_points
        wanted = height + 9.0
        if last is not None and wanted < last + _LABEL_STEP_POINTS:
            wanted = last + _LABEL_STEP_POINTS
        last = wanted
        axes.annotate(
            "full" if point.cell.is_full else point.cell.budget, place,
            xytext=(-8, up * (wanted - height)), textcoords="offset points",
            ha="right", va="center", fontsize=8.5, zorder=7,
        )  # fmt: skip
