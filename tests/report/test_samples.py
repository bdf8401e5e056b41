from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvbench.report.load import load_results
from kvbench.report.samples import answers_of, collapsed, first_different_word, sample_browser
from tests.report.synthetic import body, embedded, write_cell


def data_of(folder: Path) -> Any:
    return embedded(sample_browser(load_results(folder)), "sample-data")


def write_samples(folder: Path, *, policy: str = "h2o", samples: list[dict[str, Any]]) -> None:
    record = body(policy=policy, budget=None if policy == "full" else 0.2, num_samples=1)
    write_cell(folder, record | {"samples": samples})


def test_the_recorded_token_is_marked_and_not_a_word_near_it(tmp_path: Path) -> None:
    sample = {"id": "a", "text": "unbeaten now", "full_text": "unbelievable", "first_divergence_tokens": 1}
    places = {"divergence_starts_at": 3, "divergence_ends_at": 5, "full_divergence_ends_at": 6}
    write_samples(tmp_path, samples=[sample | places, sample | {"id": "b"}])
    exact, near = data_of(tmp_path)[0]["cells"][0]["samples"]
    assert exact["marks"] == [[3, 6], [3, 5]]
    assert "word" not in exact
    assert near["marks"] == [[0, 12], [0, 8]]
    assert near["word"] is True


@pytest.mark.parametrize(
    "wrong", [{"divergence_starts_at": 9}, {"divergence_ends_at": 99}, {"full_divergence_ends_at": "x"}]
)
def test_places_that_cannot_be_right_fall_back_to_words(tmp_path: Path, wrong: dict[str, Any]) -> None:
    sample = {"id": "a", "text": "one cat", "full_text": "one dog"}
    places = {"divergence_starts_at": 3, "divergence_ends_at": 7, "full_divergence_ends_at": 7}
    write_samples(tmp_path, samples=[sample | places | wrong])
    assert data_of(tmp_path)[0]["cells"][0]["samples"][0]["marks"] == [[4, 7], [4, 7]]


def test_the_space_before_a_token_is_not_marked(tmp_path: Path) -> None:
    sample = {"id": "a", "text": "one cat", "full_text": "one dog"}
    write_samples(
        tmp_path,
        samples=[sample | {"divergence_starts_at": 3, "divergence_ends_at": 7, "full_divergence_ends_at": 7}],
    )
    assert data_of(tmp_path)[0]["cells"][0]["samples"][0]["marks"] == [[4, 7], [4, 7]]


@pytest.mark.parametrize(
    ("full", "text", "marks"),
    [
        ("a red cat", "a blue cat", ((2, 5), (2, 6))),
        ("a b", "a", ((2, 3), (1, 1))),
        ("a  b", "a b", None),
        ("", "", None),
        ("", "x", ((0, 0), (0, 1))),
    ],
)
def test_the_first_different_word(full: str, text: str, marks: Any) -> None:
    assert first_different_word(full, text) == marks


def test_scores_stand_beside_those_of_the_full_cache(tmp_path: Path) -> None:
    one = {"id": "a", "text": "x", "full_text": "y", "nll_sum": 30.0, "num_scored_tokens": 10}
    full = {"id": "a", "text": "y", "full_text": "y", "nll_sum": 1.0, "num_scored_tokens": 10}
    write_samples(tmp_path, samples=[one | {"rougeL_vs_full": 0.25, "objects_recalled_fraction": 0.2}])
    write_samples(tmp_path, policy="full", samples=[full | {"rougeL_vs_full": 1.0, "objects_recalled_fraction": 0.5}])
    cells = {cell["policy"]: cell["samples"][0] for cell in data_of(tmp_path)[0]["cells"]}
    scores = {name: rest for name, *rest in cells["h2o"]["scores"]}
    assert scores["ppl"] == ["3.000", "0.100", "+2.900", "worse"]
    assert scores["rougeL_vs_full"] == ["0.250", "1.000", "\u22120.750", "worse"]
    assert scores["objects_recalled_fraction"] == ["20.0 %", "50.0 %", "\u221230.0 points", "worse"]
    assert cells["h2o"]["collapsed"] is True
    assert "collapsed" not in cells["full"]


@pytest.mark.parametrize(
    ("scores", "full", "lost"),
    [
        ({"rougeL_vs_full": 0.49}, {"rougeL_vs_full": 1.0}, True),
        ({"rougeL_vs_full": 0.5}, {"rougeL_vs_full": 1.0}, False),
        ({"rougeL_vs_full": 0.9, "ppl": 9.0}, {"rougeL_vs_full": 1.0, "ppl": 0.0}, False),
        ({"ppl": 2.0}, {"ppl": 0.9}, True),
        ({"ppl": 1.8}, {"ppl": 0.9}, False),
        ({"length_ratio": 0.1}, {"length_ratio": 1.0}, False),
        ({"ppl": 2.0}, {}, False),
    ],
)
def test_what_counts_as_a_collapse(scores: dict[str, float], full: dict[str, float], lost: bool) -> None:
    assert collapsed(scores, full) is lost


def test_conversations_are_shown_turn_by_turn(tmp_path: Path) -> None:
    turns = {
        "turn1_question": "What?", "turn1_text": "a ring", "turn1_full_text": "a cross", "turn1_rougeL_vs_full": 0.5,
        "turn2_question": "Where?", "turn2_text": "left", "turn2_full_text": "left", "turn2_reference": "left",
    }  # fmt: skip
    write_samples(tmp_path, samples=[{"id": "s/1", **turns}])
    group = data_of(tmp_path)[0]
    first, second = group["cells"][0]["samples"]
    assert [first["id"], second["id"]] == ["s/1, turn 1", "s/1, turn 2"]
    assert group["items"]["s/1, turn 1"] == {"question": "What?", "full": "a cross"}
    assert group["items"]["s/1, turn 2"]["reference"] == "left"
    assert first["scores"][0][:2] == ["rougeL_vs_full", "0.500"]
    assert first["marks"] == [[2, 7], [2, 6]]
    assert "marks" not in second


def test_a_sample_without_texts_still_has_its_scores(tmp_path: Path) -> None:
    write_samples(tmp_path, samples=[{"id": "a", "nll_sum": 3.0, "num_scored_tokens": 2}, {"text": None}])
    first, second = data_of(tmp_path)[0]["cells"][0]["samples"]
    assert first["scores"] == [["ppl", "1.500", "", "", ""]]
    assert "text" not in first
    assert second["id"] == ""
    assert next(answers_of(load_results(tmp_path).records[0])).marks is None
