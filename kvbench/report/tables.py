"""Draw the results table in a terminal, as wide as it is, and as markdown.

>>> print_tables(load_results(Path("results")))
"""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from kvbench.report.load import Results
from kvbench.report.table_rows import Entry, Row, Table, reading_note, results_table
from kvbench.units import measure

NARROW_COLUMNS = 100
_LAYOUTS = ((False, 1), (True, 1), (True, 0))  # from roomy to tight: budget below the policy, blanks between columns
_STYLES = {"number": "", "missing": "dim", "failed": "bold red"}


def print_tables(results: Results, console: Console | None = None) -> None:
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
    if not results.records:
        console.print(Text("No usable record was found."))
    for problem in results.problems:
        console.print(Text(f"problem: {problem.path}: {problem.message}", style="yellow"))


def markdown_tables(results: Results) -> str:
    """Return the same tables in markdown, one heading per model and data set."""
    parts = [_markdown(results_table(group)) for group in results.groups] or ["No usable record was found.\n"]
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
