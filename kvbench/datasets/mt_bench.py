"""MT-Bench (arXiv 2306.05685): `question.jsonl` of two-turn questions, and Vicuna's of one turn.

A question is `{"question_id", "turns": [text, ...]}`; its references are in the row (`reference`) or in
FastChat's answer files (`choices[0].turns`). Most turns have none: their answers are compared with
the full cache's only. MT-Bench's own score asks a model to judge and is not computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kvbench.datasets.answers_file import answers_by_id
from kvbench.datasets.base import Example
from kvbench.datasets.fields import checked_text, id_of, object_of
from kvbench.datasets.file_dataset import FileDataset
from kvbench.datasets.rows import Row, read_rows
from kvbench.datasets.turn import Turn
from kvbench.errors import DataError


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
        content = object_of(row.content, row.where, ("question_id", "turns"))
        name = id_of(content, ("question_id",), str(row.number), row.where)
        questions = _texts(content.get("turns"), "turns", row.where)
        answers = self._answers(name, content, row.where) or [""] * len(questions)
        if len(answers) != len(questions):
            raise DataError(f"{row.where} has {len(questions)} turns, but {len(answers)} reference answers")
        turns = [Turn(question=q, answer=a) for q, a in zip(questions, answers, strict=True)]
        return Example(
            id=name,
            cluster=name,
            question=turns[0].question,
            reference=turns[0].answer,
            follow_ups=tuple(turns[1:]),
        )

    def _answers(self, name: str, content: Mapping[str, Any], where: str) -> list[str]:
        if name in self._references:
            choices = self._references[name].get("choices")
            if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
                raise DataError(f"the answer to {where} has no choices; give FastChat's reference_answer file")
            return _texts(choices[0].get("turns"), "choices[0].turns", f"the answer to {where}")
        own = content.get("reference")
        return _texts(own, "reference", where, may_be_empty=True) if own else []


def _texts(value: Any, name: str, where: str, *, may_be_empty: bool = False) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise DataError(f"{where} has the {name} {str(value)[:80]!r}; it must be a list of texts")
    return [checked_text(text, name, where) if text.strip() or not may_be_empty else "" for text in value]
