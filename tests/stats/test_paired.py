"""Paired differences beside simulations whose truth is known; times on a virtual clock: launches, drift, neighbours."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kvbench.errors import ConfigError, MeasureError
from kvbench.measures import MEASURES
from kvbench.stats.intervals import NUM_DRAWS, SEED, Interval, bootstrap, ratio_interval
from kvbench.stats.paired import (
    LogRatio,
    PairedSums,
    between,
    differences,
    from_interval,
    infer,
    noise_reason,
    paired_sums,
    sign_test,
    spread_fraction,
)
from kvbench.stats.tests import (
    holm,
    is_non_inferior,
    minimum_detectable,
    more_samples,
    parse_margins,
    smallest_margin,
    unpaired_p_value,
    verdict_of,
)
from tests.stats.worlds import VirtualClock, by_cluster, passages, scores


@pytest.mark.parametrize("num_clusters", [12, 40, 500])
def test_the_bootstrap_is_scipys_bca_on_the_same_draws(num_clusters: int) -> None:
    pairs = by_cluster(*passages(np.random.default_rng(0), num_clusters, 0.05))
    draws = bootstrap(pairs)
    assert draws is not None
    theirs = stats.bootstrap(
        tuple(pairs.columns.T),
        lambda a, b, c, d, axis: a.sum(axis) / b.sum(axis) - c.sum(axis) / d.sum(axis),
        n_resamples=NUM_DRAWS, paired=True, vectorized=True, method="BCa", rng=np.random.default_rng(SEED),
    ).confidence_interval  # fmt: skip
    assert draws.bounds(0.95, widened=False) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_the_t_interval_of_scores_is_the_paired_t_test() -> None:
    found = np.random.default_rng(1).normal(0.03, 0.1, 30)
    theirs = stats.ttest_1samp(found, 0.0)
    ours = infer(scores(found))
    assert (ours.t_low, ours.t_high) == pytest.approx(theirs.confidence_interval())
    assert (ours.p_value or 0) >= theirs.pvalue - 1e-12
    few = infer(scores(found[:9]))
    assert (few.low, few.high) == pytest.approx(stats.ttest_1samp(found[:9], 0.0).confidence_interval())
    assert few.p_value == pytest.approx(stats.ttest_1samp(found[:9], 0.0).pvalue)
    assert few.method.startswith("t interval")


def test_the_p_value_is_where_the_bootstrap_interval_just_holds_zero() -> None:
    draws = bootstrap(scores(0.06 - np.random.default_rng(2).exponential(0.1, 40)))
    assert draws is not None
    p_value = draws.p_value()
    assert 0 < p_value < 1
    low, high = draws.bounds(1 - p_value)
    assert min(abs(low), abs(high)) < 2e-3


def test_perplexity_is_a_ratio_of_sums_over_documents() -> None:
    rows, cluster = passages(np.random.default_rng(3), 12, 0.05)
    found = infer(by_cluster(rows, cluster))
    assert found.value == pytest.approx(rows[:, 0].sum() / rows[:, 1].sum() - rows[:, 2].sum() / rows[:, 3].sum())
    assert (found.num_samples, found.num_clusters) == (len(rows), 12)
    # the jackknife and the linear influences are two ways to one standard error
    pairs = by_cluster(rows, cluster)
    jackknife = pairs.leave_one_out()
    error = np.sqrt((11 / 12) * np.square(jackknife - jackknife.mean()).sum())
    assert found.standard_error == pytest.approx(error, rel=0.15)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30), st.floats(0.1, 10))
def test_a_difference_turns_round_with_its_arms(values: list[float], scale: float) -> None:
    pairs = scores(np.asarray(values) * scale)
    turned = PairedSums(columns=pairs.columns[:, [2, 3, 0, 1]], num_samples=pairs.num_samples)
    assert differences(turned.columns.sum(axis=0)) == pytest.approx(-pairs.value)
    assert turned.influences() == pytest.approx(-pairs.influences())
    assert turned.leave_one_out() == pytest.approx(-pairs.leave_one_out())


def test_the_order_of_samples_changes_only_the_draws() -> None:
    found = np.random.default_rng(4).normal(0, 0.1, 50)
    one, two = infer(scores(found)), infer(scores(found[::-1].copy()))
    assert one.value == pytest.approx(two.value)
    assert (one.low or 0) == pytest.approx(two.low or 0, abs=3e-3)
    assert infer(scores(found)) == one, "the same records give the same numbers"


def test_degenerate_samples_say_what_they_are() -> None:
    alone = infer(scores(np.array([0.3])))
    assert (alone.low, alone.p_value, alone.minimum_detectable) == (None, None, None)
    same = infer(scores(np.full(8, 0.1)))
    assert (same.low, same.high) == pytest.approx((0.1, 0.1))
    assert same.p_value == pytest.approx(2 * 0.5**8)
    equal = infer(scores(np.zeros(8)))
    assert (equal.value, equal.low, equal.high, equal.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_scores_that_hardly_differ_are_bounded_by_how_few_differ() -> None:
    rows = scores(np.zeros(32))
    rows.columns[:, [0, 2]] += 0.5
    equal = infer(rows, scale=(-1, 0))
    assert equal.low == pytest.approx(-(1 - 0.025 ** (1 / 32))), "3.7 over n, the rule of three at 97.5 %"
    assert equal.high == pytest.approx(0.0), "nothing is above the full score"
    rows.columns[0, 0] -= 0.4
    one = infer(rows, scale=(-1, 0))
    assert (one.low or 0) < (equal.low or 0)
    assert one.p_value == 1.0
    assert one.is_sparse
    assert sign_test(0, 10) == pytest.approx(2 * 0.5**10)


def test_the_few_that_differ_may_be_the_heaviest_clusters() -> None:
    weight = np.where(np.arange(32) == 0, 31.0, 1.0)
    rows = np.stack([weight, weight, weight, weight], axis=1)
    found = infer(PairedSums(columns=rows, num_samples=62), scale=(-1, 0))
    share = 32 * (1 - 0.025 ** (1 / 32))
    assert found.low == pytest.approx(-(31 + share - 1) / 62), "one of half the weight, and the rest of that share"
    assert found.high == 0.0


def test_p_values_of_two_numbers_measured_apart_are_welchs() -> None:
    rng = np.random.default_rng(9)
    one, two = rng.normal(10, 1, 8), rng.normal(11, 3, 12)
    widths = [np.ptp(stats.ttest_1samp(values, 0.0).confidence_interval()) for values in (one, two)]
    found = unpaired_p_value(one.mean() - two.mean(), (widths[0], widths[1]), (8, 12))
    assert found == pytest.approx(stats.ttest_ind(one, two, equal_var=False).pvalue)
    assert (unpaired_p_value(0.0, (0, 0), (3, 3)), unpaired_p_value(1.0, (0, 0), (3, 3))) == (1.0, 0.0)


def test_samples_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(MeasureError, match="cannot be paired"):
        paired_sums([(1.0, 1.0)], [], ["a"])
    with pytest.raises(MeasureError, match="not finite"):
        paired_sums([(float("nan"), 1.0)], [(1.0, 1.0)], ["a"])
    with pytest.raises(MeasureError, match="above 0"):
        paired_sums([(1.0, 0.0)], [(1.0, 1.0)], ["a"])
    assert paired_sums([(1.0, 1.0)] * 3, [(0.5, 1.0)] * 3, ["a", "b", "a"]).num_clusters == 2


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_keeps_order_and_is_between_plain_and_bonferroni(p_values: list[float]) -> None:
    found = holm(p_values)
    for plain, corrected in zip(p_values, found, strict=True):
        assert plain <= corrected <= min(1.0, len(p_values) * plain) + 1e-12
    order = np.argsort(p_values, kind="stable")
    assert list(np.array(found)[order]) == sorted(found)


def test_holm_as_in_its_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.03, 0.05, "better"),
        (-0.05, -0.03, "worse"),
        (0.001, 0.01, "equivalent"),
        (-0.01, 0.01, "equivalent"),
        (-0.03, 0.01, "undecided"),
        (0.01, 0.05, "better"),
    ],
)
def test_verdicts(low: float, high: float, verdict: str) -> None:
    assert verdict_of(low, high, higher_is_better=True, margin=0.02, p_value=0.01) == verdict
    turned = {"better": "worse", "worse": "better"}.get(verdict, verdict)
    assert verdict_of(low, high, higher_is_better=False, margin=0.02, p_value=0.01) == turned


def test_a_correction_can_take_a_verdict_back() -> None:
    assert verdict_of(0.03, 0.05, higher_is_better=True, margin=None, p_value=0.2) == "undecided"
    assert is_non_inferior(-0.019, 0.1, higher_is_better=True, margin=0.02)
    assert not is_non_inferior(-0.021, 0.1, higher_is_better=True, margin=0.02)
    assert is_non_inferior(-1.0, 0.019, higher_is_better=False, margin=0.02)


def test_more_samples_are_asked_for_by_what_they_would_show() -> None:
    assert minimum_detectable(0.01, 10_000) == pytest.approx(0.028, abs=1e-4)
    assert more_samples(0.02, 0.04, 50, None) == 150, "half the detectable difference needs four times the samples"
    assert more_samples(0.0, 0.04, 50, 0.02) == 150
    assert more_samples(0.0, 0.04, 50, 0.02, is_sparse=True) == 50
    assert more_samples(0.0, 0.04, 50, None) is None
    assert more_samples(1e-6, 0.04, 50, None) is None
    assert more_samples(5e-324, 0.04, 50, None) is None


def test_differences_that_share_a_level_ask_for_more_samples_and_a_margin_does_not() -> None:
    alone, of_twelve = (more_samples(0.02, 0.04, 50, None, num_compared=count) for count in (1, 12))
    level = 0.025 / 12
    standard_errors = NormalDist().inv_cdf(1 - level) + NormalDist().inv_cdf(0.8)
    assert of_twelve == pytest.approx(50 * ((standard_errors / 2.8016) ** 2 * 4 - 1), abs=1)
    assert alone == 150
    assert more_samples(0.0, 0.04, 50, 0.02, num_compared=12) == 150
    assert more_samples(0.02, 0.04, 50, None, num_compared=12, is_sparse=True) == 118


@pytest.mark.parametrize("num_compared", [1, 4, 12, 48])
def test_as_many_samples_as_are_asked_for_decide_in_four_of_five_repetitions(num_compared: int) -> None:
    difference, spread, num_samples = 0.02, 0.2, 200
    detectable = minimum_detectable(spread / num_samples**0.5, num_samples)
    more = more_samples(difference, detectable, num_samples, None, num_compared=num_compared)
    total = num_samples + (more or 0)
    found = stats.ttest_1samp(np.random.default_rng(num_compared).normal(difference, spread, (2000, total)), 0, axis=1)
    assert np.mean(found.pvalue <= 0.05 / num_compared) == pytest.approx(0.8, abs=0.035)


def test_what_holm_leaves_undecided_is_never_one_sample_short() -> None:
    """A difference of 2 standard errors among 12: its own p value is under 5 %, the corrected one is not."""
    assert (more_samples(0.02, 0.028, 50, None, num_compared=12) or 0) > 100


def test_margins_are_declared_and_can_be_changed() -> None:
    assert smallest_margin("rougeL_vs_full") == 0.02
    assert smallest_margin("tpot_ratio_to_full") == 0.03
    assert smallest_margin("kv_stored_bytes") is None
    assert smallest_margin("length_ratio") is None
    assert parse_margins(["ppl=0.05"]) == {"ppl": 0.05}
    for wrong in ("ppl", "ppl=x", "ppl=-1", "ppl=nan"):
        with pytest.raises(ConfigError, match="number above 0"):
            parse_margins([wrong])
    with pytest.raises(ConfigError, match="rougeL_vs_full"):
        parse_margins(["rougeLvsflul=0.1"])
    assert parse_margins(["rougeLvsfull=0.1", "perplexity=0.2"]) == {"rougeL_vs_full": 0.1, "ppl": 0.2}
    assert all(smallest_margin(name) is None for name, one in MEASURES.items() if one.better == "none")


def test_two_scores_differ_by_at_most_the_scale() -> None:
    pairs = paired_sums([(0.1, 1), (0.9, 1)], [(0.9, 1), (0.2, 1)], ["a", "b"])
    assert infer(pairs).low == pytest.approx(-9.58, abs=0.01)
    found = infer(pairs, scale=(-1.0, 1.0))
    assert (found.low, found.high) == (-1.0, 1.0)


NUM = 1500


def experiments(clock: VirtualClock, slower: float, seed: int, num: int = NUM) -> list[Interval]:
    rng = np.random.default_rng(seed)
    return [ratio_interval(*clock.abba(rng, slower)) for _ in range(num)]


def share(found: list[Interval], *, slower: bool) -> float:
    """Share of experiments that say the policy is slower (or faster)."""
    return float(np.mean([(one.low or 0) > 1 if slower else (one.high or 2) < 1 for one in found]))


@pytest.mark.cover("one")
@pytest.mark.parametrize("clock", [VirtualClock(), VirtualClock(drift=0.05), VirtualClock(spike_share=0.2)])
def test_ratios_of_launches_cover(clock: VirtualClock) -> None:
    found = experiments(clock, 1.1, seed=1)
    assert 0.93 <= np.mean([(one.low or 0) <= 1.1 <= (one.high or 0) for one in found]) <= 0.985


def test_one_policy_under_two_names_is_rarely_called_different() -> None:
    found = experiments(VirtualClock(), 1.0, seed=2)
    assert share(found, slower=True) + share(found, slower=False) <= 0.08


@pytest.mark.cover("one")
@pytest.mark.parametrize("slower", [1.03, 0.97])
def test_three_per_cent_are_found_in_four_of_five(slower: float) -> None:
    assert share(experiments(VirtualClock(), slower, seed=3), slower=slower > 1) >= 0.8


def test_drift_of_five_per_cent_moves_the_ratio_by_less_than_half_a_per_cent() -> None:
    clock, rng = VirtualClock(drift=0.05), np.random.default_rng(4)
    found = [one.value for one in experiments(clock, 1.0, seed=4) if one.value is not None]
    assert abs(np.mean(found) - 1) <= 0.005
    one_after_the_other = [np.split(clock.launches(rng, np.ones(12)), 2) for _ in range(NUM)]
    assert abs(np.mean([np.median(b) / np.median(a) for a, b in one_after_the_other]) - 1) > 0.02


def test_a_neighbour_is_noticed_and_a_quiet_machine_is_not_blamed() -> None:
    def noisy(clock: VirtualClock, seed: int) -> float:
        rng = np.random.default_rng(seed)
        return float(np.mean([bool(noise_reason(spread_fraction(*clock.abba(rng, 1.2)), 0.0)) for _ in range(NUM)]))

    assert noisy(VirtualClock(neighbour_share=0.3), 5) >= 0.95
    assert noisy(VirtualClock(), 6) <= 0.05


def test_reasons_for_noise_name_what_was_seen() -> None:
    assert noise_reason(0.01, 0.01, 0) == noise_reason(None, None) == ""
    reason = noise_reason(0.05, 0.03, 2)
    assert "spread by 5.0%" in reason
    assert "drifted by 3.0%" in reason
    assert "2 other processes" in reason
    assert spread_fraction([1.0, 2.0], [1.0, 1.0]) is None, "two launches say nothing"


def test_a_recorded_interval_gives_back_its_log_ratio() -> None:
    rng = np.random.default_rng(7)
    policy, full = VirtualClock().abba(rng, 1.1)
    found = ratio_interval(policy, full)
    assert None not in (found.value, found.low, found.high)
    back = from_interval(found.value or 0, found.low or 0, found.high or 0, found.n)
    assert back is not None
    logs = np.log(policy / full)
    assert back.mean == pytest.approx(logs.mean())
    assert back.standard_error == pytest.approx(logs.std(ddof=1) / math.sqrt(6))
    assert back.bounds() == pytest.approx(((found.low or 0) - 1, (found.high or 0) - 1))
    assert from_interval(1.0, 0.9, 1.1, 1) is None


def test_two_policies_measured_apart_cover_too() -> None:
    rng, clock, held = np.random.default_rng(8), VirtualClock(), 0
    for _ in range(NUM):
        logs = [np.log(np.divide(*clock.abba(rng, slower))) for slower in (1.2, 1.0)]
        sides = [
            LogRatio(mean=x.mean(), standard_error=x.std(ddof=1) / math.sqrt(len(x)), num_units=len(x)) for x in logs
        ]
        low, high = between(*sides).bounds()
        held += low <= 0.2 <= high
    assert 0.93 <= held / NUM <= 0.97
