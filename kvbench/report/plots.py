"""Every figure of a report as SVG text: four per model and data set."""

from __future__ import annotations

import re
from dataclasses import dataclass

from matplotlib import rc_context

from kvbench.report.load import Group, Results
from kvbench.report.plots_pareto import pareto_figure
from kvbench.report.plots_quality import quality_figure
from kvbench.report.plots_rows import latency_figure, memory_figure
from kvbench.report.plots_style import BLUE, GREY, GRID, INK, MUTED, PAPER, RC, Palette, svg_text

FIGURES = {"quality": quality_figure, "pareto": pareto_figure, "latency": latency_figure, "memory": memory_figure}
# The page swaps these for its own variables, so that figures follow its light or dark colours.
# Blue and grey are too dark for a dark page, so they get lighter there; the other colours serve both.
THEME_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PAPER: "var(--card)",
    BLUE: "var(--blue)",
    GREY: "var(--grey)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One figure; `name` is a file name without suffix, `kind` one of quality, pareto, latency, memory."""

    name: str
    kind: str
    group_title: str
    svg: str


def draw_plots(results: Results) -> tuple[Plot, ...]:
    """Return the figures of all groups, in table order."""
    palette = Palette(results.policies)
    return tuple(plot for index, group in enumerate(results.groups) for plot in _group_plots(index, group, palette))


def figure_name(index: int, group: Group, kind: str) -> str:
    """Return the file name, without suffix, of a figure of the `index`-th group."""
    # The index keeps two groups apart whose names differ only in characters a file name can not have.
    return f"{index + 1}-" + re.sub(r"[^A-Za-z0-9._]+", "-", f"{group.model}-{group.dataset}") + f"-{kind}"


def _group_plots(index: int, group: Group, palette: Palette) -> list[Plot]:
    plots: list[Plot] = []
    for kind, draw in FIGURES.items():
        with rc_context(RC):
            svg = svg_text(draw(group, palette))
        plots.append(Plot(name=figure_name(index, group, kind), kind=kind, group_title=group.title, svg=svg))
    return plots
