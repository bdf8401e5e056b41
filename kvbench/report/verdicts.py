"""The verdict table: each cell with its quality against full, times and bytes; as Markdown, CSV and LaTeX.

    verdicts_latex([judge(group) for group in results.groups])

`cell_rows` are the rows before they are drawn, which the page draws too. `verdict_table` makes text of them for
Markdown, `verdicts_latex` what fits a column of a paper, and each policy against each other (`standing.matrices`)
follows in both; CSV holds the numbers in base units and full precision. The same records give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kvbench.measures import format_value, format_with_interval, measure
from kvbench.report.answer import sentences_before
from kvbench.report.compare import (
    PRIMARY_LATENCY,
    Comparison,
    difference_interval,
    difference_text,
    difference_unit,
    difference_value,
    size_text,
    size_with_unit,
    timing_noise,
    verdict_remark,
)
from kvbench.report.load import CellResult, Estimate
from kvbench.report.standing import BEHIND, LENGTH, Judged, losses_of, matrices
from kvbench.report.tables import csv_text, escaped, markdown_table, matrix_markdown

REFERENCE = "reference"
_TIMES = ("tpot", "ttft")
RATIO_NOTE = (
    "Times are medians of runs, full's time is that of the full cache in the same runs, and the ratio is the "
    "geometric mean over their pairs; where the quotient of the two medians is another number, it stands beside it."
)
_NOTE = (
    "Differences are the policy minus the full cache, paired by sample, with 95 % intervals; detectable is the "
    "smallest true difference found in 80 % of repetitions; ratios to full under 1 are faster. "
    f"{RATIO_NOTE}"
)
_NUM_TEXT = 3  # policy, budget and verdict are text, all other columns numbers
_COLUMN_NOTE = (
    "Minus full: the difference paired by sample, with its 95 % interval. TPOT / full: geometric mean over pairs of "
    "runs, under 1 is faster. Bold: the best of its budget as printed, clear of the next or not."
)
_MARKS = {
    "better": r"$\uparrow$ ", "worse": r"$\downarrow$ ", "equivalent": r"$\approx$ ", "undecided": "? ",
    "noisy": r"$\sim$ ", "not ranked": r"$\varnothing$ ",
}  # fmt: skip
_TEX = {
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "[": "{[}", **{sign: f"\\{sign}" for sign in "{}$&#%_"},
}  # fmt: skip
_TURN = re.compile(r"turn\d+_")
_NEGATIVE = re.compile(r"(?<![\w.)])-(?=\d)")
_TEXTS = (
    *("model", "dataset", "policy", "budget", "status", "measure", "verdict", "remark", "method"),
    *("tpot_verdict", "ttft_verdict", "folder", "key"),
)
_COUNTS = ("budget_tokens", "more_samples", "num_samples", "num_clusters", "num_collapsed")
_OF_COMPARISON = (
    *("margin", "minimum_detectable", "more_samples", "p_value", "p_holm", "num_samples", "num_clusters", "method"),
)
_OF_TIME = {
    "ms": "own.value", "ms_of_full": "full.value", "ratio_to_full": "ratio.value", "ratio_low": "ratio.low",
    "ratio_high": "ratio.high", "verdict": "comparison.verdict",
}  # fmt: skip
# The columns of the CSV, and where in a CellRow they are found.
_CSV = {
    **{name: name for name in ("model", "dataset", "policy")},
    **{name: f"cell.{name}" for name in ("budget", "budget_fraction", "budget_tokens", "status")},
    "measure": "measure", "value": "quality.value", "value_low": "quality.low", "value_high": "quality.high",
    "difference": "comparison.value", "difference_low": "comparison.low", "difference_high": "comparison.high",
    "verdict": "verdict", "remark": "remark", **{name: f"comparison.{name}" for name in _OF_COMPARISON},
    "num_collapsed": "num_collapsed",
    "rougeL_vs_full": "behind.value", "length_ratio": "length.value",
    **{f"{kind}_{name}": f"times.{n}.{path}" for n, kind in enumerate(_TIMES) for name, path in _OF_TIME.items()},
    "kv_stored_bytes": "stored_bytes", "kv_share_of_full": "stored_share", "folder": "cell.folder", "key": "cell.key",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Time:
    """A time, the full cache's in the same runs, its ratio to that, and what follows from it."""

    own: Estimate | None
    full: Estimate | None
    ratio: Estimate | None
    comparison: Comparison | None

    @property
    def of_medians(self) -> str:
        """Return the quotient of the two times, which are medians; "" where the ratio over pairs is printed the same.

        Noise makes the two differ, and a ratio must follow from what stands beside it.
        """
        if self.own is None or self.full is None or self.ratio is None or self.full.value <= 0:
            return ""
        name = "tpot_ratio_to_full"
        text = format_value(name, self.own.value / self.full.value)
        return "" if text == format_value(name, self.ratio.value) else f"of medians {text}"


@dataclass(frozen=True, kw_only=True, slots=True)
class CellRow:
    """One cell: its quality against full, its times, its bytes, and the samples it loses.

    `verdict` is the quality's, "reference" for the full cache, the status of a failed cell, "" where none exists.
    `behind` is ROUGE against the full cache, `length` the answers' length beside the full cache's, which that follows.
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
    behind: Estimate | None
    length: Estimate | None

    @property
    def remark(self) -> str:
        """Return what belongs below the verdict."""
        return verdict_remark(self.comparison) if self.comparison else ""


def cell_rows(judged: Judged, name: str | None = None) -> tuple[CellRow, ...]:
    """Return the rows of a group in table order, quality by the measure `name`, else the primary one."""
    return tuple(_cell_row(judged, cell, name or judged.primary) for cell in judged.group.cells)


def all_rows(groups: Iterable[Judged]) -> tuple[CellRow, ...]:
    """Return the rows of several groups, each by its primary measure."""
    return tuple(row for judged in groups for row in cell_rows(judged))


def _cell_row(judged: Judged, cell: CellResult, name: str | None) -> CellRow:
    group = judged.group
    comparison = judged.against_full(cell, name) if name else None
    losses = losses_of(group, cell, name) if name and not cell.is_full else ()
    turn = _TURN.match(name or "")
    prefix = turn[0] if turn else ""
    stored, full = cell.estimate("kv_stored_bytes"), group.full and group.full.estimate("kv_stored_bytes")
    return CellRow(
        model=group.model,
        dataset=group.dataset,
        policy=group.series_label(cell),
        cell=cell,
        measure=name,
        quality=cell.estimate(name) if name else None,
        comparison=comparison,
        verdict=cell.status if cell.failed
        else REFERENCE if cell.is_full
        else comparison.verdict if comparison else "",
        times=tuple(
            time_of(cell, kind, judged.against_full(cell, f"{kind}_ratio_to_full")) for kind in _TIMES
        ),
        stored_bytes=stored.value if stored else None,
        stored_share=stored.value / full.value if stored and full and full.value > 0 else None,
        num_collapsed=sum(loss.collapsed for loss in losses) if losses else None,
        num_paired=len(losses),
        behind=cell.estimate(f"{prefix}{BEHIND}"),
        length=cell.estimate(f"{prefix}{LENGTH}"),
    )  # fmt: skip


def time_of(cell: CellResult, kind: str, comparison: Comparison | None = None) -> Time:
    """Return "tpot" or "ttft" of the cell beside the full cache's that it was interleaved with."""
    own, full, ratio = (cell.estimate(name) for name in (f"{kind}_ms", f"full_{kind}_ms", f"{kind}_ratio_to_full"))
    return Time(own=own, full=full, ratio=ratio, comparison=comparison)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictTable:
    """One model and data set: heads and rows of the same length; the first three columns are text."""

    title: str
    note: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def verdict_table(judged: Judged) -> VerdictTable:
    """Return the table of one group by its primary measure."""
    rows = cell_rows(judged)
    label = measure(judged.primary).label if judged.primary else "quality"
    shown = behind_of(rows)
    behind = [measure(name).label for name in shown]
    heads = (
        *("policy", "budget", "verdict", label, "minus full", "detectable", "collapses"),
        *behind,
        *("TPOT", "full's TPOT", "TPOT / full", "TTFT", "full's TTFT", "TTFT / full", "KV stored", "of full"),
    )
    note = " ".join([*sentences_before(judged.group, judged.choices), f"{_NOTE}{_margins(rows)}"])
    cells = tuple(_cells(row, shown) for row in rows)
    return VerdictTable(title=judged.group.title, note=note, heads=heads, rows=cells)


def behind_of(rows: Iterable[CellRow]) -> list[str]:
    """Return what stands behind the quality of the rows, where any has it: ROUGE unless it leads, and the length."""
    rows = list(rows)
    ranks = {row.measure for row in rows} - {None}
    is_behind = any(row.behind and not (row.measure or "").endswith(BEHIND) for row in rows) and bool(ranks)
    has_length = any(row.behind and row.length for row in rows)
    return [name for name, has in ((BEHIND, is_behind), (LENGTH, has_length)) if has]


def _cells(row: CellRow, behind: Sequence[str]) -> tuple[str, ...]:
    one, cell = row.comparison, row.cell
    return (
        row.policy,
        cell.budget,
        _verdict(row),
        _estimate(row.measure, row.quality),
        difference_text(one) if one else "-",
        (size_text(one.measure, one.minimum_detectable) if one else "") or "-",
        "-" if row.num_collapsed is None else f"{row.num_collapsed} of {row.num_paired}",
        *(_estimate(name, row.behind if name == BEHIND else row.length) for name in behind),
        *(
            text
            for name, time in zip(_TIMES, row.times, strict=True)
            for text in (
                _estimate(f"{name}_ms", time.own),
                "-" if time.full is None else format_value(f"full_{name}_ms", time.full.value),
                _estimate(f"{name}_ratio_to_full", time.ratio) + (f" ({time.of_medians})" if time.of_medians else ""),
            )
        ),
        "-" if row.stored_bytes is None else format_value("kv_stored_bytes", row.stored_bytes),
        "-" if row.stored_share is None else f"{row.stored_share:.2f}x",
    )


def _verdict(row: CellRow) -> str:
    noisy = "times noisy" if row.cell.status == "noisy" and row.verdict != "noisy" else ""
    remarks = "; ".join(part for part in (row.remark, noisy) if part)
    return (row.verdict or "-") + (f" ({remarks})" if remarks else "")


def _estimate(name: str | None, found: Estimate | None) -> str:
    return "-" if name is None or found is None else format_with_interval(name, found.value, found.low, found.high)


def _margins(rows: Sequence[CellRow]) -> str:
    made = [row.comparison for row in rows if row.comparison is not None and row.comparison.margin is not None]
    found = {size_with_unit(one.measure, one.margin) for one in made}
    return f" Margin: {', '.join(sorted(found))}." if found else ""


def verdicts_markdown(groups: Sequence[Judged]) -> str:
    """Return one table per model and data set, and behind it each policy against each other, a table per measure."""
    parts = []
    for judged in groups:
        table = verdict_table(judged)
        sides = "l" * _NUM_TEXT + "r" * (len(table.heads) - _NUM_TEXT)
        lines = [f"## {escaped(table.title)}", "", escaped(table.note), ""]
        parts.append("\n".join([*lines, *markdown_table(table.heads, table.rows, sides)]) + "\n")
        parts += ["\n".join(matrix_markdown(one, table.title)) + "\n" for one in matrices(judged)]
    return "\n".join(parts) or "No usable record was found.\n"


def verdicts_csv(groups: Sequence[Judged]) -> str:
    """Return one row per cell and quality measure, numbers in base units and full precision."""
    made = (row for judged in groups for name in judged.qualities or (None,) for row in cell_rows(judged, name))
    frame = pd.DataFrame([{name: _at(row, path) for name, path in _CSV.items()} for row in made], columns=list(_CSV))
    kinds = {name: "Int64" if name in _COUNTS else "string" if name in _TEXTS else "float64" for name in _CSV}
    return csv_text(frame.astype(kinds))


def _at(row: CellRow, path: str) -> object:
    """Return what lies at the path below the row; None where a part of it is missing, or a text is empty."""
    found: Any = row
    for part in path.split("."):
        if found is not None:
            found = found[int(part)] if part.isdigit() else getattr(found, part)
    return None if found == "" else found


def verdicts_latex(groups: Sequence[Judged]) -> str:
    """Return a table that fits a column per group, and each policy against each other across the page; booktabs."""
    head = "% Made by kvbench report --format latex; needs \\usepackage{booktabs} and \\usepackage{graphicx}.\n"
    # Of tables without text between them LaTeX holds back 52 at most.
    return head + "\\clearpage\n".join("\n".join(_latex_tables(judged)) for judged in groups)


def _latex_tables(judged: Judged) -> Iterator[str]:
    yield _column_table(judged)
    for found in matrices(judged):
        caption = tex(f"{found.title}, {judged.group.title}. {found.note}")
        rows = (f"{' & '.join(map(tex, row))} \\\\" for row in found.texts)
        yield _floating("table*", caption, "l" * len(found.heads), map(tex, found.heads), rows)


def _column_table(judged: Judged) -> str:
    """Return the cells budget by budget: what a reader of a paper compares, the best of each budget in bold."""
    rows = cell_rows(judged)
    primary = judged.primary
    length = [LENGTH] if primary and primary.endswith(BEHIND) and LENGTH in behind_of(rows) else []
    unit = difference_unit(primary)[0] if primary else ""
    heads = ["policy", measure(primary).label if primary else "quality", f"minus full{f' ({unit})' if unit else ''}"]
    heads += [*(measure(name).label for name in length), "TPOT / full", "KV / full"]
    by_budget: dict[str, list[CellRow]] = {}
    for row in sorted(rows, key=lambda row: (not row.cell.is_full, row.cell.budget_order)):
        by_budget.setdefault("" if row.cell.is_full else row.cell.budget, []).append(row)
    lines: list[str] = []
    for budget, same in by_budget.items():
        lines += [r"\midrule"] if lines else []
        lines += [rf"\multicolumn{{{len(heads)}}}{{@{{}}l}}{{\emph{{{tex(budget)}}}}} \\"] if budget else []
        best = _best(judged, same)
        lines += [f"{' & '.join(_column_cells(row, best, length=bool(length)))} \\\\" for row in same]
    said = {row.verdict for row in rows} | {"noisy" for row in rows if _noisy_ratio(row)}
    marks = ", ".join(f"{mark.strip()} {word}" for word, mark in _MARKS.items() if word in said)
    told = " ".join([*sentences_before(judged.group, judged.choices), f"{_COLUMN_NOTE}{_margins(rows)}"])
    caption = f"{tex(f'{judged.group.title}. {told}')}{f' {marks}.' if marks else ''}"
    return _floating("table", caption, "@{}l" + "r" * (len(heads) - 1) + "@{}", map(tex, heads), lines)


def _best(judged: Judged, rows: Sequence[CellRow]) -> dict[str, str]:
    """Return the best printed entry of quality, TPOT and KV among the rows of one budget.

    None where all are alike, times are noisy, or nobody is ranked.
    """
    name, best = judged.primary, {}
    ranked = [] if name is None or judged.ability.reason(name) else [row for row in rows if row.quality]
    texts = {
        "quality": [(row.quality.value, _value(name, row.quality)) for row in ranked if row.quality],
        "tpot": [(ratio.value, _ratio(row)) for row in rows if (ratio := row.times[0].ratio) and not _noisy_ratio(row)],
        "kv": [(row.stored_share, _share(row)) for row in rows if row.stored_share is not None],
    }
    for kind, found in texts.items():
        higher = kind == "quality" and name is not None and measure(name).better == "higher"
        if len({text for _, text in found}) > 1:
            best[kind] = (max if higher else min)(found)[1]
    return best


def _column_cells(row: CellRow, best: Mapping[str, str], *, length: bool) -> Iterator[str]:
    yield tex(row.policy)
    if row.cell.failed:
        yield from (tex(row.cell.status), *["--"] * (4 if length else 3))
        return
    yield _bold(_value(row.measure, row.quality), best.get("quality"))
    if row.comparison is None:
        yield "--" if row.verdict != REFERENCE else REFERENCE
    else:
        interval = difference_interval(row.comparison)
        small = f" {{\\scriptsize {tex(interval)}}}" if interval else ""
        yield f"{_MARKS.get(row.verdict, '')}{tex(difference_value(row.comparison))}{small}"
    if length:
        yield _value(LENGTH, row.length)
    noisy = _noisy_ratio(row)
    yield f"{_MARKS['noisy']}{_ratio(row)}" if noisy else _bold(_ratio(row), best.get("tpot"))
    yield _bold(_share(row), best.get("kv"))


def _noisy_ratio(row: CellRow) -> bool:
    return row.times[0].ratio is not None and bool(timing_noise(row.cell))


def _ratio(row: CellRow) -> str:
    return _value(PRIMARY_LATENCY, row.times[0].ratio)


def _share(row: CellRow) -> str:
    return "--" if row.stored_share is None else tex(f"{row.stored_share:.2f}x")


def _value(name: str | None, found: Estimate | None) -> str:
    return "--" if name is None or found is None else tex(format_value(name, found.value))


def _bold(text: str, best: str | None) -> str:
    return rf"\textbf{{{text}}}" if text == best else text


def _floating(kind: str, caption: str, columns: str, heads: Iterable[str], lines: Iterable[str]) -> str:
    """Return a float of what is LaTeX already; the table is made smaller where it is wider than its column."""
    body = "\n".join(lines)
    return rf"""\begin{{{kind}}}[t]
\centering
\caption{{{caption}}}
\sbox0{{\footnotesize\setlength{{\tabcolsep}}{{3pt}}%
\begin{{tabular}}{{{columns}}}
\toprule
{" & ".join(heads)} \\
\midrule
{body}
\bottomrule
\end{{tabular}}}}%
\ifdim\wd0>\linewidth\resizebox{{\linewidth}}{{!}}{{\usebox0}}\else\usebox0\fi
\end{{{kind}}}
"""


def tex(text: str) -> str:
    """Return any text as LaTeX: special characters escaped, line breaks and control characters as blanks."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    marked = _NEGATIVE.sub("\0", plain)
    return "".join("$-$" if letter == "\0" else _TEX.get(letter, letter) for letter in marked)
