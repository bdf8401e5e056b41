"""The sample browser's data: answers by cell, what they share once, scores beside the full cache's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from kvbench.measures import format_value, measure
from kvbench.report.cell import CellResult
from kvbench.report.load import Group
from kvbench.report.page_markup import MINUS
from kvbench.report.sample_answers import FIRST_TURN, Answer, answers_of, better_or_worse, collapsed

_NATS = ("ppl", "kl_to_full")
NO_LINKS: Mapping[tuple[str, str], Collection[str]] = MappingProxyType({})


def group_data(group: Group, most: int, linked: Mapping[tuple[str, str], Collection[str]] = NO_LINKS) -> dict[str, Any]:
    """Return one group for the script; references and the full cache's answers stand once per sample.

    Of each cell `most` answers, those first that are `linked` (samples by group's title and cell's label): all of them.
    """
    full = {} if group.full is None else {answer.id: answer for answer in answers_of(group.full)}
    items: dict[str, dict[str, Any]] = {}
    cells = []
    for cell in group.cells:
        if cell.samples:
            wanted = linked.get((group.title, group.cell_label(cell)), ())
            cells.append(_cell(group, cell, full, items, most, wanted))
    names = list(dict.fromkeys(name for cell in cells for answer in cell["samples"] for name, *_ in answer["scores"]))
    return {"title": group.title, "cells": cells, "items": items, "labels": {name: _label(name) for name in names}}


def _cell(
    group: Group, cell: CellResult, full: Mapping[str, Answer], items: dict[str, dict[str, Any]], most: int,
    wanted: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    answers = list(answers_of(cell))
    lost = {index for index, answer in enumerate(answers) if _is_lost(answer, full.get(answer.id))}
    kept = _kept(answers, lost, most, wanted)
    return {
        "key": cell.key[:16],
        "label": group.cell_label(cell),
        "policy": group.series_label(cell),
        "budget": "" if cell.is_full else cell.budget,
        "samples": [_data(answers[index], full.get(answers[index].id), items) for index in kept],
        "num": len(answers),
        "num_collapsed": len(lost),
    }


def _kept(answers: Sequence[Answer], lost: Collection[int], most: int, wanted: Collection[str]) -> list[int]:
    """Return which answers the page holds: every one linked to, then the collapsed, then from the beginning."""
    linked = [index for index, answer in enumerate(answers) if {answer.id, *_whole(answer.id)} & set(wanted)]
    others = sorted(set(range(len(answers))).difference(linked), key=lambda index: (index not in lost, index))
    return sorted([*linked, *others[: max(0, most - len(linked))]])


def _whole(name: str) -> tuple[str, ...]:
    """Return the conversation that a link means when it leads to its first turn."""
    return (name.removesuffix(FIRST_TURN),) if name.endswith(FIRST_TURN) else ()


def _is_lost(answer: Answer, full: Answer | None) -> bool:
    return full is not None and collapsed(answer.scores, full.scores)


def _data(answer: Answer, full: Answer | None, items: dict[str, dict[str, Any]]) -> dict[str, Any]:
    item = items.setdefault(answer.id, {})
    for name in ("question", "reference", "full"):
        if getattr(answer, name) is not None:
            item.setdefault(name, getattr(answer, name))
    others: Mapping[str, float] = {} if full is None else full.scores
    data: dict[str, Any] = {
        "id": answer.id,
        "scores": [_score(name, value, others.get(name)) for name, value in answer.scores.items()],
    }
    optional = {
        "text": answer.text,
        "full": answer.full if answer.full != item.get("full") else None,
        "marks": answer.marks,
        "token": answer.token,
        "word": True if answer.marks is not None and not answer.exact else None,
        "collapsed": True if _is_lost(answer, full) else None,
    }
    return data | {name: value for name, value in optional.items() if value is not None}


def _score(name: str, value: float, full: float | None) -> list[str]:
    """Return measure, value, the full cache's, difference, and worse or better."""
    if full is None:
        return [name, _value(name, value), "", "", ""]
    return [
        name,
        _value(name, value),
        _value(name, full),
        _difference(name, value - full),
        better_or_worse(name, value, full),
    ]


def _label(name: str) -> str:
    return "log-loss, nats per reference token" if name == "ppl" else measure(name).label


def _value(name: str, value: float) -> str:
    return f"{value:.3f}" if name in _NATS else format_value(name, value)


def _difference(name: str, value: float) -> str:
    sign = "+" if value > 0 else MINUS if value < 0 else ""
    text = f"{100 * abs(value):.1f} points" if measure(name).unit == "fraction" else _value(name, abs(value))
    return sign + text
