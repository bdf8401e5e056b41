"""LLaVA-Bench (COCO and in-the-wild) and MM-Vet: single questions about pictures.

LLaVA-Bench has JSON lines, a question `{"question_id", "image", "text"}`, and in a file of their own the answers
`{"question_id", "text"}`. The form that holds both, `{"id", "image", "instruction", "output"}` (the 30 x 3 COCO
file), is read too; its ids name pictures, so an item is named by its number.

MM-Vet (arXiv 2308.02490) is `mm-vet.json`, an object keyed by question id, and a folder of pictures. An answer may
list alternatives (`<OR>`), each of required parts (`<AND>`). The reference is the first alternative, its parts joined
by ", ". MM-Vet's own score asks GPT-4 and is not computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvbench.datasets.base import Example, Fields, checked_text
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
