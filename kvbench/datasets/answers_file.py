"""Answers that lie in a file of their own, by question id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvbench.datasets.fields import id_of, object_of, text_of
from kvbench.datasets.rows import existing, read_json, read_rows
from kvbench.errors import DataError


def texts_by_id(source: str, setting: str) -> dict[str, str]:
    """Return id -> text of a JSON object. Raises: ConfigError, DataError naming the id."""
    path = existing(source, setting)
    content = object_of(read_json(path, setting), path.name, ("a text for each id",))
    return {name: text_of(content, name, path.name) for name in content}


def answers_by_id(source: str) -> dict[str, Mapping[str, Any]]:
    """Return question_id -> row of JSON lines. Raises: ConfigError, DataError naming the line."""
    existing(source, "answers")
    found: dict[str, Mapping[str, Any]] = {}
    for row in read_rows(source):
        if row.problem is not None:
            raise DataError(row.problem)
        content = object_of(row.content, row.where, ("question_id",))
        name = id_of(content, ("question_id",), "", row.where)
        if name in found:
            raise DataError(f"{row.where} has the question_id {name!r}, which an earlier line has; ids must differ")
        found[name] = content
    return found


def answer_for(name: str, answers: Mapping[str, Any], where: str, source: str) -> Any:
    """Return the answer of question `name`. Raises: DataError if there is none."""
    if name not in answers:
        raise DataError(f"{where} (id {name!r}) has no answer in {source}; give the file that belongs to the questions")
    return answers[name]
