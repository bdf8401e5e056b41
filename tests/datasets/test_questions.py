"""Published sets of questions as their authors publish them, and what counts as the same final answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kvbench.datasets import questions as maths
from kvbench.datasets.base import Example, Turn
from kvbench.datasets.questions import Conversation, LlavaBench, MMVet, Problems, same_whole_number
from kvbench.errors import ConfigError, DataError
from kvbench.tasks.generation import fact_fields
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


GOOD = {"question": "What is it?", "answer": "A dot."}


def written(folder: Path, items: Any, encoding: str = "utf-8") -> str:
    path = folder / "talks.json"
    path.write_bytes((items if isinstance(items, str) else json.dumps(items)).encode(encoding))
    return str(path)


def load_all(path: str, **options: Any) -> None:
    for example in Conversation(path=path, **options).examples():
        assert example.load_image is not None
        example.load_image()


def refused(path: str, **options: Any) -> str:
    """Return the message of the one error that making the data set, or loading its pictures, gives."""
    with pytest.raises((ConfigError, DataError)) as caught:
        load_all(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_good_file_gives_its_items_in_order(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    Image.new("RGB", (5, 4), "red").save(tmp_path / "pics" / "a.png")
    Image.new("L", (6, 4)).save(tmp_path / "pics" / "b.jpg")
    path = written(
        tmp_path,
        [
            {**GOOD, "image": "pics/a.png", "question": "<image>\nWhat is it?"},
            {**GOOD, "image": "pics/b.jpg"},
            {**GOOD, "image": "pics/b.jpg"},
            {**GOOD, "answer": " Ein Punkt, \u00e9\u4e2d. ", "image": None},
        ],
    )
    data = Conversation(path=path)
    examples = data.examples()
    assert [example.question for example in examples] == ["What is it?"] * 4
    assert [example.reference for example in examples] == ["A dot."] * 3 + ["Ein Punkt, \u00e9\u4e2d."]
    assert [example.cluster for example in examples] == ["pics/a.png", "pics/b.jpg", "pics/b.jpg", "3"]
    pictures = [example.load_image() for example in examples[:3] if example.load_image]
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (5, 4)), ("RGB", (6, 4)), ("RGB", (6, 4))]
    assert examples[3].load_image is None
    assert len(Conversation(path=path, num_samples=2).examples()) == 2
    assert data.facts_in("anything") == frozenset()


def test_pictures_may_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    Image.new("RGB", (5, 4)).save(tmp_path / "pics" / "a.webp")
    path = written(tmp_path, [{**GOOD, "image": "a.webp"}])
    assert Conversation(path=path, images=str(tmp_path / "pics")).examples()[0].load_image is not None
    assert "not a file" in refused(path)


@pytest.mark.parametrize("text", ["\ufeff" + json.dumps([GOOD]), json.dumps([GOOD], indent=1).replace("\n", "\r\n")])
def test_a_byte_order_mark_and_windows_lines_are_fine(tmp_path: Path, text: str) -> None:
    assert len(Conversation(path=written(tmp_path, text)).examples()) == 1


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    for name, items in (("a", [GOOD]), ("b", [GOOD]), ("c", [GOOD, GOOD])):
        (tmp_path / name).mkdir()
        written(tmp_path / name, items)
    a, b, c = (Conversation(path=str(tmp_path / name / "talks.json")).fingerprint for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("{nonsense", "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ({"question": "q"}, "holds a dict"),
        ([], "holds no item"),
        (["text"], "item 0 is"),
        ([GOOD, None], "item 1 is"),
        ([GOOD, {"question": "q"}], "item 1 has no answer; it needs the text 'answer'"),
        ([{"question": 3, "answer": "a"}], "item 0 has the question '3'"),
        ([GOOD, {**GOOD, "answer": " \n"}], "item 1 has an empty answer"),
        ([{**GOOD, "question": ""}], "item 0 has an empty question"),
        ([{**GOOD, "question": "<image>\n"}], "item 0 has an empty question"),
        ([{**GOOD, "answer": "\ud800 half"}], "item 0 has half a surrogate pair"),
        ([{**GOOD, "image": "../secret.png"}], "item 0 names the image '../secret.png', which lies outside"),
        ([{**GOOD, "image": "/etc/passwd"}], "item 0 names the image '/etc/passwd', which lies outside"),
        ([{**GOOD, "image": "a/../../secret.png"}], "lies outside"),
        ([{**GOOD, "image": "a\0.png"}], "item 0 has the image"),
        ([{**GOOD, "image": "\udcff.png"}], "item 0 has the image"),
        ([{**GOOD, "image": ["a.png"]}], "item 0 has the image"),
        ([{**GOOD, "image": "x" * 2000}], "item 0 has the image"),
        ([{**GOOD, "image": "x" * 600}], "item 0 names the image"),
        ([{**GOOD, "image": "nowhere.png"}], "item 0 names the image 'nowhere.png', which is not a file"),
        ([{**GOOD, "image": "."}], "which is not a file"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, content: Any, fragment: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (5, 4)).save(tmp_path / "secret.png")
    assert fragment in refused(written(folder, content))


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    assert "is not JSON in UTF-8" in refused(written(tmp_path, '[{"question": "\u00e9", "answer": "a"}]', "latin-1"))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refused(str(tmp_path / "nowhere.json"))
    assert "cannot be read" in refused(str(tmp_path))


@pytest.mark.parametrize("number", [0, -3])
def test_a_number_of_samples_below_one_is_refused(tmp_path: Path, number: int) -> None:
    assert f"dataset.num_samples is {number}" in refused(written(tmp_path, [GOOD]), num_samples=number)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (5, 4)).save(tmp_path / "secret.png")
    (folder / "a.png").symlink_to(tmp_path / "secret.png")
    assert "item 0 names the image 'a.png', which lies outside" in refused(
        written(folder, [{**GOOD, "image": "a.png"}])
    )


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("b.png")
    (tmp_path / "b.png").symlink_to("a.png")
    assert "item 0 names the image 'a.png'" in refused(written(tmp_path, [{**GOOD, "image": "a.png"}]))


@pytest.mark.parametrize("size", [(8001, 8000), (14_000, 14_000)])
def test_a_giant_picture_is_refused_before_it_is_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("1", size).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 10**5
    assert "item 0: a.png" in refused(written(tmp_path, [{**GOOD, "image": "a.png"}]))


def test_broken_and_foreign_pictures_are_refused(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    jpg, png = (tmp_path / "whole.jpg").read_bytes(), (tmp_path / "whole.png").read_bytes()
    contents = {
        "text.png": b"hello",
        "empty.png": b"",
        "cut.jpg": jpg[: len(jpg) // 2],
        "cut.png": png[: len(png) // 2],
        "chunk.png": png[:37] + b"\0" * 8 + png[45:],
        "type.png": png[:12] + b"XXXX" + png[16:],
    }
    Image.new("RGB", (5, 4)).save(tmp_path / "a.bmp")
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "a.bmp"):
        message = refused(written(tmp_path, [{**GOOD, "image": name}]))
        assert message.startswith(f"talks.json, item 0: {name} cannot be decoded"), message


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
