"""Times relative to the full cache, and whether a machine was quiet enough for its times to enter a comparison.

A launch, not a step, is the unit (Kalibera and Jones 2013, "Rigorous benchmarking in reasonable time"): steps of one
launch share its memory layout and its moment. Launches come as policy, full, full, policy; the k-th launch of each
arm is a pair, so in half of the pairs the policy comes first and in half the full cache, and what drifts linearly
cancels in their mean. We keep to one process, so what differs between processes is not in the interval.

Launches of one and the same setting may spread by 3 % and a reference kernel may change by 2 % from start to end;
no other process may use the GPU. What is noisier is measured once more, and then called noisy: its numbers are
shown, but no verdict is made of them. Nothing is ever dropped for being large. A copy between buffers larger than any
cache has one bandwidth on one machine: where a cell saw another one (`is_far_off`) it was not alone, so reports take
the median over a sweep's cells for its roofs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvbench.stats.power import minimum_detectable
from kvbench.stats.tests import p_value_of, quantile, welch

MAX_SPREAD_FRACTION = 0.03
_MAX_DRIFT_FRACTION = 0.02
_FAR_OFF_FRACTION = 0.2  # a quiet machine's copies differ by up to a twentieth
FEWEST_LAUNCHES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRatio:
    """The mean log of a ratio, its standard error, and the degrees of freedom of that, as units minus 1."""

    mean: float
    standard_error: float
    num_units: float

    def bounds(self) -> tuple[float, float]:
        """Return the 95 % interval of the ratio minus 1."""
        half = quantile(0.975, self.num_units) * self.standard_error
        return math.expm1(self.mean - half), math.expm1(self.mean + half)

    def p_value(self) -> float:
        """Return the two-sided p value of a ratio of 1."""
        return p_value_of(self.mean, self.standard_error, self.num_units)

    def minimum_detectable(self) -> float:
        """Return the change of the ratio that is found in 80 % of repetitions."""
        return math.expm1(minimum_detectable(self.standard_error, self.num_units))


def from_interval(value: float, low: float, high: float, num_pairs: int) -> LogRatio | None:
    """Return the log ratio behind a recorded ratio with its t interval of logs; None for under two pairs."""
    if num_pairs < 2 or min(value, low, high) <= 0:
        return None
    error = math.log(high / low) / (2 * quantile(0.975, num_pairs))
    return LogRatio(mean=math.log(value), standard_error=error, num_units=num_pairs)


def between(first: LogRatio, second: LogRatio) -> LogRatio:
    """Return first over second, measured apart: Welch's degrees of freedom."""
    error, units = welch((first.standard_error, first.num_units), (second.standard_error, second.num_units))
    return LogRatio(mean=first.mean - second.mean, standard_error=error, num_units=units)


def spread_fraction(*arms: Sequence[float]) -> float | None:
    """Return the largest standard deviation over mean of any arm's launches; None for under three launches."""
    if min(len(arm) for arm in arms) < FEWEST_LAUNCHES:
        return None
    return max(float(np.std(arm, ddof=1) / np.mean(arm)) for arm in arms)


def is_far_off(bandwidth: float, median: float) -> bool:
    """Whether a copy was so much slower or faster than those of the same machine and sweep that it is not its own."""
    return abs(bandwidth / median - 1) > _FAR_OFF_FRACTION


def noise_reason(spread: float | None, drift: float | None, num_foreign: int | None = None) -> str:
    """Return why times are noisy, empty where they are not; None is what was not measured."""
    reasons = []
    if spread is not None and spread > MAX_SPREAD_FRACTION:
        reasons.append(f"runs of one setting spread by {spread:.1%}, over {MAX_SPREAD_FRACTION:.0%}")
    if drift is not None and drift > _MAX_DRIFT_FRACTION:
        reasons.append(f"a reference kernel drifted by {drift:.1%}, over {_MAX_DRIFT_FRACTION:.0%}")
    if num_foreign:
        reasons.append(f"{num_foreign} other processes used the GPU")
    return "; ".join(reasons)
