"""LongBench (arXiv 2308.14508): JSON lines of `input`, `context`, `answers`, with a prompt per task.

The prompt is a template with {context} and {input}; everything up to the context's end is context,
the rest is the question (a template that asks before the context has no part to hide). Prompts are
put into the model's chat template where it has one (the benchmark's own scripts leave it out for
few-shot and code tasks), and nothing is cut out of the middle.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kvbench.datasets.base import Example, Fields, checked_text
from kvbench.datasets.files import FileDataset, Row, texts_by_id
from kvbench.errors import ConfigError, DataError, close_matches

_CONTEXT, _INPUT = "{context}", "{input}"


@dataclass(frozen=True, kw_only=True)
class LongBench(FileDataset):
    """Examples of one task's file, each its own cluster; the reference is the first answer.

    templates: the benchmark's `dataset2prompt.json` (task -> template); the task is the row's `dataset`, else
    the file's name up to its first dot. Without it `template` serves for all. A row without an answer is bad.
    """

    template: str = "{context}\n\n{input}"
    templates: str | None = None

    def _check_settings(self) -> None:
        _check_template(self.template, "dataset.template")

    @cached_property
    def _by_task(self) -> Mapping[str, str] | None:
        return texts_by_id(self.templates, "templates") if self.templates else None

    def _example(self, row: Row) -> Example:
        fields = row.fields("input", "context", "answers")
        name = fields.id("_id", "id", default=row.number)
        before, after = self._template(fields).split(_CONTEXT)
        asked = fields.content.get("input")
        if not isinstance(asked, str):
            raise DataError(
                f"{row.where} has the input {str(asked)[:80]!r}; it must be text, empty where nothing is asked"
            )
        context, question = before.replace(_INPUT, asked) + fields.text("context"), after.replace(_INPUT, asked)
        if not question.strip() or (_INPUT in before and asked):
            context, question = "", context + question
        return Example(
            id=name, cluster=name, context=context, question=question, reference=answers_of(fields, "answers")[0]
        )

    def _template(self, fields: Fields) -> str:
        if self._by_task is None:
            return self.template
        task = str(fields.content.get("dataset") or Path(self.path).name.split(".")[0])
        if task not in self._by_task:
            raise DataError(
                f"{fields.where} is of the task {task!r}, which has no template; {close_matches(task, self._by_task)}"
            )
        _check_template(self._by_task[task], f"the template of {task!r} in {self.templates}")
        return self._by_task[task]


def _check_template(template: str, name: str) -> None:
    if template.count(_CONTEXT) != 1:
        raise ConfigError(f"{name} is {template[:80]!r}; it must hold {_CONTEXT} once, and may hold {_INPUT}")


def answers_of(fields: Fields, name: str) -> list[str]:
    """Return a list of texts: JSON's, one text or number, or the text of a Python list (as some copies have it)."""
    found = fields.content.get(name)
    if isinstance(found, str) and found.lstrip().startswith("["):
        try:
            found = ast.literal_eval(found.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise DataError(f"{fields.where} has {name} that begin a list and end otherwise ({error})") from error
    items = found if isinstance(found, list) else [found]
    if not items or any(isinstance(item, bool) or not isinstance(item, str | int) for item in items):
        raise DataError(f"{fields.where} has the {name} {str(found)[:80]!r}; it must be a text or a list of texts")
    return [checked_text(str(item), name, fields.where) for item in items]
