"""R7: every interval holds its value, and has the width that samples and launches give.

Bootstrap bounds are drawn again with fewer draws, so they are compared within a quarter of the width.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.audit.recomputed import from_launches, from_samples, tolerance
from kvbench.errors import MeasureError

_SHARE_OF_WIDTH = 0.25


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    for name in sorted(cell.body["measurements"]):
        value, low, high = (cell.number(name, part) for part in ("value", "low", "high"))
        if (low is None) != (high is None):
            yield f"{name} has one bound"
        elif value is not None and low is not None and high is not None:
            slack = tolerance(cell, name) * max(abs(value), 1.0)
            if not low - slack <= value <= high + slack:
                yield f"{name} is {value:.6g}, outside of its interval [{low:.6g}, {high:.6g}]"
            elif problem := _width(cell, name, low, high):
                yield problem


def _width(cell: Cell, name: str, low: float, high: float) -> str | None:
    try:
        again = from_samples(cell, name) or from_launches(cell, name)
    except MeasureError:
        return None  # told by the check of values
    if again is None or again.low is None or again.high is None:
        return None
    slack = _SHARE_OF_WIDTH * (again.high - again.low) + 1e-9 * max(abs(again.low), abs(again.high))
    if abs(low - again.low) > slack or abs(high - again.high) > slack:
        return f"{name} has the interval [{low:.4g}, {high:.4g}], its data give [{again.low:.4g}, {again.high:.4g}]"
    return None


CHECK = Check(
    id="R7",
    title="intervals hold their values and follow from the data",
    meaning="a value or an interval was changed: results look surer than they are",
    applies=lambda cell, peers: cell.usable and bool(cell.body["measurements"]),
    problems=_problems,
)
