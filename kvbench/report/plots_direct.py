"""Names written beside what they name instead of in a legend, placed when all else of a figure is laid out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvbench.report.plots_labels import Box, place, spread
from kvbench.report.plots_style import Look

Segment = tuple[tuple[float, float], tuple[float, float]]
_GAP_PIXELS = 16.0
_POINT_PIXELS = 5.0
_FAR_SHARE = 0.12
_TITLE_SHARE = 0.96  # glyphs are a little wider at another resolution


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """A text for the point `x`, `y` (data), and the colour of the line that leads to it."""

    text: str
    x: float
    y: float
    colour: str


@dataclass(kw_only=True, slots=True)
class DirectLabels:
    """Labels of one figure; `settle` is called last, as their places depend on the layout."""

    figure: Figure
    look: Look
    columns: list[tuple[Axes, list[tuple[Named, Any]]]] = field(default_factory=list)
    around: list[tuple[Axes, list[tuple[Named, Any]], list[tuple[float, float]], list[Segment]]] = field(
        default_factory=list
    )
    unplaced: set[str] = field(default_factory=set)

    def right_of(self, axes: Axes, ends: Sequence[Named]) -> None:
        """Name the right ends of lines in a column beside `axes`; the layout leaves room for it."""
        texts = [
            axes.annotate(
                end.text, (1.0, 0.5), xycoords="axes fraction", xytext=(_GAP_PIXELS * 0.72, 0),
                textcoords="offset points", ha="left", va="center", fontsize=self.look.small_points,
                annotation_clip=False, zorder=8,
            )
            for end in ends
        ]  # fmt: skip
        self.columns.append((axes, list(zip(ends, texts, strict=True))))

    def beside(
        self, axes: Axes, points: Sequence[Named], spots: Sequence[tuple[float, float]], lines: Sequence[Segment]
    ) -> None:
        """Name points inside `axes`, over no point in `spots` (data), and over no upright or level line if possible."""
        texts = [axes.text(0, 0, point.text, fontsize=self.look.small_points, zorder=8) for point in points]
        for text in texts:
            text.set_in_layout(False)
        self.around.append((axes, list(zip(points, texts, strict=True)), list(spots), list(lines)))

    def settle(self) -> None:
        """Lay the figure out, then place every label. `unplaced` holds the texts that found no room."""
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")
        _fit_titles(self.figure)
        for axes, column in self.columns:
            self._settle_column(axes, column)
        for axes, labels, spots, lines in self.around:
            self._settle_around(axes, labels, spots, lines)

    def _settle_column(self, axes: Axes, column: list[tuple[Named, Any]]) -> None:
        frame = axes.get_window_extent()
        sizes = [text.get_window_extent() for _, text in column]
        wanted = [float(axes.transData.transform((end.x, end.y))[1]) for end, _ in column]
        room = 6.0 * self.figure.dpi / 72
        centres = spread(wanted, [size.height * 1.04 for size in sizes], frame.y0 - room, frame.y1 + 1.0)
        if centres is None:
            self._drop(column)
            return
        for (end, text), centre in zip(column, centres, strict=True):
            text.xyann = (text.xyann[0], (centre - (frame.y0 + frame.y1) / 2) * 72 / self.figure.dpi)
            start = axes.transData.transform((end.x, end.y))
            label_x = frame.x1 + _GAP_PIXELS * 0.72 * self.figure.dpi / 72
            # A line that ends early must not look as if it went on.
            dotted = start[0] < frame.x1 - _FAR_SHARE * frame.width
            self._lead([start, (label_x - 9, centre), (label_x - 3, centre)], end.colour, dotted=dotted)

    def _settle_around(
        self, axes: Axes, labels: list[tuple[Named, Any]], spots: list[tuple[float, float]], lines: list[Segment]
    ) -> None:
        frame, pixel = axes.get_window_extent(), self.figure.dpi / 72
        half = _POINT_PIXELS * pixel
        points = [_box(axes, spot, spot, half) for spot in spots]
        thin = [_box(axes, start, end, pixel) for start, end in lines]
        anchors = [_pixels(axes, (point.x, point.y)) for point, _ in labels]
        extents = [text.get_window_extent() for _, text in labels]
        sizes = [(size.width + 2 * pixel, size.height) for size in extents]
        bounds = Box(frame.x0, frame.y0, frame.x1 + 4 * pixel, frame.y1)
        boxes = place(anchors, sizes, [*points, *thin], bounds, gap=half + 1.0)
        if None in boxes:
            boxes = place(anchors, sizes, points, bounds, gap=half + 1.0)
        for (point, text), anchor, box in zip(labels, anchors, boxes, strict=True):
            if box is None:
                self._drop([(point, text)])
            else:
                self._write(point, text, anchor, box, 2.6 * half)

    def _write(self, point: Named, text: Any, anchor: tuple[float, float], box: Box, near_pixels: float) -> None:
        """Put a label into its box, with a line to its point where it is not near."""
        text.set(horizontalalignment="center", verticalalignment="center", transform=self.figure.transFigure)
        middle = ((box.left + box.right) / 2, (box.bottom + box.top) / 2)
        text.set_position(self.figure.transFigure.inverted().transform(middle))
        edge = (min(max(anchor[0], box.left), box.right), min(max(anchor[1], box.bottom), box.top))
        if abs(edge[0] - anchor[0]) + abs(edge[1] - anchor[1]) > near_pixels:
            self._lead([anchor, edge], point.colour)

    def _drop(self, labels: list[tuple[Named, Any]]) -> None:
        for named, text in labels:
            text.set_visible(False)
            self.unplaced.add(named.text)

    def _lead(self, pixels: Sequence[Any], colour: str, *, dotted: bool = False) -> None:
        """Draw a thin line through points in pixels, fixed to the figure so that it scales with it."""
        xs, ys = zip(*(self.figure.transFigure.inverted().transform(point) for point in pixels), strict=True)
        line = Line2D(xs, ys, transform=self.figure.transFigure, color=colour, linewidth=0.9, zorder=2.5)
        line.set_linestyle((0, (1, 2.5)) if dotted else "-")
        line.set_in_layout(False)
        self.figure.add_artist(line)


def _fit_titles(figure: Figure) -> None:
    """Make a title smaller that would run into the panel on its right, or out of the figure."""
    for axes in (axes for axes in figure.axes if axes.get_visible()):
        frame = axes.get_window_extent()
        rights = [
            other.get_tightbbox(for_layout_only=True)
            for other in figure.axes
            if other.get_visible() and other.get_window_extent().x0 > frame.x1 - 1 and _same_row(axes, other)
        ]
        room = min([figure.bbox.x1, *(box.x0 for box in rights if box is not None)]) - frame.x0
        title = axes._left_title  # type: ignore[attr-defined]  # the only way to the text that set_title drew
        width = title.get_window_extent().width
        if width > _TITLE_SHARE * room:
            title.set_fontsize(title.get_fontsize() * _TITLE_SHARE * room / width)


def _same_row(one: Axes, two: Axes) -> bool:
    return bool(abs(one.get_window_extent().y0 - two.get_window_extent().y0) < 1)


def _pixels(axes: Axes, place: tuple[float, float]) -> tuple[float, float]:
    x, y = axes.transData.transform(place)
    return float(x), float(y)


def _box(axes: Axes, start: tuple[float, float], end: tuple[float, float], half: float) -> Box:
    """Return what an upright or level line covers, `half` to every side."""
    (x, y), (u, v) = _pixels(axes, start), _pixels(axes, end)
    return Box(min(x, u) - half, min(y, v) - half, max(x, u) + half, max(y, v) + half)


def labelled(build: Callable[[bool], DirectLabels]) -> Figure:
    """Return the figure of `build(False)`, or of `build(True)`, with a legend, where direct labels find no room."""
    labels = build(False)
    labels.settle()
    if labels.unplaced:
        labels = build(True)
        labels.settle()
    return labels.figure
