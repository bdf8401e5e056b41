"""The page's building blocks: escaped prose, scrolling boxes, and tables that can be sorted by click or key.

Names as a sentence lists them.

Choosing rows of the verdict table: a select for every label in which rows differ, and a text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from kvbench.report.load import CellResult
from kvbench.report.verdicts import CellRow

MINUS = "\u2212"
_INTERVAL = re.compile(r"(\[[^\s\]]+,) ([^\s\]]+\])")
_NEGATIVE = re.compile(r"(?<![\w.)])-(?=[\d.])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A column's head: `kind` says how it sorts (None: not), `group` what stands above neighbouring columns.

    An "amount" is text that sorts by a number, such as a budget, and stands on the left as text does.
    """

    label: str
    note: str = ""
    kind: Literal["number", "amount", "text"] | None = "number"
    group: str = ""


def escaped(text: object) -> str:
    """Return any text as HTML text or attribute value."""
    return html.escape(str(text))


def prose(text: str) -> str:
    """Return text as HTML: `names` as code, true minus signs, no line break between a number and its per cent sign."""
    joined = numbers(text).replace(" %", "&nbsp;%").replace("n = ", "n&nbsp;=&nbsp;")
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", joined)


def numbers(text: str) -> str:
    """Return text as HTML with a true minus sign before negative numbers, and intervals on one line."""
    return _INTERVAL.sub(r"\1&nbsp;\2", _NEGATIVE.sub(MINUS, html.escape(text)))


def scroll_box(content: str, label: str) -> str:
    """Return `content` in a box that scrolls sideways by itself, by touch and by key."""
    return f'<div class=scroll tabindex=0 role=region aria-label="{escaped(label)}">{content}</div>'


def table(caption: str, heads: Sequence[Head], rows: Iterable[str], *, name: str = "", classes: str = "") -> str:
    """Return a table in a box of its own; `caption` is text, `rows` are HTML, `name` is its id."""
    attributes = (f' id="{escaped(name)}"' if name else "") + (f' class="{escaped(classes)}"' if classes else "")
    top = f"<tr>{_groups(heads)}</tr>" if any(head.group for head in heads) else ""
    columns = "".join(_head(head) for head in heads)
    body = "".join(rows)
    drawn = (
        f"<table{attributes}><caption>{prose(caption)}</caption>"
        f"<thead>{top}<tr>{columns}</tr></thead><tbody>{body}</tbody></table>"
    )
    return scroll_box(drawn, caption)


def number_cell(text: str, below: str = "", *, value: float | None = None, kind: str = "", title: str = "") -> str:
    """Return a cell with a number and, small below it, its interval or a remark; `value` is what it sorts by."""
    small = f"<small>{numbers(below)}</small>" if below else ""
    return (
        f'<td{_class(kind)}{_title(title)} data-v="{"" if value is None else repr(value)}">{numbers(text)}{small}</td>'
    )


def text_cell(text: str, below: str = "", *, sort: str | float | None = None, kind: str = "name") -> str:
    """Return a cell with text; `sort` is what it sorts by where that is not the text."""
    small = f"<small>{prose(below)}</small>" if below else ""
    return f'<td{_class(kind)} data-v="{escaped(text if sort is None else sort)}">{prose(text)}{small}</td>'


def row_head(text: str, below: str = "") -> str:
    """Return the cell that names the row."""
    small = f"<small>{prose(below)}</small>" if below else ""
    return f'<th scope=row class=name data-v="{escaped(text)}">{prose(text)}{small}</th>'


def not_measured() -> str:
    """Return the cell of a number that the record does not have."""
    return '<td class=missing data-v="">not measured</td>'


def _groups(heads: Sequence[Head]) -> str:
    parts: list[tuple[str, int]] = []
    for head in heads:
        if parts and parts[-1][0] == head.group:
            parts[-1] = (head.group, parts[-1][1] + 1)
        else:
            parts.append((head.group, 1))
    return "".join(
        f"<th scope=colgroup colspan={span} class=over>{prose(text)}</th>" if text else f"<td colspan={span}></td>"
        for text, span in parts
    )


def _head(head: Head) -> str:
    note = f"<small>{prose(head.note)}</small>" if head.note else ""
    if head.kind is None:
        return f"<th scope=col class=name>{prose(head.label)}{note}</th>"
    name = "" if head.kind == "number" else " class=name"
    kind = "text" if head.kind == "text" else "number"
    button = f"<button type=button>{prose(head.label)}</button>"
    return f"<th scope=col{name} aria-sort=none data-kind={kind}>{button}{note}</th>"


def _class(kind: str) -> str:
    return f' class="{escaped(kind)}"' if kind else ""


def _title(title: str) -> str:
    return f' title="{escaped(title)}"' if title else ""


def listed(names: Sequence[str]) -> str:
    """Return "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


_FILTERS = (
    ("model", "Model"),
    ("dataset", "Data set"),
    ("policy", "Policy"),
    ("budget", "Budget"),
    ("verdict", "Verdict"),
    ("status", "Status"),
)


def filters_html(rows: Sequence[CellRow]) -> str:
    """Return the form, which the script shows and works."""
    selects = "".join(_select(name, label, _values(rows, name)) for name, label in _FILTERS)
    return (
        '<form id="filters" class=controls aria-label="Choose rows of the verdict table" hidden>'
        f'{selects}<label>Text<input type=search id="filter-text" autocomplete=off></label>'
        f'<button type=reset>Show all</button><output id="filter-count" aria-live=polite></output></form>'
    )


def _values(rows: Sequence[CellRow], name: str) -> list[str]:
    if name == "budget":
        ordered = sorted(rows, key=lambda row: (budget_size(row.cell), row.cell.budget))
        return list(dict.fromkeys(row.cell.budget for row in ordered))
    found: Iterable[str] = (
        {"verdict": row.verdict or "no quality", "model": row.model, "dataset": row.dataset}.get(name)
        or str(getattr(row.cell, name))
        for row in rows
    )
    return sorted(set(found))


def _select(name: str, label: str, values: list[str]) -> str:
    if len(values) < 2:
        return ""
    options = "".join(f'<option value="{escaped(value)}">{escaped(_shown(name, value))}</option>' for value in values)
    return f'<label>{label}<select data-field="{name}"><option value="" selected>all</option>{options}</select></label>'


def _shown(name: str, value: str) -> str:
    return "everything" if name == "budget" and value == "-" else value


def budget_size(cell: CellResult) -> float:
    """Return what budgets sort by; the full cache keeps everything, so it stands above every budget."""
    size = cell.budget_fraction if cell.budget_fraction is not None else cell.budget_tokens
    return 1e18 if cell.is_full or size is None else float(size)
