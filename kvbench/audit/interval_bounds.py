"""R7: every interval holds its value, and has the width that samples and launches give.

Bootstrap bounds are drawn again with fewer draws, so they are compared within a quarter of the width.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.audit.recomputed import from_launches, from_samples, tolerance
from kvbench.errors import MeasureError
from kvbench.measures import bounds_on_scale
from kvbench.stats.intervals import Interval

_SHARE_OF_WIDTH = 0.25
# Told with bounds wherever there are two launches, and not to be computed from what is stored of them.
_OVER_LAUNCHES = ("tpot_p90_ms", "settle_ms", "prepare_ms", "throughput_tokens_per_s", "throughput_ratio_to_full")


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    for name in sorted(cell.body["measurements"]):
        if cell.value(name) is not None and (problem := _wrong(cell, name)):
            yield problem


def _wrong(cell: Cell, name: str) -> str | None:
    value, low, high = (cell.number(name, part) for part in ("value", "low", "high"))
    again = _again(cell, name)
    if value is not None and low is not None and high is not None:
        slack = tolerance(cell, name) * max(abs(value), 1.0)
        if not low - slack <= value <= high + slack:
            return f"{name} is {value:.6g}, outside of its interval [{low:.6g}, {high:.6g}]"
        return None if again is None else _width(name, value, low, high, again)
    if again is not None and (again.low is None, again.high is None) == (low is None, high is None):
        return None  # one sample or launch, or a bound too large for a number
    if low is not None or high is not None:
        return f"{name} has one bound"
    if again is not None or (name in _OVER_LAUNCHES and len(cell.curve("launches_ms", 4)) > 1):
        return f"{name} has no interval, and its data give one"
    return None


def _again(cell: Cell, name: str) -> Interval | None:
    try:
        return from_samples(cell, name) or from_launches(cell, name)
    except MeasureError:
        return None  # told by the check of values


def _width(name: str, value: float, low: float, high: float, again: Interval) -> str | None:
    if again.low is None or again.high is None:
        return f"{name} has the interval [{low:.4g}, {high:.4g}], its data give none"
    # Older records hold bounds outside of what a measure can be, later ones are cut: both are compared as cut.
    told = bounds_on_scale(name, value, low, high)
    made = bounds_on_scale(name, value if again.value is None else again.value, again.low, again.high)
    slack = _SHARE_OF_WIDTH * (made[1] - made[0]) + 1e-9 * max(map(abs, made))
    if any(abs(one - other) > slack for one, other in zip(told, made, strict=True)):
        return f"{name} has the interval [{low:.4g}, {high:.4g}], its data give [{made[0]:.4g}, {made[1]:.4g}]"
    return None


BOUNDS_CHECK = Check(
    id="R7",
    title="intervals hold their values and follow from the data",
    meaning="a value or an interval was changed: results look surer than they are",
    applies=lambda cell, peers: cell.usable and bool(cell.body["measurements"]),
    problems=_problems,
)
