"""LLaVA-Bench (COCO and in-the-wild): questions as JSON lines, answers in a file of their own.

A question is `{"question_id", "image", "text"}`, an answer `{"question_id", "text"}`. The form that holds
both, `{"id", "image", "instruction", "output"}` (the 30 x 3 COCO file), is read too; its ids name
pictures, so an item is named by its number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvbench.datasets.answers_file import answer_for, answers_by_id
from kvbench.datasets.base import Example
from kvbench.datasets.fields import id_of, object_of, text_of
from kvbench.datasets.file_dataset import FileDataset
from kvbench.datasets.pictures import picture_at
from kvbench.datasets.rows import Row


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
