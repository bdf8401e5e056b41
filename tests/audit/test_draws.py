"""A row of several draws is checked draw by draw, and its scores as their means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvbench.audit.evidence import answers_in
from kvbench.audit.scoring import _draws_problem
from kvbench.tasks.rouge import rouge_scores

TEXTS = (("a red square", "a red square in A1"), ("two blue rings", "a blue ring"))
REFERENCE = "a red ring"


def row() -> dict[str, Any]:
    draws: list[dict[str, Any]] = []
    for text, full_text in TEXTS:
        scores = {
            f"{name}_vs_{against}": score
            for against, other in (("full", full_text), ("reference", REFERENCE))
            for name, score in rouge_scores(prediction=text, reference=other).items()
        }
        draws.append({"text": text, "full_text": full_text, "length_ratio": 0.5, "num_new_tokens": 3, **scores})
    means = {
        name: sum(draw[name] for draw in draws) / len(draws)
        for name in draws[0]
        if name not in ("text", "full_text", "num_new_tokens")
    }
    return {**draws[0], **means, "reference": REFERENCE, "draws": draws}


def raise_the_mean(found: dict[str, Any]) -> None:
    found["rougeL_vs_full"] += 0.01


def raise_one_draw(found: dict[str, Any]) -> None:
    found["draws"][1]["rouge1_vs_reference"] += 0.3
    found["rouge1_vs_reference"] += 0.15


def drop_the_worst(found: dict[str, Any]) -> None:
    del found["draws"][1]


def drop_all(found: dict[str, Any]) -> None:
    found["draws"] = []


def test_draws_and_their_means_agree() -> None:
    assert _draws_problem(row(), is_old=False) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (raise_the_mean, "rougeL_vs_full is "),
        (raise_one_draw, "draw 1: rouge1_vs_reference is "),
        (drop_the_worst, "its draws give "),
        (drop_all, "its draws give none"),
    ],
)
def test_a_changed_draw_or_mean_is_told(change: Callable[[dict[str, Any]], None], told: str) -> None:
    found = row()
    change(found)
    assert told in (_draws_problem(found, is_old=False) or "")


def test_what_is_no_list_of_draws_is_an_answer_without_them() -> None:
    for draws in (None, "text", 3):
        assert answers_in({"draws": draws, "text": "a"}) == [{"draws": draws, "text": "a"}]
    assert answers_in({"draws": ["a", {"text": "b"}]}) == [{"text": "b"}]
