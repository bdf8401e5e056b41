"""What figures with one row per cell share: names on the left, lines between policies, statuses instead of numbers."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from kvbench.measures import MISSING
from kvbench.report.cell import CellResult
from kvbench.report.compare_latency import timing_noise
from kvbench.report.load import Group
from kvbench.report.plots_axes import artist_name, series_names
from kvbench.report.plots_policies import Mark
from kvbench.report.plots_style import Look, new_figure, style_of


def row_figure(group: Group, look: Look, num_panels: int) -> tuple[Figure, list[Axes]]:
    """Return panels side by side that share the rows of `group`; below each other in a single column."""
    columns = {"page": num_panels, "double": min(num_panels, 3), "single": 1}[look.width]
    height = 1.1 + 0.03 * look.font_points * max(len(group.cells), 2)
    figure, panels = new_figure(look, num_panels, height, columns=columns)
    called = series_names(group)
    for index, axes in enumerate(panels):
        _rows(axes, group)
        names = [_row_name(group, cell, called) for cell in group.cells]
        axes.set_yticklabels(names if index % columns == 0 else [])
    return figure, panels


def _rows(axes: Axes, group: Group) -> None:
    axes.set_ylim(len(group.cells) - 0.4, -0.6)
    axes.yaxis.set_major_locator(FixedLocator(list(range(len(group.cells)))))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
    for row, (cell, above) in enumerate(zip(group.cells[1:], group.cells, strict=False), start=1):
        if cell.series != above.series:
            axes.axhline(row - 0.5, color=axes.xaxis.get_gridlines()[0].get_color(), linewidth=0.9, zorder=1)


def _row_name(group: Group, cell: CellResult, called: Mapping[str, str]) -> str:
    name = called[group.series_label(cell)]
    return name if cell.is_full else f"{name}, {cell.budget.removesuffix(' of seen')}"


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
    """Draw a measure of every cell as its mark, or an upright tick, with its interval; noisy times pale and named."""
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
        if noisy and not tick:
            axes.annotate(
                "noisy", (value, row), xytext=(0, 5), textcoords="offset points", ha="center",
                fontsize=look.small_points - 1, style="italic", zorder=6,
            )  # fmt: skip
