"""The verdict table before it is drawn: each cell against the full cache, in the measures declared for that.

The verdict table as plain text cells, for markdown and LaTeX: one wording, two notations.

The verdict table for other programs: markdown, CSV and LaTeX; the same records give the same bytes.

The page's verdict table before it is drawn: a row per cell with quality, times and bytes; also for other formats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from kvbench.measures import MISSING, format_value, format_with_interval, measure
from kvbench.report.compare import (
    DECLARED,
    PRIMARY_LATENCY,
    PRIMARY_QUALITIES,
    Choices,
    Comparison,
    difference_interval,
    difference_text,
    difference_unit,
    difference_value,
    group_comparisons,
    size_text,
    verdict_remark,
)
from kvbench.report.frames import csv_text
from kvbench.report.load import CellResult, Estimate, Group
from kvbench.report.standing import Judged, losses_of

_DECLARED = (*PRIMARY_QUALITIES, PRIMARY_LATENCY)
_REMARKED = {"equivalent": " ", "undecided": ", "}  # in a terminal only these words need more


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictRow:
    """One cell against full in one measure, as text; `detectable` is what the samples would show in 80 %."""

    policy: str
    budget: str
    measure: str
    difference: str
    interval: str
    detectable: str
    verdict: str


def verdict_rows(group: Group, choices: Choices = DECLARED) -> tuple[VerdictRow, ...]:
    """Return the rows of the group's quality measure, then those of its latency measure; noisy cells stay last."""
    against = [one for one in group_comparisons(group, choices, _DECLARED, between=False) if one.second.is_full]
    quality = next((name for name in PRIMARY_QUALITIES if any(one.measure == name for one in against)), None)
    chosen = [one for name in (quality, PRIMARY_LATENCY) for one in against if one.measure == name]
    return tuple(_row(group, one) for one in chosen)


def verdict_text(one: Comparison) -> str:
    """Return "undecided, needs about 184 more samples", "equivalent within 2.0 points", "noisy"."""
    remark = verdict_remark(one) if one.verdict in _REMARKED else ""
    return f"{one.verdict}{_REMARKED[one.verdict]}{remark}" if remark else one.verdict


def declared_text(rows: tuple[VerdictRow, ...]) -> str:
    """Return what the table says and how it was made."""
    names = " and ".join(dict.fromkeys(measure(row.measure).label for row in rows))
    return (
        f"Declared before: {names}, each policy against full, Holm's correction within a measure. "
        "[low, high] is the 95 % interval of the paired difference, uncorrected; detects: the difference that "
        "these samples find in 80 % of repetitions. Noisy times are in no ranking."
    )


def _row(group: Group, one: Comparison) -> VerdictRow:
    unit = difference_unit(one.measure)[0]
    detectable = size_text(one.measure, one.minimum_detectable)
    return VerdictRow(
        policy=group.series_label(one.first),
        budget=one.first.budget,
        measure=one.measure,
        difference=f"{difference_value(one)} {unit}".strip(),
        interval=difference_interval(one),
        detectable=f"{detectable} {unit}".strip() if detectable else MISSING,
        verdict=verdict_text(one),
    )


TIMES = ("tpot", "ttft")
REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True, slots=True)
class Time:
    """A time, its ratio to the full cache's in the same launches, and what follows from it."""

    own: Estimate | None
    ratio: Estimate | None
    comparison: Comparison | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CellRow:
    """One cell: its quality against full, its times, its bytes, and the samples it loses.

    `verdict` is the quality's, "reference" for the full cache, the status of a failed cell, "" where none exists.
    """

    model: str
    dataset: str
    policy: str
    cell: CellResult
    measure: str | None
    quality: Estimate | None
    comparison: Comparison | None
    verdict: str
    times: tuple[Time, ...]
    stored_bytes: float | None
    stored_share: float | None
    num_collapsed: int | None
    num_paired: int


def cell_rows(judged: Judged, name: str | None = None) -> tuple[CellRow, ...]:
    """Return the rows of a group in table order, quality by the measure `name`, else the primary one."""
    return tuple(_cell_rows_row(judged, cell, name or judged.primary) for cell in judged.group.cells)


def all_rows(groups: Iterable[Judged]) -> tuple[CellRow, ...]:
    """Return the rows of several groups, each by its primary measure."""
    return tuple(row for judged in groups for row in cell_rows(judged))


def _cell_rows_row(judged: Judged, cell: CellResult, name: str | None) -> CellRow:
    group = judged.group
    comparison = judged.against_full(cell, name) if name else None
    losses = losses_of(group, cell, name) if name and not cell.is_full else ()
    stored, full = cell.estimate("kv_stored_bytes"), group.full and group.full.estimate("kv_stored_bytes")
    return CellRow(
        model=group.model,
        dataset=group.dataset,
        policy=group.series_label(cell),
        cell=cell,
        measure=name,
        quality=cell.estimate(name) if name else None,
        comparison=comparison,
        verdict=_cell_rows_verdict(cell, comparison),
        times=tuple(_time(judged, cell, kind) for kind in TIMES),
        stored_bytes=stored.value if stored else None,
        stored_share=stored.value / full.value if stored and full and full.value > 0 else None,
        num_collapsed=sum(loss.collapsed for loss in losses) if losses else None,
        num_paired=len(losses),
    )


def _cell_rows_verdict(cell: CellResult, comparison: Comparison | None) -> str:
    if cell.failed:
        return cell.status
    if cell.is_full:
        return REFERENCE
    return comparison.verdict if comparison else ""


def _time(judged: Judged, cell: CellResult, kind: str) -> Time:
    ratio = f"{kind}_ratio_to_full"
    return Time(
        own=cell.estimate(f"{kind}_ms"), ratio=cell.estimate(ratio), comparison=judged.against_full(cell, ratio)
    )


NOTE = (
    "Differences are the policy minus the full cache, paired by sample, with 95 % intervals; detectable is the "
    "smallest true difference found in 80 % of repetitions; ratios to full under 1 are faster."
)
_NAMES = 3  # policy, budget and verdict are text, all other columns numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictTable:
    """One model and data set: heads and rows of the same length; the first `num_text` columns are text."""

    title: str
    note: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text: int = _NAMES


def verdict_table(judged: Judged) -> VerdictTable:
    """Return the table of one group by its primary measure."""
    rows = cell_rows(judged)
    label = measure(judged.primary).label if judged.primary else "quality"
    heads = (
        *("policy", "budget", "verdict", label, "minus full", "detectable", "collapses"),
        *("TPOT", "TPOT / full", "TTFT", "TTFT / full", "KV stored", "of full"),
    )
    withheld = judged.ability.sentence
    note = f"{withheld}{' ' if withheld else ''}{NOTE}{_margins(rows)}"
    return VerdictTable(title=judged.group.title, note=note, heads=heads, rows=tuple(map(_cells, rows)))


def _cells(row: CellRow) -> tuple[str, ...]:
    one, cell = row.comparison, row.cell
    return (
        row.policy,
        cell.budget,
        _verdict(row),
        _estimate(row.measure, row.quality),
        difference_text(one) if one else "-",
        (size_text(one.measure, one.minimum_detectable) if one else "") or "-",
        "-" if row.num_collapsed is None else f"{row.num_collapsed} of {row.num_paired}",
        *(
            text
            for name, time in zip(("tpot", "ttft"), row.times, strict=True)
            for text in (_estimate(f"{name}_ms", time.own), _estimate(f"{name}_ratio_to_full", time.ratio))
        ),
        "-" if row.stored_bytes is None else format_value("kv_stored_bytes", row.stored_bytes),
        "-" if row.stored_share is None else f"{row.stored_share:.2f}x",
    )


def _verdict(row: CellRow) -> str:
    remark = verdict_remark(row.comparison) if row.comparison else ""
    noisy = "times noisy" if row.cell.status == "noisy" and row.verdict != "noisy" else ""
    remarks = "; ".join(part for part in (remark, noisy) if part)
    return (row.verdict or "-") + (f" ({remarks})" if remarks else "")


def _estimate(name: str | None, found: Estimate | None) -> str:
    return "-" if name is None or found is None else format_with_interval(name, found.value, found.low, found.high)


def _margins(rows: Sequence[CellRow]) -> str:
    made = [row.comparison for row in rows if row.comparison is not None and row.comparison.margin is not None]
    found = {f"{size_text(one.measure, one.margin)} {difference_unit(one.measure)[0]}".strip() for one in made}
    return f" Margin: {', '.join(sorted(found))}." if found else ""


_MARKS = {
    "better": r"$\uparrow$ ",
    "worse": r"$\downarrow$ ",
    "equivalent": r"$\approx$ ",
    "undecided": "? ",
    "noisy": r"$\sim$ ",
    "not ranked": r"$\varnothing$ ",
}
_TEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "[": "{[}",
}
_TEXTS = (
    *("model", "dataset", "policy", "budget", "status", "measure", "verdict", "remark", "method"),
    *("tpot_verdict", "ttft_verdict", "folder", "key"),
)
_LEFT_OUT = ("collapses", "TPOT", "TTFT")  # a page of a paper is narrower than a screen; ratios say these
_COUNTS = ("budget_tokens", "more_samples", "num_samples", "num_clusters", "num_collapsed")
_NEGATIVE = re.compile(r"(?<![\w.)])-(?=\d)")


def verdicts_markdown(groups: Sequence[Judged]) -> str:
    """Return one table per model and data set."""
    return "\n".join(_markdown(verdict_table(judged)) for judged in groups) or "No usable record was found.\n"


def verdicts_csv(groups: Sequence[Judged]) -> str:
    """Return one row per cell and quality measure, numbers in base units and full precision."""
    rows = [
        _csv_row(row) for judged in groups for name in judged.qualities or (None,) for row in cell_rows(judged, name)
    ]
    frame = pd.DataFrame(rows, columns=list(_CSV_COLUMNS))
    kinds = {name: "Int64" if name in _COUNTS else "string" if name in _TEXTS else "float64" for name in frame.columns}
    return csv_text(frame.astype(kinds))


def verdicts_latex(groups: Sequence[Judged]) -> str:
    """Return one table per model and data set, for a document that uses booktabs (and graphicx, to fit its width)."""
    head = "% Made by kvbench report --format latex; needs \\usepackage{booktabs} and \\usepackage{graphicx}.\n"
    return head + "\n".join(_latex(verdict_table(judged)) for judged in groups)


def tex(text: str) -> str:
    """Return any text as LaTeX: special characters escaped, line breaks and control characters as blanks."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    marked = _NEGATIVE.sub("\0", plain)
    return "".join("$-$" if letter == "\0" else _TEX.get(letter, letter) for letter in marked)


def _markdown(table: VerdictTable) -> str:
    numbers = len(table.heads) - table.num_text
    lines = [
        f"## {_bar(table.title)}",
        "",
        _bar(table.note),
        "",
        f"| {' | '.join(map(_bar, table.heads))} |",
        f"|{' --- |' * table.num_text}{' ---: |' * numbers}",
        *(f"| {' | '.join(map(_bar, row))} |" for row in table.rows),
    ]
    return "\n".join(lines) + "\n"


def _bar(text: str) -> str:
    flat = " ".join(text.split())
    return flat.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")


def _latex(table: VerdictTable) -> str:
    kept = [index for index, head in enumerate(table.heads) if head not in _LEFT_OUT]
    columns = "l" * table.num_text + "r" * (len(kept) - table.num_text)
    heads = " & ".join(tex(table.heads[index]) for index in kept)
    body = "\n".join(f"{' & '.join(_tex_cells([row[index] for index in kept]))} \\\\" for row in table.rows)
    return f"""\\begin{{table}}[t]
\\centering
\\caption{{{tex(table.title)}. {tex(table.note)}}}
\\resizebox{{\\linewidth}}{{!}}{{%
\\begin{{tabular}}{{{columns}}}
\\toprule
{heads} \\\\
\\midrule
{body}
\\bottomrule
\\end{{tabular}}}}
\\end{{table}}
"""


def _tex_cells(row: Sequence[str]) -> Iterator[str]:
    for index, text in enumerate(row):
        mark = _MARKS.get(text.partition(" (")[0], "") if index == 2 else ""
        yield mark + tex(text)


def _csv_row(row: CellRow) -> Mapping[str, object]:
    return {name: value(row) for name, value in _CSV_COLUMNS.items()}


def _of(name: str) -> Callable[[CellRow], object]:
    return lambda row: None if row.comparison is None else getattr(row.comparison, name)


def _ratio(index: int, name: str) -> Callable[[CellRow], object]:
    def value(row: CellRow) -> object:
        found: Estimate | None = row.times[index].ratio
        return None if found is None else getattr(found, name)

    return value


def _time_verdict(index: int) -> Callable[[CellRow], object]:
    def value(row: CellRow) -> object:
        found: Comparison | None = row.times[index].comparison
        return None if found is None else found.verdict

    return value


_CSV_COLUMNS: Mapping[str, Callable[[CellRow], object]] = {
    "model": lambda row: row.model,
    "dataset": lambda row: row.dataset,
    "policy": lambda row: row.policy,
    "budget": lambda row: row.cell.budget,
    "budget_fraction": lambda row: row.cell.budget_fraction,
    "budget_tokens": lambda row: row.cell.budget_tokens,
    "status": lambda row: row.cell.status,
    "measure": lambda row: row.measure,
    "value": lambda row: row.quality and row.quality.value,
    "value_low": lambda row: row.quality and row.quality.low,
    "value_high": lambda row: row.quality and row.quality.high,
    "difference": _of("value"),
    "difference_low": _of("low"),
    "difference_high": _of("high"),
    "verdict": lambda row: row.verdict or None,
    "remark": lambda row: (row.comparison and verdict_remark(row.comparison)) or None,
    "margin": _of("margin"),
    "minimum_detectable": _of("minimum_detectable"),
    "more_samples": _of("more_samples"),
    "p_value": _of("p_value"),
    "p_holm": _of("p_holm"),
    "num_samples": _of("num_samples"),
    "num_clusters": _of("num_clusters"),
    "method": _of("method"),
    "num_collapsed": lambda row: row.num_collapsed,
    "tpot_ms": lambda row: row.times[0].own and row.times[0].own.value,
    "tpot_ratio_to_full": _ratio(0, "value"),
    "tpot_ratio_low": _ratio(0, "low"),
    "tpot_ratio_high": _ratio(0, "high"),
    "tpot_verdict": _time_verdict(0),
    "ttft_ms": lambda row: row.times[1].own and row.times[1].own.value,
    "ttft_ratio_to_full": _ratio(1, "value"),
    "ttft_ratio_low": _ratio(1, "low"),
    "ttft_ratio_high": _ratio(1, "high"),
    "ttft_verdict": _time_verdict(1),
    "kv_stored_bytes": lambda row: row.stored_bytes,
    "kv_share_of_full": lambda row: row.stored_share,
    "folder": lambda row: row.cell.folder or None,
    "key": lambda row: row.cell.key,
}
