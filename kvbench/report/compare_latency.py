"""Compare times: a policy with the full cache it was interleaved with, or two policies by their ratios to full."""

from __future__ import annotations

import math
from dataclasses import replace

from kvbench.measures import measure
from kvbench.report.cell import CellResult
from kvbench.report.comparison import Choices, Comparison
from kvbench.stats.latency import LogRatio, between, from_interval, noise_reason
from kvbench.stats.tests import smallest_margin


def compare_latency(first: CellResult, second: CellResult, name: str, choices: Choices) -> Comparison:
    """Return the ratio of `first` to `second` minus 1, before any verdict but noisy; `first` has the measure."""
    ratios = [_ratio(first, name), None if second.is_full else _ratio(second, name)]
    value = (first.measurements[name].value / (1.0 if second.is_full else second.measurements[name].value)) - 1
    n = first.measurements[name].n or 0
    base = Comparison(
        measure=name, first=first, second=second, value=value, method="single observations: no interval",
        num_samples=n, num_clusters=n, verdict="not comparable",
        reason="observed once, so nothing says how far chance reaches", margin=smallest_margin(name, choices.margins),
        noise=_noise(name, first, second),
    )  # fmt: skip
    mine, other = ratios
    if mine is None or (other is None and not second.is_full):
        return base
    return _filled(base, mine if other is None else between(mine, other))


def _filled(base: Comparison, found: LogRatio) -> Comparison:
    low, high = found.bounds()
    return replace(
        base,
        value=math.expm1(found.mean),
        verdict="undecided",
        reason="",
        low=low,
        high=high,
        method="t of paired log ratios of launches" + ("" if base.second.is_full else ", each to its own full cache"),
        p_value=found.p_value(),
        minimum_detectable=found.minimum_detectable(),
    )


def _ratio(cell: CellResult, name: str) -> LogRatio | None:
    found = cell.measurements[name]
    if found.low is None or found.high is None:
        return None
    return from_interval(found.value, found.low, found.high, found.n or 0)


def _noise(name: str, *cells: CellResult) -> str:
    """Return why the times of one of the cells are noisy; empty where they are not, or nothing was recorded."""
    for cell in cells:
        if (reason := timing_noise(cell, name)) and not cell.is_full:
            return reason
    return ""


def timing_noise(cell: CellResult, name: str = "tpot_ratio_to_full") -> str:
    """Return why a time or rate of the cell is noisy; empty where it is not, or the measure is neither."""
    if not _is_time(name):
        return ""
    spread = max((found for one in _spreads(name) if (found := _value(cell, one)) is not None), default=None)
    drift, foreign = _value(cell, "reference_drift_fraction"), _value(cell, "foreign_gpu_processes")
    if cell.status == "noisy" and spread is drift is foreign is None:
        return "the cell is noisy"
    return noise_reason(spread, drift, None if foreign is None else int(foreign))


def _value(cell: CellResult, name: str) -> float | None:
    found = cell.estimate(name)
    return None if found is None else found.value


def _spreads(name: str) -> tuple[str, ...]:
    """Return the spreads that say how far the measure can be trusted; a whole launch has both parts."""
    if "throughput" in name:
        return "tpot_spread_fraction", "ttft_spread_fraction"
    return ("ttft_spread_fraction",) if "ttft" in name else ("tpot_spread_fraction",)


def _is_time(name: str) -> bool:
    """Whether the measure is a time or a rate, or made of one, which a noisy machine spoils."""
    if name == "capacity_ratio_to_full":
        return False  # how many prompts fit, on any clock
    of_times = ("_ratio_to_full", "roof_share_fraction")
    return measure(name).unit in ("ms", "tokens/s") or name.endswith(of_times)
