"""LLaVA-Bench (COCO and in-the-wild): questions as JSON lines, answers in a file of their own.

A question is `{"question_id", "image", "text"}`, an answer `{"question_id", "text"}`. The form that holds
both, `{"id", "image", "instruction", "output"}` (the 30 x 3 COCO file), is read too; its ids name
pictures, so an item is named by its number.

MM-Vet (arXiv 2308.02490): `mm-vet.json`, an object keyed by question id, and a folder of pictures.

An answer may list alternatives (`<OR>`), each of required parts (`<AND>`). The reference is the first
alternative, its parts joined by ", ". MM-Vet's own score asks GPT-4 and is not computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvbench.datasets.base import Example, checked_text, id_of, object_of, text_of
from kvbench.datasets.files import (
    FileDataset,
    Row,
    answer_for,
    answers_by_id,
    existing,
    item_row,
    read_items,
    read_json,
    texts_by_id,
)
from kvbench.datasets.pictures import picture_at
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
        content = object_of(row.content, row.where, ("question_id", "image", "text"))
        folder = Path(self.images or Path(self.path).parent).expanduser()
        picture = self.image_prefix + text_of(content, "image", row.where)
        both = "instruction" in content
        name = str(row.number) if both else id_of(content, ("question_id",), str(row.number), row.where)
        return Example(
            id=name,
            cluster=picture,
            question=text_of(content, "instruction" if both else "text", row.where),
            reference=text_of(content, "output", row.where) if both else self._reference(name, row.where),
            load_image=picture_at(picture, folder, row.where),
        )

    def _reference(self, name: str, where: str) -> str:
        if self._references is None:
            return ""
        answer = answer_for(name, self._references, where, str(self.answers))
        return text_of(answer, "text", f"the answer to {where}")


_NEEDS = ("imagename", "question", "answer")


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
        items = object_of(read_items(path), path.name, ("an item for each question id",))
        names = _wanted(self.ids, items) if self.ids else list(items)
        for number, name in enumerate(names):
            yield item_row(f"{path.name}, item {name!r}", number, (name, items[name]))

    def _example(self, row: Row) -> Example:
        name, content = row.content
        content = object_of(content, row.where, _NEEDS)
        folder = Path(self.images).expanduser() if self.images else existing(self.path).parent / "images"
        picture = text_of(content, "imagename", row.where)
        own = _first_alternative(text_of(content, "answer", row.where))
        other = answer_for(name, self._references, row.where, str(self.answers)) if self._references else None
        return Example(
            id=checked_text(name, "id", row.where),
            cluster=picture,
            question=text_of(content, "question", row.where),
            reference=checked_text(own if other is None else other, "answer", row.where),
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


def _first_alternative(answer: str) -> str:
    parts = answer.split("<OR>")[0].split("<AND>")
    return ", ".join(part.strip() for part in parts if part.strip())
