"""R11: throughput, ratios of throughput and share of the roof that the measured times allow.

At least half of the steps of a launch take the median step, so a launch takes at least its prompt and half
of its steps at TPOT; with both ends of a distribution in it a real one takes about all of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.audit.recomputed import from_launches
from kvbench.stats.latency import MAX_SPREAD_FRACTION, spread_fraction

_MOST = 1.5
_MOST_OF_NOISY = 3.0  # where launches differ by more than is ranked, or are too few to tell
_CAPACITY = ("capacity_prompts", "capacity_throughput_tokens_per_s")


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
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
    problems=_problems,
)
