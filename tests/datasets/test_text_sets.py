from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvbench.datasets.base import Turn
from kvbench.datasets.questions import MTBench
from kvbench.datasets.retrieval import LongBench, Retrieval
from kvbench.datasets.text import Summaries
from tests.datasets.files import refusal, write_json, write_lines

QUESTIONS = [
    {"question_id": 81, "turns": ["Write a post.", "Shorter."]},
    {"question_id": 101, "turns": ["Who is second?", "And last?"]},
    {"question_id": 121, "turns": ["Solve it.", "Again."], "reference": ["42", ""]},
]
ANSWERS = [{"question_id": 101, "choices": [{"index": 0, "turns": ["You.", "Nobody."]}]}]


@pytest.fixture
def mt(tmp_path: Path) -> dict[str, str]:
    paths = {"path": write_lines(tmp_path / "question.jsonl", QUESTIONS)}
    return paths | {"answers": write_lines(tmp_path / "gpt-4.jsonl", ANSWERS)}


def test_mt_bench_turns_and_references_come_together(mt: dict[str, str]) -> None:
    examples = MTBench(**mt).examples()
    assert [(e.id, e.question, e.reference) for e in examples] == [
        ("81", "Write a post.", ""),
        ("101", "Who is second?", "You."),
        ("121", "Solve it.", "42"),
    ]
    assert [e.follow_ups for e in examples] == [
        (Turn(question="Shorter.", answer=""),),
        (Turn(question="And last?", answer="Nobody."),),
        (Turn(question="Again.", answer=""),),
    ]


def test_mt_bench_can_be_cut_to_what_has_a_reference(mt: dict[str, str]) -> None:
    assert [e.id for e in MTBench(**mt, only_with_reference=True).examples()] == ["101", "121"]
    assert [e.id for e in MTBench(**mt, only_with_reference=True, num_samples=1).examples()] == ["101"]
    assert [e.id for e in MTBench(path=mt["path"], only_with_reference=True).examples()] == ["121"]


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"question_id": 1}, "has the turns 'None'"),
        ({"question_id": 1, "turns": []}, "has the turns '[]'"),
        ({"question_id": 1, "turns": ["q", ""]}, "has an empty turns"),
        ({"question_id": 1, "turns": ["q", 2]}, "must be a list of texts"),
        ({"question_id": 1, "turns": ["q"], "reference": ["a", "b"]}, "has 1 turns, but 2 reference answers"),
        ({"question_id": 1, "turns": ["q"], "reference": "a"}, "has the reference 'a'"),
        ({"question_id": None, "turns": ["q"]}, ""),
    ],
)
def test_mt_bench_names_the_line_that_is_wrong(tmp_path: Path, row: dict[str, Any], fragment: str) -> None:
    path = write_lines(tmp_path / "question.jsonl", [row])
    if fragment:
        assert fragment in refusal(lambda: MTBench(path=path))
    else:
        assert MTBench(path=path).examples()[0].id == "0"


def test_mt_bench_answers_of_another_form_are_refused(tmp_path: Path, mt: dict[str, str]) -> None:
    answers = write_lines(tmp_path / "a.jsonl", [{"question_id": 101, "text": "no choices"}])
    assert "has no choices" in refusal(lambda: MTBench(path=mt["path"], answers=answers))


LONG = {"input": "Who?", "context": "A long story.", "answers": ["Ann", "Anna"], "_id": "x", "dataset": "qa"}
PROMPT = "Read.\n\n{context}\n\nQuestion: {input}\nAnswer:"


def test_longbench_splits_its_prompt_after_the_context(tmp_path: Path) -> None:
    templates = write_json(tmp_path / "prompts.json", {"qa": PROMPT, "sum": "{context}\nSummary:"})
    rows = [LONG, {**LONG, "_id": "y", "input": "", "dataset": "sum"}]
    first, second = LongBench(path=write_lines(tmp_path / "qa.jsonl", rows), templates=templates).examples()
    assert (first.context, first.question) == ("Read.\n\nA long story.", "\n\nQuestion: Who?\nAnswer:")
    assert (first.id, first.cluster, first.reference) == ("x", "x", "Ann")
    assert (second.context, second.question) == ("A long story.", "\nSummary:")


def test_longbench_names_its_task_by_row_or_file(tmp_path: Path) -> None:
    templates = write_json(tmp_path / "prompts.json", {"qasper": PROMPT})
    row = {name: value for name, value in LONG.items() if name != "dataset"}
    data = LongBench(path=write_lines(tmp_path / "qasper.first2.jsonl", [row]), templates=templates)
    assert data.examples()[0].context.startswith("Read.")
    other = write_lines(tmp_path / "other.jsonl", [{**row, "dataset": "qaspr"}])
    assert "did you mean 'qasper'" in refusal(lambda: LongBench(path=other, templates=templates))


@pytest.mark.parametrize("template", ["{input}\n{context}\nAnswer:", "Question: {input}\n{context}"])
def test_a_template_that_asks_before_the_context_hides_nothing(tmp_path: Path, template: str) -> None:
    path = write_lines(tmp_path / "qa.jsonl", [LONG])
    (example,) = LongBench(path=path, template=template).examples()
    assert not example.can_hide_question
    assert example.question == template.replace("{input}", "Who?").replace("{context}", "A long story.")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [(["a", "b"], "a"), ("a", "a"), ("['it\\'s', 'b']", "it's"), (7, "7"), ('["x"]', "x")],
)
def test_longbench_answers_may_be_lists_texts_or_pythons_lists(tmp_path: Path, answers: Any, expected: str) -> None:
    path = write_lines(tmp_path / "qa.jsonl", [{**LONG, "answers": answers}])
    assert LongBench(path=path).examples()[0].reference == expected


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"answers": []}, "has the answers '[]'"),
        ({"answers": [""]}, "has an empty answers"),
        ({"answers": "['a"}, "that begin a list and end otherwise"),
        ({"answers": "[__import__('os').getcwd()]"}, "that begin a list and end otherwise"),
        ({"answers": None}, "has the answers 'None'"),
        ({"context": ""}, "has an empty context"),
        ({"input": None}, "has the input 'None'"),
    ],
)
def test_longbench_names_the_line_that_is_wrong(tmp_path: Path, change: dict[str, Any], fragment: str) -> None:
    path = write_lines(tmp_path / "qa.jsonl", [LONG, {**LONG, "_id": "z", **change}])
    message = refusal(lambda: LongBench(path=path))
    assert message.startswith("qa.jsonl, line 2 ")
    assert fragment in message
    assert len(LongBench(path=path, on_bad_item="skip").examples()) == 1


def test_a_template_without_a_context_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "qa.jsonl", [LONG])
    assert "dataset.template is" in refusal(lambda: LongBench(path=path, template="{input}"))
    templates = write_json(tmp_path / "p.json", {"qa": "{context}{context}"})
    assert "the template of 'qa'" in refusal(lambda: LongBench(path=path, templates=templates))


def test_rulers_last_line_is_the_question(tmp_path: Path) -> None:
    rows = [
        {"index": 4, "input": "The word is: ab-1.\nMore.\nWhat is the word?", "outputs": ["ab-1"]},
        {"index": 5, "input": "The words.\nWhich?", "outputs": ["x", "y"]},
        {"index": 6, "input": "Which?", "outputs": ["z"]},
    ]
    data = Retrieval(path=write_lines(tmp_path / "niah.jsonl", rows))
    first, second, third = data.examples()
    assert (first.context, first.question) == ("The word is: ab-1.\nMore.\n", "What is the word?")
    assert (first.id, first.reference, first.facts) == ("4", "ab-1", frozenset({"ab-1"}))
    assert (second.reference, second.facts) == ("x, y", frozenset({"x", "y"}))
    assert (third.can_hide_question, third.question) == (False, "Which?")
    assert data.facts_in("It is y, not ab-1 or q.") == frozenset({"y", "ab-1"})


def test_a_passkey_file_gets_its_question_from_the_settings(tmp_path: Path) -> None:
    rows = [{"input": "Line one.\nThe key is 7.", "target": 7}, {"input": "b", "target": "8", "question": "Key?"}]
    first, second = Retrieval(path=write_lines(tmp_path / "p.jsonl", rows), question="What is the key?").examples()
    assert (first.context, first.question, first.reference) == ("Line one.\nThe key is 7.\n", "What is the key?", "7")
    assert second.question == "Key?"


def test_a_retrieval_row_that_expects_nothing_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"input": "a\nb"}])
    assert "p.jsonl, line 1 says not what is expected" in refusal(lambda: Retrieval(path=path))


def test_summaries_put_the_instruction_last(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "s.jsonl", [{"article": "News.\n", "highlights": "N."}])
    fields = {"document": "article", "summary": "highlights"}
    (example,) = Summaries(path=path, **fields, instruction="Sum it up.").examples()
    assert (example.id, example.context, example.question, example.reference) == ("0", "News.\n\n", "Sum it up.", "N.")
    (whole,) = Summaries(path=path, **fields, instruction="").examples()
    assert (whole.context, whole.question) == ("", "News.")


def test_summaries_name_the_field_that_is_missing(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "s.jsonl", [{"article": "News.", "highlights": "N."}])
    assert "line 1 has no document; it needs the text 'document', and has the fields article, highlights" in refusal(
        lambda: Summaries(path=path)
    )
