"""The page's figures: each drawing inline, with ids of its own and the page's colours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from kvbench.report.page_markup import escaped, prose, scroll_box
from kvbench.report.plots import Plot
from kvbench.report.plots_theme import THEME_COLOURS

_MOST_CHARACTERS = 6_000_000
_TALL = 0.9  # height over width
_STYLE = re.compile(r"<style\b.*?</style>", re.DOTALL)
_SIZE = re.compile(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"')
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)


def chosen_plots(plots: Sequence[Plot]) -> tuple[Plot, ...]:
    """Return the figures that the page can hold and stay quick; of a very large folder the first ones."""
    chosen: list[Plot] = []
    room = _MOST_CHARACTERS
    for plot in plots:
        room -= len(plot.svg)
        if room >= 0:
            chosen.append(plot)
    return tuple(chosen)


def figures_html(plots: Iterable[Plot], group_title: str) -> str:
    """Return the figures of one group."""
    return "".join(_figure(plot) for plot in plots if plot.group_title == group_title)


def inline_svg(plot: Plot) -> str:
    """Return the drawing for use inside the page: own ids, the page's colours, no prologue, no style of its own.

    The style sheet inside an SVG would reach the whole page; what it says is said once in the page's own.
    """
    svg = _STYLE.sub("", _METADATA.sub("", plot.svg[plot.svg.index("<svg") :]))
    prefix = f"{plot.name}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    for colour, variable in THEME_COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg


def _figure(plot: Plot) -> str:
    label = f"{plot.title}, {plot.group_title}"
    kind = " class=tall" if _is_tall(plot.svg) else ""
    drawing = f'<div class=plot role=img aria-label="{escaped(label)}">{inline_svg(plot)}</div>'
    return f"<figure{kind}>{scroll_box(drawing, label)}<figcaption>{prose(plot.caption)}</figcaption></figure>"


def _is_tall(svg: str) -> bool:
    """Tell whether the drawing takes a sheet of its own on paper, which lies across."""
    size = _SIZE.search(svg)
    return size is not None and float(size[2]) > _TALL * float(size[1])
