"""Where the time goes: TTFT and the policy's part of it, TPOT with its roof, the share of the roof, ratios to full."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from kvbench.report.load import Group
from kvbench.report.plots_axes import artist_name, axis_scale, footnote, marks_of, measured, panel_title
from kvbench.report.plots_policies import Mark
from kvbench.report.plots_rows import interval_dots, row_figure, status_text
from kvbench.report.plots_style import Look

_Draw = Callable[[Axes, Group, Mapping[str, Mark], Look], None]


def latency_figure(group: Group, look: Look) -> Figure | None:
    """Draw a panel per part of the latency that any cell has; rows are cells."""
    wanted: tuple[tuple[tuple[str, ...], _Draw], ...] = (
        (("ttft_ms",), _ttft),
        (("tpot_ms",), _tpot),
        (("roof_share_fraction",), _roof_share),
        (("tpot_ratio_to_full",), _tpot_ratio),
        (("ttft_ratio_to_full",), _ttft_ratio),
    )
    shown = [(names, draw) for names, draw in wanted if measured(group.cells, *names)]
    if not shown:
        return None
    figure, panels = row_figure(group, look, len(shown))
    marks = marks_of(group, look.palette)
    for axes, (names, draw) in zip(panels, shown, strict=True):
        draw(axes, group, marks, look)
        for row, cell in enumerate(group.cells):
            if not any(cell.estimate(name) for name in names):
                status_text(axes, row, cell, look)
    footnote(figure, group, look)
    _keys(figure, group, look)
    return figure


def _ttft(axes: Axes, group: Group, marks: Mapping[str, Mark], look: Look) -> None:
    _part_bars(axes, group, "settle_ms", marks)
    interval_dots(axes, group, "ttft_ms", 1.0, marks, look)
    axes.set_xlim(left=0)
    axes.set_title(panel_title("ttft_ms", group.cells))
    axes.set_xlabel("ms, lower is better")


def _tpot(axes: Axes, group: Group, marks: Mapping[str, Mark], look: Look) -> None:
    _part_bars(axes, group, "policy_ms", marks)
    interval_dots(axes, group, "tpot_p90_ms", 1.0, marks, look, tick=True, shift=0.3)
    interval_dots(axes, group, "tpot_ms", 1.0, marks, look, shift=-0.08)
    for row, cell in enumerate(group.cells):
        found = cell.estimate("roof_ms")
        if found:
            axes.vlines([found.value], [row - 0.38], [row + 0.38], color=look.theme.ink, linewidth=1.8, zorder=5,
                        label=artist_name("roof_ms", group.cell_label(cell)))  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_title(panel_title("tpot_ms", group.cells))
    axes.set_xlabel("ms, lower is better")


def _roof_share(axes: Axes, group: Group, marks: Mapping[str, Mark], look: Look) -> None:
    scale = axis_scale("roof_share_fraction", group.cells)
    interval_dots(axes, group, "roof_share_fraction", scale.factor, marks, look)
    axes.set_xlim(left=0)
    axes.set_title(panel_title("roof_share_fraction", group.cells))
    axes.set_xlabel("% of the memory roof")


def _tpot_ratio(axes: Axes, group: Group, marks: Mapping[str, Mark], look: Look) -> None:
    _ratio(axes, group, "tpot_ratio_to_full", marks, look)


def _ttft_ratio(axes: Axes, group: Group, marks: Mapping[str, Mark], look: Look) -> None:
    _ratio(axes, group, "ttft_ratio_to_full", marks, look)


def _ratio(axes: Axes, group: Group, name: str, marks: Mapping[str, Mark], look: Look) -> None:
    interval_dots(axes, group, name, 1.0, marks, look)
    axes.axvline(1.0, color=look.theme.ink, linestyle="--", linewidth=1.0, zorder=2)
    axes.set_title(panel_title(name, group.cells))
    axes.set_xlabel("x full, lower is better")


def _part_bars(axes: Axes, group: Group, name: str, marks: Mapping[str, Mark]) -> None:
    """Draw the part of a time that is the policy's own as a bar from 0."""
    for row, cell in enumerate(group.cells):
        found = cell.estimate(name)
        if found:
            axes.barh(row, found.value, height=0.55, color=marks[group.series_label(cell)].colour, alpha=0.35,
                      zorder=1.5, label=artist_name(name, group.cell_label(cell)))  # fmt: skip


def _keys(figure: Figure, group: Group, look: Look) -> None:
    theme = look.theme
    keys: list[Line2D | Patch] = [
        Line2D([], [], linestyle="none", marker="o", color=theme.muted, label="median, 95 % interval", markersize=6)
    ]
    if measured(group.cells, "tpot_p90_ms"):
        keys.append(Line2D([], [], color=theme.muted, marker="|", markersize=7, markeredgewidth=1.4, linestyle="none",
                           label="TPOT p90"))  # fmt: skip
    if measured(group.cells, "settle_ms", "policy_ms"):
        keys.append(Patch(color=theme.muted, alpha=0.35, label="bar: the policy's own time"))
    if measured(group.cells, "roof_ms"):
        keys.append(Line2D([], [], color=theme.ink, marker="|", markersize=9, markeredgewidth=1.8, linestyle="none",
                           label="memory roof"))  # fmt: skip
    columns = 1 if look.width == "single" else 4 if look.width == "page" else 2
    figure.legend(handles=keys, loc="outside upper left", ncols=columns, handlelength=1.4)
