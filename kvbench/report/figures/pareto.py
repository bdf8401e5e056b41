"""Quality against what it costs, and the smallest safe budget of every policy.

`pareto_figure` draws quality over KV bytes and over time per output token, with both intervals and the front;
`frontier_figure` what `kvbench frontier` found, where the true answer may lie, and every budget that was looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from kvbench.measures import FACT_MEASURES, measure
from kvbench.report.compare import Ability, timing_noise
from kvbench.report.figures.labels import DirectLabels, Named, Segment, labelled
from kvbench.report.figures.style import (
    FAILED,
    Look,
    Mark,
    artist_name,
    axis_scale,
    emphasised,
    fitting,
    footnote,
    hide_ticks_outside,
    keys_above,
    legend_above,
    listed,
    marks_of,
    measured,
    new_figure,
    panel_title,
    rest_text,
    series_names,
    shortened,
    sparse,
    style_of,
)
from kvbench.report.load import CellResult, Estimate, Group, is_better
from kvbench.results.frontier import Frontier, Search

_QUALITIES = (
    *FACT_MEASURES, "rougeL_vs_full", "ppl", "rougeL_released_vs_full", "ppl_released",
)  # fmt: skip
_BYTES = ("kv_stored_bytes", "kv_valid_bytes", "kv_theoretical_bytes")
_LOG_RATIO = 3.0
_LADDER_LOG_RATIO = 32.0
_MORE_HELD = 0.01
_PIECES = 24  # of a line that is neither upright nor level
_LOOKS: dict[str, tuple[str, Any]] = {
    "safe": ("o", "full"),
    "worse": ("v", "full"),
    "undecided": ("o", "none"),
    "failed": (FAILED, "full"),
}


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
    panels = [_Panel(group, name, cost, look) for name in names for cost in costs]
    shown = [panel for panel in panels if panel.points]
    return labelled(lambda legend: _pareto(group, look, shown, legend)) if shown else None


def _pareto(group: Group, look: Look, shown: Sequence[_Panel], legend: bool) -> DirectLabels:
    height = 3.6 if look.width == "page" else 2.7
    shown = fitting(look, shown, height)
    figure, panels = new_figure(look, len(shown), height, columns=2)
    labels = DirectLabels(figure=figure, look=look)
    for axes, panel in zip(panels, shown, strict=True):
        axes.set_title(panel_title(panel.name, group.cells))
        panel.draw(axes, labels, legend)
    shown_series = frozenset().union(*(panel.shown for panel in shown))
    if legend:
        marks = marks_of(group, look.palette)
        legend_above(figure, {label: mark for label, mark in marks.items() if label in shown_series}, look)
    noisy = any(point.noise for panel in shown for point in panel.points)
    footnote(figure, group, look, *rest_text(group, shown_series), *(("pale: noisy times",) if noisy else ()))
    return labels


class _Panel:
    """One quality over one cost; places are in the units of the axes."""

    def __init__(self, group: Group, name: str, cost: str, look: Look) -> None:
        self.group, self.name, self.cost, self.look = group, name, cost, look
        self.marks = marks_of(group, look.palette)
        self.across, self.up = axis_scale(cost, group.cells), axis_scale(name, group.cells)
        self.points = [
            Point(cell=cell, cost=paid, quality=quality, noise=timing_noise(cell, cost))
            for cell in group.cells
            if (paid := cell.estimate(cost)) and (quality := cell.estimate(name))
        ]
        quiet = [point for point in self.points if not point.noise]
        self.shown = emphasised(group, name)
        self.front = [] if Ability(group).reason(name) else pareto_front(quiet, name)

    def place(self, point: Point) -> tuple[float, float]:
        return point.cost.value / self.across.factor, point.quality.value / self.up.factor

    def bounds(self, point: Point) -> tuple[float, float, float, float]:
        """Return left, right, low and high."""
        left, right = (bound / self.across.factor for bound in point.cost.bounds)
        low, high = (bound / self.up.factor for bound in point.quality.bounds)
        return left, right, low, high

    def draw(self, axes: Axes, labels: DirectLabels, legend: bool) -> None:
        for label in self.group.by_series():
            mine = [point for point in self.points if self.group.series_label(point.cell) == label]
            mark = self.marks[label]
            if label not in self.shown and not any(point in self.front for point in mine):
                axes.plot(*zip(*map(self.place, mine), strict=True), linestyle="none", marker="o", markersize=3,
                          color=self.look.theme.grid, zorder=1.8)  # fmt: skip
                continue
            if len(mine) > 1:
                axes.plot(*zip(*map(self.place, mine), strict=True), color=mark.colour, linestyle=mark.line,
                          linewidth=0.9, alpha=0.6, zorder=2.2)  # fmt: skip
            for point in mine:
                self._point(axes, point, mark)
        steps = [self.place(point) for point in self.front]
        xs, ys = [x for x, _ in steps], [y for _, y in steps]
        muted = self.look.theme.muted
        axes.plot(xs, ys, color=muted, linewidth=1.3, zorder=2, drawstyle="steps-post", label="front")
        self._frame(axes)
        texts = self._texts(legend)
        named = [
            Named(text=texts[point.cell.key], x=x, y=y, colour=self.marks[self.group.series_label(point.cell)].colour)
            for point in self.points if point.cell.key in texts for x, y in (self.place(point),)
        ]  # fmt: skip
        lines = []
        for point in self.points:
            (x, y), (left, right, low, high) = self.place(point), self.bounds(point)
            lines += [((x, low), (x, high)), ((left, y), (right, y))]
        lines += [((x, y), (after, y)) for (x, y), after in zip(steps, xs[1:], strict=False)]
        lines += [piece for cells in self.group.by_series().values() for piece in self._joined(cells)]
        labels.beside(axes, named, [self.place(point) for point in self.points], lines)
        axes.set_xlabel(f"{measure(self.cost).label} ({self.across.label})")
        axes.set_ylabel(self.up.label)

    def _point(self, axes: Axes, point: Point, mark: Mark) -> None:
        """Draw one cell with both intervals; the front is larger and ringed, what was noisy is pale."""
        (x, y), (left, right, low, high) = self.place(point), self.bounds(point)
        on_front, pale, theme = point in self.front, 0.35 if point.noise else 1.0, self.look.theme
        title = artist_name(f"{self.name} over {self.cost}", self.group.cell_label(point.cell))
        axes.vlines([x], [low], [high], color=mark.colour, linewidth=1.3, alpha=0.7 * pale, zorder=3, label=title)
        axes.hlines([y], [left], [right], color=mark.colour, linewidth=1.3, alpha=0.7 * pale, zorder=3, label=title)
        style = style_of(mark, theme, size=8 if on_front else 5.5)
        style |= {"markeredgecolor": theme.ink, "markeredgewidth": 1.0} if on_front else {}
        axes.plot([x], [y], linestyle="none", alpha=pale, zorder=5 if on_front else 4, label=title, **style)

    def _joined(self, cells: Sequence[CellResult]) -> list[Segment]:
        """Return the line that joins a policy's budgets in short pieces, which a name is kept off."""
        places = [self.place(point) for point in self.points if point.cell in cells]
        shares = [step / _PIECES for step in range(_PIECES + 1)]
        dots = [
            (x + (u - x) * share, y + (v - y) * share)
            for (x, y), (u, v) in itertools.pairwise(places)
            for share in shares
        ]
        return [(dot, dot) for dot in dots]

    def _texts(self, legend: bool) -> dict[str, str]:
        """Return what to write beside which cell: budgets on the front, each policy once, at its largest budget."""
        called = series_names(self.group)
        # points come by growing budget
        largest = {label: p for p in self.points if (label := self.group.series_label(p.cell)) in self.shown}
        texts = {} if legend else {p.cell.key: called[label] for label, p in largest.items()}
        for cell in (point.cell for point in self.front if not point.cell.is_full):
            parts = texts.get(cell.key, ""), cell.budget.removesuffix(" tokens kept")
            texts[cell.key] = " ".join(part for part in parts if part)
        return texts

    def _frame(self, axes: Axes) -> None:
        """Leave room around the points for their labels."""
        lefts, rights, lows, highs = zip(*map(self.bounds, self.points), strict=True)
        left, right, low, high = min(lefts), max(rights), min(lows), max(highs)
        room = (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - 0.10 * room, high + 0.14 * room)
        is_share = measure(self.name).unit in ("score", "fraction")
        hide_ticks_outside(axes, 0.0, 1.0 / self.up.factor if is_share else high + room)
        if left > 0 and right / left > _LOG_RATIO:
            # Budgets grow by factors, so do bytes.
            axes.set_xscale("log", base=2)
            axes.set_xlim(left / (right / left) ** 0.14, right * (right / left) ** 0.12)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            return
        width = (right - left) or right or 1.0
        axes.set_xlim(left - 0.14 * width, right + 0.14 * width)


def pareto_front(points: Sequence[Point], name: str) -> list[Point]:
    """Return the points that no other one beats in both cost and quality, by growing cost."""
    front: list[Point] = []
    sign = -1.0 if measure(name).better == "higher" else 1.0
    for point in sorted(points, key=lambda p: (p.cost.value, sign * p.quality.value)):
        if not front or is_better(name, point.quality.value, front[-1].quality.value):
            front.append(point)
    return front


def searches_of(group: Group, frontiers: Iterable[Frontier]) -> Iterator[tuple[Frontier, list[Search]]]:
    """Yield the searches of this model and data set where it ranks policies in their measure.

    A search is of the group by its cells: groups add settings to names that several of them share.
    """
    ability, keys = Ability(group), {cell.key for cell in group.cells}
    for frontier in frontiers:
        found = [one for one in frontier.searches if keys & {one.full_key, *(seen.key for seen in one.looks)}]
        if found and not ability.reason(frontier.measure):
            yield frontier, found


def frontier_figure(group: Group, look: Look) -> Figure | None:
    """Draw a panel per search file that has this model and data set."""
    wanted = (one for one in look.frontiers if not look.measures or one.measure in look.measures)
    found = list(searches_of(group, wanted))
    if not found:
        return None
    rows = max(len(searches) for _, searches in found)
    figure, panels = new_figure(look, len(found), 1.2 + 0.045 * look.font_points * max(rows, 2), columns=1)
    for axes, (frontier, searches) in zip(panels, found, strict=True):
        _frontier_panel(axes, frontier, searches, look)
    muted = look.theme.muted
    keys_of_marks = [Line2D([], [], color=muted, linewidth=3.0, alpha=0.6, label="where the true one may lie")]
    keys_of_marks += [
        Line2D([], [], color=muted, marker=marker, fillstyle=fill, linestyle="none", markersize=4,
               label=f"looked at: {outcome}") for outcome, (marker, fill) in _LOOKS.items()
    ]  # fmt: skip
    columns = {"page": 5, "double": 3, "single": 1}
    keys_above(figure, keys_of_marks, look, columns, handlelength=1.5, columnspacing=1.2)
    return figure


def _frontier_panel(axes: Axes, frontier: Frontier, searches: list[Search], look: Look) -> None:
    factor = 100.0 if frontier.budget_setting == "fraction" else 1.0
    axes.set_ylim(len(searches) - 0.5, -0.5)
    several = len({search.policy for search in searches}) < len(searches)
    names = [shortened(f"{one.policy} ({one.positions})" if several else one.policy) for one in searches]
    axes.set_yticks(range(len(searches)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    for row, search in enumerate(searches):
        for outcome, (marker, fill) in _LOOKS.items():
            places = [one.budget * factor for one in search.looks if one.outcome == outcome]
            if places:
                axes.plot(places, [row + 0.27] * len(places), linestyle="none", marker=marker, markersize=4,
                          fillstyle=fill, color=look.theme.muted, zorder=3,
                          label=artist_name(outcome, search.policy))  # fmt: skip
        _answer(axes, row, search, max(frontier.ladder), factor, look)
    rungs = [rung * factor for rung in frontier.ladder]
    is_log = rungs[-1] / rungs[0] >= _LADDER_LOG_RATIO
    if is_log:
        axes.set_xscale("log")
    axes.set_xlim(*((rungs[0] / 1.2, rungs[-1] * 2) if is_log else (rungs[0] - 0.04 * rungs[-1], 1.17 * rungs[-1])))
    axes.xaxis.set_major_locator(FixedLocator(rungs))
    axes.xaxis.set_minor_locator(NullLocator())
    gap = 0.1 if look.width == "single" else 0.045
    axes.set_xticklabels(sparse([(rung, f"{rung:g}") for rung in rungs], is_log, gap))
    axes.set_xlabel(f"budget ({'% of tokens' if factor > 1 else 'entries per layer and KV head'}), smaller is better")
    unit = {"ppl": " nats/token"}.get(measure(frontier.measure).unit, "")
    counts = {one.num_samples for search in searches for one in search.looks if one.num_samples}
    n_text = f" (n = {listed(map(str, sorted(counts)))})" if counts else ""
    axes.set_title(f"{measure(frontier.measure).label} at most {frontier.margin:g}{unit} worse than full{n_text}")


def _answer(axes: Axes, row: int, search: Search, top: float, factor: float, look: Look) -> None:
    """Draw the smallest safe budget and from where on the true one may lie, and say it in words.

    That is the budget, what is really held where that is clearly more, and what was odd; text where it lies above the
    ladder's `top`.
    """
    mark, title = look.palette.mark(search.policy, search.positions), artist_name("smallest_safe", search.policy)
    safe, seen, unit = search.smallest_safe, search.look, " %" if factor > 1 else ""
    end = top if safe is None else safe
    if search.budget_low is not None:
        axes.hlines([row - 0.05], [search.budget_low * factor], [end * factor], color=mark.colour, linewidth=3.0,
                    alpha=0.6, zorder=2, label=title)  # fmt: skip
    if safe is not None:
        axes.plot([end * factor], [row - 0.05], linestyle="none", zorder=4, label=title,
                  **style_of(mark, look.theme, size=8))  # fmt: skip
    text = f"{'above ' if safe is None else ''}{end * factor:g}{unit}"
    held = seen.realised_budget if seen is not None and factor > 1 else None
    if held is not None and safe is not None and held >= safe + _MORE_HELD:
        text += f" (holds {held * factor:.0f} %)"
    text += ", not monotone" if search.status == "not monotone" else ""
    axes.annotate(text, (end * factor, row - 0.05), xytext=(8, 0), textcoords="offset points", va="center",
                  fontsize=look.small_points, zorder=6)  # fmt: skip
