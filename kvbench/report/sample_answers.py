"""A record's samples as answers to be read: one per sample, or one per turn of a conversation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvbench.measures import MEASURES, measure
from kvbench.report.cell import CellResult
from kvbench.report.collapses import is_collapsed
from kvbench.report.comparisons import PRIMARY_QUALITIES
from kvbench.report.judged import OTHER_QUALITIES
from kvbench.report.paired import is_better, sample_score

_TURN = re.compile(r"turn(\d+)_(.+)")
_WORD = re.compile(r"\s*\S+")
_JUDGED_BY = (*PRIMARY_QUALITIES[:1], *OTHER_QUALITIES)
FIRST_TURN = ", turn 1"  # the end of its answer's id
COLLAPSE_RULE = (
    "Collapsed: under half of the full cache's score in ROUGE-L vs full, or in the next quality that was measured; "
    "in perplexity, more than one nat per token worse."
)

Mark = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer with its scores by measure; texts are None where the record has none.

    marks: place of the first different token in the full cache's text and in this one, None for equal texts.
    exact: False where the place is that of the first different word, because the record does not hold the token's.
    """

    id: str
    question: str | None
    text: str | None
    full: str | None
    reference: str | None
    scores: Mapping[str, float]
    marks: tuple[Mark, Mark] | None
    exact: bool
    token: int | None


def answers_of(cell: CellResult) -> Iterator[Answer]:
    """Yield the answers of a cell in the order of its samples and turns."""
    for sample in cell.samples:
        turns = _turns(sample)
        if "text" in sample or not turns:
            yield _answer(str(sample.get("id", "")), sample)
        for number, fields in turns.items():
            yield _answer(f"{sample.get('id', '')}, turn {number}", fields)


def collapsed(scores: Mapping[str, float], full: Mapping[str, float]) -> bool:
    """Tell whether an answer lost most of what the full cache's was worth; see COLLAPSE_RULE."""
    name = next((name for name in _JUDGED_BY if name in scores and name in full), None)
    return name is not None and is_collapsed(name, scores[name], full[name])


def better_or_worse(name: str, score: float, full: float) -> str:
    """Return "worse", "better" or nothing for measures without a good direction and for equal scores."""
    if measure(name).better == "none" or score == full:
        return ""
    return "better" if is_better(name, score, full) else "worse"


def first_different_word(full: str, text: str) -> tuple[Mark, Mark] | None:
    """Return the places of the first different words; behind the last one where a text ends there."""
    one, two = (list(_WORD.finditer(words)) for words in (full, text))
    for index in range(max(len(one), len(two))):
        left, right = (words[index] if index < len(words) else None for words in (one, two))
        if left is None or right is None or left[0].strip() != right[0].strip():
            return _word_place(left, full), _word_place(right, text)
    return None


def _word_place(word: re.Match[str] | None, text: str) -> Mark:
    return (len(text), len(text)) if word is None else (word.end() - len(word[0].lstrip()), word.end())


def _turns(sample: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for name, value in sample.items():
        part = _TURN.fullmatch(str(name))
        if part is not None:
            found.setdefault(int(part[1]), {})[part[2]] = value
    return dict(sorted(found.items()))


def _answer(name: str, fields: Mapping[str, Any]) -> Answer:
    text, full = _text(fields, "text"), _text(fields, "full_text")
    marks, exact = _marks(fields, full, text)
    scored = ((measured, sample_score(fields, measured)) for measured in MEASURES)
    token = fields.get("first_divergence_tokens")
    return Answer(
        id=name,
        question=_text(fields, "question"),
        text=text,
        full=full,
        reference=_text(fields, "reference"),
        scores={measured: score[0] / score[1] for measured, score in scored if score is not None},
        marks=marks,
        exact=exact,
        token=token if isinstance(token, int) and not isinstance(token, bool) else None,
    )


def _marks(fields: Mapping[str, Any], full: str | None, text: str | None) -> tuple[tuple[Mark, Mark] | None, bool]:
    if full is None or text is None:
        return None, False
    names = ("divergence_starts_at", "divergence_ends_at", "full_divergence_ends_at")
    places = [fields.get(name) for name in names]
    if all(isinstance(place, int) and not isinstance(place, bool) for place in places):
        start, end, full_end = (int(str(place)) for place in places)
        if 0 <= start <= end <= len(text) and start <= full_end <= len(full):
            return (_trimmed(full, start, full_end), _trimmed(text, start, end)), True
    return first_different_word(full, text), False


def _trimmed(text: str, start: int, end: int) -> Mark:
    """Leave out the white space that a token begins with, unless it is nothing else."""
    token = text[start:end]
    return (end - len(token.lstrip()), end) if token.strip() else (start, end)


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    return None if fields.get(name) is None else str(fields[name])
