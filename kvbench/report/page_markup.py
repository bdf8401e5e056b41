"""The page's building blocks: escaped prose, scrolling boxes, and tables that can be sorted by click or key."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

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
