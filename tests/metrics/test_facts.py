from __future__ import annotations

import pytest

from kvbench.tasks.rouge import fact_scores

TRUE = frozenset("abcd")


@pytest.mark.parametrize(
    ("stated", "recalled", "f1"),
    [
        ("abcd", 1.0, 1.0),
        ("", 0.0, 0.0),
        ("xyz", 0.0, 0.0),
        ("ab", 0.5, 2 / 3),
        ("abcdxyzw", 1.0, 2 / 3),
        ("ax", 0.25, 1 / 3),
    ],
)
def test_recall_and_f1_are_those_of_the_sets(stated: str, recalled: float, f1: float) -> None:
    scores = fact_scores(stated=frozenset(stated), true=TRUE)
    assert scores == {"objects_recalled_fraction": recalled, "objects_f1": pytest.approx(f1)}
