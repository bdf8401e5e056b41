"""Draw the results table in a terminal, as wide as it is, and as markdown.

>>> print_tables(load_results(Path("results")))

The results table before it is drawn: the same rows feed the terminal, markdown and the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from kvbench.measures import MEASURES, MISSING, format_interval, format_value, measure
from kvbench.report.ability import Ability
from kvbench.report.compare import DECLARED, Choices, timing_noise
from kvbench.report.load import CellResult, Group, Results
from kvbench.report.verdicts import VerdictRow, declared_text, verdict_rows

MAIN_COLUMNS = (
    "ppl",
    "rougeL_vs_full",
    "rougeL_vs_reference",
    "objects_recalled_fraction",
    "ttft_ms",
    "tpot_ms",
    "peak_memory_bytes",
    "kv_stored_bytes",
)
_EXTRA_COLUMNS = ("needles_recalled_fraction", "num_skipped_items")
_TURN_COLUMNS = ("rougeL_vs_full", "exact_fraction", "objects_recalled_fraction", "needles_recalled_fraction")
COST_COLUMNS = (
    "ttft_ms",
    "tpot_ms",
    "tpot_ratio_to_full",
    "throughput_tokens_per_s",
    "roof_share_fraction",
    "capacity_prompts",
    "capacity_ratio_to_full",
    "capacity_throughput_tokens_per_s",
    "capacity_throughput_ratio_to_full",
    "peak_memory_bytes",
    "peak_over_bound_ratio",
    "kv_stored_bytes",
)
_QUALITIES = MAIN_COLUMNS[:4]
_OVERHEAD_BOUND_SHARE = 0.5
INTERVAL_NOTE = "[low, high] is the 95 % interval; a number without one is a single observation or an exact count."


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """The rows of one group; `columns` are measurement names."""

    title: str
    counts: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def results_table(group: Group, *, every_measure: bool = False) -> Table:
    """Return the table of `group`: the main columns, or every measurement that any cell has."""
    columns = _measured(group) if every_measure else _main_columns(group)
    rows = tuple(
        Row(
            cell=cell,
            policy=group.series_label(cell),
            budget=cell.budget,
            entries=tuple(_entry(cell, name) for name in columns),
        )
        for cell in group.cells
    )
    return Table(title=group.title, counts=counts_text(group.cells), columns=columns, rows=rows)


def counts_text(cells: tuple[CellResult, ...]) -> str:
    """Return "13 cells: 12 ok, 1 oom": every status counted, nothing dropped."""
    statuses = Counter(cell.status for cell in cells)
    order = sorted(statuses, key=lambda status: (status != "ok", status))
    counted = ", ".join(f"{statuses[status]} {status}" for status in order)
    return f"{len(cells)} cell{'' if len(cells) == 1 else 's'}: {counted or 'none'}"


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
    return f"{INTERVAL_NOTE}{f' {counts}.' if counts else ''}{_overhead_note(table)}"


def _overhead_note(table: Table) -> str:
    """Name the cells whose decode step is mostly not reading: their TPOT says little about the cache."""
    name = "roof_share_fraction"
    if name not in table.columns:
        return ""
    found = [(row, row.cell.estimate(name)) for row in table.rows]
    bound = [row.policy for row, share in found if share is not None and share.value < _OVERHEAD_BOUND_SHARE]
    if not bound:
        return ""
    names = ", ".join(dict.fromkeys(bound))
    return f" Overhead-bound (under {_OVERHEAD_BOUND_SHARE:.0%} of the memory roof): {names}."


def _measured(group: Group) -> tuple[str, ...]:
    return tuple(name for name in MEASURES if any(cell.estimate(name) for cell in group.cells))


def _main_columns(group: Group) -> tuple[str, ...]:
    """Choose the columns: costs alone where no quality was measured.

    On a CPU there is no device memory, so the process's own peak takes that column. What only some data sets
    or tasks have comes after, and then columns without any number are left out.
    """
    measured = _measured(group)
    more = tuple(name for name in measured if name in _EXTRA_COLUMNS or _is_of_turn(name))
    if measured and not more and not set(_QUALITIES) & set(measured):
        return tuple(name for name in COST_COLUMNS if name in measured) or MAIN_COLUMNS
    columns: tuple[str, ...] = MAIN_COLUMNS
    if "peak_memory_bytes" not in measured and "peak_rss_bytes" in measured:
        columns = tuple("peak_rss_bytes" if name == "peak_memory_bytes" else name for name in MAIN_COLUMNS)
    return (*(name for name in columns if name in measured), *more) if more else columns


def _is_of_turn(name: str) -> bool:
    turn, _, rest = name.partition("_")
    return turn.startswith("turn") and rest in _TURN_COLUMNS


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


NARROW_COLUMNS = 100
_LAYOUTS = ((False, 1), (True, 1), (True, 0))  # from roomy to tight: budget below the policy, blanks between columns
_STYLES = {"number": "", "missing": "dim", "failed": "bold red", "noisy": "dim"}
_VERDICT_HEADS = ("policy", "budget", "measure", "policy minus full", "detects", "verdict")
_VERDICT_SIDES: tuple[Literal["left", "right"], ...] = ("left", "left", "left", "right", "right", "left")


def print_tables(results: Results, console: Console | None = None, choices: Choices = DECLARED) -> None:
    """Print one table per model and data set; plain stacked lines where no table fits the terminal."""
    console = console or Console()
    for group in results.groups:
        table = results_table(group)
        drawings = (_rich(table, joined=joined, padding=padding) for joined, padding in _LAYOUTS)
        fitting = next((drawn for drawn in drawings if _width(drawn, console) <= console.width), None)
        if fitting is not None and console.width >= NARROW_COLUMNS:
            console.print(fitting)
        else:
            console.print(Text("\n".join(_stacked(table))))
        console.print()
        if sentence := Ability(group).sentence:
            console.print(Text(sentence), end="\n\n")
        _print_verdicts(verdict_rows(group, choices), console)
    if not results.records:
        console.print(Text("No usable record was found."))
    for problem in results.problems:
        console.print(Text(f"problem: {problem.path}: {problem.message}", style="yellow"))


def markdown_tables(results: Results, choices: Choices = DECLARED) -> str:
    """Return the same tables in markdown, one heading per model and data set."""
    parts = [_markdown(results_table(group)) + _markdown_verdicts(group, choices) for group in results.groups] or [
        "No usable record was found.\n"
    ]
    if results.problems:
        lines = [f"- `{problem.path}`: {_escaped(problem.message)}" for problem in results.problems]
        parts.append("\n".join(["## Problems found while reading", "", *lines]) + "\n")
    return "\n".join(parts)


def _rich(table: Table, *, joined: bool, padding: int) -> RichTable:
    """Draw the table; `joined` puts the budget below the policy, which saves a column."""
    drawn = RichTable(
        title=Text(f"{table.title} ({table.counts})"),
        caption=Text(reading_note(table)),
        title_justify="left",
        caption_justify="left",
        box=box.HORIZONTALS,
        padding=(0, padding, 0, 0),
    )
    for head in ("policy\nbudget",) if joined else ("policy", "budget"):
        drawn.add_column(head, no_wrap=True, vertical="top")
    for name in table.columns:
        drawn.add_column(Text(_two_line_label(name)), justify="right", no_wrap=True)
    for row, following in zip(table.rows, (*table.rows[1:], None), strict=True):
        noisy = " (noisy)" if row.cell.status == "noisy" else ""
        names = [Text(row.policy), Text(row.budget + noisy)]
        heads = [Text("\n").join(names)] if joined else names
        ends = following is None or following.policy != row.policy
        drawn.add_row(*heads, *(_two_lines(entry) for entry in row.entries), end_section=ends)
    return drawn


def _print_verdicts(rows: tuple[VerdictRow, ...], console: Console) -> None:
    """Print the comparisons with full, as a table or as lines where that does not fit."""
    if not rows:
        return
    drawn = RichTable(
        title=Text("Compared with full"), caption=Text(declared_text(rows)), title_justify="left",
        caption_justify="left", box=box.HORIZONTALS, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for head, justify in zip(_VERDICT_HEADS, _VERDICT_SIDES, strict=True):
        drawn.add_column(head, justify=justify, no_wrap=True)
    for row, following in zip(rows, (*rows[1:], None), strict=True):
        ends = following is None or (following.policy, following.measure) != (row.policy, row.measure)
        drawn.add_row(*map(Text, _verdict_texts(row)), end_section=ends)
    if _width(drawn, console) <= console.width and console.width >= NARROW_COLUMNS:
        console.print(drawn)
    else:
        lines = (f"{texts[0]}, {texts[1]}: {' '.join(texts[2:4])} {row.verdict}" for row, texts in _with_texts(rows))
        console.print(Text("\n".join(("Compared with full", *lines, declared_text(rows)))))
    console.print()


def _with_texts(rows: tuple[VerdictRow, ...]) -> Iterator[tuple[VerdictRow, tuple[str, ...]]]:
    yield from ((row, _verdict_texts(row)) for row in rows)


def _verdict_texts(row: VerdictRow) -> tuple[str, ...]:
    difference = f"{row.difference} {row.interval}".strip()
    return row.policy, row.budget, measure(row.measure).label, difference, row.detectable, row.verdict


def _markdown_verdicts(group: Group, choices: Choices) -> str:
    rows = verdict_rows(group, choices)
    if not rows:
        return ""
    sentence = Ability(group).sentence
    lines = ["", f"### Compared with full: {_escaped(group.title)}", ""]
    lines += [*([_escaped(sentence), ""] if sentence else []), declared_text(rows), ""]
    lines += [f"| {' | '.join(_VERDICT_HEADS)} |", "| --- | --- | --- | ---: | ---: | --- |"]
    lines += [f"| {' | '.join(map(_escaped, _verdict_texts(row)))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _width(drawn: RichTable, console: Console) -> int:
    """Return the columns that the table needs; measured on a wide page, since rich cuts off at the console's width."""
    return Measurement.get(console, console.options.update(width=10_000), drawn).maximum


def _two_line_label(name: str) -> str:
    label = measure(name).label
    head, _, tail = label.partition(" ")
    return f"{head}\n{tail}" if tail else label


def _two_lines(entry: Entry) -> Text:
    text = Text(entry.text, style=_STYLES[entry.kind])
    return text.append(f"\n{entry.interval}", style="dim") if entry.interval else text


def _stacked(table: Table) -> Iterator[str]:
    """Yield a heading, then a block of one short line per number for each cell."""
    yield f"{table.title} ({table.counts})"
    for row in table.rows:
        yield ""
        noisy = " (noisy)" if row.cell.status == "noisy" else ""
        yield f"{row.policy}, {row.budget}{noisy}" if row.budget != "-" else f"{row.policy}{noisy}"
        yield from _stacked_entries(table, row)
    yield ""
    yield reading_note(table)


def _stacked_entries(table: Table, row: Row) -> Iterator[str]:
    if row.cell.failed:
        yield f"  {row.cell.status}{f' in {row.cell.phase}' if row.cell.phase else ''}"
        return
    width = max(len(measure(name).label) for name in table.columns)
    for name, entry in zip(table.columns, row.entries, strict=True):
        yield f"  {measure(name).label:<{width}}  {entry.text} {entry.interval}".rstrip()


def _markdown(table: Table) -> str:
    heads = ["policy", "budget", *(measure(name).label for name in table.columns)]
    lines = [f"## {_escaped(table.title)}", "", f"{table.counts}. {reading_note(table)}", ""]
    lines += [f"| {' | '.join(heads)} |", f"|{' --- |' * 2}{' ---: |' * len(table.columns)}"]
    for row in table.rows:
        noisy = " (noisy)" if row.cell.status == "noisy" else ""
        texts = [f"{entry.text} {entry.interval}".strip() for entry in row.entries]
        lines.append(f"| {' | '.join(_escaped(text) for text in (row.policy + noisy, row.budget, *texts))} |")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Keep a name with a bar or a line break from breaking the table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
