"""Student's t for a mean of independent units: quantiles, p value, and two means by Welch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from scipy import special

if TYPE_CHECKING:
    from kvbench.stats.paired import Floats


def quantile(probability: float, num_units: float) -> float:
    """Return the quantile of t with one degree of freedom fewer than units."""
    return float(special.stdtrit(num_units - 1, probability))


def tail(statistic: float, num_units: float) -> float:
    """Return P(T <= statistic)."""
    return float(special.stdtr(num_units - 1, statistic))


def standard_error(influences: Floats) -> float:
    """Return the standard error of an estimate from its units' influences; 0 where they are equal."""
    return float(influences.std(ddof=1)) / math.sqrt(len(influences))


def welch(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Return the standard error of a difference of two means of (standard error, units) each, and its units.

    Source: Welch 1947, "The generalization of Student's problem"; units are degrees of freedom and one.
    """
    parts = [(error**2, units - 1) for error, units in (first, second)]
    total = sum(part for part, _ in parts)
    freedom = total**2 / sum(part**2 / free for part, free in parts) if total > 0 else parts[0][1]
    return math.sqrt(total), freedom + 1
