"""Quality against what it costs: KV bytes and time per output token, with both intervals and the front drawn.

The smallest safe budget of every policy, with where the true one may lie, and every budget that was looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from kvbench.frontier.table import Frontier, Search
from kvbench.measures import measure
from kvbench.report.compare import Ability, timing_noise
from kvbench.report.figures.axes import (
    artist_name,
    axis_scale,
    footnote,
    hide_ticks_outside,
    marks_of,
    measured,
    panel_title,
    series_names,
    sparse,
)
from kvbench.report.figures.labels import DirectLabels, Named, Segment, labelled
from kvbench.report.figures.style import (
    Look,
    Mark,
    key_line,
    legend_above,
    listed,
    new_figure,
    shortened,
    style_of,
)
from kvbench.report.load import CellResult, Estimate, Group, is_better

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


_LOG_FROM = 32.0
_MORE_HELD = 0.01
_LOOKS: dict[str, tuple[str, Any]] = {
    "safe": ("o", "full"),
    "worse": ("x", "full"),
    "undecided": ("o", "none"),
    "failed": ("_", "full"),
}


def frontier_figure(group: Group, look: Look) -> Figure | None:
    """Draw a panel per search file that has this model and data set."""
    ability = Ability(group)
    found = [
        (frontier, searches)
        for frontier in look.frontiers
        if (searches := [search for search in frontier.searches if _is_of(search, group)])
        and (not look.measures or frontier.measure in look.measures)
        and not ability.reason(frontier.measure)
    ]
    if not found:
        return None
    rows = max(len(searches) for _, searches in found)
    figure, panels = new_figure(look, len(found), 1.2 + 0.045 * look.font_points * max(rows, 2), columns=1)
    for axes, (frontier, searches) in zip(panels, found, strict=True):
        _plots_frontier_panel(axes, frontier, searches, look)
    _keys(figure, look)
    return figure


def _is_of(search: Search, group: Group) -> bool:
    """Tell whether a search is of the group, by its cells: groups add settings to names that several of them share."""
    keys = {search.full_key, *(one.key for one in search.looks)}
    return any(cell.key in keys for cell in group.cells)


def _plots_frontier_panel(axes: Axes, frontier: Frontier, searches: list[Search], look: Look) -> None:
    factor = 100.0 if frontier.budget_setting == "fraction" else 1.0
    axes.set_ylim(len(searches) - 0.5, -0.5)
    several = len({search.policy for search in searches}) < len(searches)
    names = [shortened(f"{one.policy} ({one.positions})" if several else one.policy) for one in searches]
    axes.set_yticks(range(len(searches)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    for row, search in enumerate(searches):
        mark = look.palette.mark(search.policy, search.positions)
        _looks(axes, row, search, factor, look)
        _answer(axes, row, search, mark, frontier, factor, look)
    rungs = [rung * factor for rung in frontier.ladder]
    is_log = rungs[-1] / rungs[0] >= _LOG_FROM
    if is_log:
        axes.set_xscale("log")
    axes.set_xlim(*((rungs[0] / 1.2, rungs[-1] * 2) if is_log else (rungs[0] - 0.04 * rungs[-1], 1.17 * rungs[-1])))
    axes.xaxis.set_major_locator(FixedLocator(rungs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(
        sparse([(rung, f"{rung:g}") for rung in rungs], is_log, 0.1 if look.width == "single" else 0.045)
    )
    axes.set_xlabel(f"budget ({'% of tokens' if factor > 1 else 'entries per layer and KV head'}), smaller is better")
    unit = {"ppl": " nats/token"}.get(measure(frontier.measure).unit, "")
    counts = {one.num_samples for search in searches for one in search.looks if one.num_samples}
    n_text = f" (n = {listed(map(str, sorted(counts)))})" if counts else ""
    axes.set_title(f"{measure(frontier.measure).label} at most {frontier.margin:g}{unit} worse than full{n_text}")


def _looks(axes: Axes, row: int, search: Search, factor: float, look: Look) -> None:
    for outcome, (marker, fill) in _LOOKS.items():
        places = [one.budget * factor for one in search.looks if one.outcome == outcome]
        if places:
            axes.plot(places, [row + 0.27] * len(places), linestyle="none", marker=marker, markersize=4,
                      fillstyle=fill, color=look.theme.muted, zorder=3,
                      label=artist_name(outcome, search.policy))  # fmt: skip


def _answer(axes: Axes, row: int, search: Search, mark: Mark, frontier: Frontier, factor: float, look: Look) -> None:
    """Draw the smallest safe budget and from where on the true one may lie; text where it lies above the ladder."""
    top = max(frontier.ladder)
    end = top if search.smallest_safe is None else search.smallest_safe
    title = artist_name("smallest_safe", search.policy)
    if search.budget_low is not None:
        axes.hlines([row - 0.05], [search.budget_low * factor], [end * factor], color=mark.colour, linewidth=3.0,
                    alpha=0.6, zorder=2, label=title)  # fmt: skip
    if search.smallest_safe is not None:
        axes.plot([end * factor], [row - 0.05], linestyle="none", zorder=4, label=title,
                  **style_of(mark, look.theme, size=8))  # fmt: skip
    axes.annotate(_words(search, top, factor), (end * factor, row - 0.05), xytext=(8, 0), textcoords="offset points",
                  va="center", fontsize=look.small_points, zorder=6)  # fmt: skip


def _words(search: Search, top: float, factor: float) -> str:
    """Return the answer in words: the budget, what is really held where that is clearly more, and what was odd."""
    unit = " %" if factor > 1 else ""
    found, seen = search.smallest_safe, search.look
    text = f"above {top * factor:g}{unit}" if found is None else f"{found * factor:g}{unit}"
    held = seen.realised_budget if seen is not None and factor > 1 else None
    if held is not None and found is not None and held >= found + _MORE_HELD:
        text += f" (holds {held * factor:.0f} %)"
    return f"{text}, not monotone" if search.status == "not monotone" else text


def _keys(figure: Figure, look: Look) -> None:
    theme = look.theme
    keys = [Line2D([], [], color=theme.muted, linewidth=3.0, alpha=0.6, label="where the true one may lie")]
    keys += [
        Line2D([], [], color=theme.muted, marker=marker, fillstyle=fill, linestyle="none", markersize=4,
               label=f"looked at: {outcome}") for outcome, (marker, fill) in _LOOKS.items()
    ]  # fmt: skip
    columns = {"page": 5, "double": 3, "single": 1}[look.width]
    figure.legend(handles=keys, loc="outside upper left", ncols=columns, handlelength=1.5, columnspacing=1.2)
