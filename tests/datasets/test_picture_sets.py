from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvbench.datasets.base import Turn
from kvbench.datasets.questions import Conversation, LlavaBench, MMVet
from tests.datasets.files import refusal, write_json, write_lines, write_picture

ITEMS: dict[str, Any] = {
    "v1_0": {"imagename": "a.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["math"]},
    "v1_1": {"imagename": "a.png", "question": "What is d?", "answer": "1.25<OR>=1.25<OR>5/4"},
    "v1_2": {"imagename": "b.png", "question": "Who?", "answer": "a man <AND> a dog<OR>them"},
}


@pytest.fixture
def vet(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        write_picture(tmp_path / "images" / name)
    write_json(tmp_path / "mm-vet.json", ITEMS)
    return tmp_path


def test_mm_vet_takes_the_first_alternative_and_clusters_by_picture(vet: Path) -> None:
    examples = MMVet(path=str(vet / "mm-vet.json")).examples()
    assert [(e.id, e.cluster, e.reference) for e in examples] == [
        ("v1_0", "a.png", "-1, -5"),
        ("v1_1", "a.png", "1.25"),
        ("v1_2", "b.png", "a man, a dog"),
    ]
    assert [e.load_image().size for e in examples if e.load_image] == [(6, 5)] * 3


def test_mm_vet_keeps_the_ids_asked_for_in_the_files_order(vet: Path) -> None:
    ids = write_json(vet / "ids.json", ["v1_2", "v1_0"])
    data = MMVet(path=str(vet / "mm-vet.json"), ids=ids)
    assert [example.id for example in data.examples()] == ["v1_0", "v1_2"]


def test_mm_vet_takes_references_from_another_file(vet: Path) -> None:
    answers = write_json(vet / "answers.json", {name: f"A long answer to {name}." for name in ITEMS})
    data = MMVet(path=str(vet / "mm-vet.json"), answers=answers)
    assert data.examples()[1].reference == "A long answer to v1_1."
    assert data.fingerprint != MMVet(path=str(vet / "mm-vet.json")).fingerprint


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"ids": ["v1_9"]}, "names the question 'v1_9'"),
        ({"ids": [3]}, "names the question '3'"),
        ({"ids": {}}, "must be a JSON list"),
        ({"answers": {"v1_0": "x"}}, "item 'v1_1' (id 'v1_1') has no answer"),
        ({"answers": {"v1_0": ""}}, "answers.json has an empty v1_0"),
        ({"answers": ["x"]}, "answers.json is"),
    ],
)
def test_mm_vet_companions_that_do_not_fit_are_refused(vet: Path, settings: dict[str, Any], fragment: str) -> None:
    paths = {name: write_json(vet / f"{name}.json", content) for name, content in settings.items()}
    assert fragment in refusal(lambda: MMVet(path=str(vet / "mm-vet.json"), **paths))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"imagename": "c.png"}, "item 'v1_0' names the image 'c.png', which is not a file"),
        ({"imagename": "../mm-vet.json"}, "lies outside"),
        ({"imagename": None}, "the imagename 'None'"),
        ({"answer": "<OR>5"}, "item 'v1_0' has an empty answer"),
        ({"question": 5}, "item 'v1_0' has the question '5'"),
    ],
)
def test_mm_vet_names_the_item_that_is_wrong(vet: Path, change: dict[str, Any], fragment: str) -> None:
    path = write_json(vet / "mm-vet.json", {"v1_0": {**ITEMS["v1_0"], **change}})
    assert fragment in refusal(lambda: MMVet(path=path))
    other = write_json(vet / "mm-vet.json", {"v1_0": {**ITEMS["v1_0"], **change}, "v1_1": ITEMS["v1_1"]})
    assert [e.id for e in MMVet(path=other, on_bad_item="skip").examples()] == ["v1_1"]


def test_mm_vet_as_a_list_and_companions_that_are_missing_are_refused(vet: Path) -> None:
    path = str(vet / "mm-vet.json")
    assert "dataset.answers nowhere.json cannot be read" in refusal(lambda: MMVet(path=path, answers="nowhere.json"))
    assert "dataset.ids nowhere.json cannot be read" in refusal(lambda: MMVet(path=path, ids="nowhere.json"))
    assert "dataset.path" in refusal(lambda: MMVet(path=str(vet)))
    write_json(vet / "mm-vet.json", [ITEMS["v1_0"]])
    assert "must be an object" in refusal(lambda: MMVet(path=path))


def test_llavas_conversations_become_turns(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    said = [
        {"from": "human", "value": "Describe it.\n<image>"},
        {"from": "gpt", "value": "A red plane."},
        {"from": "human", "value": "What colour?"},
        {"from": "gpt", "value": "Red."},
    ]
    items = [{"id": "same", "image": "a.png", "conversations": said}, {"id": "same", "conversations": said[:2]}]
    first, second = Conversation(path=write_json(tmp_path / "detail_1k.json", items)).examples()
    assert (first.id, first.question, first.reference) == ("0", "Describe it.", "A red plane.")
    assert first.follow_ups == (Turn(question="What colour?", answer="Red."),)
    assert first.load_image is not None
    assert (second.id, second.follow_ups, second.load_image) == ("1", (), None)


@pytest.mark.parametrize(
    ("said", "fragment"),
    [
        ([], "must be a list of human, gpt pairs"),
        ("text", "must be a list of human, gpt pairs"),
        ([{"from": "human", "value": "q"}], "must be a list of human, gpt pairs"),
        ([{"from": "gpt", "value": "q"}, {"from": "human", "value": "a"}], "conversations 0 is from 'gpt'"),
        ([{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}], "conversations 0 has an empty value"),
        ([{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}], "conversations 1 has an empty value"),
        ([{"from": "human", "value": "q"}, 5], "conversations 1 is '5'"),
    ],
)
def test_a_wrong_conversation_is_refused(tmp_path: Path, said: Any, fragment: str) -> None:
    path = write_json(tmp_path / "talks.json", [{"conversations": said}])
    message = refusal(lambda: Conversation(path=path))
    assert message.startswith("talks.json, item 0")
    assert fragment in message


QUESTIONS = [
    {"question_id": 0, "image": "01.jpg", "text": "What is it?", "category": "conv"},
    {"question_id": 1, "image": "01.jpg", "text": "Describe it.", "category": "detail"},
]


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    write_picture(tmp_path / "COCO_01.jpg")
    write_lines(tmp_path / "questions.jsonl", QUESTIONS)
    return tmp_path


def test_llava_bench_joins_questions_and_answers_by_id(bench: Path) -> None:
    answers = write_lines(bench / "a.jsonl", [{"question_id": 1, "text": "Long."}, {"question_id": 0, "text": "Red."}])
    data = LlavaBench(path=str(bench / "questions.jsonl"), image_prefix="COCO_", answers=answers)
    assert [(e.id, e.cluster, e.reference) for e in data.examples()] == [
        ("0", "COCO_01.jpg", "Red."),
        ("1", "COCO_01.jpg", "Long."),
    ]


def test_llava_bench_without_answers_has_no_reference(bench: Path) -> None:
    data = LlavaBench(path=str(bench / "questions.jsonl"), image_prefix="COCO_")
    assert [example.reference for example in data.examples()] == ["", ""]


def test_llava_bench_reads_the_file_that_holds_both(bench: Path) -> None:
    row = {"id": "01", "image": "COCO_01.jpg", "instruction": "What?", "output": "A plane.", "type": "conv"}
    data = LlavaBench(path=write_lines(bench / "both.jsonl", [row, row]))
    assert [(e.id, e.question, e.reference) for e in data.examples()] == [
        ("0", "What?", "A plane."),
        ("1", "What?", "A plane."),
    ]


@pytest.mark.parametrize(
    ("answers", "fragment"),
    [
        ([{"question_id": 0, "text": "Red."}], "questions.jsonl, line 2 (id '1') has no answer"),
        ([{"question_id": 0, "text": ""}, {"question_id": 1, "text": "x"}], "has an empty text"),
        ([{"question_id": 0, "text": "a"}] * 2, "a.jsonl, line 2 has the question_id '0'"),
        (["x"], "a.jsonl, line 1 is 'x'"),
        ([{"text": "x"}], "a.jsonl, line 1 has an empty id"),
    ],
)
def test_llava_bench_answers_that_do_not_fit_are_refused(bench: Path, answers: list[Any], fragment: str) -> None:
    path = write_lines(bench / "a.jsonl", answers)
    make = lambda: LlavaBench(path=str(bench / "questions.jsonl"), image_prefix="COCO_", answers=path)  # noqa: E731
    assert fragment in refusal(make)
