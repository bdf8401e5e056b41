"""R10: latencies are medians of the stored launches, as many as were asked for, all above 0."""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.audit.recomputed import from_launches
from kvbench.errors import MeasureError
from kvbench.stats.latency import spread_fraction

_NAMES = ("ttft_ms", "tpot_ms", "full_ttft_ms", "full_tpot_ms", "ttft_ratio_to_full", "tpot_ratio_to_full")
_SPREADS = {"ttft_spread_fraction": (0, 2), "tpot_spread_fraction": (1, 3)}
_LAUNCHES_OF_A_BLOCK = 2  # of each arm, in the order A B B A


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    rows, speed = cell.curve("launches_ms", 4), cell.task("Speed") or {}
    if odd := cell.num_odd_rows("launches_ms", 4):
        yield f"{odd} stored launches are not four numbers"
    expected = _LAUNCHES_OF_A_BLOCK * speed.get("num_blocks", 0)
    if len(rows) != expected:
        yield f"{len(rows)} launches are stored, {expected} were asked for"
        return
    if any(one <= 0 for row in rows for one in row):
        yield "a launch took no time"
        return
    for name in _NAMES:
        stored = cell.value(name)
        found = None if stored is None else _again(cell, name)
        if stored is not None and found is not None and abs(stored - found) > 1e-9 * abs(found):
            yield f"{name} is {stored:.6g}, the launches give {found:.6g}"
    yield from _spread(cell, rows)
    yield from _order(cell)


def _again(cell: Cell, name: str) -> float | None:
    try:
        interval = from_launches(cell, name)
    except MeasureError:
        return None
    return None if interval is None else interval.value


def _spread(cell: Cell, rows: list[list[float]]) -> Iterator[str]:
    """Compare what decides whether times are called noisy."""
    for name, columns in _SPREADS.items():
        stored = cell.value(name)
        found = spread_fraction(*([row[column] for row in rows] for column in columns))
        if stored is not None and found is not None and abs(stored - found) > 1e-9:
            yield f"{name} is {stored:.4g}, the launches give {found:.4g}"


def _order(cell: Cell) -> Iterator[str]:
    for small, large in (("tpot_ms", "tpot_p90_ms"), ("settle_ms", "ttft_ms")):
        one, other = cell.value(small), cell.value(large)
        if one is not None and other is not None and one > other * (1 + 1e-9):
            yield f"{small} is {one:.4g}, more than {large}, {other:.4g}"


LAUNCHES_CHECK = Check(
    id="R10",
    title="latencies are medians of the stored launches",
    meaning="a latency was changed, or launches were left out",
    applies=lambda cell, peers: cell.value("tpot_ms") is not None,
    problems=_problems,
)
