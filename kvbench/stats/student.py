"""Student's t for a mean of independent units: quantiles, interval, p value."""

from __future__ import annotations

import math

from scipy import special

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
