"""R10: latencies are medians of the stored launches, as many as were asked for, all above 0.

R11: throughput, ratios of throughput and share of the roof that the measured times allow.

At least half of the steps of a launch take the median step, so a launch takes at least its prompt and half
of its steps at TPOT; with both ends of a distribution in it a real one takes about all of them.

R12: times that can have happened: dates that can be read, durations that hold what was timed inside them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from datetime import datetime

from kvbench.audit.evidence import Cell, Check, Peers
from kvbench.audit.numbers import from_launches
from kvbench.errors import MeasureError
from kvbench.stats.latency import MAX_SPREAD_FRACTION, spread_fraction

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


_MOST = 1.5
_MOST_OF_NOISY = 3.0  # where launches differ by more than is ranked, or are too few to tell
_CAPACITY = ("capacity_prompts", "capacity_throughput_tokens_per_s")


def _rates_problems(cell: Cell, peers: Peers) -> Iterator[str]:
    rows = cell.curve("launches_ms", 4)
    if rows and cell.value("throughput_tokens_per_s") is not None:
        yield from _throughput(cell, rows)
    for prefix in ("", "full_"):
        yield from _roof(cell, prefix)
    for name in _CAPACITY:
        yield from _capacity(cell, name)


def _throughput(cell: Cell, rows: list[list[float]]) -> Iterator[str]:
    """Compare rate and ratio with launches whose steps all take the median one."""
    speed = cell.task("Speed") or {}
    steps, tokens = speed.get("new_tokens", 1) - 1, speed.get("new_tokens", 0) * speed.get("batch_size", 1)
    ours, full = ([row[first] + steps * row[first + 1] for row in rows] for first in (0, 2))
    if min(*ours, *full) <= 0:
        return  # told by the check of launches
    rate, given = cell.value("throughput_tokens_per_s"), statistics.median(tokens / one * 1e3 for one in ours)
    if rate is not None and rate > _MOST * given:
        yield f"{rate:.4g} tokens/s, where TTFT and TPOT give {given:.4g}"
    ratio = cell.value("throughput_ratio_to_full")
    expected = math.exp(statistics.fmean(math.log(b / a) for a, b in zip(ours, full, strict=True)))
    most = _MOST if _is_quiet(cell, rows) else _MOST_OF_NOISY
    if ratio is not None and not expected / most <= ratio <= expected * most:
        yield f"throughput_ratio_to_full is {ratio:.4g}, where TTFT and TPOT of both give {expected:.4g}"


def _is_quiet(cell: Cell, rows: list[list[float]]) -> bool:
    spread = spread_fraction(*([row[column] for row in rows] for column in (1, 3)))
    return cell.body["status"] == "ok" and spread is not None and spread <= MAX_SPREAD_FRACTION


def _roof(cell: Cell, prefix: str) -> Iterator[str]:
    share = cell.value(f"{prefix}roof_share_fraction")
    if share is None:
        return
    if cell.setting("device") == "cuda" and share > 1:
        yield f"{prefix}roof_share_fraction is {share:.3g}: faster than reading its bytes once"
    again = from_launches(cell, f"{prefix}roof_share_fraction")
    if again is not None and again.value is not None and abs(share - again.value) > 1e-9 * again.value:
        yield f"{prefix}roof_share_fraction is {share:.6g}, roof and launches give {again.value:.6g}"


def _capacity(cell: Cell, name: str) -> Iterator[str]:
    """Compare a ratio at capacity with its two parts; of rates both are means, of different kinds."""
    ratio_name = "capacity_ratio_to_full" if name == "capacity_prompts" else "capacity_throughput_ratio_to_full"
    ratio, ours, full = (cell.value(one) for one in (ratio_name, name, f"full_{name}"))
    if ratio is None or ours is None or not full:
        return
    most = 1 + 1e-9 if name == "capacity_prompts" else _MOST_OF_NOISY
    if not ours / full / most <= ratio <= ours / full * most:
        yield f"{ratio_name} is {ratio:.4g}, its parts give {ours / full:.4g}"


RATES_CHECK = Check(
    id="R11",
    title="throughput, its ratios and roof share follow from the times",
    meaning="a rate was changed: the times measured beside it do not allow it",
    applies=lambda cell, peers: any(cell.value(name) is not None for name in ("throughput_tokens_per_s", *_CAPACITY)),
    problems=_rates_problems,
)


def _times_problems(cell: Cell, peers: Peers) -> Iterator[str]:
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
    problems=_times_problems,
)
