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
from collections import Counter
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
_PLAIN, _TAG = re.compile(r"[+-]?\d+(\.\d+)?"), re.compile(r"<[^>]*>")
_MOST_ROWS_AT_ONCE = 32
_MOST_CELLS_AT_ONCE = 300


@dataclass(frozen=True, slots=True)
class Head:
    """A column's head: `kind` says how it sorts (None: not), `group` what stands above neighbouring columns.

    An "amount" is text that sorts by a number, such as a budget, and stands on the left as text does. `cell` is whose
    samples the links below it show.
    """

    label: str
    note: str = ""
    kind: Literal["number", "amount", "text"] | None = "number"
    group: str = ""
    cell: str = ""


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

    role: "head" names the row, "text" is prose, "number" keeps its blanks, a "link" leads to the sample of its row
    under the policy of its column. sort: what it sorts by; without it text sorts by itself and a number stands last.
    kind: its classes; title: what its box says.
    """

    text: str
    below: str = ""
    sort: str | float | None = None
    kind: str = ""
    title: str = ""
    role: Literal["number", "text", "head", "link"] = "number"

    @property
    def order(self) -> str:
        """What the page's script sorts it by; "" where that is what it shows, or where it stands last."""
        if isinstance(self.sort, str) or self.sort is None:
            return self.sort or ""
        return "" if _PLAIN.fullmatch(self.text) else f"{self.sort:.7g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TableView:
    """A table that can be sorted by click or key; `name` is its id, `row_data` what a form may choose rows by.

    group: the title of the group whose samples its links show.
    """

    caption: str
    heads: Sequence[Head]
    rows: Sequence[Sequence[TableCell]] = ()
    row_data: Sequence[Mapping[str, str]] = ()
    name: str = ""
    classes: str = ""
    group: str = ""

    @property
    def groups(self) -> list[tuple[str, int]]:
        """What stands above the heads, each with the number of its columns; empty where nothing does."""
        parts = [(group, len(list(heads))) for group, heads in groupby(self.heads, key=attrgetter("group"))]
        return parts if any(group for group, _ in parts) else []

    @property
    def is_large(self) -> bool:
        """Whether a reader who does not look at it should not wait for it."""
        return sum(map(len, self.rows)) > _MOST_CELLS_AT_ONCE and not self.name

    @property
    def is_tall(self) -> bool:
        """Whether it scrolls below its heads in a box of its own, so that what follows is not screens away."""
        return len(self.rows) > _MOST_ROWS_AT_ONCE

    @property
    def packed(self) -> Markup:
        """What the page's script draws it from, as text: heads and cells as lists without empty ends."""
        heads = [
            _trimmed(_text(one.label), _text(one.note), one.cell, one.kind or "none", _text(one.group))
            for one in self.heads
        ]
        rows = [
            [_trimmed(_text(one.text), _text(one.below), one.kind, one.title, one.order, one.role) for one in row]
            for row in self.rows
        ]
        samples = [one.get("sample", "") for one in self.row_data]
        parts = {"caption": _text(self.caption), "classes": self.classes, "group": self.group}
        return safe_json(parts | {"heads": heads, "rows": rows, "samples": samples})


def _text(words: str) -> str:
    """Return what `prose` shows of a text, without its marks."""
    return html.unescape(_TAG.sub("", prose(words)))


def _trimmed(*parts: str) -> list[str]:
    """Return the parts without empty ones at the end."""
    found = list(parts)
    while found and not found[-1]:
        found.pop()
    return found


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
    """Return JSON for the page's scripts, whose `unpacked` reads it; no text in it can break out of its element.

    What comes again stands once, by frequency: texts in "texts", lists of texts and numbers in "lists", the keys of
    objects in "shapes". In "data" a text is its place to the base of 36, a list from the table the same behind a "!",
    an object the place of its shape with its values.
    """
    text = json.dumps(_Packing(data).packed, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


class _Packing:
    def __init__(self, data: object) -> None:
        texts, lists = Counter[str](), Counter[str]()
        _count(data, texts, lists)
        self._texts = {text: _digits(place) for place, (text, _) in enumerate(texts.most_common())}
        again = (text for text, count in lists.most_common() if count > 1)
        self._lists = {text: f"!{_digits(place)}" for place, text in enumerate(again)}
        self._shapes: dict[tuple[str, ...], str] = {}
        packed = [[self._of(one) for one in json.loads(text)] for text in self._lists]
        self.packed = {"data": self._of(data), "lists": packed, "shapes": list(self._shapes), "texts": [*self._texts]}

    def _of(self, data: object) -> object:
        if isinstance(data, str):
            return self._texts[data]
        if isinstance(data, Mapping):
            known = {str(name): value for name, value in data.items()}
            names = tuple(sorted(known))
            shape = self._shapes.setdefault(names, _digits(len(self._shapes)))
            return {shape: [self._of(known[name]) for name in names]}
        if isinstance(data, list | tuple):
            place = self._lists.get(json.dumps(data)) if _is_flat(data) else None
            return place or [self._of(one) for one in data]
        return int(data) if isinstance(data, float) and data.is_integer() else data


def _count(data: object, texts: Counter[str], lists: Counter[str]) -> None:
    """Count texts and flat lists, and what is in one of these at its first sight alone."""
    if isinstance(data, str):
        texts[data] += 1
    elif isinstance(data, Mapping | list | tuple):
        if not isinstance(data, Mapping) and _is_flat(data):
            lists[json.dumps(data)] += 1
            if lists[json.dumps(data)] > 1:
                return
        for one in data.values() if isinstance(data, Mapping) else data:
            _count(one, texts, lists)


def _is_flat(data: Sequence[object]) -> bool:
    return len(data) > 1 and not any(isinstance(one, Mapping | list | tuple) for one in data)


def _digits(number: int) -> str:
    """Return a number to the base of 36."""
    rest, digit = divmod(number, 36)
    return (_digits(rest) if rest else "") + "0123456789abcdefghijklmnopqrstuvwxyz"[digit]


def listed(names: Sequence[str]) -> str:
    """Return "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
