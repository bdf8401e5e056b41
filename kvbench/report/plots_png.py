"""The figures of a report as PNG, for places that show no SVG; the same records give the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib import rc_context

from kvbench.report.load import Results
from kvbench.report.plots import DRAW, draw_one, every_figure, palette_of
from kvbench.report.plots_style import Look


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
