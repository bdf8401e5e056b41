"""Published sets of questions: LLaVA-Bench and MM-Vet, one about a picture; with follow-ups LLaVA's, and MT-Bench.

LLaVA-Bench has JSON lines, a question `{"question_id", "image", "text"}`, and in a file of their own the answers
`{"question_id", "text"}`. The form that holds both, `{"id", "image", "instruction", "output"}` (the 30 x 3 COCO
file), is read too; its ids name pictures, so an item is named by its number.

MM-Vet (arXiv 2308.02490) is `mm-vet.json`, an object keyed by question id, and a folder of pictures. An answer may
list alternatives (`<OR>`), each of required parts (`<AND>`). The reference is the first alternative, its parts joined
by ", ". MM-Vet's own score asks GPT-4 and is not computed here.

`Conversation` and `MTBench` have questions with follow-ups. Of pictures (the Elastic Cache release's form, LLaVA's
conversations) an item is `{"image": ..., "question": ..., "answer": ...}`, or `{"image": ..., "conversations":
[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}` (LLaVA's training files,
LLaVA-Description / detail_1k), whose later pairs become follow-up questions. LLaVA's `id` names a
picture and repeats, so an item is named by its number.

Of MT-Bench (arXiv 2306.05685; Vicuna's have one turn) it is `{"question_id", "turns": [text, ...]}`; references are
in the row (`reference`) or in FastChat's answer files (`choices[0].turns`). Most turns have none: their answers are
compared with the full cache's only. MT-Bench's own score asks a model to judge and is not computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvbench.datasets.base import Example, Fields, Turn, checked_text
from kvbench.datasets.files import (
    FileDataset,
    Row,
    answer_for,
    answers_by_id,
    existing,
    item_row,
    picture_at,
    read_items,
    read_json,
    read_rows,
    texts_by_id,
)
from kvbench.errors import DataError


@dataclass(frozen=True, kw_only=True)
class LlavaBench(FileDataset):
    """Examples of a question file, clustered by picture.

    images: folder of the pictures, by default the file's own. image_prefix: put before every picture's
    name (`COCO_val2014_` where the questions leave it out). answers: JSON lines of reference answers;
    without it there is no reference, and answers are compared with the full cache's only.
    """

    images: str | None = None
    image_prefix: str = ""
    answers: str | None = None

    @cached_property
    def _references(self) -> Mapping[str, Mapping[str, Any]] | None:
        return answers_by_id(self.answers) if self.answers else None

    def _example(self, row: Row) -> Example:
        fields = row.fields("question_id", "image", "text")
        folder = Path(self.images or Path(self.path).parent).expanduser()
        picture = self.image_prefix + fields.text("image")
        if "instruction" in fields.content:
            name, question, reference = str(row.number), fields.text("instruction"), fields.text("output")
        else:
            name, question, reference = fields.id("question_id", default=row.number), fields.text("text"), ""
            if self._references is not None:
                answer = answer_for(name, self._references, row.where, str(self.answers))
                reference = Fields(answer, f"the answer to {row.where}", ("text",)).text("text")
        return Example(
            id=name,
            cluster=picture,
            question=question,
            reference=reference,
            load_image=picture_at(picture, folder, row.where),
        )


@dataclass(frozen=True, kw_only=True)
class MMVet(FileDataset):
    """Examples of `mm-vet.json`, clustered by picture.

    images: folder of the pictures, by default `images` beside the file. answers: a JSON object id -> text
    whose texts are the references in the place of the file's own short ones (a model's responses, say).
    ids: a JSON list of question ids to keep, such as the authors' subset without people.
    """

    images: str | None = None
    answers: str | None = None
    ids: str | None = None

    @cached_property
    def _references(self) -> Mapping[str, str] | None:
        return texts_by_id(self.answers, "answers") if self.answers else None

    def _rows(self) -> Iterator[Row]:
        path = existing(self.path)
        items = Fields(read_items(path), path.name, ("an item for each question id",)).content
        names = _wanted(self.ids, items) if self.ids else list(items)
        for number, name in enumerate(names):
            yield item_row(f"{path.name}, item {name!r}", number, (name, items[name]))

    def _example(self, row: Row) -> Example:
        name, content = row.read()
        fields = Fields(content, row.where, ("imagename", "question", "answer"))
        folder = Path(self.images).expanduser() if self.images else existing(self.path).parent / "images"
        picture = fields.text("imagename")
        first, *_ = fields.text("answer").split("<OR>")
        reference = ", ".join(part.strip() for part in first.split("<AND>") if part.strip())
        if self._references:
            reference = answer_for(name, self._references, row.where, str(self.answers))
        return Example(
            id=checked_text(name, "id", row.where),
            cluster=picture,
            question=fields.text("question"),
            reference=checked_text(reference, "answer", row.where),
            load_image=picture_at(picture, folder, row.where),
        )


def _wanted(source: str, items: Mapping[str, object]) -> list[str]:
    path = existing(source, "ids")
    names = read_json(path, "ids")
    if not isinstance(names, list) or not names:
        raise DataError(f"{path} holds {str(names)[:60]!r}; dataset.ids must be a JSON list of question ids")
    unknown = [name for name in names if not isinstance(name, str) or name not in items]
    if unknown:
        raise DataError(f"{path} names the question {str(unknown[0])[:60]!r}, which the data set does not have")
    return [name for name in items if name in set(names)]


_IMAGE_MARK = "<image>"
_SPEAKERS = ("human", "gpt")


@dataclass(frozen=True, kw_only=True)
class Conversation(FileDataset):
    """Examples of a JSON or JSONL file. `images`: folder of the pictures, by default the file's own."""

    images: str | None = None

    def _example(self, row: Row) -> Example:
        fields = row.fields("question", "answer")
        if "conversations" in fields.content:
            first, *later = _conversations(fields)
        else:
            first, later = Turn(question=_said(fields, "question"), answer=_said(fields, "answer")), []
        picture = fields.content.get("image")
        folder = Path(self.images or Path(self.path).parent).expanduser()
        return Example(
            id=f"{row.number}",
            cluster=str(picture) if picture else f"{row.number}",
            question=first.question,
            reference=first.answer,
            load_image=picture_at(picture, folder, row.where) if picture else None,
            follow_ups=tuple(later),
        )


def _conversations(fields: Fields) -> list[Turn]:
    said = fields.content["conversations"]
    if not isinstance(said, list) or not said or len(said) % 2:
        raise DataError(
            f"{fields.where} has the conversations {str(said)[:80]!r}; it must be a list of human, gpt pairs"
        )
    values = []
    for number, content in enumerate(said):
        speaker, where = _SPEAKERS[number % 2], f"{fields.where}, conversations {number}"
        part = Fields(content, where, ("from", "value"))
        if part.content.get("from") != speaker:
            raise DataError(f"{where} is from {str(part.content.get('from'))[:40]!r}; it must be from {speaker!r}")
        values.append(_said(part, "value"))
    return [Turn(question=q, answer=a) for q, a in zip(values[::2], values[1::2], strict=True)]


def _said(fields: Fields, name: str) -> str:
    text = fields.text(name).replace(_IMAGE_MARK, "").strip()
    if not text:
        raise DataError(f"{fields.where} has an empty {name}: it holds {_IMAGE_MARK} alone; every item needs one")
    return text


@dataclass(frozen=True, kw_only=True)
class MTBench(FileDataset):
    """Examples of a question file; later turns are follow-up questions.

    answers: JSON lines of reference answers. only_with_reference: leave the questions without one aside (all
    but math, reasoning and coding), as perplexity needs references; num_samples counts what is left.
    """

    answers: str | None = None
    only_with_reference: bool = False

    @cached_property
    def _references(self) -> Mapping[str, Mapping[str, Any]]:
        return answers_by_id(self.answers) if self.answers else {}

    def _rows(self) -> Iterator[Row]:
        for row in read_rows(self.path):
            if not self.only_with_reference or row.problem is not None or self._has_reference(row.content):
                yield row

    def _has_reference(self, content: Any) -> bool:
        """Return True also for a row of the wrong form, which is told by its own message."""
        if not isinstance(content, dict) or str(content.get("question_id")) in self._references:
            return True
        own = content.get("reference")
        return own[0] != "" if isinstance(own, list) and own else bool(own)

    def _example(self, row: Row) -> Example:
        fields = row.fields("question_id", "turns")
        name = fields.id("question_id", default=row.number)
        questions = _texts(fields.content.get("turns"), "turns", row.where)
        answers = self._answers(name, fields) or [""] * len(questions)
        if len(answers) != len(questions):
            raise DataError(f"{row.where} has {len(questions)} turns, but {len(answers)} reference answers")
        first, *later = (Turn(question=q, answer=a) for q, a in zip(questions, answers, strict=True))
        return Example(id=name, cluster=name, question=first.question, reference=first.answer, follow_ups=tuple(later))

    def _answers(self, name: str, fields: Fields) -> list[str]:
        if name in self._references:
            choices = self._references[name].get("choices")
            if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
                raise DataError(f"the answer to {fields.where} has no choices; give FastChat's reference_answer file")
            return _texts(choices[0].get("turns"), "choices[0].turns", f"the answer to {fields.where}")
        own = fields.content.get("reference")
        return _texts(own, "reference", fields.where, may_be_empty=True) if own else []


def _texts(value: Any, name: str, where: str, *, may_be_empty: bool = False) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise DataError(f"{where} has the {name} {str(value)[:80]!r}; it must be a list of texts")
    return [checked_text(text, name, where) if text.strip() or not may_be_empty else "" for text in value]
