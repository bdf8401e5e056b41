"""The results as tables: in a terminal as wide as it is, as Markdown, as CSV and as Parquet.

    print_tables(load_results(Path("results")))

`results_table` gives the rows that terminal, Markdown and page draw, `verdict_rows` the comparisons with the full
cache that were declared before; policies among each other are `standing.leading_matrix`. `cells_frame`, `long_frame`
and `samples_frame` are for whoever wants the numbers: a row per cell, per cell and measurement, per cell and sample;
CSV and Parquet hold the same, with the same bytes for the same records. Text that a spreadsheet would run as a formula
is made harmless in CSV; numbers are untouched. Every Markdown table of kvbench is written by `markdown_table`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from kvbench.measures import MEASURES, MISSING, TASK_MEASURES, format_interval, format_value, measure
from kvbench.report.answer import sentences_before
from kvbench.report.compare import (
    DECLARED,
    PRIMARY_LATENCY,
    Choices,
    Comparison,
    declared_budget,
    difference_interval,
    difference_unit,
    difference_value,
    group_comparisons,
    leading_quality,
    noisy_text,
    size_with_unit,
    timing_noise,
    verdict_remark,
)
from kvbench.report.load import CellResult, Group, Results
from kvbench.report.standing import BEHIND, LENGTH, Matrix, leading_matrix

_QUALITIES = ("objects_recalled_fraction", "rougeL_vs_full", "rougeL_vs_reference", "ppl")
MAIN_COLUMNS = (*_QUALITIES, "ttft_ms", "tpot_ms", "peak_memory_bytes", "kv_stored_bytes")
_EXTRA_COLUMNS = ("needles_recalled_fraction", "answers_right_fraction", "answer_ms", "num_skipped_items")
_TURN_COLUMN = re.compile(
    r"turn\d+_(rougeL_vs_full|exact_fraction|objects_recalled_fraction|needles_recalled_fraction|answers_right_fraction)"
)
_COST_COLUMNS = (
    *("ttft_ms", "tpot_ms", "full_tpot_ms", "tpot_ratio_to_full", "throughput_tokens_per_s", "roof_share_fraction"),
    *("capacity_prompts", "capacity_ratio_to_full"),
    *("capacity_throughput_tokens_per_s", "capacity_throughput_ratio_to_full"),
    *("peak_memory_bytes", "peak_over_bound_ratio", "kv_stored_bytes"),
)
_OVERHEAD_BOUND_SHARE = 0.5
INTERVAL_NOTE = (
    "[low, high] is the 95 % interval; a number without one is observed once, counted or the same in every sample."
)
_RATIOS_NOTE = " Times are medians of runs; a ratio to full is the geometric mean over pairs of runs."
_FILE_COLUMNS = 120  # at least, where there is no terminal
_DECLARED_TITLE = "Compared with full"
_NARROW_COLUMNS, _MATCH_COLUMNS = 100, 10  # a match is wider
_LAYOUTS = ((False, 1), (True, 1), (True, 0))  # from roomy to tight: budget below the policy, blanks between columns
_STYLES = {"number": "", "missing": "dim", "failed": "bold red", "noisy": "dim"}
_Justify = Literal["left", "right"]
_VERDICT_HEADS: Mapping[str, _Justify] = {
    "policy": "left", "budget": "left", "measure": "left", "policy minus full": "right", "detects": "right",
    "verdict": "left",
}  # fmt: skip
_REMARKED = {"equivalent": " ", "undecided": ", "}  # in a terminal only these words need more
_LABELS = ("model", "dataset", "policy", "budget", "budget_fraction", "budget_tokens", "positions", "variant")
_RUN = ("status", "phase", "error", "sweep", "key", "started_utc", "duration_s")
_SAMPLE_LABELS = (*_LABELS, "status", "key")
_NUMBERS = ("budget_fraction", "budget_tokens", "duration_s")
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One table entry; `value` is in base units and None when `text` is "-" or a status."""

    text: str
    interval: str = ""
    value: float | None = None
    n: int | None = None
    kind: Literal["number", "missing", "failed", "noisy"] = "number"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One cell of the sweep as a row."""

    cell: CellResult
    policy: str
    budget: str
    entries: tuple[Entry, ...]

    @property
    def remark(self) -> str:
        """Return what belongs behind the name of a cell whose times are noisy."""
        return " (noisy)" if self.cell.status == "noisy" else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """The rows of one group; `columns` are measurement names."""

    title: str
    counts: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def results_table(group: Group, *, every_measure: bool = False) -> Table:
    """Return the table of `group`: the main columns, or every measurement that any cell has."""
    measured = tuple(name for name in MEASURES if any(cell.estimate(name) for cell in group.cells))
    columns = measured if every_measure else _main_columns(measured)
    rows = tuple(
        Row(cell=cell, policy=group.series_label(cell), budget=cell.budget,
            entries=tuple(_entry(cell, name) for name in columns))
        for cell in group.cells
    )  # fmt: skip
    return Table(title=group.title, counts=counts_text(group.cells), columns=columns, rows=rows)


def _main_columns(measured: tuple[str, ...]) -> tuple[str, ...]:
    """Choose the columns, the task's own measure first: costs alone where no quality was measured.

    On a CPU there is no device memory, so the process's own peak takes that column. Where some data set or task has
    more, columns without any number are left out. The answers' length stands behind each ROUGE against full.
    """
    more = tuple(name for name in measured if name in _EXTRA_COLUMNS or _TURN_COLUMN.fullmatch(name))
    if measured and not more and not set(_QUALITIES) & set(measured):
        return tuple(name for name in _COST_COLUMNS if name in measured) or MAIN_COLUMNS
    columns: tuple[str, ...] = MAIN_COLUMNS
    if "peak_memory_bytes" not in measured and "peak_rss_bytes" in measured:
        columns = tuple("peak_rss_bytes" if name == "peak_memory_bytes" else name for name in MAIN_COLUMNS)
    if more:
        columns = tuple(sorted((*(name for name in columns if name in measured), *more), key=_place))
    if set(TASK_MEASURES) & set(measured):  # which makes closeness to the reference's words the least telling number
        columns = tuple(name for name in columns if name != "rougeL_vs_reference")
    lengths = {name: name.replace(BEHIND, LENGTH) for name in columns if name.endswith(BEHIND)}
    return tuple(
        one for name in columns for one in (name, lengths.get(name)) if one and (one == name or one in measured)
    )


def _place(name: str) -> tuple[bool, str, bool]:
    """Order: quality before costs, turn by turn, in each the task's own measure first."""
    found = _TURN_COLUMN.fullmatch(name)
    turn, own = (name.partition("_")[0], found[1]) if found else ("", name)
    return measure(name).unit in ("ms", "bytes", "entries"), turn, own not in TASK_MEASURES


def _entry(cell: CellResult, name: str) -> Entry:
    if cell.failed:
        return Entry(text=cell.status, kind="failed")
    found = cell.estimate(name)
    if found is None:
        return Entry(text=MISSING, kind="missing")
    return Entry(
        text=format_value(name, found.value),
        interval=format_interval(name, found.value, found.low, found.high),
        value=found.value,
        n=found.n,
        kind="noisy" if timing_noise(cell, name) else "number",
    )


def counts_text(cells: tuple[CellResult, ...]) -> str:
    """Return "13 cells: 12 ok, 1 oom; TPOT noisy in 3": every status counted, nothing dropped.

    A noisy cell is ok but for its times, and which of them are told apart in more cells than have that status.
    """
    statuses = Counter("ok" if cell.status == "noisy" else cell.status for cell in cells)
    order = sorted(statuses, key=lambda status: (status != "ok", status))
    counted = ", ".join(f"{statuses[status]} {status}" for status in order)
    noisy = noisy_text(cells)
    return f"{len(cells)} cell{'' if len(cells) == 1 else 's'}: {counted or 'none'}{f'; {noisy}' if noisy else ''}"


def samples_text(cells: Iterable[CellResult], name: str) -> str:
    """Return "n = 32", or the range where cells differ; empty when no cell states n."""
    counts = sorted({found.n for cell in cells if (found := cell.estimate(name)) and found.n is not None})
    if not counts:
        return ""
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"


def reading_note(table: Table) -> str:
    """Return how to read an entry, and how many observations each column's numbers rest on."""
    by_count: dict[str, list[str]] = {}
    for name in table.columns:
        text = samples_text((row.cell for row in table.rows), name)
        if text:
            by_count.setdefault(text, []).append(measure(name).label)
    counts = "; ".join(f"{text}: {', '.join(labels)}" for text, labels in by_count.items())
    # Where the decode step is mostly not reading, TPOT says little about the cache.
    shares = ((row.policy, row.cell.estimate("roof_share_fraction")) for row in table.rows)
    bound = dict.fromkeys(policy for policy, share in shares if share and share.value < _OVERHEAD_BOUND_SHARE)
    overhead = f" Overhead-bound (under {_OVERHEAD_BOUND_SHARE:.0%} MBU): {', '.join(bound)}."
    is_told = bound and "roof_share_fraction" in table.columns
    ratios = _RATIOS_NOTE if PRIMARY_LATENCY in table.columns else ""
    return f"{INTERVAL_NOTE}{f' {counts}.' if counts else ''}{ratios}{overhead if is_told else ''}"


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

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the row as it is shown, under the heads of the table."""
        difference = f"{self.difference} {self.interval}".strip()
        return self.policy, self.budget, measure(self.measure).label, difference, self.detectable, self.verdict


def verdict_rows(group: Group, choices: Choices = DECLARED) -> tuple[VerdictRow, ...]:
    """Return the rows of the group's quality measure, then those of its latency measure; noisy cells stay last."""
    declared = [name for name in (leading_quality(group), PRIMARY_LATENCY) if name]
    against = [one for one in group_comparisons(group, choices, declared, between=False) if one.second.is_full]
    chosen = (one for name in declared for one in against if one.measure == name)
    return tuple(_verdict_row(group, one) for one in chosen)


def _verdict_row(group: Group, one: Comparison) -> VerdictRow:
    unit = difference_unit(one.measure)[0]
    remark = verdict_remark(one) if one.verdict in _REMARKED else ""
    return VerdictRow(
        policy=group.series_label(one.first),
        budget=one.first.budget,
        measure=one.measure,
        difference=f"{difference_value(one)} {unit}".strip(),
        interval=difference_interval(one),
        detectable=size_with_unit(one.measure, one.minimum_detectable) or MISSING,
        verdict=f"{one.verdict}{_REMARKED[one.verdict]}{remark}" if remark else one.verdict,
    )


def _declared_text(rows: tuple[VerdictRow, ...]) -> str:
    """Return what the table says and how it was made."""
    names = " and ".join(dict.fromkeys(measure(row.measure).label for row in rows))
    return (
        f"Declared before: {names}, each policy against full, Holm's correction within a measure. "
        "[low, high] is the 95 % interval of the paired difference, uncorrected; detects: the difference that "
        "these samples find in 80 % of repetitions. Times are compared with the full cache's in the same runs, not "
        "with those of its own row. Noisy times are in no ranking."
    )


def print_tables(results: Results, console: Console | None = None, choices: Choices = DECLARED) -> None:
    """Print one table per model and data set; plain stacked lines where no table fits the terminal.

    A file or a pipe has no width of its own: there a table is as wide as it needs, unless COLUMNS says how wide.
    """
    found = [(group, results_table(group), verdict_rows(group, choices)) for group in results.groups]
    console = console or Console()
    if not console.is_terminal and "COLUMNS" not in os.environ and console.file is sys.stdout:
        drawn = [_rich(table, joined=False, padding=1) for _, table, _ in found]
        drawn += [_verdicts(rows) for _, _, rows in found if rows]
        console = Console(width=max([_FILE_COLUMNS, *(_needed(one, console) for one in drawn)]))
    for group, table, rows in found:
        drawings = (_rich(table, joined=joined, padding=padding) for joined, padding in _LAYOUTS)
        fitting = next((drawn for drawn in drawings if _fits(drawn, console)), None)
        console.print(fitting or Text("\n".join(_stacked(table))))
        console.print()
        for sentence in sentences_before(group, choices):
            console.print(Text(sentence), end="\n\n")
        _print_verdicts(rows, console)
        _print_matrix(group, choices, console)
    if not results.records:
        console.print(Text("No usable record was found."))
    for problem in results.problems:
        console.print(Text(f"problem: {problem.path}: {problem.message}", style="yellow"))


def _rich(table: Table, *, joined: bool, padding: int) -> RichTable:
    """Draw the table; `joined` puts the budget below the policy, which saves a column."""
    drawn = ruled(f"{table.title} ({table.counts})", reading_note(table), padding)
    for head in ("policy\nbudget",) if joined else ("policy", "budget"):
        drawn.add_column(head, no_wrap=True, vertical="top")
    for name in table.columns:
        drawn.add_column(Text(measure(name).label.replace(" ", "\n", 1)), justify="right", no_wrap=True)
    for row, following in zip(table.rows, (*table.rows[1:], None), strict=True):
        names = [Text(row.policy), Text(row.budget + row.remark)]
        heads = [Text("\n").join(names)] if joined else names
        ends = following is None or following.policy != row.policy
        drawn.add_row(*heads, *(_two_lines(entry) for entry in row.entries), end_section=ends)
    return drawn


def ruled(title: str, caption: str, padding: int) -> RichTable:
    """Return an empty table in the look of all tables in a terminal."""
    return RichTable(
        title=Text(title), caption=Text(caption), title_justify="left", caption_justify="left", box=box.HORIZONTALS,
        padding=(0, padding, 0, 0),
    )  # fmt: skip


def _fits(drawn: RichTable, console: Console) -> bool:
    return _needed(drawn, console) <= console.width and console.width >= _NARROW_COLUMNS


def _needed(drawn: RichTable, console: Console) -> int:
    """Return the table's width, measured on a wide page, since rich cuts off at the console's width."""
    return Measurement.get(console, console.options.update(width=10_000), drawn).maximum


def _print_verdicts(rows: tuple[VerdictRow, ...], console: Console) -> None:
    """Print the comparisons with full, as a table or as lines where that does not fit."""
    if not rows:
        return
    drawn = _verdicts(rows)
    lines = (f"{row.policy}, {row.budget}: {' '.join(row.texts[2:4])} {row.verdict}" for row in rows)
    text = Text("\n".join((_DECLARED_TITLE, *lines, _declared_text(rows))))
    console.print(drawn if _fits(drawn, console) else text)
    console.print()


def _verdicts(rows: tuple[VerdictRow, ...]) -> RichTable:
    drawn = ruled(_DECLARED_TITLE, _declared_text(rows), 1)
    for head, justify in _VERDICT_HEADS.items():
        drawn.add_column(head, justify=justify, no_wrap=True)
    for row, following in zip(rows, (*rows[1:], None), strict=True):
        ends = following is None or (following.policy, following.measure) != (row.policy, row.measure)
        drawn.add_row(*map(Text, row.texts), end_section=ends)
    return drawn


def _print_matrix(group: Group, choices: Choices, console: Console) -> None:
    """Print each policy against each other at the headline's budget where that fits; page and files have all of it."""
    if len({group.series_label(cell) for cell in group.budgeted}) * _MATCH_COLUMNS > console.width:
        return
    matrix, budget = leading_matrix(group, choices), declared_budget(group)
    rows = [] if matrix is None else [row for row in matrix.rows if row.budget == budget]
    if matrix is None or not rows:
        return
    drawn = ruled(f"{matrix.title}, {budget}", matrix.note, 1)
    for head in ("row against column", *matrix.columns):
        drawn.add_column(Text(head), no_wrap=True, vertical="top")
    for row in rows:
        drawn.add_row(
            Text(row.policy), *(Text("\n".join((one.word, *one.numbers)) if one else "-") for one in row.matches)
        )
    if _fits(drawn, console):
        console.print(drawn, end="\n\n")


def _two_lines(entry: Entry) -> Text:
    text = Text(entry.text, style=_STYLES[entry.kind])
    return text.append(f"\n{entry.interval}", style="dim") if entry.interval else text


def _stacked(table: Table) -> Iterator[str]:
    """Yield a heading, then a block of one short line per number for each cell."""
    yield f"{table.title} ({table.counts})"
    width = max(len(measure(name).label) for name in table.columns)
    for row in table.rows:
        yield from ("", f"{row.policy}{'' if row.budget == '-' else f', {row.budget}'}{row.remark}")
        if row.cell.failed:
            yield f"  {row.cell.status}{f' in {row.cell.phase}' if row.cell.phase else ''}"
            continue
        for name, entry in zip(table.columns, row.entries, strict=True):
            yield f"  {measure(name).label:<{width}}  {entry.text} {entry.interval}".rstrip()
    yield from ("", reading_note(table))


def markdown_tables(results: Results, choices: Choices = DECLARED) -> str:
    """Return the same tables in markdown, one heading per model and data set."""
    parts = ["\n".join(_markdown(group, choices)) + "\n" for group in results.groups]
    parts = parts or ["No usable record was found.\n"]
    if results.problems:
        lines = [f"- `{problem.path}`: {escaped(problem.message)}" for problem in results.problems]
        parts.append("\n".join(["## Problems found while reading", "", *lines]) + "\n")
    return "\n".join(parts)


def _markdown(group: Group, choices: Choices) -> Iterator[str]:
    table = results_table(group)
    heads = ["policy", "budget", *(measure(name).label for name in table.columns)]
    yield from (f"## {escaped(table.title)}", "", f"{table.counts}. {reading_note(table)}", "")
    yield from markdown_table(heads, (_markdown_row(row) for row in table.rows), "ll" + "r" * len(table.columns))
    for sentence in sentences_before(group, choices):
        yield from ("", escaped(sentence))
    if rows := verdict_rows(group, choices):
        yield from ("", f"### Compared with full: {escaped(group.title)}", "", _declared_text(rows), "")
        yield from markdown_table(tuple(_VERDICT_HEADS), (row.texts for row in rows), "lllrrl")
    if found := leading_matrix(group, choices):
        yield from ("", *matrix_markdown(found, group.title))


def _markdown_row(row: Row) -> list[str]:
    return [row.policy + row.remark, row.budget, *(f"{one.text} {one.interval}".strip() for one in row.entries)]


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], sides: str = "") -> Iterator[str]:
    """Yield the lines of a Markdown table; `sides` has an l or r per column, no columns are aligned without."""
    rules = [" ---: " if side == "r" else " --- " for side in sides] or ["---"] * len(heads)
    yield f"| {' | '.join(map(escaped, heads))} |"
    yield f"|{'|'.join(rules)}|"
    yield from (f"| {' | '.join(map(escaped, row))} |" for row in rows)


def matrix_markdown(matrix: Matrix, group_title: str) -> Iterator[str]:
    """Yield the lines of a matrix of policies under its heading."""
    yield from (f"### {escaped(matrix.title)}, {escaped(group_title)}", "", escaped(matrix.note), "")
    yield from markdown_table(matrix.heads, matrix.texts, "l" * len(matrix.heads))


def escaped(text: str) -> str:
    """Keep a name with a bar, a line break or markup from breaking what it stands in."""
    flat = " ".join(text.split())
    return flat.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")


def cells_frame(results: Results) -> pd.DataFrame:
    """Return one row per cell: labels, status, then value, _low, _high and _n of every measurement; no empty column."""
    measured = [column for name in MEASURES for column in _columns(name)]
    return _filled(_cells(results), [*_LABELS, *_RUN, *measured])


def quality_frame(results: Results) -> pd.DataFrame:
    """Return the columns of `cells_frame` that a sweep gives again wherever, whenever and however often it is run."""
    measured = [column for name, known in MEASURES.items() if known.reproduces for column in _columns(name)]
    return _filled(_cells(results), [*_SAMPLE_LABELS, *measured])


def long_frame(results: Results) -> pd.DataFrame:
    """Return one row per cell and measurement: which cell, the measure and its unit, value, low, high and n."""
    rows = [
        {
            **{label: getattr(cell, label) for label in _SAMPLE_LABELS},
            **{"measure": name, "value": found.value, "low": found.low, "high": found.high, "n": found.n},
            "unit": measure(name).unit,
        }
        for cell in results.records
        for name, found in cell.measurements.items()
    ]
    columns = [*_SAMPLE_LABELS, "measure", "value", "low", "high", "n", "unit"]
    return _typed(pd.DataFrame(rows, columns=columns), numbers={*_NUMBERS, "value", "low", "high", "n"})


def _cells(results: Results) -> pd.DataFrame:
    rows: list[dict[str, object]] = []
    for cell in results.records:
        rows.append({name: getattr(cell, name) for name in (*_LABELS, *_RUN)})
        # A failed cell may have got some numbers before it failed; the status column says how to take them.
        for name, found in cell.measurements.items():
            rows[-1] |= dict(zip(_columns(name), (found.value, found.low, found.high, found.n), strict=True))
    measured = [column for name in MEASURES for column in _columns(name)]
    return _typed(pd.DataFrame(rows, columns=[*_LABELS, *_RUN, *measured]), numbers={*_NUMBERS, *measured})


def _filled(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return those of the columns that hold something in some row; of no rows at all the labels, as a head."""
    has = [name for name in columns if (frame[name].notna() & (frame[name] != "")).any()]
    return frame[has or list(_SAMPLE_LABELS)]


def _columns(name: str) -> tuple[str, ...]:
    return name, f"{name}_low", f"{name}_high", f"{name}_n"


def samples_frame(results: Results) -> pd.DataFrame:
    """Return one row per cell and sample, with every field that a sample of any cell has."""
    rows = [
        {**{name: getattr(cell, name) for name in _SAMPLE_LABELS}, **_sample_row(sample)}
        for cell in results.records
        for sample in cell.samples
    ]
    fields = dict.fromkeys(name for row in rows for name in row)
    columns = [*_SAMPLE_LABELS, *sorted(set(fields) - set(_SAMPLE_LABELS))]
    frame = pd.DataFrame(rows, columns=columns)
    numbers = {name for name in columns if all(_is_number(row.get(name)) for row in rows) and rows}
    return _typed(frame, numbers=numbers | set(_NUMBERS))


def csv_text(frame: pd.DataFrame, *, digits: int | None = None) -> str:
    """Return `frame` as CSV; numbers in their shortest exact form, text that no spreadsheet evaluates.

    A lone "-" is no formula and stays. digits: round to so many, for what is computed anew on every machine, whose
    processors add up in different orders.
    """
    safe = frame.copy()
    for name in map(str, safe.select_dtypes("string").columns):
        risky = safe[name].str.startswith(_FORMULA_STARTS).fillna(False) & (safe[name].str.len() > 1).fillna(False)
        safe.loc[risky, name] = "'" + safe.loc[risky, name]
    rounded = None if digits is None else f"%.{digits}g"
    return str(safe.to_csv(index=False, lineterminator="\n", float_format=rounded))


def parquet_bytes(frame: pd.DataFrame) -> bytes:
    """Return `frame` as a Parquet file."""
    return bytes(frame.to_parquet(None, engine="pyarrow", index=False))


TABLES: Mapping[str, Callable[[Results], pd.DataFrame]] = {
    "table": cells_frame,
    "table_long": long_frame,
    "samples": samples_frame,
}


def csv_and_parquet(results: Results) -> dict[str, bytes]:
    """Return what each of `TABLES` holds as .csv and as .parquet, by file name."""
    files: dict[str, bytes] = {}
    for name, make in TABLES.items():
        frame = make(results)
        files |= {f"{name}.csv": csv_text(frame).encode(), f"{name}.parquet": parquet_bytes(frame)}
    return files


def _sample_row(sample: Mapping[str, Any]) -> dict[str, object]:
    """Sample fields that would hide a label get a prefix; nested values become JSON text."""
    return {
        f"sample_{name}" if name in _SAMPLE_LABELS else str(name): (
            json.dumps(value, sort_keys=True, ensure_ascii=False) if isinstance(value, dict | list) else value
        )
        for name, value in sample.items()
    }


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _typed(frame: pd.DataFrame, *, numbers: set[str]) -> pd.DataFrame:
    """Give every column one type, float64 or text, so that both formats write any mixture."""
    for name in frame.columns:
        if name in numbers:
            frame[name] = pd.to_numeric(frame[name]).astype("float64")
        else:
            texts = [None if pd.isna(value) else str(value) for value in frame[name]]
            frame[name] = pd.Series(texts, index=frame.index, dtype="string")
    return frame
