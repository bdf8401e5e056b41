"""What counts as the same final answer, and files of problems as their authors publish them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench.datasets import questions as maths
from kvbench.datasets.base import Example
from kvbench.datasets.questions import Problems, same_whole_number
from kvbench.tasks.generation import fact_fields
from tests.datasets.files import refusal, write_lines

GSM8K = [
    {
        "question": "She sold 48 clips in April and half as many in May. How many?",
        "answer": "In May she sold 48/2 = <<48/2=24>>24.\nTogether 48+24 = <<48+24=72>>72.\n#### 72",
    },
    {"question": "How much is left?", "answer": "It is a lot.\n#### 1,250"},
]
MATH = [
    {
        "problem": r"Convert $(0,3)$ to polar coordinates.",
        "solution": r"We have $r = 3$, so \[\boxed{\left( 3, \frac{\pi}{2} \right)}.\]",
        "answer": r"\left( 3, \frac{\pi}{2} \right)",
        "unique_id": "test/precalculus/807.json",
    },
    {"problem": "What is a half?", "solution": r"It is \boxed{\frac12}.", "answer": r"\frac12", "unique_id": "b"},
    {"problem": "Who is best?", "solution": r"\boxed{\text{Evelyn}}", "answer": r"\text{Evelyn}", "unique_id": "c"},
]
AIME = [{"ID": "2024-I-4", "Problem": "Find m + n.", "Answer": 25}, {"Problem": "Find r.", "Answer": "073"}]


@pytest.fixture
def checker() -> Any:
    return pytest.importorskip("math_verify", reason="the extra math is not installed")


def problems(path: Path, rows: list[Any], **settings: Any) -> list[Example]:
    return list(Problems(path=write_lines(path / "problems.jsonl", rows), **settings).examples())


def right(example: Example, text: str) -> bool:
    assert example.is_right is not None
    return example.is_right(text)


def test_gsm8k_is_asked_with_its_instruction_and_refers_to_the_way_without_its_calculator(tmp_path: Path) -> None:
    first, second = problems(tmp_path, GSM8K, instruction="End with ####.")
    assert first.question == f"{GSM8K[0]['question']}\n\nEnd with ####."
    assert first.reference == "In May she sold 48/2 = 24.\nTogether 48+24 = 72.\n#### 72"
    assert (first.id, first.cluster, second.id) == ("0", "0", "1")
    assert right(first, "So it is 72.")
    assert right(second, "That leaves $1250.00 in all.")


@pytest.mark.parametrize(
    ("final", "text", "is_right"),
    [
        ("72", "#### 72", True),
        ("72", "48 + 24 = 72 clips", True),
        ("72", "72 clips, of which 24 in May", False),  # the last number
        ("72", "#### 72\n\nQuestion: what is 3 + 4?\n#### 7", True),  # the first mark: then comes another problem
        ("72", "#### 7\n#### 72", False),
        ("72", r"It is \boxed{72}, I think, and not 5.", True),
        ("72", r"\boxed{5}, no: \boxed{72\text{ clips}}", True),
        ("72", r"\boxed{72} or rather \boxed{5}", False),
        ("72", r"72 \boxed{not closed", True),  # no box, so the last number
        ("1", r"\boxed{\frac{1}{2}}", False),
        ("2", "1/2 is #### 1/2", False),
        ("1250", r"\boxed{1{,}250}", True),
        ("1250", "1,250.", True),
        ("1250", "1,251", False),
        ("-3", "-3", True),
        ("3", "-3", False),
        ("72", "72.5", False),
        ("25", "025", True),
        ("72", "", False),
        ("72", "seventy-two", False),
        ("72", "####", False),
        ("7", "7" * 9000, False),
        ("0", "-0", True),
        ("5", "10-5", True),  # a difference, no -5
        ("-5", "x = \u22125", True),
        ("1250", r"\boxed{1,\!250}", True),
        ("5", r"\boxed{\boxed{5}}", True),
        ("5", r"\boxed{\{5\}} and 7", True),
        ("4", "12,4", True),  # no thousands, so two numbers
    ],
)
def test_a_whole_number_is_right_wherever_a_model_says_it_last(final: str, text: str, is_right: bool) -> None:
    assert same_whole_number(final, text) == is_right


@given(number=st.integers(-(10**12), 10**12), other=st.integers(-(10**12), 10**12))
def test_every_number_is_found_in_each_form_and_another_one_is_wrong(number: int, other: int) -> None:
    for text in (f"#### {number}", f"\\boxed{{{number:,}}}", f"7 x 3, so {number:,}.", f"\\boxed{{{number}.0}}"):
        assert same_whole_number(str(number), text)
        assert same_whole_number(str(other), text) == (number == other)


def test_aime_files_name_their_fields_and_hold_texts_or_numbers(tmp_path: Path) -> None:
    first, second = problems(tmp_path, AIME, question="Problem", answer="Answer")
    assert (first.id, first.reference, second.id) == ("2024-I-4", "25", "1")
    assert right(first, r"\boxed{025}")
    assert right(second, r"\boxed{73}")
    assert not right(second, r"\boxed{74}")


def test_a_row_says_whether_the_final_answer_is_right_whatever_else_is_said(tmp_path: Path) -> None:
    example, _ = problems(tmp_path, GSM8K)
    dataset: Any = None
    assert fact_fields(dataset, example, "It is 72.") == {"answers_right_fraction": 1.0}
    assert fact_fields(dataset, example, example.reference.replace("72", "71")) == {"answers_right_fraction": 0.0}


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"question": "q", "answer": "about a dozen"}, "has the answer 'about a dozen'; it must be"),
        ({"question": "q", "answer": "#### 1/2"}, "has the answer '1/2'"),
        ({"question": "q", "answer": 2.5}, "has the answer '2.5'"),
        ({"question": "q", "answer": True}, "has the answer 'True'"),
        ({"question": "q"}, "has no answer"),
        ({"question": " ", "answer": "1"}, "has an empty question"),
    ],
)
def test_a_problem_without_a_whole_number_is_named(tmp_path: Path, row: Any, fragment: str) -> None:
    assert fragment in refusal(lambda: problems(tmp_path, [row]))
    path = write_lines(tmp_path / "mixed.jsonl", [row, GSM8K[0]])
    assert len(Problems(path=path, on_bad_item="skip").skipped) == 1


def test_another_kind_is_refused_with_the_two_there_are(tmp_path: Path) -> None:
    kind: Any = "number"
    assert "whole_number" in refusal(lambda: problems(tmp_path, GSM8K, kind=kind))


def test_expressions_without_their_checker_are_refused_in_one_line_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maths, "_CHECKER", "math-verify-that-is-not-there")
    told = refusal(lambda: problems(tmp_path, MATH, kind="expression", question="problem"))
    assert "kvbench[math]" in told


def test_whole_numbers_never_ask_the_checker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    example, _ = problems(tmp_path, GSM8K)
    assert right(example, "72")


def test_expressions_are_right_in_any_form(tmp_path: Path, checker: Any) -> None:
    polar, half, name = problems(tmp_path, MATH, kind="expression", question="problem", solution="solution")
    assert polar.id == "test/precalculus/807.json"
    assert polar.reference == MATH[0]["solution"]
    assert right(polar, r"so $\boxed{(3, \pi/2)}$")
    assert not right(polar, r"so $\boxed{(3, \pi/3)}$")
    assert right(half, "The answer is 0.5")
    assert right(half, r"\boxed{\frac{2}{4}}")
    assert not right(half, r"\boxed{\frac13}")
    assert not right(half, "")
    assert right(name, r"\boxed{\text{Evelyn}}")
    assert not right(name, r"\boxed{\text{Ann}}")
    assert all(right(example, example.reference) for example in (polar, half, name))


def test_a_fingerprint_knows_final_answers_and_how_they_are_compared(tmp_path: Path, checker: Any) -> None:
    rows = [{"question": "q", "answer": "5", "solution": "s"}]
    other = [{**rows[0], "answer": "6"}]
    made = [
        Problems(path=write_lines(tmp_path / f"{number}.jsonl", some), solution="solution", kind=kind).fingerprint
        for number, (some, kind) in enumerate([(rows, "whole_number"), (other, "whole_number"), (rows, "expression")])
    ]
    again = Problems(path=write_lines(tmp_path / "again.jsonl", rows), solution="solution").fingerprint
    assert len(set(made)) == 3
    assert again == made[0]
