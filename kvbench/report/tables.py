"""Draw the results table in a terminal, as wide as it is, and as markdown.

>>> print_tables(load_results(Path("results")))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from kvbench.measures import measure
from kvbench.report.ability import Ability
from kvbench.report.comparison import DECLARED, Choices
from kvbench.report.load import Group, Results
from kvbench.report.table_rows import Entry, Row, Table, reading_note, results_table
from kvbench.report.verdict_rows import VerdictRow, declared_text, verdict_rows

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
