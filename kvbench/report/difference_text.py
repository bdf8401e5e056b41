"""Differences and verdicts in words: one wording for terminal, page, markdown, CSV and LaTeX."""

from __future__ import annotations

from kvbench.measures import measure
from kvbench.report.comparison import Comparison
from kvbench.stats.tests import is_latency_ratio


def difference_unit(name: str) -> tuple[str, float, int]:
    """Return (unit, divisor, decimals) in which differences of the measure are printed."""
    known = measure(name)
    if known.unit in ("ppl", "nats/token"):
        return "nats/token", 1.0, 3
    if known.unit == "fraction":
        return "points", 0.01, 1
    if is_latency_ratio(known):
        return "%", 0.01, 1
    return "", 1.0, 3


def difference_value(one: Comparison) -> str:
    """Return "-0.324", with the sign also where it is positive."""
    _, factor, places = difference_unit(one.measure)
    return f"{one.value / factor:+.{places}f}"


def difference_interval(one: Comparison) -> str:
    """Return "[-0.356, -0.296]"; empty without an interval."""
    if one.low is None or one.high is None:
        return ""
    _, factor, places = difference_unit(one.measure)
    return f"[{one.low / factor:+.{places}f}, {one.high / factor:+.{places}f}]"


def difference_text(one: Comparison) -> str:
    """Return "-0.324 [-0.356, -0.296] points"."""
    unit, _, _ = difference_unit(one.measure)
    return " ".join(part for part in (difference_value(one), difference_interval(one), unit) if part)


def size_text(name: str, size: float | None) -> str:
    """Return a size in the measure's difference unit, such as a margin or the smallest detectable difference."""
    if size is None:
        return ""
    _, factor, places = difference_unit(name)
    return f"{size / factor:.{places}f}"


def verdict_remark(one: Comparison) -> str:
    """Return what belongs below the word: the margin, how many samples are missing, or why nothing can be said."""
    if one.verdict == "equivalent" and one.margin is not None:
        unit = difference_unit(one.measure)[0]
        return f"within {size_text(one.measure, one.margin)}{f' {unit}' if unit else ''}"
    if one.verdict == "undecided" and one.more_samples is not None:
        many, single = ("launches", "launch") if is_latency_ratio(measure(one.measure)) else ("samples", "sample")
        return f"needs about {one.more_samples:,} more {single if one.more_samples == 1 else many}"
    return one.reason
