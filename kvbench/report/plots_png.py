"""The figures of a report as PNG, for places that show no SVG; the same records give the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib import rc_context

from kvbench.report.figures import FIGURES
from kvbench.report.load import Results
from kvbench.report.plots import DRAW, draw_one, group_slugs
from kvbench.report.plots_policies import Palette
from kvbench.report.plots_style import Look


@dataclass(frozen=True, kw_only=True, slots=True)
class Png:
    """One figure; `name` is that of the same figure on the page."""

    name: str
    caption: str
    data: bytes


def png_names(results: Results) -> list[str]:
    """Return the names of what `draw_pngs` would yield."""
    look = Look(palette=Palette(results.policies))
    with rc_context(look.rc):
        return [
            f"{slug}-{kind.name}"
            for group, slug in zip(results.groups, group_slugs(results.groups), strict=True)
            for kind in FIGURES.values()
            if DRAW[kind.name](group, look) is not None
        ]


def draw_pngs(results: Results) -> Iterator[Png]:
    """Yield every figure that has data, in the order of the page."""
    look = Look(palette=Palette(results.policies))
    for group, slug in zip(results.groups, group_slugs(results.groups), strict=True):
        for kind in FIGURES.values():
            data = draw_one(kind, group, look, "png")
            if data is not None:
                yield Png(name=f"{slug}-{kind.name}", caption=f"{group.title}: {kind.caption}", data=data)
