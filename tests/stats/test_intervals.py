from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from scipy import special, stats

from kvbench.errors import MeasureError
from kvbench.stats.intervals import (
    FEW_METHOD,
    ClusterSums,
    Interval,
    bootstrap,
    launch_interval,
    mean_interval,
    median_interval,
    pooled_ratio_interval,
    ratio_interval,
)
from kvbench.stats.paired import infer, paired_sums
from kvbench.tasks.task import TaskResult

_NUM_EXPERIMENTS = 400


def _coverage(experiment: Callable[[np.random.Generator], Interval], truth: float, number: int) -> float:
    draw = np.random.default_rng(1)
    intervals = [experiment(draw) for _ in range(number)]
    return sum(i.low is not None and i.high is not None and i.low <= truth <= i.high for i in intervals) / len(
        intervals
    )


def _normal(draw: np.random.Generator) -> Interval:
    return mean_interval(draw.normal(size=40), num_resamples=1_999)


def _zero_inflated(draw: np.random.Generator) -> Interval:
    a = draw.normal(0.3, 1, 48) * (draw.random(48) < 0.4)
    return mean_interval(a, num_resamples=1_999)


def _clustered(draw: np.random.Generator) -> Interval:
    values = np.repeat(draw.normal(size=40), 5) + 0.3 * draw.normal(size=200)
    return mean_interval(values, np.repeat(np.arange(40), 5).tolist(), num_resamples=1_999)


def _perplexity(draw: np.random.Generator) -> Interval:
    tokens = draw.integers(20, 200, 40)
    nll = tokens * 0.5 + draw.normal(size=40) * np.sqrt(tokens)
    return pooled_ratio_interval(nll, tokens, transform=math.exp, num_resamples=1_999)


def _launches(draw: np.random.Generator) -> Interval:
    return launch_interval(draw.normal(10, 0.2, 5))


def _ratios(draw: np.random.Generator) -> Interval:
    shared = draw.normal(0, 0.3, 5)
    noise = draw.normal(0, 0.02, (2, 5))
    return ratio_interval(1.5 * np.exp(shared + noise[0]), np.exp(shared + noise[1]))


def _few_samples(draw: np.random.Generator) -> Interval:
    return mean_interval(draw.normal(size=6))


@pytest.mark.parametrize(
    ("experiment", "truth"),
    [
        pytest.param(_normal, 0.0, marks=pytest.mark.long),
        pytest.param(_zero_inflated, 0.12, marks=pytest.mark.long),
        pytest.param(_clustered, 0.0, marks=pytest.mark.long),
        pytest.param(_perplexity, math.exp(0.5), marks=pytest.mark.long),
        (_launches, 10.0),
        (_ratios, 1.5),
        (_few_samples, 0.0),
    ],
)
def test_nominal_95_percent_covers_95_percent(
    experiment: Callable[[np.random.Generator], Interval], truth: float
) -> None:
    assert 0.92 <= _coverage(experiment, truth, _NUM_EXPERIMENTS) <= 0.98


def test_ignoring_clusters_would_be_far_too_narrow() -> None:
    def ignoring(draw: np.random.Generator) -> Interval:
        return mean_interval(np.repeat(draw.normal(size=40), 5), num_resamples=1_999)

    assert _coverage(ignoring, 0.0, 60) < 0.8


def test_the_bootstrap_is_near_the_one_of_scipy_and_repeats_itself() -> None:
    values = np.random.default_rng(3).exponential(size=48)
    interval = mean_interval(values)
    assert interval == mean_interval(values)
    assert (interval.n, interval.method) == (48, "BCa bootstrap over samples")
    theirs = stats.bootstrap((values,), np.mean, rng=np.random.default_rng(5)).confidence_interval
    assert (interval.low, interval.high) == pytest.approx((theirs.low, theirs.high), rel=0.03)


def test_under_ten_samples_student_t_is_used_and_said() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    interval = mean_interval(values)
    theirs = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(theirs)
    assert interval.method == "t interval over 4 samples"


def test_constant_single_and_absent_data_are_said_to_be_so() -> None:
    constant = mean_interval([0.1] * 30)
    assert (constant.value, constant.low, constant.high) == (0.1, 0.1, 0.1)
    single = mean_interval([0.5])
    assert (single.value, single.low, single.high, single.n) == (0.5, None, None, 1)
    assert mean_interval([]).value is None
    one_image = mean_interval([0.1, 0.3], ["image", "image"])
    assert one_image.value == pytest.approx(0.2)
    assert (one_image.low, one_image.n) == (None, 1)


def test_a_score_that_hardly_varies_is_bounded_as_a_difference_of_pairs_is() -> None:
    least = mean_interval([0.0] * 32, scale=(0.0, 1.0))
    assert (least.value, least.low) == (0.0, 0.0)
    assert least.high == pytest.approx(1 - 0.025 ** (1 / 32)), "3.7 over n, the rule of three at 97.5 %"
    assert (least.n, least.method) == (32, FEW_METHOD)
    most = mean_interval([1.0] * 32, scale=(0.0, 1.0))
    assert (most.low, most.high) == (pytest.approx(0.025 ** (1 / 32)), 1.0)
    pair = infer(paired_sums([(0.0, 1.0)] * 32, [(0.0, 1.0)] * 32, list(range(32))), scale=(-1.0, 1.0))
    assert (pair.high, pair.method) == (pytest.approx(least.high), FEW_METHOD)
    one = mean_interval([0.0] * 31 + [0.5], scale=(0.0, 1.0))
    assert (one.low, one.value) == (0.0, 0.5 / 32)
    assert one.high == pytest.approx(special.betaincinv(2, 31, 0.975)), "the one seen does not bound the next one"
    assert mean_interval([0.0] * 27 + [0.5] * 5, scale=(0.0, 1.0)).method.startswith("BCa"), "enough differ"
    assert mean_interval([0.0], scale=(0.0, 1.0)).low is None


def test_what_one_sample_in_thirty_shows_is_covered_with_a_scale_and_not_without() -> None:
    def rare(draw: np.random.Generator, scale: tuple[float, float] | None) -> Interval:
        return mean_interval((draw.random(32) < 0.03).astype(float), scale=scale, num_resamples=499)

    assert _coverage(lambda draw: rare(draw, (0.0, 1.0)), 0.03, 150) >= 0.95
    assert _coverage(lambda draw: rare(draw, None), 0.03, 150) < 0.8


def test_a_picture_of_many_questions_may_be_the_one_that_differs() -> None:
    clusters = ["large"] * 31 + [f"small {number}" for number in range(31)]
    found = mean_interval([0.0] * 62, clusters, scale=(0.0, 1.0))
    share = 32 * (1 - 0.025 ** (1 / 32))
    assert (found.high, found.n) == (pytest.approx((31 + share - 1) / 62), 32)


def test_the_interval_of_a_median_is_by_order_statistics_and_does_not_follow_one_value_that_is_far_off() -> None:
    found = median_interval([*range(1, 13), -1000])
    assert (found.value, found.low, found.high, found.n) == (6, 2, 10, 13), "3rd and 11th of 13: 97.8 %"
    assert found.method == "median of 13, order statistics"
    six = median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0])
    assert (six.value, six.low, six.high) == (3.5, 1.0, 6.0)
    few = median_interval([2.0, 1.0])
    assert (few.value, few.low, few.high, few.method) == (1.5, 1.0, 2.0, "median of 2, least to most")
    assert median_interval([2.0]).low is None


def test_the_interval_does_not_depend_on_names_of_clusters() -> None:
    values = np.random.default_rng(0).normal(size=30)
    by_name = mean_interval(values, [f"image {n // 2}" for n in range(30)])
    assert by_name == mean_interval(values, [n // 2 for n in range(30)])
    assert (by_name.n, by_name.method) == (15, "BCa bootstrap over clusters")


def test_perplexity_pools_tokens_and_is_exponentiated() -> None:
    interval = pooled_ratio_interval([10.0, 30.0], [10, 10], transform=math.exp)
    assert interval.value == pytest.approx(math.exp(2.0))
    assert interval.low is not None
    assert 0 < interval.low < math.exp(2.0)
    assert pooled_ratio_interval([1e5, 1e5], [10, 10], transform=math.exp).value is None


def test_launches_give_their_median_inside_the_interval() -> None:
    interval = launch_interval([10.0, 10.1, 9.9, 10.0, 14.0])
    assert (interval.value, interval.n, interval.method) == (10.0, 5, "t interval over 5 launch medians")
    assert interval.low is not None
    assert interval.high is not None
    assert interval.low <= 10.0 <= interval.high
    assert launch_interval([3.0]).low is None


def test_a_ratio_of_equal_launches_is_one() -> None:
    interval = ratio_interval([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_numbers_that_cannot_be_averaged_are_refused() -> None:
    with pytest.raises(MeasureError, match=r"values\[1\] is nan"):
        mean_interval([1.0, math.nan])
    with pytest.raises(MeasureError, match="cannot be paired"):
        ratio_interval([1.0], [1.0, 2.0])
    with pytest.raises(MeasureError, match="cannot be paired"):
        mean_interval([1.0, 2.0], ["a"])
    with pytest.raises(MeasureError, match="sample 1 has nothing scored"):
        pooled_ratio_interval([1.0, 0.0], [1, 0])
    with pytest.raises(MeasureError, match="above 0"):
        ratio_interval([0.0], [1.0])


@pytest.mark.long
def test_forty_eight_samples_take_no_longer_than_forty_means_of_their_resamples() -> None:
    """By numpy's own mean of as many draws, 2 ms where this took 40: a slow machine is slow at both."""
    values = np.random.default_rng(0).normal(size=48)
    draws = np.random.default_rng(1).integers(0, 48, (9_999, 48))

    def fastest_s(work: Callable[[], object]) -> float:
        times_s = []
        for _ in range(5):
            started = time.process_time()
            work()
            times_s.append(time.process_time() - started)
        return min(times_s)

    assert fastest_s(lambda: mean_interval(values)) < 40 * fastest_s(lambda: values[draws].mean(axis=1))


def test_an_interval_becomes_a_measurement_of_a_record() -> None:
    entry = Interval(value=1.0, low=None, high=None, n=1, method="m").as_measurement("ms")
    assert entry == {"value": 1.0, "low": None, "high": None, "n": 1, "unit": "ms", "method": "m"}


def test_two_samples_give_no_interval_beyond_the_scale() -> None:
    result = TaskResult()
    result.measure("rougeL_vs_full", mean_interval([0.0, 0.5]))
    found = result.measurements["rougeL_vs_full"]
    assert (found["value"], found["low"], found["high"]) == (0.25, 0.0, 1.0)


def test_an_interval_does_not_hang_on_the_order_in_which_a_processor_adds_up() -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        total = rng.choice([-1, 0, 0, 0, 1, 2], 100) * 0.1  # most draws are equal to others
        columns = np.stack([total, np.ones(100)], axis=1)
        noise = np.stack([rng.choice([-1, 1], 100) * 4e-16, np.zeros(100)], axis=1)
        one, other = (bootstrap(ClusterSums(columns=one)) for one in (columns, columns + noise * np.abs(columns)))
        assert one is not None
        assert other is not None
        assert one.bias == other.bias
        assert one.bounds(0.95) == pytest.approx(other.bounds(0.95), abs=1e-11)
        assert one.p_value() == pytest.approx(other.p_value(), abs=1e-11)
