"""Every figure of a report that has data, as SVG text for the page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.figure import Figure

from kvbench.report.figures import FIGURES, FigureKind
from kvbench.report.load import Group, Results
from kvbench.report.plots_capacity import capacity_figure
from kvbench.report.plots_differences import differences_figure
from kvbench.report.plots_entries import entries_figure
from kvbench.report.plots_frontier import frontier_figure
from kvbench.report.plots_latency import latency_figure
from kvbench.report.plots_memory import memory_figure
from kvbench.report.plots_pareto import pareto_figure
from kvbench.report.plots_policies import Palette
from kvbench.report.plots_quality import quality_figure
from kvbench.report.plots_save import figure_bytes
from kvbench.report.plots_style import Look
from kvbench.report.plots_theme import LIGHT, Theme

DRAW: Mapping[str, Callable[[Group, Look], Figure | None]] = {
    "quality": quality_figure,
    "pareto": pareto_figure,
    "latency": latency_figure,
    "memory": memory_figure,
    "entries": entries_figure,
    "differences": differences_figure,
    "capacity": capacity_figure,
    "frontier": frontier_figure,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One figure; `name` is a file name without suffix, `kind` its name in FIGURES."""

    name: str
    kind: str
    group_title: str
    title: str
    caption: str
    svg: str


def draw_plots(results: Results) -> tuple[Plot, ...]:
    """Return the figures of all groups, in table order; a figure without data is left out."""
    look = Look(palette=palette_of(results), frontiers=results.frontiers)
    return tuple(
        Plot(
            name=name, kind=kind.name, group_title=group.title, title=kind.title, caption=kind.caption,
            svg=svg.decode(),
        )
        for name, kind, group in every_figure(results)
        if (svg := draw_one(kind, group, look, "svg")) is not None
    )  # fmt: skip


def every_figure(results: Results) -> Iterator[tuple[str, FigureKind, Group]]:
    """Yield (file name without suffix, kind, group) of every figure that there could be, in table order."""
    for group, slug in zip(results.groups, group_slugs(results.groups), strict=True):
        for kind in FIGURES.values():
            yield f"{slug}-{kind.name}", kind, group


def palette_of(results: Results, theme: Theme = LIGHT) -> Palette:
    """Return looks for every policy of the records and searches, so that they are the same in all figures."""
    searched = [search.policy for frontier in results.frontiers for search in frontier.searches]
    return Palette([*results.policies, *searched], theme)


def draw_one(kind: FigureKind, group: Group, look: Look, file_format: str) -> bytes | None:
    """Return one figure as a file's bytes, or None if the group has no data for it."""
    with rc_context(look.rc):
        figure = DRAW[kind.name](group, look)
    return None if figure is None else figure_bytes(figure, file_format, look.rc)


def group_slugs(groups: tuple[Group, ...]) -> list[str]:
    """Return a file name per group; the index keeps two apart that differ only in characters it can not have."""
    return [
        f"{index + 1}-" + re.sub(r"[^A-Za-z0-9._]+", "-", f"{group.model}-{group.dataset}")
        for index, group in enumerate(groups)
    ]
