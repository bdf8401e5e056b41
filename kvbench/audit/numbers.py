"""R6, R7, R10, R11, R12, R14: numbers and times of a cell computed again from its samples and launches.

Bounds of a bootstrap are drawn again with fewer draws, so they are compared within a quarter of the width.

R10, R11 and R12 ask what the stored launches give and allow. At least half of the steps of a launch take the median
step, so a launch takes at least its prompt and half of its steps at TPOT; with both ends of a distribution in it a real
one takes about all of them.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cache, lru_cache
from typing import Any

from kvbench.audit.evidence import Cell, Note, Peers, any_cell, check, is_number
from kvbench.errors import MeasureError
from kvbench.measures import MEASURES, bounds_on_scale, measure, scale_of, score_scale
from kvbench.results.files import canonical_json
from kvbench.stats.intervals import (
    FEW_METHOD,
    Interval,
    launch_interval,
    mean_interval,
    pooled_ratio_interval,
    ratio_interval,
)
from kvbench.stats.paired import MAX_SPREAD_FRACTION, POOLED, is_far_off, spread_fraction

_NUM_RESAMPLES = 2000
_SHARE_OF_WIDTH = 0.25
# Told with bounds wherever there are two launches, and not to be computed from what is stored of them.
_OVER_LAUNCHES = ("tpot_p90_ms", "settle_ms", "prepare_ms", "throughput_tokens_per_s", "throughput_ratio_to_full")
_SLACK = 1e-9
_NATS_SLACK = 1e-5  # of a token: what is summed over a whole vocabulary in float32 may end below 0
# In nats, and over how many tokens.
_SUMS = {total: count for total, count in POOLED.values() if total.endswith("_sum")}
_COUNTS = (*_SUMS.values(), "num_agreeing_tokens", "num_new_tokens")


@lru_cache(maxsize=65536)
def from_samples(cell: Cell, name: str) -> Interval | None:
    """Return measurement `name` from the rows, None if it does not come from them.

    Where few clusters differ older records hold the interval that these show, later ones what they can not exclude.
    Raises: MeasureError if the rows cannot give it.
    """
    parts: tuple[str, ...] = POOLED.get(name, (name,))
    rows = [row for row in cell.samples if all(is_number(row.get(part)) for part in parts)]
    if name in POOLED:
        rows = [row for row in rows if row[parts[1]] > 0]
    elif not any(name in row for row in cell.samples):
        return None
    columns = [[float(row[part]) for row in rows] for part in parts]
    clusters = [str(row.get("cluster")) for row in rows]
    is_wide = cell.body["measurements"].get(name, {}).get("method") == FEW_METHOD
    scale = score_scale(name) if is_wide else None
    if name not in POOLED:
        return mean_interval(columns[0], clusters, scale=scale, num_resamples=_NUM_RESAMPLES)
    if not rows:
        return None
    transform = math.exp if measure(name).unit == "ppl" else None
    return pooled_ratio_interval(columns[0], columns[1], clusters, transform, scale=scale, num_resamples=_NUM_RESAMPLES)


def from_launches(cell: Cell, name: str) -> Interval | None:
    """Return measurement `name` from the curve of launches, None if it does not come from it.

    None too where a launch took no time, which the check of launches tells.
    """
    rows = cell.curve("launches_ms", 4)
    if not rows:
        return None
    ttft, tpot, full_ttft, full_tpot = (list(column) for column in zip(*rows, strict=True))
    medians = {"ttft_ms": ttft, "tpot_ms": tpot, "full_ttft_ms": full_ttft, "full_tpot_ms": full_tpot}
    pairs = {"ttft_ratio_to_full": (ttft, full_ttft), "tpot_ratio_to_full": (tpot, full_tpot)}
    try:
        if name in ("roof_share_fraction", "full_roof_share_fraction"):
            roof_ms, times = cell.value(name.replace("share_fraction", "ms")), full_tpot if "full" in name else tpot
            return None if roof_ms is None or min(times) <= 0 else launch_interval([roof_ms / one for one in times])
        if name in medians:
            return launch_interval(medians[name])
        return ratio_interval(*pairs[name]) if name in pairs else None
    except MeasureError:
        return None


def differs(stored: float | None, again: float | None, slack: float = 1e-9) -> bool:
    """Whether both are known, and they are further apart than `slack` times the second."""
    return stored is not None and again is not None and abs(stored - again) > slack * abs(again)


def _tolerance(cell: Cell, name: str) -> float:
    """Return the relative difference that is rounding: the released loop rounds to the model's precision."""
    released = cell.task("PerplexityReleased") or {}
    if name != "ppl_released" or not released.get("model_precision"):
        return 1e-9
    return 0.02 if cell.setting("model", "dtype") in ("bfloat16", "float16") else 1e-5


@check(
    "R6",
    "every number follows from its samples",
    "a result was changed, or samples were changed after it was computed",
    lambda cell, peers: cell.usable and bool(cell.samples),
)
def aggregates(cell: Cell, peers: Peers) -> Iterator[str]:
    """Compute each number again; say what samples give, here or in cells with the same tasks, and is not told."""
    told, given = cell.body["measurements"], _scores(cell)
    for name in sorted(given - set(told)):
        yield f"{name} is not there, though its samples give it"
    for name in sorted(_usual_scores(peers, canonical_json(cell.setting("task"))) - given):
        yield f"{name} is not there, though the samples of cells with the same tasks give it"
    for name in sorted(told):
        try:
            found = from_samples(cell, name)
        except MeasureError as error:
            yield f"{name} cannot be computed from the samples: {error}"
            continue
        if found is None:
            continue
        stored = cell.value(name)
        if stored is None or found.value is None:
            if stored is not found.value:
                yield f"{name} is {stored}, the samples give {found.value}"
        elif abs(stored - found.value) > max(1e-12, _tolerance(cell, name) * abs(found.value)):
            yield f"{name} is {stored:.6g}, the samples give {found.value:.6g}"
        elif (n := cell.value(name, "n")) != found.n:
            yield f"{name} says n = {n}, the samples give {found.n}"


@lru_cache(maxsize=65536)
def _scores(cell: Cell) -> frozenset[str]:
    """Return the measurements that are means over samples, as its rows name them."""
    return frozenset(name for row in cell.samples for name in row if name in MEASURES)


@lru_cache(maxsize=64)
def _usual_scores(peers: Peers, task: str) -> frozenset[str]:
    """Return what at least half of the cells with the same tasks score."""
    alike = [one for one in peers.usable if one.samples and canonical_json(one.setting("task")) == task]
    counts = Counter(name for one in alike for name in _scores(one))
    return frozenset(name for name, count in counts.items() if 2 * count >= len(alike))


@check(
    "R7",
    "intervals hold their values and follow from the data",
    "a value or an interval was changed: results look surer than they are",
    lambda cell, peers: cell.usable and bool(cell.body["measurements"]),
)
def bounds(cell: Cell, peers: Peers) -> Iterator[str]:
    """Compare every interval with its value and with its data."""
    for name in sorted(cell.body["measurements"]):
        value = cell.value(name)
        if value is not None and (problem := _interval_problem(cell, name, value)):
            yield problem


def _interval_problem(cell: Cell, name: str, value: float) -> str | None:
    low, high = cell.value(name, "low"), cell.value(name, "high")
    try:
        again = from_samples(cell, name) or from_launches(cell, name)
    except MeasureError:
        again = None  # told by the check of values
    if low is not None and high is not None:
        slack = _tolerance(cell, name) * max(abs(value), 1.0)
        if not low - slack <= value <= high + slack:
            return f"{name} is {value:.6g}, outside of its interval [{low:.6g}, {high:.6g}]"
        return None if again is None else _width_problem(name, value, low, high, again)
    if again is not None and (again.low is None, again.high is None) == (low is None, high is None):
        return None  # one sample or launch, or a bound too large for a number
    if low is not None or high is not None:
        return f"{name} has one bound"
    if again is not None or (name in _OVER_LAUNCHES and len(cell.curve("launches_ms", 4)) > 1):
        return f"{name} has no interval, and its data give one"
    return None


def _width_problem(name: str, value: float, low: float, high: float, again: Interval) -> str | None:
    if again.low is None or again.high is None:
        return f"{name} has the interval [{low:.4g}, {high:.4g}], its data give none"
    # Older records hold bounds outside of what a measure can be, later ones are cut: both are compared as cut.
    told = bounds_on_scale(name, value, low, high)
    made = bounds_on_scale(name, value if again.value is None else again.value, again.low, again.high)
    slack = _SHARE_OF_WIDTH * (made[1] - made[0]) + 1e-9 * max(map(abs, made))
    if any(abs(one - other) > slack for one, other in zip(told, made, strict=True)):
        return f"{name} has the interval [{low:.4g}, {high:.4g}], its data give [{made[0]:.4g}, {made[1]:.4g}]"
    return None


@check(
    "R14",
    "no number that cannot be",
    "samples or results were made up: no run gives such a number",
    lambda cell, peers: cell.usable and bool(cell.body["measurements"] or cell.samples),
)
def possible(cell: Cell, peers: Peers) -> Iterator[str]:
    """Look at every number of samples, in the first row that holds an impossible one, and at every measurement."""
    for row in cell.samples:
        if found := next(_impossible(row), None):
            yield f"{row.get('id')}: {found}"
            break
    for name in sorted(cell.body["measurements"]):
        if (value := cell.value(name)) is not None:
            yield from _outside(name, value)


def _impossible(row: Mapping[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        if is_number(value):
            yield from _outside(name, value)
            if name in _COUNTS and value != int(value):
                yield f"{name} is {value:g}, and tokens are counted whole"
    compared, agreeing = row.get("num_compared_tokens"), row.get("num_agreeing_tokens")
    if compared is not None and agreeing is not None and agreeing > compared:
        yield f"{agreeing} tokens agree, of {compared} compared"
    for name, count in _SUMS.items():
        if (row.get(name) or 0.0) < -_NATS_SLACK * max(1, row.get(count) or 0):
            yield f"{name} is {row[name]:.4g}, and nothing is likelier than certain, or nearer than equal"


def _outside(name: str, value: float) -> Iterator[str]:
    low, high = _range(name)
    if not low - _SLACK <= value <= high + _SLACK:
        yield f"{name} is {value:.6g}, where {low:g} {'and more' if high == math.inf else f'to {high:g}'} can be"


@cache
def _range(name: str) -> tuple[float, float]:
    """Return what a field of a sample or a measurement may be; anything for names that are not known."""
    if name in _COUNTS:
        return 0.0, math.inf
    low, high = scale_of(name)
    in_nats = name in MEASURES and MEASURES[name].unit in ("nats/token", "ppl")
    return low - (_NATS_SLACK if in_nats else 0.0), high


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
            yield from _beyond_roof(cell, peers, name, share)
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


def _copies(cell: Cell, peers: Peers) -> list[float]:
    """Return the bandwidths of the copies that the cells of its sweep and machine saw, its own among them."""
    machines = {one: (one.body["sweep"], *map(one.body["environment"].get, _MACHINE)) for one in peers.usable}
    return [seen for one in peers.usable if machines[one] == machines[cell] and (seen := one.value(_COPY) or 0) > 0]


def _beyond_roof(cell: Cell, peers: Peers, name: str, share: float) -> Iterator[str]:
    """Say that a step is faster than its bytes; only note it where another cell's copy was faster than its own."""
    own = cell.value(_COPY) or 0
    fastest = max((own, *_copies(cell, peers)))
    by_fastest = share * own / fastest if fastest > 0 else share
    if by_fastest > 1:
        yield f"{name} is {share:.3g}: faster than reading its bytes once"
    else:
        yield Note(f"{name} is {share:.3g} by its own copy, {by_fastest:.3g} by the fastest of its sweep and machine")


def _odd_copy(cell: Cell, peers: Peers) -> Iterator[str]:
    """Note what the report notes too: a copy far off those of the same sweep and machine, which its roof rests on."""
    copies, own = _copies(cell, peers), cell.value(_COPY) or 0
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
