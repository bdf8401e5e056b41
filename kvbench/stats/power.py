"""What a number of samples can show: the smallest difference, and how many more would decide.

Source: Miller 2024, arXiv 2411.00640, section 5. 80 % power at a two-sided level of 5 %: 1.960 + 0.842 = 2.80
standard errors of a normal mean; we take the quantiles of t, which matter for few units.
"""

from __future__ import annotations

import math

from kvbench.stats.student import quantile

_MOST_TIMES_MORE = 1000


def minimum_detectable(standard_error: float, num_units: float) -> float:
    """Return the true difference that is found in 80 % of repetitions."""
    return (quantile(0.975, num_units) + quantile(0.8, num_units)) * standard_error


def more_samples(
    value: float, detectable: float, num_samples: int, margin: float | None, *, is_sparse: bool = False
) -> int | None:
    """Return about how many more samples would decide, if the true difference is `value`.

    `detectable` is the difference that these samples detect. They would tell it from 0, or, where a margin is
    given and `value` is inside, show that it is inside; whichever takes fewer. A spread shrinks with the root of
    the samples, the bound of rare differences (`is_sparse`) with their number. None where more than a thousand
    times the samples would be needed, or it can not be said.
    """
    gaps = [abs(value)]
    if margin is not None and abs(value) < margin:
        gaps.append(margin - abs(value))
    if max(gaps) <= 0 or detectable <= 0:
        return None
    times = (detectable / max(gaps)) ** (1 if is_sparse else 2)
    if times > _MOST_TIMES_MORE:
        return None
    return max(1, math.ceil((times - 1) * num_samples))
