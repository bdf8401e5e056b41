"""The figures of a report as PNG, for places that show no SVG; the same records give the same bytes."""

from __future__ import annotations

import io

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg

from kvbench.report.load import Results
from kvbench.report.plots import FIGURES, figure_name
from kvbench.report.plots_style import RC, Palette

_DOTS_PER_INCH = 150


def draw_pngs(results: Results) -> dict[str, bytes]:
    """Return every figure by name, in the order of the page."""
    palette = Palette(results.policies)
    found: dict[str, bytes] = {}
    for index, group in enumerate(results.groups):
        for kind, draw in FIGURES.items():
            with rc_context(RC):
                buffer = io.BytesIO()
                figure = draw(group, palette)
                FigureCanvasAgg(figure)  # the figure is saved through it
                figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": "kvbench"})
            found[figure_name(index, group, kind)] = buffer.getvalue()
    return found
