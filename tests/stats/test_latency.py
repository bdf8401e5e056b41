"""Times on a virtual clock whose truth is known: launches, drift, slow steps, a neighbour."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvbench.stats.intervals import Interval, ratio_interval
from kvbench.stats.paired import LogRatio, between, from_interval, noise_reason, spread_fraction
from tests.stats.worlds import VirtualClock

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
