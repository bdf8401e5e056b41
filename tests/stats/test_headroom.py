from __future__ import annotations

import pytest

from kvbench.stats.power import constant_answer_score, floor_of


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
