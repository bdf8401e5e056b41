"""Names written beside what they name instead of in a legend, placed when all else of a figure is laid out.

Where they go so that none covers another is pure geometry in one unit (pixels), y upwards: `spread` for a stack beside
an axis, `place` for boxes around points. `DirectLabels` holds the labels of a figure and draws them there.

    >>> spread([5.0, 6.0], [4.0, 4.0], 0.0, 20.0)
    [3.5, 7.5]
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from kvbench.report.figures.style import Look

_DIRECTIONS = tuple(2 * math.pi * step / 16 for step in (4, 2, 6, 0, 8, 12, 14, 10, 3, 5, 1, 7, 13, 11, 15, 9))
_REACHES = (1.0, 2.0, 3.5, 5.0, 7.0, 10.0, 14.0, 19.0)
Segment = tuple[tuple[float, float], tuple[float, float]]
_GAP_PIXELS = 16.0
_POINT_PIXELS = 5.0
_FAR_SHARE = 0.12
_MOST_TRIES, _TALLER = 4, 1.4
_TITLE_SHARE = 0.96  # glyphs are a little wider at another resolution


@dataclass(frozen=True, slots=True)
class Box:
    """An upright rectangle."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box) -> bool:
        """Tell whether the insides of both meet; boxes that touch do not overlap."""
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.top <= other.bottom or other.top <= self.bottom)

    def within(self, other: Box) -> bool:
        """Tell whether no part of this box is outside of `other`."""
        across = other.left <= self.left and self.right <= other.right
        return across and other.bottom <= self.bottom and self.top <= other.top


def spread(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float] | None:
    """Return centres as near to `wanted` as possible (least squares) at which labels in a column do not overlap.

    Order is kept, equal wishes in the order given, and all stay inside `low` to `high`; None if they do not fit.
    """
    if not wanted:
        return []
    if sum(heights) > high - low:
        return None
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # With every label moved down by what lies below it, "no overlap" becomes "not falling".
    below, offsets = 0.0, []
    for i in order:
        offsets.append(below + heights[i] / 2)
        below += heights[i]
    fitted = _not_falling([wanted[i] - offset for i, offset in zip(order, offsets, strict=True)])
    centres = [0.0] * len(wanted)
    for i, offset, free in zip(order, offsets, fitted, strict=True):
        centres[i] = min(max(free, low), high - below) + offset
    return centres


def _not_falling(values: Sequence[float]) -> list[float]:
    """Return the nearest sequence that never falls: pool neighbours that fall until none does."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = (blocks[-1][0] + total, blocks[-1][1] + count)
    return [total / count for total, count in blocks for _ in range(count)]


def place(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    bounds: Box,
    *,
    gap: float,
) -> list[Box | None]:
    """Return a box of each size near its anchor, inside `bounds`, over no obstacle and no other label.

    Earlier labels choose first; one that finds no place may move one other label that has another place.
    None where there is no place.
    """
    free = [
        [box for box in _around(anchor, size, gap) if box.within(bounds) and not _hits(box, obstacles)]
        for anchor, size in zip(anchors, sizes, strict=True)
    ]
    placed: list[Box | None] = [None] * len(anchors)
    for i, boxes in enumerate(free):
        others = [box for box in placed if box]
        placed[i] = next((box for box in boxes if not _hits(box, others)), None)
    for i, boxes in enumerate(free):
        if placed[i] is None:
            _make_room(i, boxes, free, placed)
    return placed


def _around(anchor: tuple[float, float], size: tuple[float, float], gap: float) -> Iterator[Box]:
    """Yield boxes in 16 directions, near ones first."""
    (x, y), (width, height) = anchor, size
    for reach in _REACHES:
        for angle in _DIRECTIONS:
            across, up = math.cos(angle), math.sin(angle)
            left = x + across * (gap * reach + width / 2) - width / 2
            bottom = y + up * (gap * reach + height / 2) - height / 2
            yield Box(left, bottom, left + width, bottom + height)


def _hits(box: Box, others: Sequence[Box]) -> bool:
    return any(box.overlaps(other) for other in others)


def _make_room(index: int, boxes: Sequence[Box], free: Sequence[Sequence[Box]], placed: list[Box | None]) -> None:
    """Place label `index` by moving the only label in its way, if that one fits elsewhere."""
    for box in boxes:
        blocking = [j for j, other in enumerate(placed) if other and box.overlaps(other)]
        if len(blocking) != 1:
            continue
        rest = [other for j, other in enumerate(placed) if other and j != blocking[0]]
        moved = next((one for one in free[blocking[0]] if not _hits(one, [*rest, box])), None)
        if moved:
            placed[index], placed[blocking[0]] = box, moved
            return


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
        halo = withStroke(linewidth=2.4, foreground=self.look.theme.paper)  # a line behind a name stops before it
        for text in texts:
            text.set_path_effects([halo])
            text.set_in_layout(False)
        self.around.append((axes, list(zip(points, texts, strict=True)), list(spots), list(lines)))

    def settle(self) -> None:
        """Lay the figure out, then place every label. `unplaced` holds the texts that found no room."""
        for _ in range(_MOST_TRIES):
            if self._laid_out():
                break
            if self.columns:  # names beside the panels left no room for them
                self.unplaced.update(end.text for _, column in self.columns for end, _ in column)
                break
            self.figure.set_figheight(_TALLER * self.figure.get_figheight())  # a legend did
        self.figure.set_layout_engine("none")
        _fit_titles(self.figure)
        for axes, column in self.columns:
            self._settle_column(axes, column)
        for axes, labels, spots, lines in self.around:
            self._settle_around(axes, labels, spots, lines)

    def _laid_out(self) -> bool:
        """Lay the figure out, and tell whether its panels have any size."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.figure.draw_without_rendering()
        return not any("collapsed" in str(one.message) for one in said)

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
