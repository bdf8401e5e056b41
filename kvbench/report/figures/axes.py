"""What several figures share: where cells stand on a budget axis, names of series, and panels with a row per cell."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from kvbench.measures import MISSING, measure, printed_scale
from kvbench.report.compare import declared_budget, leading_quality, timing_noise
from kvbench.report.figures.style import Look, Mark, Palette, listed, new_figure, shortened, style_of
from kvbench.report.load import CellResult, Group
from kvbench.report.tables import samples_text

_LOG_FROM = 8.0
_SHARES = {"tokens kept": "tokens kept (%)", "prompt tokens kept": "prompt tokens kept (%)"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetAxis:
    """A common x axis for the budgeted cells of a group."""

    title: str
    places: dict[str, float]
    ticks: tuple[tuple[float, str], ...]
    is_log: bool

    def apply(self, axes: Axes) -> None:
        """Set scale, ticks and label."""
        if self.is_log:
            axes.set_xscale("log")
        places = [*self.places.values(), *(place for place, _ in self.ticks)]
        low, high = min(places), max(places)
        room = 0.08 * (high - low) or 0.25 * abs(high) or 0.5
        limits = (low / 1.2, high * 1.2) if self.is_log else (low - room, high + room)
        axes.set_xlim(*limits)
        axes.xaxis.set_major_locator(FixedLocator([place for place, _ in self.ticks]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels(sparse(self.ticks, self.is_log, 0.11))
        axes.set_xlabel(self.title)


def budget_axis(cells: Sequence[CellResult]) -> BudgetAxis:
    """Return shares of the tokens seen, or tokens; names in order where the cells mix both.

    Points stand at the realised budget where it is near the setting; ticks are the settings.
    """
    if cells and all(cell.budget_fraction is not None for cell in cells):
        shares = {cell.key: cell.budget_fraction or 0.0 for cell in cells}
        kinds = {cell.budget.partition("% ")[2] for cell in cells}
        what = _SHARES.get(kinds.pop() if len(kinds) == 1 else "", "budget (%)")
        places = {cell.key: _realised(cell, shares[cell.key]) for cell in cells}
        return _numeric(what, places, sorted(set(shares.values())), 100.0)
    if cells and all(cell.budget_tokens is not None for cell in cells):
        places = {cell.key: float(cell.budget_tokens or 0) for cell in cells}
        return _numeric("budget (entries per layer and KV head)", places, sorted(set(places.values())), 1.0)
    names = list(dict.fromkeys(cell.budget for cell in sorted(cells, key=lambda cell: cell.budget_order)))
    places = {cell.key: float(names.index(cell.budget)) for cell in cells}
    ticks = tuple((float(place), name) for place, name in enumerate(names))
    return BudgetAxis(title="budget setting", places=places, ticks=ticks, is_log=False)


def _numeric(title: str, places: dict[str, float], settings: list[float], factor: float) -> BudgetAxis:
    is_log = settings[0] > 0 and settings[-1] / settings[0] >= _LOG_FROM
    ticks = tuple((setting, f"{setting * factor:.4g}") for setting in settings)
    return BudgetAxis(title=title, places=places, ticks=ticks, is_log=is_log)


def _realised(cell: CellResult, setting: float) -> float:
    found = cell.estimate("realised_budget_fraction")
    return found.value if found and setting > 0 and 0.67 < found.value / setting < 1.5 else setting


def marks_of(group: Group, palette: Palette) -> dict[str, Mark]:
    """Return how each series label of the group is drawn."""
    marks: dict[str, Mark] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for label, cells in group.by_series().items():
        one = cells[0]
        # Twins differ in a setting that has no look of its own: they are told apart by their order.
        marks[label] = palette.mark(one.policy, one.positions, seen[one.policy, one.positions])
        seen[one.policy, one.positions] += 1
    return marks


def sparse(ticks: Sequence[tuple[float, str]], is_log: bool, gap_share: float) -> list[str]:
    """Return the labels of rising ticks, without those nearer to the last one shown than a share of the axis."""
    places = [math.log(place) if is_log else place for place, _ in ticks]
    shown, last = [], -math.inf
    for place, (_, label) in zip(places, ticks, strict=True):
        keep = place - last >= gap_share * (places[-1] - places[0])
        shown.append(label if keep else "")
        last = place if keep else last
    return shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """What an axis divides base units by, and its label: unit and better direction."""

    factor: float
    label: str


def axis_scale(name: str, cells: Iterable[CellResult]) -> Scale:
    """Return the scale in which the largest value among `cells` is printed."""
    values = [abs(found.value) for cell in cells if (found := cell.estimate(name))]
    factor, unit = printed_scale(name, max(values, default=0.0))
    known = measure(name)
    notes = [unit or {"score": "score from 0 to 1", "ppl": "perplexity"}.get(known.unit, "")]
    notes += [f"{known.better} is better"] if known.better != "none" else []
    return Scale(factor=factor, label=", ".join(note for note in notes if note))


def panel_title(name: str, cells: Iterable[CellResult]) -> str:
    """Return label and sample count of a measurement."""
    n_text = samples_text(cells, name)
    label = measure(name).label
    return f"{label[:1].upper()}{label[1:]}{f' ({n_text})' if n_text else ''}"


def hide_ticks_outside(axes: Axes, low: float, high: float) -> None:
    """Keep a share's axis from showing ticks below nothing or above all."""
    bottom, top = axes.get_ylim()
    shown = [tick for tick in axes.get_yticks() if max(low, bottom) <= tick <= min(high, top) + 1e-9]
    axes.yaxis.set_major_locator(FixedLocator(shown))
    axes.set_ylim(bottom, top)


def measured(cells: Iterable[CellResult], *names: str) -> list[str]:
    """Return those of `names` that any cell has, in the order given."""
    cells = list(cells)
    return [name for name in names if any(cell.estimate(name) for cell in cells)]


def series_names(group: Group) -> dict[str, str]:
    """Return what each series label is called in a figure: the policy alone where that says which one is meant."""
    by_series = group.by_series()
    num = Counter(cells[0].policy for cells in by_series.values())
    short = {
        label: shortened(cells[0].policy if num[cells[0].policy] == 1 else label) for label, cells in by_series.items()
    }
    return short if len(set(short.values())) == len(short) else {label: label for label in by_series}


def footnote(figure: Figure, group: Group, look: Look, *more: str) -> None:
    """Say below a figure what its short names leave out, that cells failed, and `more`."""
    modes: dict[str, list[str]] = {}
    called = series_names(group)
    for label, cells in group.by_series().items():
        if cells[0].positions != "original" and called[label] != label:
            modes.setdefault(cells[0].positions, []).append(called[label])
    notes = [f"positions {mode}: {listed(names)}" for mode, names in modes.items()]
    failed = [f"{group.cell_label(cell)}: {cell.status}" for cell in group.cells if cell.failed]
    notes += [f"failed, no number: {listed(failed)}"] if failed else []
    if notes or more:
        text = ". ".join([*notes, *more])
        figure.supxlabel(text, fontsize=look.small_points, x=0.01, ha="left", color=look.theme.muted, wrap=True)


def artist_name(measure_name: str, what: str) -> str:
    """Return the label of the artist that holds a measure of `what` (a cell or series), so that it can be found."""
    return f"{measure_name}: {what}"


def keys_above(
    figure: Figure, keys: Sequence[Line2D | Patch], look: Look, columns: Mapping[str, int], **style: float
) -> None:
    """Explain above the panels what their marks and bars are, in so many columns at the figure's width."""
    figure.legend(handles=list(keys), loc="outside upper left", ncols=columns[look.width], **style)


_MOST_NARROW_ROWS = 18
MANY, _BEST = 12, 6  # series that a reader tells apart, and how many of more than those are named


def emphasised(group: Group, name: str | None = None) -> frozenset[str]:
    """Return the series to draw in their colours: all, of very many full, random and the best at the headline's budget.

    name: the measure by which they are the best, by default the leading one.
    """
    series = group.by_series()
    name = name or leading_quality(group)
    if len(series) <= MANY or name is None:
        return frozenset(series)
    sign, budget = -1.0 if measure(name).better == "higher" else 1.0, declared_budget(group)
    here = [(sign * found.value, cell) for cell in group.budgeted
            if cell.budget == budget and (found := cell.estimate(name))]  # fmt: skip
    best = [cell for _, cell in sorted(here, key=lambda pair: (pair[0], pair[1].sort_key))[:_BEST]]
    kept = {group.series_label(cell) for cell in best}
    return frozenset({*kept, *(label for label, cells in series.items() if cells[0].policy in ("full", "random"))})


def rest_text(group: Group, shown: Collection[str]) -> tuple[str, ...]:
    """Return what a footnote says of series that are grey; nothing where none is."""
    count = len(group.by_series()) - len(shown)
    return (f"grey: {count} other policies; named: the best at {declared_budget(group)}",) if count > 0 else ()


def narrowed(group: Group, look: Look) -> Group:
    """Return the group, for a single column the full cache and the headline's budget alone, the best of very many."""
    if look.width != "single":
        return group
    budget, name = declared_budget(group), leading_quality(group)
    kept = [cell for cell in group.cells if cell.is_full or cell.budget == budget]
    if name is not None and len(kept) > _MOST_NARROW_ROWS:
        sign = -1.0 if measure(name).better == "higher" else 1.0
        values = {cell.key: sign * found.value if (found := cell.estimate(name)) else math.inf for cell in kept}
        best = {cell.key for cell in sorted(kept, key=lambda cell: values[cell.key])[:_MOST_NARROW_ROWS]}
        kept = [cell for cell in kept if cell.key in best or cell.is_full]
    return replace(group, cells=tuple(kept)) if kept else group


def row_inches(group: Group, look: Look) -> float:
    """Return the height of a panel with a row per cell."""
    least, by_row = (0.85, 0.024) if look.width == "single" else (1.1, 0.03)
    return least + by_row * look.font_points * max(len(group.cells), 2)


def row_figure(group: Group, look: Look, num_panels: int) -> tuple[Figure, list[Axes]]:
    """Return panels side by side that share the rows of `group`; below each other in a single column."""
    columns = {"page": num_panels, "double": min(num_panels, 3), "single": 1}[look.width]
    height = row_inches(group, look)
    figure, panels = new_figure(look, num_panels, height, columns=columns)
    called = series_names(group)
    names = [called[group.series_label(cell)] for cell in group.cells]
    for row, cell in enumerate(group.cells):
        names[row] += "" if cell.is_full else f", {cell.budget.removesuffix(' tokens kept')}"
    for index, axes in enumerate(panels):
        axes.set_ylim(len(group.cells) - 0.4, -0.6)
        axes.yaxis.set_major_locator(FixedLocator(list(range(len(group.cells)))))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
        for row, (above, cell) in enumerate(itertools.pairwise(group.cells), start=1):
            if cell.series != above.series:
                axes.axhline(row - 0.5, color=axes.xaxis.get_gridlines()[0].get_color(), linewidth=0.9, zorder=1)
        axes.set_yticklabels(names if index % columns == 0 else [])
    return figure, panels


def status_text(axes: Axes, row: int, cell: CellResult, look: Look) -> None:
    """Write the status of a failed cell, or a dash, in the place of a number that is not there."""
    axes.text(
        0.02, row, cell.status if cell.failed else MISSING, transform=axes.get_yaxis_transform(), va="center",
        fontsize=look.small_points, style="italic", zorder=6,
        bbox={"facecolor": look.theme.paper, "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def interval_dots(
    axes: Axes, group: Group, name: str, factor: float, marks: Mapping[str, Mark], look: Look, *, shift: float = 0.0,
    tick: bool = False,
) -> None:  # fmt: skip
    """Draw a measure of every cell as its mark, or an upright tick, with its interval; noisy times are pale."""
    for row, cell in enumerate(group.cells):
        found = cell.estimate(name)
        if found is None:
            continue
        mark = marks[group.series_label(cell)]
        noisy = timing_noise(cell, name)
        pale = 0.35 if noisy else 1.0
        value, low, high = (number / factor for number in (found.value, *found.bounds))
        title, wide = artist_name(name, group.cell_label(cell)), 1.0 if tick else 1.8
        axes.hlines([row + shift], [low], [high], color=mark.colour, linewidth=wide, zorder=3, alpha=pale, label=title)
        style = style_of(mark, look.theme)
        if tick:
            style |= {"marker": "|", "markersize": 7.0, "markeredgewidth": 1.4}
        axes.plot([value], [row + shift], linestyle="none", zorder=4, alpha=pale, label=title, **style)
