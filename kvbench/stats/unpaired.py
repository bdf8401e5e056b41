"""Two numbers measured apart, each known by its value and its 95 % interval alone."""

from __future__ import annotations

import math

from kvbench.stats.student import quantile, tail, welch


def unpaired_p_value(difference: float, widths: tuple[float, float], num_units: tuple[int, int]) -> float:
    """Return the two-sided p value of a difference of 0, by Welch's t; each width gives a standard error back."""
    errors = [width / (2 * quantile(0.975, num)) for width, num in zip(widths, num_units, strict=True)]
    error, units = welch((errors[0], num_units[0]), (errors[1], num_units[1]))
    if error == 0 or not math.isfinite(error):
        return 1.0 if difference == 0 or error else 0.0
    return 2 * tail(-abs(difference) / error, units)
