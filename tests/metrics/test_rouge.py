from __future__ import annotations

import random

import pytest
from rouge_score import rouge_scorer

from kvbench.metrics.rouge import first_divergence, length_ratio, rouge_scores


def test_ascii_scores_are_those_of_rouge_score() -> None:
    draw = random.Random(0)
    words = ["the", "Red", "squares", "is", "running", "left,", "of", "two", "circles.", "...", "\n", "3"]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for _ in range(500):
        a, b = (" ".join(draw.choices(words, k=draw.randrange(20))) for _ in range(2))
        if a.strip() == b.strip():
            continue
        theirs = {name: score.fmeasure for name, score in scorer.score(b, a).items()}
        assert rouge_scores(prediction=a, reference=b) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(
    "text", ["", "...", "a red square", "yes", "caf\u00e9", "\u7ea2\u8272\u65b9\u5757", "\U0001f600"]
)
def test_a_text_scores_one_against_itself(text: str) -> None:
    assert rouge_scores(prediction=text, reference=text) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}


def test_an_empty_or_disjoint_answer_scores_zero() -> None:
    for prediction in ("", "...", "blue circle"):
        assert set(rouge_scores(prediction=prediction, reference="red square").values()) == {0.0}
    assert set(rouge_scores(prediction="\u84dd", reference="\u7ea2").values()) == {0.0}


def test_chinese_is_compared_by_character() -> None:
    scores = rouge_scores(prediction="\u7ea2\u8272\u65b9\u5757", reference="\u7ea2\u8272\u5706\u5757")
    assert scores["rouge1"] == pytest.approx(0.75)
    assert scores["rouge2"] == pytest.approx(1 / 3)


def test_accents_count_and_english_words_are_still_stemmed() -> None:
    assert rouge_scores(prediction="caf\u00e9", reference="caf")["rouge1"] == 0.0
    assert rouge_scores(prediction="caf\u00e9 squares", reference="cafe\u0301 square")["rouge1"] == 1.0


def test_the_length_ratio_is_undefined_only_against_nothing() -> None:
    assert length_ratio(5, 10) == 0.5
    assert length_ratio(0, 0) == 1.0
    assert length_ratio(3, 0) is None


def test_the_first_divergence_is_the_first_differing_token() -> None:
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([1, 2, 3], [1, 5, 3]) == 1
    assert first_divergence([1, 2], [1, 2, 3]) == 2
    assert first_divergence([], [1]) == 0
