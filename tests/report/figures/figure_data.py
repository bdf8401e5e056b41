"""What a figure holds, read back from its axes by the names that its artists carry."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from kvbench.report.figures import FIGURES
from kvbench.report.figures.draw import DRAW, Plot, draw_one, draw_plots
from kvbench.report.figures.style import Look, Palette
from kvbench.report.load import Group, load_results


def draw(folder: Path, name: str, **look: Any) -> tuple[Group, Figure]:
    """Return the first group below `folder` and the figure of it."""
    results = load_results(folder)
    drawing = Look(palette=Palette(results.policies), **look)
    with rc_context(drawing.rc):
        figure = DRAW[name](results.groups[0], drawing)
    assert figure is not None
    return results.groups[0], figure


@cache
def plots_of(folder: Path) -> tuple[Plot, ...]:
    """Return all figures of a folder that nobody writes into any more, drawn once."""
    return draw_plots(load_results(folder))


def svg_of(folder: Path, name: str) -> str | None:
    """Return one figure of the first group as a file holds it, or None where there is no data for it."""
    results = load_results(folder)
    drawn = draw_one(FIGURES[name], results.groups[0], Look(palette=Palette(results.policies)), "svg")
    return None if drawn is None else drawn.decode()


@cache
def drawn_once(folder: Path, name: str, **look: Any) -> tuple[Group, Figure]:
    """Return what `draw` does of a folder that nobody writes into any more; to be looked at only."""
    return draw(folder, name, **look)


def lines(figure: Figure, label: str) -> list[np.ndarray]:
    """Return (x, y) rows of every line named `label`."""
    return [np.asarray(line.get_xydata()) for axes in figure.axes for line in axes.lines if line.get_label() == label]


def corners(figure: Figure, label: str) -> np.ndarray:
    """Return all corners of the bands and interval bars named `label`."""
    found = [
        path.vertices
        for axes in figure.axes
        for collection in axes.collections
        if collection.get_label() == label
        for path in collection.get_paths()
    ]
    return np.concatenate(found) if found else np.zeros((0, 2))


def bars(figure: Figure, label: str) -> list[tuple[float, float]]:
    """Return (start, width) of every bar named `label`."""
    return [
        (patch.get_x(), patch.get_width())
        for axes in figure.axes
        for container in axes.containers
        if container.get_label() == label
        for patch in container
    ]


def texts(figure: Figure) -> set[str]:
    """Return every visible text."""
    return {text.get_text() for axes in figure.axes for text in axes.texts if text.get_visible()}
