"""The page's samples: every answer beside the full cache's, in a browser that links from numbers lead to.

A record's samples become `Answer`s, one per sample or one per turn of a conversation; of each cell as many as the page
has room for become data that the script `samples.js` shows. What all cells of a group share stands there once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

from markupsafe import Markup

from kvbench.measures import FACT_MEASURES, MEASURES, format_value, measure
from kvbench.report.compare import PRIMARY_QUALITIES, leading_quality
from kvbench.report.load import CellResult, Group, Results, is_better, sample_score
from kvbench.report.markup import MINUS, SampleLink, render, safe_json
from kvbench.report.standing import OTHER_QUALITIES, is_collapsed


class SampleLinks:
    """Makes the links of a page to samples, and knows what they lead to: `found`, by group's title and cell's label."""

    def __init__(self) -> None:
        """Start without any."""
        self.found: dict[tuple[str, str], set[str]] = {}

    def add(self, group: Group, cell: CellResult, sample: str) -> SampleLink:
        """Return a link that shows this sample of this cell."""
        label = group.cell_label(cell)
        self.found.setdefault((group.title, label), set()).add(sample)
        return SampleLink(group=group.title, cell=label, sample=sample, text=short_name(group, sample))


def short_name(group: Group, sample: str) -> str:
    """Return the id without what all ids of the group begin with, up to a slash."""
    first = next((str(one.get("id")) for cell in group.cells for one in cell.samples), "")
    prefix = first.rpartition("/")[0] + "/"
    return sample.removeprefix(prefix) if len(prefix) > 1 and sample.startswith(prefix) else sample


_TURN = re.compile(r"turn(\d+)_(.+)")
_WORD = re.compile(r"\S+")
_JUDGED_BY = (*FACT_MEASURES, *PRIMARY_QUALITIES[:1], *OTHER_QUALITIES)
FIRST_TURN = ", turn 1"  # the end of its answer's id
COLLAPSE_RULE = (
    "Collapsed: under half of the full cache's score in what the task asks for (needles, objects, questions), without "
    "that in the next quality that was measured; in perplexity, more than one nat per token worse."
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
        turns: dict[int, dict[str, Any]] = {}
        for name, value in sample.items():
            if part := _TURN.fullmatch(str(name)):
                turns.setdefault(int(part[1]), {})[part[2]] = value
        if "text" in sample or not turns:
            yield _answer(str(sample.get("id", "")), sample)
        for number, fields in sorted(turns.items()):
            yield _answer(f"{sample.get('id', '')}, turn {number}", fields)


def collapsed(scores: Mapping[str, float], full: Mapping[str, float]) -> bool:
    """Tell whether an answer lost most of what the full cache's was worth; see COLLAPSE_RULE."""
    name = next((name for name in _JUDGED_BY if name in scores and name in full), None)
    return name is not None and is_collapsed(name, scores[name], full[name])


def first_different_word(full: str, text: str) -> tuple[Mark, Mark] | None:
    """Return the places of the first different words; behind the last one where a text ends there."""
    for one, other in zip_longest(_WORD.finditer(full), _WORD.finditer(text)):
        if one is None or other is None or one[0] != other[0]:
            ends = (len(full), len(full)), (len(text), len(text))
            return one.span() if one else ends[0], other.span() if other else ends[1]
    return None


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


_NATS = ("ppl", "kl_to_full")
NO_LINKS: Mapping[tuple[str, str], Collection[str]] = MappingProxyType({})


def group_data(group: Group, most: int, linked: Mapping[tuple[str, str], Collection[str]] = NO_LINKS) -> dict[str, Any]:
    """Return one group for the script; references and the full cache's answers stand once per sample.

    Of each cell `most` answers, those first that are `linked` (samples by group's title and cell's label): all of them.
    """
    full = {} if group.full is None else {answer.id: answer for answer in answers_of(group.full)}
    items: dict[str, dict[str, Any]] = {}
    cells: list[dict[str, Any]] = []
    for cell in group.cells:
        if cell.samples:
            label, pairs = group.cell_label(cell), [(answer, full.get(answer.id)) for answer in answers_of(cell)]
            lost = {index for index, (one, other) in enumerate(pairs) if other and collapsed(one.scores, other.scores)}
            kept = _kept([one.id for one, _ in pairs], lost, most, set(linked.get((group.title, label), ())))
            shown = {
                "key": cell.key[:16],
                "label": label,
                "policy": group.series_label(cell),
                "budget": "" if cell.is_full else cell.budget,
                "samples": [_data(*pairs[index], items, is_lost=index in lost) for index in kept],
                "num": len(pairs),
                "num_collapsed": len(lost),
            }
            cells.append(shown)
    names = dict.fromkeys(name for cell in cells for answer in cell["samples"] for name, *_ in answer["scores"])
    labels = {name: measure(name).label for name in names}
    if "ppl" in labels:
        labels["ppl"] = "log-loss, nats per reference token"
    lead = leading_quality(group)
    return {"title": group.title, "cells": cells, "items": items, "labels": labels, "lead": lead}


def _kept(names: Sequence[str], lost: Collection[int], most: int, linked: Collection[str]) -> list[int]:
    """Return which answers the page holds: every one linked to, then the collapsed, then from the beginning.

    A conversation is linked to as a whole, which means its first turn.
    """
    first = [index for index, name in enumerate(names) if name in linked or name.removesuffix(FIRST_TURN) in linked]
    others = sorted(set(range(len(names))).difference(first), key=lambda index: (index not in lost, index))
    return sorted([*first, *others[: max(0, most - len(first))]])


def _data(answer: Answer, full: Answer | None, items: dict[str, dict[str, Any]], *, is_lost: bool) -> dict[str, Any]:
    item = items.setdefault(answer.id, {})
    for name in ("question", "reference", "full"):
        if getattr(answer, name) is not None:
            item.setdefault(name, getattr(answer, name))
    others: Mapping[str, float] = {} if full is None else full.scores
    scores = [
        _score(name, value, others.get(name)) for name, value in answer.scores.items() if not _LEFT_OUT.match(name)
    ]
    data = {"id": answer.id, "scores": scores}
    optional = {
        "text": answer.text,
        "full": answer.full if answer.full != item.get("full") else None,
        "marks": answer.marks,
        "token": answer.token,
        "word": (answer.marks is not None and not answer.exact) or None,
        "collapsed": is_lost or None,
    }
    return data | {name: value for name, value in optional.items() if value is not None}


def _score(name: str, value: float, full: float | None) -> list[str]:
    """Return measure, value, the full cache's, difference, and worse or better."""
    if full is None:
        return [name, _value(name, value), "", "", ""]
    difference = value - full
    in_points = measure(name).unit == "fraction"
    size = f"{100 * abs(difference):.1f} points" if in_points else _value(name, abs(difference))
    is_seen = bool(re.search("[1-9]", size))  # what rounds to nothing is neither better nor worse
    sign = "" if not is_seen else "+" if difference > 0 else MINUS
    has_way = measure(name).better != "none" and is_seen
    word = ("better" if is_better(name, value, full) else "worse") if has_way else ""
    return [name, _value(name, value), _value(name, full), sign + size, word]


def _value(name: str, value: float) -> str:
    return f"{value:.3f}" if name in _NATS else format_value(name, value)


_MOST_SAMPLES = 4000
_MOST_BYTES = 700_000  # of answers, so that a page of a hundred cells stays under three million
_LEFT_OUT = re.compile(r"(turn\d+_)?rouge[12]_")  # which say what ROUGE-L says; all scores are in samples.csv


def sample_browser(
    results: Results,
    linked: Mapping[tuple[str, str], Collection[str]] = NO_LINKS,
    openings: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    asked: Mapping[str, Mapping[str, tuple[str, str]]] = MappingProxyType({}),
) -> Markup:
    """Return filters and panes, and the data they show; `linked` samples are among them whatever else is.

    openings: by the title of a group the policy and the budget whose answers are shown first. asked: by title and
    sample what was asked, and its picture, where the record does not say it.
    """
    groups = [group for group in results.groups if any(cell.samples for cell in group.cells)]
    if not groups:
        return Markup("<p>No record carries samples.</p>")
    most = max(2, _MOST_SAMPLES // max(1, sum(bool(cell.samples) for cell in results.records)))
    while True:
        data = [group_data(group, most, linked) | {"opening": openings.get(group.title)} for group in groups]
        for group in data:
            for name, item in group["items"].items():
                question, picture = asked.get(group["title"], {}).get(name.removesuffix(FIRST_TURN), ("", ""))
                shown = {"question": question, "picture": picture}
                group["items"][name] = {part: found for part, found in shown.items() if found} | item
        text = safe_json(data)
        if len(text) <= _MOST_BYTES or most <= 2:
            break
        most = max(2, min(most - 1, most * _MOST_BYTES // len(text)))
    is_cut = any(cell["num"] > most for group in data for cell in group["cells"])
    return render("samples.html.j2", rule=COLLAPSE_RULE, is_cut=is_cut, most=most, data=text)
