"""The ROUGE-L of the released code, on pairs worked out by hand."""

from __future__ import annotations

import pytest

from kvbench.tasks.rouge import rouge_l_released, rouge_scores


@pytest.mark.parametrize(
    ("prediction", "reference", "common", "stated", "wanted"),
    [
        ("a b c", "a b c", 3, 3, 3),
        ("a cat. a cat. a cat.", "a cat.", 2, 2, 2),  # repetition is free
        ("b a", "a b", 1, 2, 2),  # within a sentence order counts
        ("b. a", "a b", 2, 2, 2),  # between sentences it does not
        ("a b x. c d y", "c d. a b", 4, 6, 4),
        ("Red dog.</s>", "red dog.</s>", 2, 3, 3),  # case counts, and so does the end token
        ("a. .b", "a b", 2, 3, 2),  # white space between full stops is an empty word
    ],
)
def test_distinct_words_of_common_subsequences(
    prediction: str, reference: str, common: int, stated: int, wanted: int
) -> None:
    precision, recall = common / stated, common / wanted
    score = rouge_l_released(prediction=prediction, reference=reference)
    assert score == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-7)


def test_it_is_not_rouge_l() -> None:
    pair = {"prediction": "a cat. a cat. a cat.", "reference": "a cat."}
    assert rouge_scores(**pair)["rougeL"] == pytest.approx(0.5)
    assert rouge_l_released(**pair) == pytest.approx(1.0)


@pytest.mark.parametrize(("prediction", "reference"), [("", "a"), ("a", ""), ("", ""), ("...", "a")])
def test_a_text_without_words_scores_zero(prediction: str, reference: str) -> None:
    assert rouge_l_released(prediction=prediction, reference=reference) == 0.0


def test_of_several_common_subsequences_the_one_that_goes_back_through_the_prediction_counts() -> None:
    """Both `a` and `b` are longest alone; which of them is taken decides whether `b` is counted twice."""
    assert rouge_l_released(prediction="b a. b", reference="a b") == pytest.approx(2 * 0.5 * 0.5 / 1.0, abs=1e-7)
