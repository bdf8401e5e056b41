"""What is inferred about a paired difference, of scores and of times: interval, p value, what the samples could show.

    infer(paired_sums(policy, full, clusters)).low

Two arms are measured on the same samples. Every mean is a ratio of sums over clusters (images, documents), because
clusters are what was drawn independently: a score has its number of samples below, perplexity its scored tokens.
Source: Miller 2024, arXiv 2411.00640, sections 2.2 (clusters) and 4.2 (pairing); the ratio of sums is what pools
tokens there.

The interval reaches, on each side, as far as the wider of BCa and Student's t: simulated over 8 kinds of
differences, BCa alone covers 91 % where tails are heavy and t alone 87 % where losses are rare, the wider of the two
93 to 97 % from 20 clusters on (docs/statistics.md). Under 10 clusters there is no bootstrap.

No bootstrap and no t can see a loss that none or few of the clusters show: with losses in 3 % of 64 clusters their
lower bound was wrong in 18 % of simulations. There the bound of kvbench.stats.intervals counts. What the other arm
scores on average bounds nothing: what is lost is what it scored where it differs.

Times are relative to the full cache's. A launch, not a step, is the unit (Kalibera and Jones 2013, "Rigorous
benchmarking in reasonable time"): steps of one launch share its memory layout and its moment. Launches come as policy,
full, full, policy; the k-th launch of each arm is a pair, so in half of the pairs the policy comes first and in half
the full cache, and what drifts linearly cancels in their mean. We keep to one process, so what differs between
processes is not in the interval.

Launches of one and the same setting may spread by 3 % and a reference kernel may change by 2 % from start to end;
no other process may use the GPU. What is noisier is measured once more, and then called noisy: its numbers are
shown, but no verdict is made of them. Nothing is ever dropped for being large. A copy between buffers larger than any
cache has one bandwidth on one machine: where a cell saw another one (`is_far_off`) it was not alone, so reports take
the median over a sweep's cells for its roofs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvbench.errors import MeasureError
from kvbench.stats.intervals import (
    FEW_METHOD,
    MIN_BOOTSTRAP_CLUSTERS,
    NUM_DRAWS,
    ClusterSums,
    bootstrap,
    few_differing,
    influences,
    sums_by_cluster,
)
from kvbench.stats.tests import Floats, minimum_detectable, p_value_of, quantile, special, standard_error, welch

CONFIDENCE = 0.95
_MAX_T_CLUSTERS = 100
_ROUNDING = 1e-12
# Which fields of a sample a pooled measure divides: the sums over samples, total by weight, not a mean of scores.
POOLED: Mapping[str, tuple[str, str]] = {
    "ppl": ("nll_sum", "num_scored_tokens"),
    "ppl_released": ("released_nll_sum", "released_num_scored_tokens"),
    "kl_to_full": ("kl_sum", "num_compared_tokens"),
    "top1_agreement_fraction": ("num_agreeing_tokens", "num_compared_tokens"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedSums(ClusterSums):
    """Per cluster (C, 4): total and weight of the first arm, total and weight of the second.

    The difference is sum(total) / sum(weight) of the first arm minus the same of the second.
    """

    num_samples: int

    def statistic(self, sums: Floats) -> Floats:
        """Return the difference of sums (..., 4)."""
        return differences(sums)

    def influences(self) -> Floats:
        """Return what each cluster adds to the difference, (C,)."""
        mine, weight, other, other_weight = self.columns.T
        return influences(mine, weight) - influences(other, other_weight)


def differences(sums: Floats) -> Floats:
    """Return the difference of sums (..., 4)."""
    return np.asarray(sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3], dtype=np.float64)


def paired_sums(
    first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]], clusters: Sequence[Hashable]
) -> PairedSums:
    """Return the sums by cluster of two arms' (total, weight) on the same samples.

    Raises: MeasureError if lengths differ, there is no sample, a number is not finite or a weight not above 0.
    """
    if not len(first) == len(second) == len(clusters) or not len(first):
        raise MeasureError(
            f"{len(first)} and {len(second)} samples in {len(clusters)} clusters cannot be paired; give one of each."
        )
    rows = np.hstack([np.asarray(arm, dtype=np.float64).reshape(-1, 2) for arm in (first, second)])
    if not np.isfinite(rows).all() or (rows[:, 1::2] <= 0).any():
        raise MeasureError("a sample has a number that is not finite or a weight that is not above 0; leave it out.")
    return PairedSums(columns=sums_by_cluster(rows, clusters), num_samples=len(rows))


def _few_differences(pairs: PairedSums, level: float, scale: tuple[float, float]) -> tuple[float, float, float] | None:
    """Return (low, high, p value) of a difference that lies on `scale` in every cluster; None where enough differ.

    The p value is the sign test's (against a difference of 0), the only one that holds for so few.
    """
    mine, weight, other, other_weight = pairs.columns.T
    found = mine / weight - other / other_weight
    bounds = few_differing(found, (weight, other_weight), level, scale)
    rounded = found.round(12)
    return None if bounds is None else (*bounds, sign_test(int((rounded > 0).sum()), int((rounded < 0).sum())))


def sign_test(num_above: int, num_below: int) -> float:
    """Return the two-sided p value of so many differences above and below 0; 1 where there are none."""
    fewer, num = min(num_above, num_below), num_above + num_below
    return min(1.0, 2.0 * float(special().bdtr(fewer, num, 0.5))) if num else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Inference:
    """A difference with its 95 % interval; `t_low` and `t_high` stand beside a bootstrap of under 100 clusters.

    `low` is None where one cluster shows no spread. `p_value` is against a difference of 0, two-sided, and
    `minimum_detectable` the difference found with 80 % power. `is_sparse` where so few clusters differ that only their
    number counts.
    """

    value: float
    low: float | None = None
    high: float | None = None
    method: str
    t_low: float | None = None
    t_high: float | None = None
    p_value: float | None = None
    standard_error: float = 0.0
    minimum_detectable: float | None = None
    num_samples: int = 0
    num_clusters: int = 0
    is_sparse: bool = False


def infer(pairs: PairedSums, *, scale: tuple[float, float] | None = None, confidence: float = CONFIDENCE) -> Inference:
    """Return what `pairs` show; `scale` is what the difference of any cluster must lie on, such as -1 to 1."""
    return _infer(pairs.columns.tobytes(), pairs.num_samples, scale, confidence)


@functools.lru_cache(maxsize=8192)
def _infer(data: bytes, num_samples: int, scale: tuple[float, float] | None, confidence: float) -> Inference:
    pairs = PairedSums(columns=np.frombuffer(data, dtype=np.float64).reshape(-1, 4), num_samples=num_samples)
    num = pairs.num_clusters
    plain = Inference(value=pairs.value, method="", num_samples=num_samples, num_clusters=num)
    if num == 1:
        return replace(plain, method="one cluster: no interval")
    found = _with_spread(plain, pairs, confidence)
    if scale is not None:
        found = _on_scale(found, pairs, scale, confidence)
    return replace(found, minimum_detectable=minimum_detectable(found.standard_error, num))


def _on_scale(found: Inference, pairs: PairedSums, scale: tuple[float, float], confidence: float) -> Inference:
    """Return the inference with no bound beyond what two scores can differ by, and with what the few may hide.

    The value stays inside its bounds too where no run could write it.
    """
    sparse = _few_differences(pairs, confidence, scale)
    if sparse is None:
        least, most = min(-1.0, found.value), max(1.0, found.value)
        bounds = {name: getattr(found, name) for name in ("low", "high", "t_low", "t_high")}
        cut: dict[str, Any] = {name: None if at is None else min(max(at, least), most) for name, at in bounds.items()}
        return replace(found, **cut)
    assert found.low is not None
    assert found.high is not None
    low = max(min(scale[0], found.value), min(found.low, sparse[0]))
    high = min(max(scale[1], found.value), max(found.high, sparse[1]))
    error = max(high - found.value, found.value - low) / quantile(0.5 + confidence / 2, pairs.num_clusters)
    p_value = max(found.p_value or 0.0, sparse[2])
    return replace(found, low=low, high=high, standard_error=error, p_value=p_value, method=FEW_METHOD, is_sparse=True)


def _with_spread(plain: Inference, pairs: PairedSums, confidence: float) -> Inference:
    error = standard_error(pairs.influences())
    scale = float(np.abs(pairs.columns[:, ::2] / pairs.columns[:, 1::2]).max())
    num = pairs.num_clusters
    if error <= _ROUNDING * scale:
        same = plain.value if abs(plain.value) > _ROUNDING * scale else 0.0
        p_value = sign_test(num, 0) if same else 1.0
        return replace(
            plain, value=same, low=same, high=same, p_value=p_value, method="every cluster differs by the same"
        )
    half = quantile(0.5 + confidence / 2, num) * error
    t_low, t_high = plain.value - half, plain.value + half
    found = replace(
        plain, low=t_low, high=t_high, method=f"t interval over {num} clusters", standard_error=error,
        p_value=p_value_of(plain.value, error, num),
    )  # fmt: skip
    draws = bootstrap(pairs) if num >= MIN_BOOTSTRAP_CLUSTERS else None
    bounds = draws.bounds(confidence) if draws else (math.nan, math.nan)
    if draws is None or not all(map(math.isfinite, bounds)):
        return found
    beside = (t_low, t_high) if num < _MAX_T_CLUSTERS else (None, None)
    return replace(
        found, low=min(bounds[0], t_low), high=max(bounds[1], t_high), t_low=beside[0], t_high=beside[1],
        p_value=max(found.p_value or 0.0, draws.p_value()), method=f"BCa bootstrap, {NUM_DRAWS:,} draws, by cluster",
    )  # fmt: skip


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
