"""What a number of samples can show: the smallest difference, and how many more would decide.

Source: Miller 2024, arXiv 2411.00640, section 5. 80 % power at a two-sided level of 5 %: 1.960 + 0.842 = 2.80
standard errors of a normal mean; we take the quantiles of t, which matter for few units.
"""

from __future__ import annotations

import math

from scipy import special

from kvbench.stats.student import quantile

_MOST_TIMES_MORE = 1000


def minimum_detectable(standard_error: float, num_units: float) -> float:
    """Return the true difference that is found in 80 % of repetitions."""
    return (quantile(0.975, num_units) + quantile(0.8, num_units)) * standard_error


def more_samples(
    value: float,
    detectable: float,
    num_samples: int,
    margin: float | None,
    *,
    is_sparse: bool = False,
    num_compared: int = 1,
) -> int | None:
    """Return about how many more samples would decide, if the true difference is `value`.

    `detectable` is the difference that these samples detect. They would tell it from 0, or, where a margin is
    given and `value` is inside, show that it is inside; whichever takes fewer. `num_compared` differences share the
    level of the first question (Holm), the second is asked of each alone. A spread shrinks with the root of
    the samples, the bound of rare differences (`is_sparse`) with their number. None where more than a thousand
    times the samples would be needed, or it can not be said.
    """
    gaps = [abs(value) / _stretch(num_compared, is_sparse)]
    if margin is not None and abs(value) < margin:
        gaps.append(margin - abs(value))
    if detectable <= 0 or detectable > _MOST_TIMES_MORE * max(gaps):
        return None
    times = (detectable / max(gaps)) ** (1 if is_sparse else 2)
    if times > _MOST_TIMES_MORE:
        return None
    return max(1, math.ceil((times - 1) * num_samples))


def _stretch(num_compared: int, is_sparse: bool) -> float:
    """Return by how much a difference must be larger to be found at that part of the level."""
    part = 0.025 / num_compared
    if is_sparse:
        return math.log(part) / math.log(0.025)
    at_80_percent = float(special.ndtri(0.8))
    return float((special.ndtri(1 - part) + at_80_percent) / (special.ndtri(0.975) + at_80_percent))
