"""R10, R11, R12: what the stored launches of a cell give and allow.

At least half of the steps of a launch take the median step, so a launch takes at least its prompt and half of its
steps at TPOT; with both ends of a distribution in it a real one takes about all of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from datetime import datetime

from kvbench.audit.evidence import Cell, Note, Peers, any_cell, check
from kvbench.audit.numbers import differs, from_launches
from kvbench.stats.latency import MAX_SPREAD_FRACTION, is_far_off, spread_fraction

_NAMES = ("ttft_ms", "tpot_ms", "full_ttft_ms", "full_tpot_ms", "ttft_ratio_to_full", "tpot_ratio_to_full")
_SPREADS = {"ttft_spread_fraction": (0, 2), "tpot_spread_fraction": (1, 3)}
_LAUNCHES_OF_A_BLOCK = 2  # of each arm, in the order A B B A
_MOST = 1.5
_MOST_OF_NOISY = 3.0  # where launches differ by more than is ranked, or are too few to tell
_COPY = "copy_bandwidth_bytes_per_s"
_MACHINE = ("device", "gpu", "cpu_model", "num_threads")
_CAPACITY = {
    "capacity_prompts": "capacity_ratio_to_full",
    "capacity_throughput_tokens_per_s": "capacity_throughput_ratio_to_full",
}


@check(
    "R10",
    "latencies are medians of the stored launches",
    "a latency was changed, or launches were left out",
    lambda cell, peers: cell.value("tpot_ms") is not None,
)
def launches(cell: Cell, peers: Peers) -> Iterator[str]:
    """Compute latencies, and what decides whether they are called noisy, again from the launches."""
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
        stored, again = cell.value(name), from_launches(cell, name)
        if again is not None and differs(stored, again.value):
            yield f"{name} is {stored:.6g}, the launches give {again.value:.6g}"
    for name, columns in _SPREADS.items():
        stored, found = cell.value(name), _spread(rows, columns)
        if stored is not None and found is not None and abs(stored - found) > 1e-9:
            yield f"{name} is {stored:.4g}, the launches give {found:.4g}"
    for small, large in (("tpot_ms", "tpot_p90_ms"), ("settle_ms", "ttft_ms")):
        one, other = cell.value(small), cell.value(large)
        if one is not None and other is not None and one > other * (1 + 1e-9):
            yield f"{small} is {one:.4g}, more than {large}, {other:.4g}"


def _spread(rows: list[list[float]], columns: tuple[int, int]) -> float | None:
    return spread_fraction(*([row[column] for row in rows] for column in columns))


@check(
    "R11",
    "throughput, its ratios and roof share follow from the times",
    "a rate was changed: the times measured beside it do not allow it",
    lambda cell, peers: any(cell.value(name) is not None for name in ("throughput_tokens_per_s", *_CAPACITY)),
)
def rates(cell: Cell, peers: Peers) -> Iterator[str]:
    """Compare rates, shares of the roof and ratios at capacity with their parts."""
    rows, rate = cell.curve("launches_ms", 4), cell.value("throughput_tokens_per_s")
    if rows and rate is not None:
        yield from _throughput(cell, rows, rate)
    for name in ("roof_share_fraction", "full_roof_share_fraction"):
        share, again = cell.value(name), from_launches(cell, name)
        if share is not None and cell.setting("device") == "cuda" and share > 1:
            yield f"{name} is {share:.3g}: faster than reading its bytes once"
        if again is not None and differs(share, again.value):
            yield f"{name} is {share:.6g}, roof and launches give {again.value:.6g}"
    yield from _odd_copy(cell, peers)
    for name, ratio_name in _CAPACITY.items():  # of rates both are means, of different kinds
        ratio, ours, full = (cell.value(one) for one in (ratio_name, name, f"full_{name}"))
        most = 1 + 1e-9 if name == "capacity_prompts" else _MOST_OF_NOISY
        if ratio is not None and ours is not None and full and not ours / full / most <= ratio <= ours / full * most:
            yield f"{ratio_name} is {ratio:.4g}, its parts give {ours / full:.4g}"


def _throughput(cell: Cell, rows: list[list[float]], rate: float) -> Iterator[str]:
    """Compare rate and ratio with launches whose steps all take the median one."""
    speed = cell.task("Speed") or {}
    steps, tokens = speed.get("new_tokens", 1) - 1, speed.get("new_tokens", 0) * speed.get("batch_size", 1)
    ours, full = ([row[first] + steps * row[first + 1] for row in rows] for first in (0, 2))
    if min(*ours, *full) <= 0:
        return  # told by the check of launches
    given = statistics.median(tokens / one * 1e3 for one in ours)
    if rate > _MOST * given:
        yield f"{rate:.4g} tokens/s, where TTFT and TPOT give {given:.4g}"
    ratio, spread = cell.value("throughput_ratio_to_full"), _spread(rows, (1, 3))
    expected = math.exp(statistics.fmean(math.log(b / a) for a, b in zip(ours, full, strict=True)))
    is_quiet = cell.body["status"] == "ok" and spread is not None and spread <= MAX_SPREAD_FRACTION
    most = _MOST if is_quiet else _MOST_OF_NOISY
    if ratio is not None and not expected / most <= ratio <= expected * most:
        yield f"throughput_ratio_to_full is {ratio:.4g}, where TTFT and TPOT of both give {expected:.4g}"


def _odd_copy(cell: Cell, peers: Peers) -> Iterator[str]:
    """Note what the report notes too: a copy far off those of the same sweep and machine, which its roof rests on."""
    machines = {one: (one.body["sweep"], *map(one.body["environment"].get, _MACHINE)) for one in peers.usable}
    copies = [seen for one in peers.usable if machines[one] == machines[cell] and (seen := one.value(_COPY) or 0) > 0]
    own = cell.value(_COPY) or 0
    if own > 0 and is_far_off(own, median := statistics.median(copies)):
        yield Note(f"copied {own / 1e9:.3g} GB/s, cells of its sweep and machine {median / 1e9:.3g}: reports use those")


@check(
    "R12",
    "dates and durations can have happened",
    "dates or durations were changed, or the launches are not of this run",
    any_cell,
)
def dates(cell: Cell, peers: Peers) -> Iterator[str]:
    """Read every date, and compare the duration with what was timed inside it."""
    for body in (cell.body, *cell.attempts):
        if not _is_date(body["started_utc"]):
            yield f"attempt {body['attempt'][:8]} started at {body['started_utc']!r:.40}, which is no date with a zone"
            return
    duration_s = cell.body["duration_s"]
    if duration_s < 0:
        yield f"took {duration_s} s"
    steps = math.ceil(((cell.task("Speed") or {}).get("new_tokens", 1) - 1) / 2)
    rows = cell.curve("launches_ms", 4)
    timed_s = sum(ttft + full_ttft + steps * (tpot + full_tpot) for ttft, tpot, full_ttft, full_tpot in rows) / 1e3
    if timed_s > duration_s:
        yield f"took {duration_s:.3g} s, but its launches alone take at least {timed_s:.3g} s"


def _is_date(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False
