"""What the place of a new token does to every policy: one line a policy across the position modes, full for reference.

Two panels on one scale: policies as their papers describe them, and as their code was released.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from kvbench.measures import measure
from kvbench.report.figures.draw import figure_bytes
from kvbench.report.figures.labels import DirectLabels, Named, labelled
from kvbench.report.figures.style import Look, Palette, new_figure, style_of
from kvbench.report.load import CellResult

MODES = ("original", "in_cache", "released")
_PANELS = {"as described": False, "as released": True}


def positions_svg(cells: Sequence[CellResult], name: str) -> bytes:
    """Return the figure of `cells`, one budget and data set, as SVG; what was not measured has no mark."""
    look = Look(palette=Palette(cell.policy for cell in cells))
    with rc_context(look.rc):
        figure = labelled(lambda legend: _build(cells, name, look))
    return figure_bytes(figure, "svg", look.rc)


def _build(cells: Sequence[CellResult], name: str, look: Look) -> DirectLabels:
    figure, panels = new_figure(look, len(_PANELS), 2.9, columns=2, sharey=True)
    labels = DirectLabels(figure=figure, look=look)
    for axes, (title, released) in zip(panels, _PANELS.items(), strict=True):
        axes.set_title(title)
        axes.set_xlim(-0.2, len(MODES) - 0.8)
        axes.set_xticks(range(len(MODES)), [f"{mode}\npositions" for mode in MODES])
        shown = [cell for cell in cells if cell.is_full or ("_release" in cell.policy) == released]
        labels.right_of(axes, _lines(axes, shown, name, look))
    panels[0].set_ylabel(measure(name).label)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panels[0].yaxis.set_major_formatter(ScalarFormatter())
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    return labels


def _lines(axes: Axes, cells: Sequence[CellResult], name: str, look: Look) -> list[Named]:
    """Draw a line with intervals for every policy and return their right ends."""
    ends: list[Named] = []
    for policy in dict.fromkeys(cell.policy for cell in cells):
        found = {cell.positions: cell.estimate(name) for cell in cells if cell.policy == policy}
        points = [(MODES.index(mode), estimate) for mode, estimate in found.items() if mode in MODES and estimate]
        if not points:
            continue
        points.sort(key=lambda point: point[0])
        mark = look.palette.mark(policy)
        places, values = [place for place, _ in points], [estimate.value for _, estimate in points]
        lows, highs = zip(*(estimate.bounds for _, estimate in points), strict=True)
        axes.plot(places, values, linestyle=mark.line, linewidth=1.6, **style_of(mark, look.theme))
        axes.vlines(places, lows, highs, color=mark.colour, linewidth=1.6)
        ends.append(Named(text=policy, x=float(places[-1]), y=values[-1], colour=mark.colour))
    return ends
