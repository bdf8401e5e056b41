"""Every figure of a report that has data: as SVG for the page, as PNG for places that show no SVG, or as a file.

The same records give the same bytes: no date, no library version, and identifiers from a fixed salt. Text is drawn as
the outlines of DejaVu Sans, which comes with matplotlib, in SVG: a figure then looks the same where that font is
missing, and labels that were placed so that they do not overlap really do not. A PDF embeds the font, so its text can
be searched.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from kvbench.report.figures.costs import capacity_figure, latency_figure, memory_figure
from kvbench.report.figures.kinds import FIGURES, FigureKind
from kvbench.report.figures.pareto import frontier_figure, pareto_figure
from kvbench.report.figures.quality import differences_figure, entries_figure, quality_figure
from kvbench.report.figures.style import LIGHT, Look, Palette, Theme
from kvbench.report.load import Group, Results

_NO_DATE: dict[str, dict[str, Any]] = {
    "svg": {"Date": None, "Creator": "kvbench"},
    "pdf": {"CreationDate": None, "ModDate": None, "Creator": "kvbench", "Producer": "kvbench"},
    "png": {"Software": "kvbench"},
}
_PNG_DPI = 200


def figure_bytes(figure: Figure, kind: str, rc: Any) -> bytes:
    """Return the figure as svg, pdf or png, drawn under the settings `rc`."""
    buffer = io.BytesIO()
    with rc_context(rc):
        figure.savefig(buffer, format=kind, metadata=_NO_DATE[kind], dpi=_PNG_DPI if kind == "png" else "figure")
    data = buffer.getvalue()
    if kind != "svg":
        return data
    # Without the spaces that matplotlib leaves at line ends.
    return ("\n".join(line.rstrip() for line in data.decode().splitlines()) + "\n").encode()


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Png:
    """One figure; `name` is that of the same figure on the page."""

    name: str
    caption: str
    data: bytes


def png_names(results: Results) -> list[str]:
    """Return the names of what `draw_pngs` would yield."""
    look = Look(palette=palette_of(results))
    with rc_context(look.rc):
        return [name for name, kind, group in every_figure(results) if DRAW[kind.name](group, look) is not None]


def draw_pngs(results: Results) -> Iterator[Png]:
    """Yield every figure of the cells that has data, in the order of the page."""
    look = Look(palette=palette_of(results))
    for name, kind, group in every_figure(results):
        data = draw_one(kind, group, look, "png")
        if data is not None:
            yield Png(name=name, caption=f"{group.title}: {kind.caption}", data=data)
