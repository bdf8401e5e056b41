"""Estimates with their intervals, a row each: the same rows in every panel, and a line where there is no difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes

from kvbench.report.figures.draw import figure_bytes
from kvbench.report.figures.style import Look, Palette, new_figure

_ROW_INCHES = 0.19
_WIDE = 8.0  # from a ratio of the largest to the middle size on, places far from 0 are drawn by their logarithm
_LEAST = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One estimate; `low` and `high` are None where it has no interval."""

    value: float
    low: float | None = None
    high: float | None = None


def forest_svg(names: Sequence[str], panels: Mapping[str, Mapping[str, Row]], *, label: str) -> bytes:
    """Return the rows `names`, from the top, in panels by their title, as SVG; `label` is of the common scale."""
    look = Look(palette=Palette([]))
    with rc_context(look.rc):
        height = 1.0 + _ROW_INCHES * max(1, len(names))
        figure, axes = new_figure(look, max(1, len(panels)), height, columns=3, sharey=True)
        for one, (title, rows) in zip(axes, panels.items(), strict=False):
            one.set_title(title)
            one.set_xlabel(label)
            _panel(one, names, rows, look)
        axes[0].set_yticks(range(len(names)), list(names))
        axes[0].set_ylim(len(names) - 0.5, -0.5)
    return figure_bytes(figure, "svg", look.rc)


def _panel(axes: Axes, names: Sequence[str], rows: Mapping[str, Row], look: Look) -> None:
    axes.axvline(0.0, color=look.theme.muted, linewidth=1.0, linestyle="--", zorder=1)
    axes.grid(axis="y", color=look.theme.grid, linewidth=0.6)
    for place, name in enumerate(names):
        if (row := rows.get(name)) is None:
            continue
        if row.low is not None and row.high is not None:
            axes.hlines(place, row.low, row.high, color=look.theme.blue, linewidth=1.6, zorder=2)
        axes.plot([row.value], [place], marker="o", markersize=4.5, color=look.theme.blue, linestyle="", zorder=3)
    sizes = sorted(abs(row.value) for row in rows.values())
    if sizes and sizes[-1] > _WIDE * max(_LEAST, sizes[len(sizes) // 2]):
        axes.set_xscale("symlog", linthresh=max(_LEAST, sizes[len(sizes) // 2]))
