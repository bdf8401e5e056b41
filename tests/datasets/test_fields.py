"""A text that holds a picture mark is text: in every reader, for the marks of every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvbench.datasets.base import PICTURE_MARKS, Example, without_marks
from kvbench.datasets.files import FileDataset
from kvbench.datasets.questions import Conversation, LlavaBench, MMVet, MTBench, Problems
from kvbench.datasets.retrieval import LongBench, Needles, Retrieval
from kvbench.datasets.text import Summaries, TextWindows
from tests.datasets.files import write_json, write_lines, write_picture


@pytest.mark.parametrize("mark", PICTURE_MARKS)
def test_a_mark_is_parted_and_nothing_else_changes(mark: str) -> None:
    text = f"a {mark}\n{mark}{mark} b <images> <IMAGE> image <|im_start|> <unk>"
    parted = without_marks(text)
    assert not any(other in parted for other in PICTURE_MARKS)
    assert parted == text.replace(mark, f"{mark[0]} {mark[1:]}")
    assert without_marks(parted) == parted


def test_no_mark_is_left_by_marks_inside_each_other() -> None:
    assert without_marks("<im<image>age> <<img>img>") == "<im< image>age> << img>img>"


def said(mark: str) -> str:
    return f"What does {mark} do?"


def of_llava_bench(folder: Path, mark: str) -> FileDataset:
    answers = write_lines(folder / "a.jsonl", [{"question_id": 0, "text": said(mark)}])
    row = {"question_id": 0, "image": "p.png", "text": said(mark)}
    return LlavaBench(path=write_lines(folder / "q.jsonl", [row]), answers=answers)


def of_mm_vet(folder: Path, mark: str) -> FileDataset:
    item = {"imagename": "p.png", "question": said(mark), "answer": said(mark)}
    return MMVet(path=write_json(folder / "mm.json", {"v1_0": item}), images=str(folder))


def of_mt_bench(folder: Path, mark: str) -> FileDataset:
    row = {"question_id": 1, "turns": [said(mark)] * 2, "reference": [said(mark)] * 2}
    return MTBench(path=write_lines(folder / "q.jsonl", [row]))


def of_summaries(folder: Path, mark: str) -> FileDataset:
    row = {"document": said(mark), "summary": said(mark)}
    return Summaries(path=write_lines(folder / "s.jsonl", [row]), instruction=said(mark))


def of_longbench(folder: Path, mark: str) -> FileDataset:
    row = {"input": said(mark), "context": said(mark), "answers": [said(mark)]}
    return LongBench(path=write_lines(folder / "l.jsonl", [row]))


def of_retrieval(folder: Path, mark: str) -> FileDataset:
    return Retrieval(
        path=write_lines(folder / "r.jsonl", [{"input": f"{said(mark)}\n{said(mark)}", "outputs": [said(mark)]}])
    )


def of_windows(folder: Path, mark: str) -> FileDataset:
    (folder / "w.txt").write_text(f"{said(mark)} " * 40)
    return TextWindows(path=str(folder / "w.txt"), prompt_tokens=4, scored_tokens=4)


def of_conversation(folder: Path, mark: str) -> FileDataset:
    values = [{"from": who, "value": said(mark)} for who in ("human", "gpt", "human", "gpt")]
    return Conversation(path=write_json(folder / "c.json", [{"conversations": values, "image": "p.png"}]))


def of_problems(folder: Path, mark: str) -> FileDataset:
    row = {"question": said(mark), "answer": f"{said(mark)} #### 4"}
    return Problems(path=write_lines(folder / "p.jsonl", [row]))


READERS = (
    of_llava_bench,
    of_mm_vet,
    of_mt_bench,
    of_summaries,
    of_longbench,
    of_retrieval,
    of_windows,
    of_conversation,
    of_problems,
)


def texts_of(example: Example) -> list[str]:
    turns = [text for turn in example.follow_ups for text in (turn.question, turn.answer)]
    return [example.context, example.question, example.reference, *turns, *map(str, example.facts or ())]


@pytest.mark.parametrize("mark", ["<image>", "<|vision_start|>", "<imgpad>"])
@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_every_reader_gives_text_without_marks(
    tmp_path: Path, make: Callable[[Path, str], FileDataset], mark: str
) -> None:
    write_picture(tmp_path / "p.png")
    data = make(tmp_path, mark)
    whole = "\n".join(text for example in data.examples() for text in texts_of(example))
    assert mark not in whole
    stripped = isinstance(data, Conversation) and mark == "<image>"  # LLaVA's files mark the picture's place
    assert ("What does  do?" if stripped else f"What does {mark[0]} {mark[1:]} do?") in whole


def test_an_expected_text_with_a_mark_is_found_in_an_answer_as_it_is_asked_for(tmp_path: Path) -> None:
    data = of_retrieval(tmp_path, "<image>")
    (example,) = data.examples()
    assert data.facts_in(f"It says: {example.reference}") == example.facts


def test_every_reader_of_files_is_looked_at_here() -> None:
    made = {make.__annotations__ and make.__name__.removeprefix("of_") for make in READERS}
    assert len(made) == len(FileDataset.__subclasses__())


def test_hay_of_a_file_holds_no_mark(tmp_path: Path) -> None:
    (tmp_path / "hay.txt").write_text("A tag <image> is here. Another </img> there. And nothing.")
    text = Needles(num_samples=1, filler=str(tmp_path / "hay.txt")).examples()[0].context
    assert "< image>" in text
    assert not any(mark in text for mark in PICTURE_MARKS)
