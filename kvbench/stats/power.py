"""What a number of samples can show: the smallest difference, and how many more would decide.

Source: Miller 2024, arXiv 2411.00640, section 5 (power of a paired comparison); trust in a normal mean of
clusters. 80 % power at a two-sided level of 5 %, so 1.960 + 0.842 = 2.80 standard errors.
"""

from __future__ import annotations

import math

POWER_Z = 0.8416212335729143
LEVEL_Z = 1.959963984540054
_MOST_TIMES_MORE = 1000


def minimum_detectable(standard_error: float) -> float:
    """Return the true difference that is found in 80 % of repetitions."""
    return (LEVEL_Z + POWER_Z) * standard_error


def more_samples(
    value: float, standard_error: float, num_samples: int, margin: float | None, *, is_sparse: bool = False
) -> int | None:
    """Return about how many more samples would decide, if the true difference is `value`.

    To tell it from 0, or, where a margin is given and `value` is inside, to show that it is inside; whichever
    takes fewer. A spread shrinks with the root of the samples, the bound of rare differences (`is_sparse`) with
    their number. None where more than a thousand times the samples would be needed, or it can not be said.
    """
    gaps = [abs(value)]
    if margin is not None and abs(value) < margin:
        gaps.append(margin - abs(value))
    if max(gaps) <= 0 or standard_error <= 0:
        return None
    times = (minimum_detectable(standard_error) / max(gaps)) ** (1 if is_sparse else 2)
    if times > _MOST_TIMES_MORE:
        return None
    return max(1, math.ceil((times - 1) * num_samples))
