"""Quality: against the budget, sample by sample against the full cache, and the entries really held while decoding.

`quality_figure` has a panel per measure and a line with its 95 % band per policy, full dashed; `differences_figure`
shows which samples collapse, the same sample in one column; `entries_figure` whether a cache stays within its budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, ScalarFormatter

from kvbench.measures import TASK_MEASURES, measure
from kvbench.report.compare import declared_budget
from kvbench.report.figures.labels import DirectLabels, Named, labelled
from kvbench.report.figures.style import (
    FAILED,
    MOST_HEIGHT_INCHES,
    BudgetAxis,
    Look,
    Mark,
    Scale,
    artist_name,
    axis_scale,
    budget_axis,
    emphasised,
    fitting,
    footnote,
    hide_ticks_outside,
    legend_above,
    marks_of,
    measured,
    new_figure,
    panel_title,
    rest_text,
    series_names,
    style_of,
)
from kvbench.report.findings import QUALITIES, budgets_of
from kvbench.report.load import CellResult, Group, mean_scores

_QUALITY_PANELS = (
    *(*TASK_MEASURES, "rougeL_vs_full", "ppl", "rougeL_vs_reference", "kl_to_full", "top1_agreement_fraction"),
    *("ppl_released", "rougeL_released_vs_full"),
)
_LOG_RATIO = 5.0
_MOST_SAMPLES = 48


def quality_figure(group: Group, look: Look) -> Figure | None:
    """Draw a panel per measure; failed cells stand as daggers at the bottom with their status."""
    names = measured(group.cells, *(look.measures or _QUALITY_PANELS))
    if not names or not group.budgeted:
        return None
    return labelled(lambda legend: _build(group, look, names, legend))


def _build(group: Group, look: Look, names: list[str], legend: bool) -> DirectLabels:
    height = 3.1 if look.width == "page" else 2.4
    names = list(fitting(look, names, height))
    figure, panels = new_figure(look, len(names), height, columns=3)
    labels = DirectLabels(figure=figure, look=look)
    marks = marks_of(group, look.palette)
    axis = budget_axis(group.budgeted)
    shown = emphasised(group)
    for axes, name in zip(panels, names, strict=True):
        axes.set_title(panel_title(name, group.cells))
        ends = _panel(axes, group, name, marks, axis, look)
        if not legend:
            labels.right_of(axes, ends)
    footnote(figure, group, look, *rest_text(group, shown))
    if legend:
        legend_above(figure, {label: mark for label, mark in marks.items() if label in shown}, look)
    return labels


def _panel(axes: Axes, group: Group, name: str, marks: Mapping[str, Mark], axis: BudgetAxis, look: Look) -> list[Named]:
    """Draw one measure and return the right ends of its lines; full is a reference line with its band."""
    scale = axis_scale(name, group.cells)
    axis.apply(axes)
    called, shown = series_names(group), emphasised(group)
    ends: list[Named] = []
    for label, cells in group.by_series().items():
        mark, title = marks[label], artist_name(name, label)
        if cells[0].is_full:
            if found := cells[0].estimate(name):
                value, low, high = (number / scale.factor for number in (found.value, *found.bounds))
                line = axes.axhline(value, color=mark.colour, linestyle=mark.line, linewidth=1.4, zorder=2)
                line.set_label(title)
                axes.axhspan(low, high, color=mark.colour, alpha=0.12, linewidth=0, zorder=1)
                ends.append(Named(text=label, x=axes.get_xlim()[1], y=value, colour=mark.colour))
            continue
        points = sorted(
            (axis.places[cell.key], *(number / scale.factor for number in (found.value, *found.bounds)))
            for cell in cells
            if cell.key in axis.places and (found := cell.estimate(name))
        )
        if points and label not in shown:
            axes.plot([point[0] for point in points], [point[1] for point in points], color=look.theme.grid,
                      linewidth=1.0, zorder=1.2, label=title)  # fmt: skip
        elif points:
            _series(axes, points, title, mark, look)
            ends.append(Named(text=called[label], x=points[-1][0], y=points[-1][1], colour=mark.colour))
    _scale_y(axes, group, name, scale)
    _failed(axes, group, marks, axis, look)
    axes.set_ylabel(scale.label)
    return ends


def _series(axes: Axes, points: list[tuple[float, ...]], title: str, mark: Mark, look: Look) -> None:
    places, values, lows, highs = (list(column) for column in zip(*points, strict=True))
    axes.plot(places, values, linestyle=mark.line, linewidth=1.6, label=title, **style_of(mark, look.theme))
    # A band needs two places; a single one gets a bar, or its interval would be invisible.
    if len(set(places)) > 1:
        axes.fill_between(places, lows, highs, color=mark.colour, alpha=0.16, linewidth=0, zorder=1.5, label=title)
    else:
        axes.vlines(places, lows, highs, color=mark.colour, linewidth=1.6, zorder=1.9, label=title)


def _scale_y(axes: Axes, group: Group, name: str, scale: Scale) -> None:
    """Scores stay inside 0 to 1; a perplexity that explodes gets a logarithmic axis."""
    found = [estimate for cell in group.cells if (estimate := cell.estimate(name))]
    low = min(estimate.bounds[0] for estimate in found) / scale.factor
    high = max(estimate.bounds[1] for estimate in found) / scale.factor
    smallest = min(estimate.value for estimate in found) / scale.factor
    num_failed = sum(cell.failed for cell in group.budgeted)
    if measure(name).unit == "ppl" and smallest > 0 and high / smallest > _LOG_RATIO:
        axes.set_yscale("log")
        bottom = max(low, smallest / 2)
        room = (high / bottom) ** (0.06 * (1 + min(num_failed, 2)))
        axes.set_ylim(bottom / room, high * 1.15)
        if high / smallest < 100:
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    below = room * (1 + min(num_failed, 4))
    axes.set_ylim(low - (below if num_failed or low > 0 else room), high + room)
    most = 1.0 / scale.factor if measure(name).unit in ("score", "fraction") else high + room
    hide_ticks_outside(axes, 0.0, most)


def _failed(axes: Axes, group: Group, marks: Mapping[str, Mark], axis: BudgetAxis, look: Look) -> None:
    """Stack daggers of failed cells from the bottom edge, and write upright above them what happened."""
    at = axes.get_xaxis_transform()
    stacks: dict[float, list[CellResult]] = {}
    for cell in (cell for cell in group.cells if cell.failed):
        if cell.key in axis.places:
            stacks.setdefault(axis.places[cell.key], []).append(cell)
        else:  # the full cache has no place on a budget axis
            axes.text(0.98, 0.97, f"full: {cell.status}", transform=axes.transAxes, ha="right", va="top",
                      fontsize=look.small_points)  # fmt: skip
    for place, cells in stacks.items():
        for step, cell in enumerate(cells):
            axes.plot([place], [0.04 + 0.06 * step], transform=at, color=marks[group.series_label(cell)].colour,
                      marker=FAILED, markersize=7, markeredgewidth=0.3, zorder=6, clip_on=False,
                      label=artist_name("failed", group.cell_label(cell)))  # fmt: skip
        said = ", ".join(dict.fromkeys(cell.status for cell in cells))
        axes.text(place, 0.02 + 0.06 * len(cells), said, transform=at, ha="center", va="bottom", rotation=90,
                  fontsize=look.small_points, zorder=6)  # fmt: skip


def _sample_differences(group: Group, name: str) -> dict[str, dict[str, float]]:
    """Return, by the key of each budgeted cell, every sample's score minus full's; for `ppl` in nats per token."""
    full = mean_scores(group.full, name) if group.full else {}
    found = {
        cell.key: {sample: score - full[sample] for sample, score in mean_scores(cell, name).items() if sample in full}
        for cell in group.budgeted if not cell.failed
    }  # fmt: skip
    return {key: scores for key, scores in found.items() if scores}


def _worst_first(by_cell: Mapping[str, Mapping[str, float]], name: str) -> list[str]:
    """Return the sample ids by their mean difference over all cells, those that lose most first."""
    found: dict[str, list[float]] = {}
    for scores in by_cell.values():
        for sample, value in scores.items():
            found.setdefault(sample, []).append(value)
    sign = 1.0 if measure(name).better == "higher" else -1.0
    return sorted(found, key=lambda sample: (sign * sum(found[sample]) / len(found[sample]), sample))


def differences_figure(group: Group, look: Look) -> Figure | None:
    """Draw, per budget, a column of dots per sample, and beside it the share of samples at or below each value."""
    names = look.measures[:1] or QUALITIES
    found = next(((name, scores) for name in names if (scores := _sample_differences(group, name))), None)
    if found is None:
        return None
    name, by_cell = found
    kept = {budget: [cell for cell in cells if cell.key in by_cell] for budget, cells in budgets_of(group).items()}
    named = emphasised(group, name)
    kept = {budget: [cell for cell in cells if group.series_label(cell) in named] for budget, cells in kept.items()}
    budgets = {budget: cells for budget, cells in kept.items() if cells}
    if look.width == "single" and budgets:  # the budget of the headline alone fits a column
        asked = declared_budget(group) or ""
        budgets = {asked: budgets[asked]} if asked in budgets else dict([next(iter(budgets.items()))])
    columns = 1 if look.width == "single" else 2
    rows = len(budgets) * (2 // columns)
    height = (2.1 if look.width == "page" else 1.8 if columns > 1 else 1.5) * rows + 0.6
    figure = Figure(figsize=(look.width_inches, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, width_ratios=[3.2, 1][:columns])
    pairs = list(zip(grid.flat[::2], grid.flat[1::2], strict=True))
    order, marks, called = _worst_first(by_cell, name), marks_of(group, look.palette), series_names(group)
    values = [0.0, *(value for by_sample in by_cell.values() for value in by_sample.values())]
    room = 0.06 * (max(values) - min(values)) or 0.05
    is_ppl = measure(name).unit == "ppl"
    for (dots, shares), (budget, cells) in zip(pairs, budgets.items(), strict=True):
        dots.axhline(0.0, color=look.theme.ink, linestyle="--", linewidth=1.2, zorder=1.5)
        shares.axvline(0.0, color=look.theme.ink, linestyle="--", linewidth=1.2, zorder=1.5)
        for cell in cells:
            mark, title = marks[group.series_label(cell)], artist_name(name, group.cell_label(cell))
            lost = by_cell[cell.key]
            places = [(place, lost[one]) for place, one in enumerate(order[:_MOST_SAMPLES]) if one in lost]
            dots.plot(*zip(*places, strict=True), linestyle="none", alpha=0.9, label=title,
                      **style_of(mark, look.theme, size=4.5))  # fmt: skip
            steps = sorted(lost.values())
            shares.plot([steps[0], *steps], [0.0, *(100.0 * (place + 1) / len(steps) for place in range(len(steps)))],
                        drawstyle="steps-post", color=mark.colour, linewidth=1.4, linestyle=mark.line,
                        label=title)  # fmt: skip
        dots.set_title(f"{budget}: {measure(name).label} (n = {len(order)})")
        dots.set_ylabel("to full, nats/token" if is_ppl else "difference to full")
        dots.set_ylim(min(values) - room, max(values) + room)
        num = len(order[:_MOST_SAMPLES])
        dots.set_xlim(-0.8, num - 0.2)
        dots.xaxis.set_major_locator(FixedLocator(list(range(num))))
        dots.xaxis.set_minor_locator(NullLocator())
        dots.set_xticklabels([])
        shares.set_ylabel("% of samples")
        shares.set_ylim(0, 102)
        shares.set_xlim(min(values) - room, max(values) + room)
    _sample_names(pairs[-1][0], order, look)
    pairs[-1][1].set_xlabel(f"difference{', nats/token' if is_ppl else ' to full'} or below")
    shown = {group.series_label(cell) for cells in budgets.values() for cell in cells}
    left = len(group.by_series()) - len(named)
    footnote(figure, group, look, *((f"left out: {left} other policies",) if left > 0 else ()))
    legend_above(figure, {called[label]: mark for label, mark in marks.items() if label in shown}, look)
    return figure


def _sample_names(axes: Axes, order: Sequence[str], look: Look) -> None:
    """Name the samples below the last row, without what all of them begin with."""
    shown = order[:_MOST_SAMPLES]
    folders = {sample.rpartition("/")[0] for sample in shown}
    shared = f"{folders.pop()}/" if len(folders) == 1 else ""
    shared = "" if shared == "/" else shared
    axes.set_xticklabels([sample.removeprefix(shared)[:14] for sample in shown], rotation=90,
                         fontsize=look.small_points - 1.5)  # fmt: skip
    what = f"the {len(shown)} of {len(order)} samples that lose most" if len(shown) < len(order) else "samples"
    axes.set_xlabel(f"{what} (those that lose most on the left){f': {shared}...' if shared else ''}")


def _entries_curve(cell: CellResult) -> list[tuple[float, float, float]]:
    """Return (tokens seen, mean entries, most entries) per decode step; empty if the record has no such curve."""
    rows: Any = cell.curves.get("entries")
    if cell.failed or not isinstance(rows, list):
        return []
    return [(float(r[0]), float(r[1]), float(r[2])) for r in rows if isinstance(r, list) and len(r) == 3]


def entries_figure(group: Group, look: Look) -> Figure | None:
    """Draw a panel per policy with a line per budget, and the full cache in each."""
    series = {
        label: drawn for label, cells in group.by_series().items()
        if not cells[0].is_full and (drawn := [cell for cell in cells if _entries_curve(cell)])
    }  # fmt: skip
    return labelled(lambda legend: _entries(group, look, series)) if series else None


def _entries(group: Group, look: Look, series: Mapping[str, list[CellResult]]) -> DirectLabels:
    columns = 4 if look.width == "page" else 3
    height = 1.3 if look.width == "single" else 2.5
    series = dict(list(series.items())[: 2 * int(MOST_HEIGHT_INCHES / height)]) if look.width == "single" else series
    figure, panels = new_figure(look, len(series), height, columns=columns, narrow=2, sharex=True, sharey=True)
    labels = DirectLabels(figure=figure, look=look)
    marks, called = marks_of(group, look.palette), series_names(group)
    fulls = [cell for cell in group.cells if cell.is_full and _entries_curve(cell)]
    for place, (axes, (label, cells)) in enumerate(zip(panels, series.items(), strict=True)):
        ends = [_curve(axes, group, cell, marks[group.series_label(cell)]) for cell in (*fulls, *cells)]
        labels.right_of(axes, ends)
        axes.set_title(called[label])
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("tokens seen")
        if place % (2 if look.width == "single" else columns) == 0:
            axes.set_ylabel("entries" if look.width == "single" else "entries per layer and KV head")
        axes.set_ylim(bottom=0)
    footnote(figure, group, look)
    return labels


def _curve(axes: Axes, group: Group, cell: CellResult, mark: Mark) -> Named:
    """Draw one cell: a line for the mean, a shade up to the fullest head, layer and row."""
    title = artist_name("entries", group.cell_label(cell))
    seen, mean, most = (list(column) for column in zip(*_entries_curve(cell), strict=True))
    axes.plot(seen, mean, color=mark.colour, linestyle=mark.line, linewidth=1.5, label=title)
    axes.fill_between(seen, mean, most, color=mark.colour, alpha=0.15, linewidth=0, label=title)
    axes.plot(seen[-1:], mean[-1:], color=mark.colour, marker=mark.marker, markersize=4, linestyle="none")
    text = "full" if cell.is_full else cell.budget.removesuffix(" tokens kept")
    return Named(text=text, x=seen[-1], y=mean[-1], colour=mark.colour)
