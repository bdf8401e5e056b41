"""The verdict table for other programs: markdown, CSV and LaTeX; the same records give the same bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd

from kvbench.report.cell import Estimate
from kvbench.report.cell_rows import CellRow, cell_rows
from kvbench.report.comparison import Comparison
from kvbench.report.difference_text import verdict_remark
from kvbench.report.frames import csv_text
from kvbench.report.judged import Judged
from kvbench.report.verdict_cells import VerdictTable, verdict_table

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
