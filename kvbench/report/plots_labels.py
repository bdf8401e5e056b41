"""Where labels go so that none covers another: a stack beside an axis, and boxes around points.

Pure geometry in one unit (pixels), y upwards; nothing is drawn here.

>>> spread([5.0, 6.0], [4.0, 4.0], 0.0, 20.0)
[3.5, 7.5]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_DIRECTIONS = tuple(2 * math.pi * step / 16 for step in (4, 2, 6, 0, 8, 12, 14, 10, 3, 5, 1, 7, 13, 11, 15, 9))
_REACHES = (1.0, 2.0, 3.5, 5.0, 7.0, 10.0, 14.0, 19.0)


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
