"""Quality against what it costs: KV bytes and time per output token, with both intervals and the front drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from kvbench.measures import measure
from kvbench.report.ability import Ability
from kvbench.report.cell import CellResult, Estimate
from kvbench.report.compare_latency import timing_noise
from kvbench.report.load import Group
from kvbench.report.paired import is_better
from kvbench.report.plots_axes import (
    artist_name,
    axis_scale,
    footnote,
    hide_ticks_outside,
    marks_of,
    measured,
    panel_title,
    series_names,
)
from kvbench.report.plots_direct import DirectLabels, Named, Segment, labelled
from kvbench.report.plots_policies import Mark
from kvbench.report.plots_style import Look, key_line, legend_above, new_figure, style_of

_QUALITIES = (
    "rougeL_vs_full", "objects_recalled_fraction", "needles_recalled_fraction", "ppl", "rougeL_released_vs_full",
    "ppl_released",
)  # fmt: skip
_BYTES = ("kv_stored_bytes", "kv_valid_bytes", "kv_theoretical_bytes")
_LOG_RATIO = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One cell in a panel; `noise` says why its cost is noisy, if it is a time."""

    cell: CellResult
    cost: Estimate
    quality: Estimate
    noise: str = ""


def pareto_figure(group: Group, look: Look) -> Figure | None:
    """Draw one row of panels per quality measure: over KV bytes, and over TPOT where it was measured."""
    names = measured(group.cells, *(look.measures or _QUALITIES))[: len(look.measures) or 2]
    costs = [*measured(group.cells, *_BYTES)[:1], *measured(group.cells, "tpot_ms")]
    pairs = [(name, cost) for name in names for cost in costs if _points(group, name, cost)]
    return labelled(lambda legend: _build(group, look, pairs, legend)) if pairs else None


def _build(group: Group, look: Look, pairs: list[tuple[str, str]], legend: bool) -> DirectLabels:
    figure, panels = new_figure(look, len(pairs), 3.6 if look.width == "page" else 2.7, columns=2)
    labels = DirectLabels(figure=figure, look=look)
    marks = marks_of(group, look.palette)
    for axes, (name, cost) in zip(panels, pairs, strict=True):
        axes.set_title(panel_title(name, group.cells))
        _panel(axes, group, name, cost, marks, labels, legend)
    if legend:
        legend_above(figure, [key_line(label, mark, look.theme) for label, mark in marks.items()], look)
    footnote(figure, group, look)
    return labels


def _points(group: Group, name: str, cost: str) -> list[Point]:
    return [
        Point(cell=cell, cost=paid, quality=quality, noise=timing_noise(cell, cost))
        for cell in group.cells
        if (paid := cell.estimate(cost)) and (quality := cell.estimate(name))
    ]


def _panel(
    axes: Axes, group: Group, name: str, cost: str, marks: Mapping[str, Mark], labels: DirectLabels, legend: bool
) -> None:
    points = _points(group, name, cost)
    across, up = axis_scale(cost, group.cells), axis_scale(name, group.cells)
    ranks = not Ability(group).reason(name)
    front = pareto_front([point for point in points if ranks and not point.noise], name)
    theme = labels.look.theme
    for label in group.by_series():
        mine = [point for point in points if group.series_label(point.cell) == label]
        places = [(p.cost.value / across.factor, p.quality.value / up.factor) for p in mine]
        if len(places) > 1:
            axes.plot(*zip(*places, strict=True), color=marks[label].colour, linestyle=marks[label].line,
                      linewidth=0.9, alpha=0.6, zorder=2.2)  # fmt: skip
        for point, place in zip(mine, places, strict=True):
            title = artist_name(f"{name} over {cost}", group.cell_label(point.cell))
            _point(axes, point, place, title, (across.factor, up.factor), marks[label], point in front, labels.look)
    xs = [point.cost.value / across.factor for point in front]
    ys = [point.quality.value / up.factor for point in front]
    axes.plot(xs, ys, color=theme.muted, linewidth=1.3, zorder=2, drawstyle="steps-post", label="front")
    _frame(axes, points, across.factor, up.factor, name)
    places = [(p.cost.value / across.factor, p.quality.value / up.factor) for p in points]
    texts = _texts(group, points, front, legend)
    named = [Named(text=texts[p.cell.key], x=x, y=y, colour=marks[group.series_label(p.cell)].colour)
             for p, (x, y) in zip(points, places, strict=True) if p.cell.key in texts]  # fmt: skip
    bars = [line for p in points for line in _bars(p, across.factor, up.factor)]
    steps = [((x, y), (after, y)) for (x, y), after in zip(zip(xs, ys, strict=True), xs[1:], strict=False)]
    labels.beside(axes, named, places, [*bars, *steps])
    axes.set_xlabel(f"{measure(cost).label} ({across.label})")
    axes.set_ylabel(up.label)


def _point(
    axes: Axes, point: Point, place: tuple[float, float], title: str, factors: tuple[float, float], mark: Mark,
    on_front: bool, look: Look,
) -> None:  # fmt: skip
    """Draw one cell with both intervals; the front is larger and ringed, what was noisy is pale."""
    x, y = place
    pale = 0.35 if point.noise else 1.0
    left, right = (bound / factors[0] for bound in point.cost.bounds)
    low, high = (bound / factors[1] for bound in point.quality.bounds)
    axes.vlines([x], [low], [high], color=mark.colour, linewidth=1.3, alpha=0.7 * pale, zorder=3, label=title)
    axes.hlines([y], [left], [right], color=mark.colour, linewidth=1.3, alpha=0.7 * pale, zorder=3, label=title)
    style = style_of(mark, look.theme, size=8 if on_front else 5.5)
    ring = {"markeredgecolor": look.theme.ink, "markeredgewidth": 1.0} if on_front else {}
    axes.plot([x], [y], linestyle="none", alpha=pale, zorder=5 if on_front else 4, label=title, **style | ring)


def _texts(group: Group, points: Sequence[Point], front: Sequence[Point], legend: bool) -> dict[str, str]:
    """Return what to write beside which cell: budgets on the front, and each policy once, at its largest budget."""
    called = series_names(group)
    texts: dict[str, str] = {}
    if not legend:
        largest = {group.series_label(p.cell): p for p in points}  # points come by growing budget
        texts = {p.cell.key: called[label] for label, p in largest.items()}
    for point in front:
        if not point.cell.is_full:
            budget = point.cell.budget.removesuffix(" of seen")
            texts[point.cell.key] = " ".join(part for part in (texts.get(point.cell.key, ""), budget) if part)
    texts |= {p.cell.key: f"{texts.get(p.cell.key, '')} (noisy)".strip() for p in points if p.noise}
    return texts


def _bars(point: Point, across: float, up: float) -> list[Segment]:
    x, y = point.cost.value / across, point.quality.value / up
    left, right = (bound / across for bound in point.cost.bounds)
    low, high = (bound / up for bound in point.quality.bounds)
    return [((x, low), (x, high)), ((left, y), (right, y))]


def pareto_front(points: Sequence[Point], name: str) -> list[Point]:
    """Return the points that no other one beats in both cost and quality, by growing cost."""
    front: list[Point] = []
    sign = -1.0 if measure(name).better == "higher" else 1.0
    for point in sorted(points, key=lambda p: (p.cost.value, sign * p.quality.value)):
        if not front or is_better(name, point.quality.value, front[-1].quality.value):
            front.append(point)
    return front


def _frame(axes: Axes, points: Sequence[Point], across: float, up: float, name: str) -> None:
    """Leave room around the points for their labels."""
    lefts, rights = zip(*(point.cost.bounds for point in points), strict=True)
    lows, highs = zip(*(point.quality.bounds for point in points), strict=True)
    low, high = min(lows) / up, max(highs) / up
    room = (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - 0.10 * room, high + 0.14 * room)
    hide_ticks_outside(axes, 0.0, 1.0 / up if measure(name).unit in ("score", "fraction") else high + room)
    left, right = min(lefts) / across, max(rights) / across
    if left > 0 and right / left > _LOG_RATIO:
        # Budgets grow by factors, so do bytes.
        axes.set_xscale("log", base=2)
        axes.set_xlim(left / (right / left) ** 0.14, right * (right / left) ** 0.12)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        return
    width = (right - left) or right or 1.0
    axes.set_xlim(left - 0.14 * width, right + 0.14 * width)
