"""What the page is made of before it is HTML, and the one place where it becomes HTML.

A section's function builds plain data (tables of cells, sentences, lists) and gives it to a template of `templates/`,
which escapes whatever it prints: no text of a record, a model or a policy is ever read as markup. Templates, style
sheets and scripts lie there as files of their own kind and are read as resources of the package.

>>> render("memory.html.j2", view=TableView(caption="Memory", heads=[Head("weights")], rows=[[TableCell("4 MB")]]))
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from operator import attrgetter
from typing import Literal

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from kvbench.report.load import CellResult

MINUS = "\u2212"
_INTERVAL = re.compile(r"(\[[^\s\]]+,) ([^\s\]]+\])")
_NEGATIVE = re.compile(r"(?<![\w.)])-(?=[\d.])")


@dataclass(frozen=True, slots=True)
class Head:
    """A column's head: `kind` says how it sorts (None: not), `group` what stands above neighbouring columns.

    An "amount" is text that sorts by a number, such as a budget, and stands on the left as text does.
    """

    label: str
    note: str = ""
    kind: Literal["number", "amount", "text"] | None = "number"
    group: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleLink:
    """A link that shows one sample of one cell; without a script it leads to the samples."""

    group: str
    cell: str
    sample: str
    text: str


@dataclass(frozen=True, slots=True)
class TableCell:
    """What stands in a row under one head: text, and small below it an interval or a remark; both plain.

    role: "head" names the row, "text" is prose, "number" keeps its blanks. sort: what it sorts by; without it text
    sorts by itself and a number stands last. kind: its classes; title: what its box says; mark: a sign before the text
    that is not read out; link: what the text leads to, and then `below` is a sign beside it.
    """

    text: str
    below: str = ""
    sort: str | float | None = None
    kind: str = ""
    title: str = ""
    role: Literal["number", "text", "head"] = "number"
    mark: str | None = None
    link: SampleLink | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TableView:
    """A table that can be sorted by click or key; `name` is its id, `row_data` what a form may choose rows by."""

    caption: str
    heads: Sequence[Head]
    rows: Sequence[Sequence[TableCell]] = ()
    row_data: Sequence[Mapping[str, str]] = ()
    name: str = ""
    classes: str = ""

    @property
    def groups(self) -> list[tuple[str, int]]:
        """What stands above the heads, each with the number of its columns; empty where nothing does."""
        parts = [(group, len(list(heads))) for group, heads in groupby(self.heads, key=attrgetter("group"))]
        return parts if any(group for group, _ in parts) else []


CELL_HEADS = (Head("policy", kind="text"), Head("budget", kind="amount"))
NOT_MEASURED = TableCell("not measured", kind="missing")


def text_cell(text: str, *, sort: str | float | None = None) -> TableCell:
    """Return a cell with text on the left; `sort` is what it sorts by where that is not the text."""
    return TableCell(text, sort=sort, kind="name", role="text")


def row_head(text: str, below: str = "") -> TableCell:
    """Return the cell that names the row."""
    return TableCell(text, below, role="head")


def budget_cell(cell: CellResult) -> TableCell:
    """Return the cell that says the budget, which the full cache does not have."""
    text = "everything" if cell.is_full and cell.budget == "-" else cell.budget
    return text_cell(text, sort=budget_size(cell))


def budget_size(cell: CellResult) -> float:
    """Return what budgets sort by; the full cache keeps everything, so it stands above every budget."""
    size = cell.budget_fraction if cell.budget_fraction is not None else cell.budget_tokens
    return 1e18 if cell.is_full or size is None else float(size)


def render(template: str, **context: object) -> Markup:
    """Return what the template makes of the context; every text in it is escaped, `Markup` stands as it is."""
    return Markup(_environment().get_template(template).render(context))


@cache
def resource(name: str) -> str:
    """Return a template, a style sheet or a script of the page."""
    return files("kvbench.report").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FunctionLoader(lambda name: (resource(name), name, None)),
        autoescape=True,
        finalize=escaped,  # before Jinja's own escaping, which leaves its result alone: None prints nothing
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"prose": prose, "numbers": numbers}
    return made


def escaped(value: object) -> Markup:
    """Return any value as HTML text or attribute value; None is nothing."""
    if isinstance(value, Markup):
        return value
    return Markup("" if value is None else html.escape(str(value)))


def prose(text: str) -> Markup:
    """Return text as HTML: `names` as code, true minus signs, no line break between a number and its per cent sign."""
    joined = str(numbers(text)).replace(" %", "&nbsp;%").replace("n = ", "n&nbsp;=&nbsp;")
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", joined))


def numbers(text: str) -> Markup:
    """Return text as HTML with a true minus sign before negative numbers, and intervals on one line."""
    return Markup(_INTERVAL.sub(r"\1&nbsp;\2", _NEGATIVE.sub(MINUS, html.escape(text))))


def safe_json(data: object) -> Markup:
    """Return JSON that no text in it can break out of its element; a reader of JSON sees the same characters."""
    text = json.dumps(data, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def listed(names: Sequence[str]) -> str:
    """Return "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
