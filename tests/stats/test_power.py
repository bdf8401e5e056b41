"""The smallest safe rung: the fewest looks, and claims that are true in 95 % of simulated searches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench.stats.paired import infer
from kvbench.stats.tests import (
    constant_answer_score,
    floor_of,
    is_non_inferior,
    look_confidence,
    most_looks,
    next_rung,
    smallest_sample,
)
from tests.stats.worlds import scores

LADDER = np.linspace(1 / 16, 15 / 16, 15)


@given(st.integers(1, 200), st.data())
def test_bisection_finds_the_first_safe_rung_within_its_looks(num_rungs: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, num_rungs))
    seen: dict[int, bool] = {}
    while (rung := next_rung(num_rungs, seen)) is not None:
        assert rung not in seen
        seen[rung] = rung >= first
    assert min((rung for rung, safe in seen.items() if safe), default=num_rungs) == first
    assert len(seen) <= most_looks(num_rungs)


def test_every_look_gets_its_part_of_five_per_cent() -> None:
    assert most_looks(15) == 4
    assert look_confidence(15) == pytest.approx(1 - 2 * 0.05 / 4)
    assert smallest_sample(0.02, look_confidence(15)) == 217


@given(st.floats(0.001, 0.999), st.integers(1, 40))
def test_the_smallest_sample_just_shows_the_margin(margin: float, num_rungs: int) -> None:
    confidence = look_confidence(num_rungs)

    def bound(num: int) -> float:
        return float(1 - ((1 - confidence) / 2) ** (1 / num))

    num = smallest_sample(margin, confidence)
    assert bound(num) < margin * (1 + 1e-9)
    assert num == 1 or bound(num - 1) >= margin * (1 - 1e-9)


def test_the_smallest_sample_of_any_margin_is_known_at_once() -> None:
    assert smallest_sample(1e-9, look_confidence(15)) == 4_382_026_633
    assert smallest_sample(1.0, look_confidence(15)) == smallest_sample(9.0, look_confidence(15)) == 1


def search(rng: np.random.Generator, num: int, margin: float, share_of: np.ndarray) -> int:
    """One search over answers that are the same at every budget they survive; returns the claimed rung."""
    luck, severity = rng.random(num), rng.beta(2, 5, num)
    seen: dict[int, bool] = {}
    while (rung := next_rung(len(LADDER), seen)) is not None:
        rows = scores(-severity * (luck < share_of[rung]))
        rows.columns[:, [0, 2]] += 0.5
        found = infer(rows, scale=(-1, 0), confidence=look_confidence(len(LADDER)))
        assert found.low is not None
        assert found.high is not None
        seen[rung] = is_non_inferior(found.low, found.high, higher_is_better=True, margin=margin)
    return min((rung for rung, safe in seen.items() if safe), default=len(LADDER))


@pytest.mark.long
@pytest.mark.parametrize("num", [48, 128])
@pytest.mark.parametrize("steepness", [1.0, 4.0])
def test_a_claimed_budget_is_truly_safe_in_95_per_cent(num: int, steepness: float) -> None:
    rng, margin = np.random.default_rng(num), 0.1
    share_of = (1 - LADDER) ** steepness
    truly_safe = share_of * 2 / 7 < margin
    claims = [search(rng, num, margin, share_of) for _ in range(250)]
    false = [claim < len(LADDER) and not truly_safe[claim] for claim in claims]
    assert np.mean(false) <= 0.05
    assert np.mean([claim < len(LADDER) for claim in claims]) > 0.5, "a search that never claims is of no use"


@pytest.mark.parametrize(("chance", "floor"), [(0.0, 0.1), (0.5, 0.55), (1.0, 1.0)])
def test_the_floor_is_a_tenth_of_the_way_from_chance_to_a_perfect_score(chance: float, floor: float) -> None:
    assert floor_of(chance) == pytest.approx(floor)


@pytest.mark.parametrize(
    ("references", "score"),
    [
        ([], 0.0),
        (["one"], 0.0),
        (["48213", "90125", "11873"], 0.0),
        (["yes", "no", "Yes ", "no", "YES"], 0.6),
        (["red", "red", "blue", "green"], 0.5),
    ],
)
def test_a_constant_answer_is_right_as_often_as_the_most_common_reference(references: list[str], score: float) -> None:
    assert constant_answer_score(references) == pytest.approx(score)
