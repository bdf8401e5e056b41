"""R12: times that can have happened: dates that can be read, durations that hold what was timed inside them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    for body in (cell.body, *cell.attempts):
        if not _is_date(body["started_utc"]):
            yield f"attempt {body['attempt'][:8]} started at {body['started_utc']!r:.40}, which is no date with a zone"
            return
    duration_s = cell.body["duration_s"]
    if duration_s < 0:
        yield f"took {duration_s} s"
    timed_s = _least_timed_s(cell)
    if timed_s > duration_s:
        yield f"took {duration_s:.3g} s, but its launches alone take at least {timed_s:.3g} s"


def _is_date(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _least_timed_s(cell: Cell) -> float:
    """Half of the steps of a launch take at least its median step."""
    speed = cell.task("Speed") or {}
    steps = math.ceil((speed.get("new_tokens", 1) - 1) / 2)
    rows = cell.curve("launches_ms", 4)
    timed_ms = sum(ttft + other_ttft + steps * (tpot + other) for ttft, tpot, other_ttft, other in rows)
    return float(timed_ms) / 1e3


TIMES_CHECK = Check(
    id="R12",
    title="dates and durations can have happened",
    meaning="dates or durations were changed, or the launches are not of this run",
    applies=lambda cell, peers: True,
    problems=_problems,
)
