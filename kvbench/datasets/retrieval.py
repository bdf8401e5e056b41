"""Needle, passkey and RULER files: a long text that hides something, and what must be found.

A row has `input` and what is expected (`outputs`, `answers`, `answer` or `target`). Every expected text is
a fact, so an answer is also scored by how many it names.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kvbench.datasets.base import Example
from kvbench.datasets.fields import id_of, object_of, text_of
from kvbench.datasets.file_dataset import FileDataset
from kvbench.datasets.longbench import answers_of
from kvbench.datasets.rows import Row
from kvbench.errors import DataError

_EXPECTED = ("outputs", "answers", "answer", "target")


@dataclass(frozen=True, kw_only=True)
class Retrieval(FileDataset):
    """Examples of a JSON or JSONL file, each its own cluster.

    question: what is asked after every `input` where rows have no `question` of their own; null: the last
    line of `input` is the question (RULER). The id is the row's `index` or `id`, else its number.
    """

    question: str | None = None

    def _example(self, row: Row) -> Example:
        content = object_of(row.content, row.where, ("input", "outputs"))
        name = id_of(content, ("index", "id"), str(row.number), row.where)
        expected = answers_of(content, _expected_name(content, row.where), row.where)
        context, question = self._split(content, row.where)
        return Example(
            id=name,
            cluster=name,
            context=context,
            question=question,
            reference=", ".join(expected),
            facts=frozenset(expected),
            fact_noun="needles",
        )

    def _split(self, content: Mapping[str, Any], where: str) -> tuple[str, str]:
        text = text_of(content, "input", where)
        asked = text_of(content, "question", where) if "question" in content else (self.question or "").strip()
        if asked:
            return f"{text}\n", asked
        context, line, question = text.rpartition("\n")
        return context + line, question

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(str(fact) for example in self.examples() for fact in example.facts or ())

    def facts_in(self, text: str) -> frozenset[Hashable]:
        """Return every text expected anywhere in the data set that `text` holds, as RULER counts (a substring)."""
        return frozenset(known for known in self._known if known in text)


def _expected_name(content: Mapping[str, Any], where: str) -> str:
    found = next((name for name in _EXPECTED if name in content), None)
    if found is None:
        raise DataError(f"{where} says not what is expected; it needs one of {', '.join(_EXPECTED)}")
    return found
