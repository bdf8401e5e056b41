"""Compare two cells that hold no samples of a measure, such as times and bytes, by their own intervals."""

from __future__ import annotations

from dataclasses import replace

from kvbench.report.cell import Estimate
from kvbench.report.compare_latency import timing_noise
from kvbench.report.comparison import Comparison, judged
from kvbench.stats.tests import unpaired_p_value

Bounds = tuple[float, float]


def compare_unpaired(base: Comparison, ends: tuple[Bounds, Bounds], counts: tuple[int, int]) -> Comparison:
    """Return whether the intervals `ends` of the two cells, over `counts` units each, are apart.

    The bounds are in the unit of the difference. It is stricter than pairing: the interval of the difference reaches
    from one's low to the other's high.
    """
    noise = next(filter(None, (timing_noise(cell, base.measure) for cell in (base.first, base.second))), "")
    (low, high), (other_low, other_high) = ends
    found = replace(
        base,
        low=low - other_high,
        high=high - other_low,
        p_value=unpaired_p_value(base.value, (high - low, other_high - other_low), counts),
        method="the two cells' own intervals, not paired",
        noise=noise,
    )
    return judged(found)


def observed_once(base: Comparison) -> Comparison:
    """Return the comparison of numbers without an interval."""
    reason = "observed once, so nothing says how far chance reaches"
    return replace(base, method="single observations: no interval", verdict="not comparable", reason=reason)


def has_interval(found: Estimate) -> bool:
    """Whether the number has bounds, and a count of what they were made of."""
    return found.low is not None and found.high is not None and (found.n or 0) > 1
