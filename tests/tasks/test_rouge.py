from __future__ import annotations

import random
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem import porter
from rouge_score import rouge_scorer, tokenizers

from kvbench.tasks.rouge import (
    _longest_f1,
    common_length,
    fact_scores,
    first_divergence,
    length_ratio,
    rouge_l_released,
    rouge_scores,
)


class WithoutMarks:
    """The tokenizer of the protocol greedy_v1, which dropped combining marks."""

    _UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    _WORD = re.compile(f"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\\W_])+")

    def tokenize(self, text: str) -> list[str]:
        words = self._WORD.findall(unicodedata.normalize("NFC", text).lower())
        stem = porter.PorterStemmer().stem
        return [stem(word) if len(word) > 3 and word.isascii() else word for word in words]


def scores_without_marks(*, prediction: str, reference: str) -> dict[str, float]:
    """The scores of the protocol greedy_v1."""
    if prediction.strip() == reference.strip():
        return {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    told = any(letter.isalnum() and not letter.isascii() for letter in prediction + reference)
    tokenizer = WithoutMarks() if told else tokenizers.DefaultTokenizer(use_stemmer=True)
    found = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=tokenizer).score(reference, prediction)
    return {name: float(score.fmeasure) for name, score in found.items()}


WORDS = {
    "English": (
        "the",
        "Red",
        "squares",
        "is",
        "running,",
        "don't...",
        "caf\xe9",
        "na\xefve",
        "3.14",
        "U.S.",
        "state-of-the-art",
        "\U0001f44d\ufe0f",
        "\u201cof\u201d",
        "a_b",
    ),
    "German": (
        "Stra\xdfe",
        "Gr\xf6\xdfe",
        "\xdcBER",
        "sch\xf6ne",
        "Donaudampfschiff,",
        "\u201enicht\u201c",
        "H\xe4user",
        "wei\xdf",
        "M\xe4dchen\u2013",
        "1\xad2",
        "Auf\xadlage",
        "ist",
        "gr\xf6\xdfer",
        "\u1e9e",
    ),
    "Chinese": (
        "\u7ea2\u8272",
        "\u65b9\u5757",
        "\u5728",
        "\u7b2c\u4e00\u884c\uff0c",
        "\u6709",
        "\u4e24\u4e2a",
        "\u5706\u5f62\u3002",
        "\u4e8c\u3007\u4e8c\u56db\u5e74",
        "\uff21\uff22\uff23",
        "\uff11\uff12",
        "GPU\u7684",
        "\u84dd",
        "\u300a\u5b57\u300b",
        "\U00020bb7",
        "\u5b57\ufe00",
        "\u3001",
        "running",
    ),
}


@pytest.mark.parametrize("language", WORDS)
def test_english_german_and_chinese_score_as_before_to_the_last_digit(language: str) -> None:
    draw = random.Random(language)
    for _ in range(120):
        reference = [draw.choice(WORDS[language]) for _ in range(draw.randrange(1, 25))]
        prediction = [draw.choice(WORDS[language]) if draw.random() < 0.3 else word for word in reference]
        space = "" if language == "Chinese" and draw.random() < 0.7 else " "
        pair = {"prediction": space.join(prediction), "reference": space.join(reference)}
        if not any(letter.isalnum() for letter in pair["prediction"] + pair["reference"]):
            continue
        assert rouge_scores(**pair) == scores_without_marks(**pair)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\u0915\u093f", "\u0915\u0940"),  # Hindi: ki, kee
        ("\u09a6\u09bf\u09a8", "\u09a6\u09c0\u09a8"),  # Bengali: day, poor
        ("\u0baa\u0bb2\u0bcd", "\u0baa\u0bb2\u0bbf"),  # Tamil
        ("\u0e14\u0e35", "\u0e14\u0e34"),  # Thai
        (
            "\u0643\u064e\u062a\u064e\u0628\u064e",
            "\u0643\u064f\u062a\u0650\u0628\u064e",
        ),  # Arabic
        ("\u05e1\u05b4\u05e4\u05b5\u05e8", "\u05e1\u05b5\u05e4\u05b6\u05e8"),  # Hebrew: he told, book
        ("\u1ecdk\u1ecd\u0301", "\u1ecdk\u1ecd\u0300"),  # Yoruba: hoe, spear
        ("cafe\u0301", "cafe\u0300"),
    ],
)
def test_words_that_differ_in_a_mark_are_different_words(one: str, other: str) -> None:
    assert rouge_scores(prediction=one, reference=other)["rouge1"] == 0.0
    assert rouge_scores(prediction=f"{one} {other}", reference=f"{one} {one}")["rouge1"] == 0.5
    assert rouge_scores(prediction=f"{one}.", reference=f"{one}!") == {"rouge1": 1.0, "rouge2": 0.0, "rougeL": 1.0}


def test_a_word_with_marks_inside_is_one_word() -> None:
    """Two of four: a mark neither parts a word nor counts as one."""
    hindi = "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e"
    scores = rouge_scores(
        prediction=f"{hindi} \u0915\u093f \u0915\u0940", reference=f"{hindi} \u0915\u0941 \u0915\u0942"
    )
    assert (scores["rouge1"], scores["rouge2"]) == (0.5, pytest.approx(1 / 3))
    joined, plain = "\u0915\u094d\u200d\u0937 \u0915", "\u0915\u094d\u0937 \u0915"
    assert rouge_scores(prediction=joined, reference=plain)["rouge2"] == 1.0, "a joiner is how it is drawn"


def test_thai_is_compared_letter_by_letter_with_its_marks() -> None:
    scores = rouge_scores(
        prediction="\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", reference="\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e34"
    )
    assert scores["rouge1"] == pytest.approx(3 / 4)
    assert scores["rouge2"] == pytest.approx(2 / 3)


def test_half_width_katakana_is_katakana() -> None:
    assert rouge_scores(prediction="\uff76\uff9e\uff97\uff7d", reference="\u30ac\u30e9\u30b9")["rouge2"] == 1.0
    assert rouge_scores(prediction="\uff76\uff9e\uff97\uff7d", reference="\u30ab\u30e9\u30b9")[
        "rouge1"
    ] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("prediction", "reference", "rouge1"),
    [
        ("?!", "!!", 0.5),
        ("...", "....", 6 / 7),
        ("\U0001f44d", "\U0001f44d \U0001f44d", 2 / 3),
        ("\u2764\ufe0f \U0001f600", "\u2764 \U0001f602", 0.5),  # how a heart is drawn does not count
        ("\U0001f44d\U0001f3fd", "\U0001f44d\U0001f3fb", 0.0),  # one sign, of another colour
        ("\U0001f1e9\U0001f1ea", "\U0001f1e9\U0001f1f0", 0.0),  # flags
        ("\U0001f44d", "", 0.0),
        ("\U0001f44d", "yes \U0001f44d", 0.0),  # where there are words, words count
    ],
)
def test_texts_without_words_are_compared_sign_by_sign(prediction: str, reference: str, rouge1: float) -> None:
    assert rouge_scores(prediction=prediction, reference=reference)["rouge1"] == pytest.approx(rouge1)


def test_ascii_scores_are_those_of_rouge_score() -> None:
    draw = random.Random(0)
    words = ["the", "Red", "squares", "is", "running", "left,", "of", "two", "circles.", "...", "\n", "3"]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for _ in range(500):
        a, b = (" ".join(draw.choices(words, k=draw.randrange(20))) for _ in range(2))
        if a.strip() == b.strip() or not any(letter.isalnum() for letter in a + b):
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


@given(st.lists(st.sampled_from("abcd"), max_size=90), st.lists(st.sampled_from("abcde"), max_size=90))
def test_rouge_l_is_that_of_the_table_of_rouge_score_to_the_last_bit(one: list[str], other: list[str]) -> None:
    expected = rouge_scorer._score_lcs(other, one).fmeasure
    assert _longest_f1(one, other) == expected
    assert common_length(one, other) == rouge_scorer._lcs_table(one, other)[-1][-1]


def test_rouge_of_answers_of_thousands_of_words_takes_no_table() -> None:
    words = [f"w{number * number % 997}" for number in range(9000)]
    one, other = words[:6000], words[3000:]
    assert common_length(one, other) >= 3000
    assert 0.5 <= rouge_scores(prediction=" ".join(one), reference=" ".join(other))["rougeL"] <= 1.0
