"""95 % intervals for everything that is measured, always over the unit that was drawn independently.

Quality varies between samples (or the images they share), so samples or clusters are resampled,
never tokens. Latency varies between launches, so the launches' medians are the data, never single
iterations. Numbers: BCa bootstrap, 9,999 resamples, fixed seed, widened for few units; under 10 units
Student's t. Sources: Efron 1987 (BCa); Hesterberg 2015, arXiv 1411.5279 (few units); Miller 2024, arXiv
2411.00640 (pairing, clusters); Kalibera and Jones 2013 (launches). (The one idea makes a long file.)

    mean_interval([0.9, 0.8, 1.0, ...], clusters=["image 1", "image 1", "image 2", ...])
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbench.errors import MeasureError

NUM_RESAMPLES = 9_999
_CONFIDENCE = 0.95
_MIN_BOOTSTRAP_UNITS = 10
_SEED = 20_260_101
_Floats = npt.NDArray[np.float64]


def _stats() -> Any:
    """Import scipy.stats when the first number is there; a sweep with nothing to do never needs it."""
    from scipy import stats

    return stats


_Clusters = Sequence[Hashable]
_Values = Sequence[float] | npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A number and its 95 % interval, in the unit of the data.

    value is None if there are no data; low and high are None if one unit alone shows no spread.
    n counts the independent units: samples, clusters or launches.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    method: str

    def as_measurement(self, unit: str = "") -> dict[str, float | int | str | None]:
        """Return the entry of a record's `measurements`; `unit` is text such as "ms"."""
        bounds = {"value": self.value, "low": self.low, "high": self.high}
        return {**bounds, "n": self.n, "unit": unit, "method": self.method}


def mean_interval(
    values: _Values, clusters: _Clusters | None = None, *, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """Return the mean over samples; `clusters` names the shared image or document of each sample.

    Raises: MeasureError if a value is not finite or the lengths differ.
    """
    numerators = _floats(values, "values")
    return pooled_ratio_interval(numerators, np.ones_like(numerators), clusters, num_resamples=num_resamples)


def pooled_ratio_interval(
    numerators: _Values,
    denominators: _Values,
    clusters: _Clusters | None = None,
    transform: Callable[[float], float] | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Return sum(numerators) / sum(denominators), each entry one sample.

    For perplexity: nll sums (nats), scored tokens, `transform=math.exp`; the interval is made for the
    mean log-loss and then transformed, so `transform` must increase. Where it overflows the result is None.
    Raises: MeasureError if a value is not finite, a denominator is not above 0, or lengths differ.
    """
    over = "samples" if clusters is None else "clusters"
    top, bottom = _pair(numerators, denominators, "numerators", "denominators")
    if np.any(bottom <= 0):
        raise MeasureError(f"sample {int(np.argmax(bottom <= 0))} has nothing scored; leave it out and count it.")
    if clusters is not None:
        top, bottom = _sum_by_cluster(top, clusters), _sum_by_cluster(bottom, clusters)
    return _transformed(_ratio(top, bottom, over, num_resamples), transform)


def launch_interval(launch_medians: _Values) -> Interval:
    """Return the median of the launches' medians with a t interval on them.

    Order statistics would need 6 launches to reach 95 % (5 give 93.75 % at most), and 5 is our default;
    launch medians are close to normal, so t covers. It is centred on the mean, and is widened to hold
    the median in the rare case that it does not.
    """
    values = _floats(launch_medians, "launch_medians")
    interval = _t_interval(values, np.ones_like(values), "launch medians")
    if interval.low is None or interval.high is None:
        return interval
    median = float(np.median(values))
    return replace(interval, value=median, low=min(interval.low, median), high=max(interval.high, median))


def ratio_interval(policy: _Values, full: _Values) -> Interval:
    """Return the geometric mean of policy[i] / full[i], two times of one launch, with a t interval of the logs.

    Raises: MeasureError if a time is not above 0 or the lengths differ.
    """
    top, bottom = _pair(policy, full, "policy", "full")
    if np.any(top <= 0) or np.any(bottom <= 0):
        raise MeasureError("a launch took no time; the ratio needs times above 0. Check the clock.")
    logs = np.log(top / bottom)
    return _transformed(_t_interval(logs, np.ones_like(logs), "paired log-ratios of launches"), math.exp)


def _floats(values: _Values, name: str) -> _Floats:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(array).all():
        index = int(np.argmin(np.isfinite(array)))
        raise MeasureError(f"{name}[{index}] is {array[index]}; leave samples without a number out and count them.")
    return array


def _pair(a: _Values, b: _Values, name_a: str, name_b: str) -> tuple[_Floats, _Floats]:
    left, right = _floats(a, name_a), _floats(b, name_b)
    _check_lengths(len(left), len(right))
    return left, right


def _check_lengths(num_a: int, num_b: int) -> None:
    if num_a != num_b:
        raise MeasureError(f"{num_a} and {num_b} values cannot be paired; give one of each per sample.")


def _sum_by_cluster(values: _Floats, clusters: _Clusters) -> _Floats:
    _check_lengths(len(values), len(clusters))
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    index = np.array([numbers[cluster] for cluster in clusters], dtype=np.intp)
    return np.bincount(index, weights=values, minlength=len(numbers)).astype(np.float64)


def _ratio(top: _Floats, bottom: _Floats, over: str, num_resamples: int) -> Interval:
    small = _t_interval(top, bottom, over)
    if len(top) < _MIN_BOOTSTRAP_UNITS or small.value is None or small.low == small.high:
        return small
    bounds = _bca_bounds(top, bottom, num_resamples)
    if bounds is None:
        return small
    return replace(small, low=bounds[0], high=bounds[1], method=f"BCa bootstrap over {over}")


def _t_interval(top: _Floats, bottom: _Floats, over: str) -> Interval:
    """Student's t for a ratio of sums; its standard error is the delta method's, exact for a mean."""
    n = len(top)
    if n == 0:
        return Interval(value=None, low=None, high=None, n=0, method=f"no {over}")
    ratios = top / bottom
    if n == 1:
        return Interval(value=float(ratios[0]), low=None, high=None, n=1, method=f"one of {over}: no interval")
    # Equal to within rounding counts as constant: an interval of 1e-17 would only look like news.
    if np.ptp(ratios) <= 1e-12 * np.abs(ratios).max():
        constant = float(ratios[0])
        return Interval(value=constant, low=constant, high=constant, n=n, method=f"constant over {over}")
    value = float(top.sum() / bottom.sum())
    error = math.sqrt(float(np.square(top - value * bottom).sum()) * n / (n - 1)) / float(bottom.sum())
    half = error * float(_stats().t.ppf(0.5 + _CONFIDENCE / 2, n - 1))
    return Interval(value=value, low=value - half, high=value + half, n=n, method=f"t interval over {n} {over}")


def _resampling_level(n: int) -> float:
    """Return the level at which a bootstrap of n units covers 95 %: Hesterberg 2015, section 4.2.

    Resampling n units shows (n - 1) / n of the variance and normal instead of t tails. Simulated with
    48 samples, 60 % of them zero: 92 % covered without this, 93 % with it; normal: 93 % and 94 %.
    """
    wider = math.sqrt(n / (n - 1)) * float(_stats().t.ppf(0.5 + _CONFIDENCE / 2, n - 1))
    return 2 * float(_stats().norm.cdf(wider)) - 1


def _bca_bounds(top: _Floats, bottom: _Floats, num_resamples: int) -> tuple[float, float] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a degenerate resample warns and gives NaN, which is handled here
        result = _stats().bootstrap(
            (top, bottom),
            lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
            n_resamples=num_resamples,
            paired=True,
            vectorized=True,
            confidence_level=_resampling_level(len(top)),
            method="BCa",
            rng=np.random.default_rng(_SEED),
        )
    low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _transformed(interval: Interval, transform: Callable[[float], float] | None) -> Interval:
    if transform is None:
        return interval

    def shown(number: float | None) -> float | None:
        try:
            result = math.nan if number is None else float(transform(number))
        except OverflowError:
            return None
        return result if math.isfinite(result) else None

    return replace(interval, value=shown(interval.value), low=shown(interval.low), high=shown(interval.high))
