"""Laws of the field: what any correct harness shows on any text model of the Llama kind, told from records.

    for row in law_rows(load_results(Path("results"))):
        print(row.law.name, row.verdict)

A law is a yaml of `conf/law`: what is said, by whom, and what is expected of the difference between two cells, with a
direction and a margin of our own that was written down before the first run. Figures that others published for other
models stand beside it and decide nothing. A law holds where the whole 95 % interval of the difference, paired by
sample, is beyond the margin; it does not where the whole interval is on the other side; else nothing can be told.
Several pairs under one expectation share the 5 %. Bytes are counted, so that they have no interval.

Any record that has the settings a law names is evidence, whoever made it: of several the newest.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import pandas as pd
from markupsafe import Markup
from omegaconf import OmegaConf
from rich.console import Console
from rich.text import Text

from kvbench.errors import ConfigError, check_known
from kvbench.measures import MEASURES
from kvbench.report.compare import Ability, Choices, compare, difference_unit
from kvbench.report.load import CellResult, Group, Results, scores_of
from kvbench.report.markup import Head, TableCell, TableView, render, row_head, text_cell
from kvbench.report.tables import csv_text, markdown_table, ruled
from kvbench.stats.paired import CONFIDENCE

Words = Mapping[str, Any]
Direction = Literal["above", "below", "within"]
Told = Literal["holds", "does not", "cannot be told"]
_CHOSEN = ("task", "dataset", "budget")  # what of a group is chosen is settled by the settings that follow from it
_OF_TASKS = "task."
_HEADS = ("law", "source", "expected", "measured [95 %]", "verdict")
NOTE = (
    "Each difference is the first cell minus the second, paired by sample, with its 95 % interval; of several pairs "
    "the one that decides is shown, and all of them share the 5 %. Directions and margins were set before the first "
    "run; what others published for other models decides nothing."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Expectation:
    """One difference that a law speaks of: the cells `first` minus `second`, pair by pair, in `measure`.

    `difference` is the side of `margin` it must be on, "within" meaning plus or minus. `of_pairs`: whether each pair
    must show it, or one. `samples`: a regular expression that the ids of the samples that count have in them.
    """

    says: str
    measure: str
    first: tuple[Words, ...]
    second: tuple[Words, ...]
    difference: Direction
    margin: float
    of_pairs: Literal["all", "any"] = "all"
    samples: str = ""

    @property
    def counts_bytes(self) -> bool:
        """Whether the measure is counted, not sampled: then the difference is a share of the second's."""
        return MEASURES[self.measure].unit == "bytes"

    @property
    def text(self) -> str:
        """Return "above +0.400 nats/token"."""
        sign = "\u00b1" if self.difference == "within" else "+"
        return f"{self.difference} {_sized(self, self.margin, sign)}"

    def told(self, low: float, high: float) -> Told:
        """Return what an interval of the difference says of the margin."""
        if self.difference == "within":
            inside, outside = -self.margin < low and high < self.margin, low > self.margin or high < -self.margin
        else:
            above, below = low > self.margin, high < self.margin
            inside, outside = (above, below) if self.difference == "above" else (below, above)
        return "holds" if inside else "does not" if outside else "cannot be told"


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """A law: `number` is its place in the table, `data` the class of the data sets whose records may tell of it."""

    name: str
    number: int
    statement: str
    source: str
    published: str
    data: str
    expects: tuple[Expectation, ...]

    @property
    def cells_needed(self) -> tuple[Words, ...]:
        """Return the settings of every cell that the law compares, each once."""
        every = [cell for one in self.expects for pair in zip(one.first, one.second, strict=True) for cell in pair]
        return tuple({tuple(sorted(map(repr, cell.items()))): cell for cell in every}.values())


def load_laws(names: Collection[str] | None = None) -> tuple[Law, ...]:
    """Return the laws called `names`, all of them without it, by number. Raises: ConfigError, one line."""
    known = _laws()
    for name in names or ():
        check_known("laws", name, known)
    return tuple(law for name, law in known.items() if names is None or name in names)


@cache
def _laws() -> dict[str, Law]:
    found = [
        read_law(entry.name.removesuffix(".yaml"), entry.read_text(encoding="utf-8"))
        for entry in (files("kvbench.conf") / "law").iterdir()
        if entry.name.endswith(".yaml")
    ]
    return {law.name: law for law in sorted(found, key=lambda law: (law.number, law.name))}


def read_law(name: str, text: str) -> Law:
    """Return the law that a yaml states. Raises: ConfigError saying what is wrong with it."""
    given: Any = OmegaConf.to_container(OmegaConf.create(text))
    common = given.pop("cells", {})
    parts = given.pop("expects", None) or []
    _check_fields(f"law {name}", given, {one.name for one in fields(Law)} - {"name", "expects"})
    if not parts:
        raise ConfigError(f"law {name} expects nothing; it needs `expects` with at least one difference")
    return Law(name=name, expects=tuple(_expectation(f"law {name}", common, part) for part in parts), **given)


def _expectation(where: str, common: Words, given: dict[str, Any]) -> Expectation:
    optional = {"of_pairs", "samples"}
    _check_fields(where, given, {one.name for one in fields(Expectation)} - optional, optional)
    check_known(f"{where}: measure", given["measure"], MEASURES)
    check_known(f"{where}: difference", given["difference"], get_args(Direction))
    check_known(f"{where}: of_pairs", given.get("of_pairs", "all"), ("all", "any"))
    if given["difference"] == "within" and not given["margin"] > 0:
        raise ConfigError(f"{where}: margin is {given['margin']}; what a difference is to lie within must be above 0")
    sizes = {len(value) for arm in ("first", "second") for value in given[arm].values() if isinstance(value, list)}
    if len(sizes) > 1:
        raise ConfigError(f"{where}: lists of {sorted(sizes)} settings go along together, so they must be equally long")
    arms = {arm: tuple(_arms({**common, **given[arm]}, *(sizes or {1}))) for arm in ("first", "second")}
    return Expectation(**{**given, **arms})


def _check_fields(where: str, given: Words, needed: Collection[str], optional: Collection[str] = ()) -> None:
    if missing := sorted(set(needed) - set(given)):
        raise ConfigError(f"{where} does not say {', '.join(missing)}")
    for name in given:
        check_known(f"{where}: a field", name, [*needed, *optional])


def _arms(words: Words, count: int) -> Iterator[Words]:
    for at in range(count):
        yield {name: value[at] if isinstance(value, list) else value for name, value in words.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two cells and their difference: nats per token, a share of the second's bytes, or what the measure is in."""

    first: CellResult
    second: CellResult
    value: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: Told = "cannot be told"
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LawRow:
    """What the records of one model and data set say of one expectation; `pairs` that decides comes first."""

    law: Law
    expectation: Expectation
    model: str
    dataset: str
    pairs: tuple[Pair, ...]
    verdict: Told

    @property
    def measured(self) -> str:
        """Return "+0.706 [+0.612, +0.801] nats/token", and whose it is where there are several pairs."""
        pair, one = self.pairs[0], self.expectation
        if pair.value is None:
            return "not measured"
        bounds = (
            "" if pair.low is None or pair.high is None else f" [{_number(one, pair.low)}, {_number(one, pair.high)}]"
        )
        whose = f" ({_name(pair.first, pair.second)}, of {len(self.pairs)})" if len(self.pairs) > 1 else ""
        return f"{_number(one, pair.value)}{bounds} {_unit(one)[0]}".strip() + whose

    @property
    def remark(self) -> str:
        """Return why nothing can be told, where there is more to say than that the interval is too wide."""
        return self.pairs[0].reason

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the row as it is shown, under `_HEADS`."""
        law = f"{self.law.number}. {self.law.statement} Here: {self.expectation.says}."
        verdict = f"{self.verdict} ({self.remark})" if self.remark else self.verdict
        return law, self.law.source, self.expectation.text, self.measured, verdict


def law_rows(results: Results, laws: Iterable[Law] | None = None) -> tuple[LawRow, ...]:
    """Return a row for every expectation whose cells are all there, failed ones too, by law, model and data set."""
    return tuple(
        row
        for law in (load_laws() if laws is None else laws)
        for one in law.expects
        for group in _by_data(results)
        if (row := _row(law, one, group)) is not None
    )


def _by_data(results: Results) -> list[Group]:
    """Return the cells by model and data, however it was asked: a law may compare ways of asking."""
    found: dict[tuple[str, str], list[CellResult]] = {}
    for group in results.groups:
        for cell in group.cells:
            found.setdefault((cell.model, cell.data), []).append(cell)
    return [Group(model=model, dataset=data, cells=tuple(cells)) for (model, data), cells in found.items()]


def _row(law: Law, one: Expectation, group: Group) -> LawRow | None:
    cells = [cell for cell in group.cells if _in(cell.settings.get("dataset"), "class") == f"kvbench:{law.data}"]
    arms = [
        (_newest(cells, first, one), _newest(cells, second, one))
        for first, second in zip(one.first, one.second, strict=True)
    ]
    confidence = 1 - (1 - CONFIDENCE) / len(arms)
    unable = Ability(group).reason(one.measure)
    pairs = []
    for first, second in arms:
        if first is None or second is None:
            return None
        pairs.append(_pair(one, first, second, confidence, unable))
    weakest, strongest = (("does not", "cannot be told", "holds"), ("holds", "cannot be told", "does not"))
    order = weakest if one.of_pairs == "all" else strongest
    pairs.sort(key=lambda pair: (order.index(pair.verdict), _nearness(one, pair)))
    return LawRow(
        law=law, expectation=one, model=group.model, dataset=group.dataset, pairs=tuple(pairs), verdict=pairs[0].verdict
    )


def _newest(cells: Iterable[CellResult], words: Words, one: Expectation) -> CellResult | None:
    """Return the newest cell with these settings; one that has the measure before one that failed."""
    found = [cell for cell in cells if _has(cell, words) and (cell.failed or cell.estimate(one.measure))]
    return max(found, key=lambda cell: (not cell.failed, cell.started_utc), default=None)


def _has(cell: CellResult, words: Words) -> bool:
    return all(_agrees(cell, name, value) for name, value in words.items())


def _agrees(cell: CellResult, name: str, value: object) -> bool:
    group, _, setting = name.partition(".")
    if name in _CHOSEN or name.startswith(_OF_TASKS) or (group == "budget" and cell.is_full):
        return True
    if name == "policy":
        return cell.labels.get("policy") == value
    found: Any = cell.settings.get(group)
    if isinstance(value, list):  # a part of a policy that is not set is in no key
        return list(_in(found, setting) or ()) == value
    return bool(_in(found, setting) == value if setting else found == value)


def _in(settings: Any, name: str) -> Any:
    return settings.get(name) if isinstance(settings, dict) else None


def _pair(one: Expectation, first: CellResult, second: CellResult, confidence: float, unable: str) -> Pair:
    pair = Pair(first=first, second=second)
    mine, theirs = first.estimate(one.measure), second.estimate(one.measure)
    if mine is None or theirs is None:
        failed = next(cell for cell in (first, second) if cell.failed)
        return replace(pair, reason=f"{failed.policy}, {failed.budget}: {failed.status}")
    if one.counts_bytes:
        share = mine.value / theirs.value - 1
        return replace(pair, value=share, verdict=one.told(share, share))
    chosen = [_only(cell, one.samples) for cell in (first, second)]
    if not all(scores_of(cell, one.measure) for cell in chosen):
        return replace(pair, reason="no sample counts")
    found = compare(chosen[0], chosen[1], one.measure, Choices(confidence=confidence))
    assert found is not None
    if found.low is None or found.high is None:
        return replace(pair, value=found.value, reason=found.reason or found.method)
    told: Told = "cannot be told" if unable else one.told(found.low, found.high)
    return replace(pair, value=found.value, low=found.low, high=found.high, verdict=told, reason=unable)


def _only(cell: CellResult, pattern: str) -> CellResult:
    chosen = re.compile(pattern)
    return replace(cell, samples=tuple(sample for sample in cell.samples if chosen.search(str(sample.get("id")))))


def _nearness(one: Expectation, pair: Pair) -> float:
    """Return what pairs of one verdict are ordered by, so that the one that decides comes first."""
    if pair.value is None:
        return float("-inf")
    beyond = {"above": pair.value, "below": -pair.value, "within": -abs(pair.value)}[one.difference]
    return beyond if one.of_pairs == "all" else -beyond


def _unit(one: Expectation) -> tuple[str, float, int]:
    return ("%", 0.01, 1) if one.counts_bytes else difference_unit(one.measure)


def _number(one: Expectation, number: float) -> str:
    _, factor, places = _unit(one)
    return f"{number / factor:+.{places}f}"


def _sized(one: Expectation, number: float, sign: str) -> str:
    unit, factor, places = _unit(one)
    text = f"{number / factor:+.{places}f}"
    return f"{sign}{text[1:]} {unit}".strip() if sign == "\u00b1" else f"{text} {unit}".strip()


def _name(first: CellResult, second: CellResult) -> str:
    """Return the policy, and its budget and settings as far as the second cell of the same policy has others."""
    if first.policy != second.policy:
        return first.policy
    mine, other = (cell.settings.get("policy") for cell in (first, second))
    told = [f"{name}={value}" for name, value in (mine or {}).items() if _in(other, name) != value]
    return ", ".join([first.policy, *told, *([first.budget] if first.budget != second.budget else [])])


def print_laws(rows: Sequence[LawRow], console: Console | None = None) -> None:
    """Print the laws that the records tell of, a table where the terminal is wide enough for one."""
    console = console or Console()
    if not rows:
        return
    wide = console.width >= 100
    for title, same in _by_model(rows):
        drawn = ruled(f"Laws of the field: {title}", NOTE, 1)
        for head in _HEADS:
            drawn.add_column(head, overflow="fold", vertical="top")
        for row in same:
            drawn.add_row(*map(Text, row.texts), end_section=True)
        lines = (f"{row.law.number}. {row.expectation.says}: {' '.join(row.texts[2:])}" for row in same)
        console.print(drawn if wide else Text("\n".join((f"Laws of the field: {title}", *lines, NOTE))))
        console.print()


def _by_model(rows: Iterable[LawRow]) -> Iterable[tuple[str, list[LawRow]]]:
    found: dict[str, list[LawRow]] = {}
    for row in rows:
        found.setdefault(row.model, []).append(row)
    return found.items()


def laws_markdown(rows: Sequence[LawRow]) -> str:
    """Return a table per model, with the data set of each row."""
    parts = []
    for title, same in _by_model(rows):
        heads = (*_HEADS, "data", "published, other models")
        table = markdown_table(heads, ((*row.texts, row.dataset, row.law.published) for row in same))
        parts.append("\n".join([f"## Laws of the field: {title}", "", NOTE, "", *table]) + "\n")
    return "\n".join(parts)


def laws_csv(rows: Sequence[LawRow]) -> str:
    """Return a row per pair of cells, numbers in base units, to 10 digits."""
    frame = pd.DataFrame(
        [
            {
                "model": row.model, "dataset": row.dataset, "law": row.law.name, "number": row.law.number,
                "says": row.expectation.says, "measure": row.expectation.measure,
                "first": pair.first.key, "second": pair.second.key, "pair": _name(pair.first, pair.second),
                "difference": pair.value, "low": pair.low, "high": pair.high,
                "expected": row.expectation.difference, "margin": row.expectation.margin,
                "verdict_of_pair": pair.verdict, "verdict": row.verdict, "reason": pair.reason,
            }
            for row in rows
            for pair in row.pairs
        ]
    )  # fmt: skip
    return csv_text(frame, digits=10)


def laws_html(rows: Sequence[LawRow]) -> Markup:
    """Return the section of the page; nothing where the records tell of no law."""
    if not rows:
        return Markup()
    heads = [
        Head("law", kind="text"),
        Head("data", kind="text"),
        Head("expected", kind="text"),
        Head("measured"),
        Head("verdict", kind="text"),
    ]
    views = [
        TableView(
            caption=f"Laws of the field, {title}",
            heads=heads,
            classes="text",
            rows=[
                [
                    row_head(f"{row.law.number}. {row.law.statement}", f"{row.expectation.says}; {row.law.source}"),
                    text_cell(row.dataset),
                    text_cell(row.expectation.text),
                    TableCell(row.measured, sort=row.pairs[0].value),
                    TableCell(row.verdict, row.remark, role="text", kind="name"),
                ]
                for row in same
            ],
        )
        for title, same in _by_model(rows)
    ]
    return render("laws.html.j2", note=NOTE, views=views)
