"""Questions about pictures as JSON: the Elastic Cache release's form, and LLaVA's conversations.

An item is `{"image": ..., "question": ..., "answer": ...}`, or `{"image": ..., "conversations":
[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}` (LLaVA's training files,
LLaVA-Description / detail_1k), whose later pairs become follow-up questions. LLaVA's `id` names a
picture and repeats, so an item is named by its number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.datasets.base import Example
from kvbench.datasets.fields import object_of, text_of
from kvbench.datasets.file_dataset import FileDataset
from kvbench.datasets.pictures import picture_at
from kvbench.datasets.rows import Row
from kvbench.datasets.turn import Turn
from kvbench.errors import DataError

_IMAGE_MARK = "<image>"
_SPEAKERS = ("human", "gpt")


@dataclass(frozen=True, kw_only=True)
class Conversation(FileDataset):
    """Examples of a JSON or JSONL file. `images`: folder of the pictures, by default the file's own."""

    images: str | None = None

    def _example(self, row: Row) -> Example:
        content = object_of(row.content, row.where, ("question", "answer"))
        turns = _conversations(content, row.where) if "conversations" in content else [_pair(content, row.where)]
        picture = content.get("image")
        folder = Path(self.images or Path(self.path).parent).expanduser()
        return Example(
            id=f"{row.number}",
            cluster=str(picture) if picture else f"{row.number}",
            question=turns[0].question,
            reference=turns[0].answer,
            load_image=picture_at(picture, folder, row.where) if picture else None,
            follow_ups=tuple(turns[1:]),
        )


def _pair(content: Mapping[str, Any], where: str) -> Turn:
    return Turn(question=_said(content, "question", where), answer=_said(content, "answer", where))


def _conversations(content: Mapping[str, Any], where: str) -> list[Turn]:
    said = content["conversations"]
    if not isinstance(said, list) or not said or len(said) % 2:
        raise DataError(f"{where} has the conversations {str(said)[:80]!r}; it must be a list of human, gpt pairs")
    values = []
    for number, part in enumerate(said):
        speaker, at = _SPEAKERS[number % 2], f"{where}, conversations {number}"
        if object_of(part, at, ("from", "value")).get("from") != speaker:
            raise DataError(f"{at} is from {str(part.get('from'))[:40]!r}; it must be from {speaker!r}")
        values.append(_said(part, "value", at))
    return [Turn(question=q, answer=a) for q, a in zip(values[::2], values[1::2], strict=True)]


def _said(content: Mapping[str, Any], name: str, where: str) -> str:
    text = text_of(content, name, where).replace(_IMAGE_MARK, "").strip()
    if not text:
        raise DataError(f"{where} has an empty {name}: it holds {_IMAGE_MARK} alone; every item needs one")
    return text
