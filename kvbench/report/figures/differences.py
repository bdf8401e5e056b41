"""Which samples collapse: every sample's difference to the full cache, the same sample in one column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from kvbench.measures import measure
from kvbench.report.figures.axes import artist_name, footnote, marks_of, series_names
from kvbench.report.figures.style import Look, Mark, key_line, legend_above, style_of
from kvbench.report.findings import QUALITIES, budgets_of
from kvbench.report.load import CellResult, Group, sample_score

MOST_SAMPLES = 48


@dataclass(frozen=True, kw_only=True, slots=True)
class Differences:
    """Per budgeted cell (by key) and sample id, the cell's score minus that of the full cache."""

    name: str
    by_cell: Mapping[str, Mapping[str, float]]

    @property
    def worst_first(self) -> list[str]:
        """Return the sample ids by their mean difference over all cells, those that lose most first."""
        found: dict[str, list[float]] = {}
        for scores in self.by_cell.values():
            for sample, value in scores.items():
                found.setdefault(sample, []).append(value)
        sign = 1.0 if measure(self.name).better == "higher" else -1.0
        return sorted(found, key=lambda sample: (sign * sum(found[sample]) / len(found[sample]), sample))


def sample_differences(group: Group, name: str) -> Differences:
    """Return every sample's difference to full; for `ppl` in nats per token."""
    full = _scores(group.full, name) if group.full else {}
    by_cell = {
        cell.key: {sample: score - full[sample] for sample, score in _scores(cell, name).items() if sample in full}
        for cell in group.budgeted if not cell.failed
    }  # fmt: skip
    return Differences(name=name, by_cell={key: scores for key, scores in by_cell.items() if scores})


def _scores(cell: CellResult, name: str) -> dict[str, float]:
    found = {str(sample.get("id")): sample_score(sample, name) for sample in cell.samples}
    return {sample: score[0] / score[1] for sample, score in found.items() if score}


def differences_figure(group: Group, look: Look) -> Figure | None:
    """Draw, per budget, a column of dots per sample, and beside it the share of samples at or below each value."""
    names = look.measures[:1] or ("rougeL_vs_full", *QUALITIES)
    found = next((one for one in (sample_differences(group, name) for name in names) if one.by_cell), None)
    if found is None:
        return None
    budgets = {
        budget: kept for budget, cells in budgets_of(group).items()
        if (kept := [cell for cell in cells if cell.key in found.by_cell])
    }  # fmt: skip
    alone = look.width == "single"
    height = (2.1 if look.width == "page" else 1.8) * len(budgets) * (2 if alone else 1) + 0.6
    figure = Figure(figsize=(look.width_inches, height), layout="constrained")
    rows = len(budgets) * (2 if alone else 1)
    grid = figure.subplots(rows, 1 if alone else 2, squeeze=False, width_ratios=[1] if alone else [3.2, 1])
    pairs = list(zip(grid.flat[::2], grid.flat[1::2], strict=True))
    order = found.worst_first
    for (dots, shares), (budget, cells) in zip(pairs, budgets.items(), strict=True):
        _dots(dots, group, cells, found, order[:MOST_SAMPLES], look)
        _shares(shares, group, cells, found, look)
        dots.set_title(f"{budget}: {measure(found.name).label} (n = {len(order)})")
    _same_scale(pairs, found)
    _sample_names(pairs[-1][0], order, look)
    pairs[-1][1].set_xlabel(_unit(found.name))
    shown = {group.series_label(cell) for cells in budgets.values() for cell in cells}
    marks = marks_of(group, look.palette)
    called = series_names(group)
    keys = [key_line(called[label], mark, look.theme) for label, mark in marks.items() if label in shown]
    footnote(figure, group, look)
    legend_above(figure, keys, look)
    return figure


def _same_scale(pairs: Sequence[tuple[Axes, Axes]], found: Differences) -> None:
    values = [0.0, *(value for scores in found.by_cell.values() for value in scores.values())]
    room = 0.06 * (max(values) - min(values)) or 0.05
    for dots, shares in pairs:
        dots.set_ylim(min(values) - room, max(values) + room)
        shares.set_xlim(min(values) - room, max(values) + room)


def _unit(name: str) -> str:
    return f"difference{', nats/token' if measure(name).unit == 'ppl' else ' to full'} or below"


def _dots(
    axes: Axes, group: Group, cells: Sequence[CellResult], found: Differences, order: Sequence[str], look: Look
) -> None:
    marks: Mapping[str, Mark] = marks_of(group, look.palette)
    axes.axhline(0.0, color=look.theme.ink, linestyle="--", linewidth=1.2, zorder=1.5)
    for cell in cells:
        scores = found.by_cell[cell.key]
        places = [(place, scores[sample]) for place, sample in enumerate(order) if sample in scores]
        title = artist_name(found.name, group.cell_label(cell))
        axes.plot(*zip(*places, strict=True), linestyle="none", alpha=0.9, label=title,
                  **style_of(marks[group.series_label(cell)], look.theme, size=4.5))  # fmt: skip
    axes.set_xlim(-0.8, len(order) - 0.2)
    axes.xaxis.set_major_locator(FixedLocator(list(range(len(order)))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([])
    axes.set_ylabel("to full, nats/token" if measure(found.name).unit == "ppl" else "difference to full")


def _sample_names(axes: Axes, order: Sequence[str], look: Look) -> None:
    """Name the samples below the last row, without what all of them begin with."""
    shown = order[:MOST_SAMPLES]
    folders = {sample.rpartition("/")[0] for sample in shown}
    shared = f"{folders.pop()}/" if len(folders) == 1 else ""
    shared = "" if shared == "/" else shared
    axes.set_xticklabels([sample.removeprefix(shared)[:14] for sample in shown], rotation=90,
                         fontsize=look.small_points - 1.5)  # fmt: skip
    what = f"the {len(shown)} of {len(order)} samples that lose most" if len(shown) < len(order) else "samples"
    axes.set_xlabel(f"{what} (those that lose most on the left){f': {shared}...' if shared else ''}")


def _shares(axes: Axes, group: Group, cells: Sequence[CellResult], found: Differences, look: Look) -> None:
    """Draw the share of samples whose difference is at or below each value."""
    marks = marks_of(group, look.palette)
    axes.axvline(0.0, color=look.theme.ink, linestyle="--", linewidth=1.2, zorder=1.5)
    for cell in cells:
        values = sorted(found.by_cell[cell.key].values())
        shares = [100.0 * (place + 1) / len(values) for place in range(len(values))]
        mark = marks[group.series_label(cell)]
        axes.plot([values[0], *values], [0.0, *shares], drawstyle="steps-post", color=mark.colour, linewidth=1.4,
                  linestyle=mark.line, label=artist_name(found.name, group.cell_label(cell)))  # fmt: skip
    axes.set_ylim(0, 102)
    axes.set_ylabel("% of samples")
