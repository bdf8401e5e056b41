"""The page's tables: results (sortable), how each number is measured, environment, problems."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable

from kvbench.measures import MEASURES, measure
from kvbench.report.load import Problem, Results
from kvbench.report.page_filters import budget_size
from kvbench.report.page_markup import Head, number_cell, row_head, table, text_cell
from kvbench.report.table_rows import Entry, Row, Table, samples_text


def results_html(numbers: Table, caption: str) -> str:
    """Return the table; each head is a button that sorts, numbers carry their base value."""
    heads = [Head(label="policy", kind="text"), Head(label="budget", kind="amount")]
    for name in numbers.columns:
        better = measure(name).better
        notes = ("" if better == "none" else f"{better} is better", samples_text((r.cell for r in numbers.rows), name))
        heads.append(Head(label=measure(name).label, note=", ".join(note for note in notes if note)))
    return table(caption, heads, map(_row, numbers.rows))


def measures_html(names: Iterable[str]) -> str:
    """Return what each shown measurement means."""
    shown = set(names)
    rows = "".join(
        f"<tr><th scope=row>{html.escape(known.label)}</th><td>{html.escape(known.definition)}</td>"
        f"<td>{html.escape(_unit_text(known.unit))}</td><td>{known.better if known.better != 'none' else '-'}</td></tr>"
        for name, known in MEASURES.items()
        if name in shown
    )
    heads = [Head(label=label, kind=None) for label in ("name", "what it is", "unit", "better")]
    return table("Definitions of the numbers on this page", heads, [rows], classes="text")


def methods_text(results: Results) -> str:
    """Return how intervals were made, as the records state it."""
    methods = {found.method for cell in results.records for found in cell.measurements.values() if found.method}
    return "; ".join(sorted(methods)) or "not stated in the records"


def environment_html(results: Results) -> str:
    """Return every environment value, with the number of cells where they differ."""
    names = sorted({name for cell in results.records for name in cell.environment})
    rows = []
    for name in names:
        counts = Counter(_plain(cell.environment.get(name)) for cell in results.records)
        values = "<br>".join(
            html.escape(value) + (f" <span class=quiet>({count} cells)</span>" if len(counts) > 1 else "")
            for value, count in sorted(counts.items())
        )
        rows.append(f"<tr><th scope=row>{html.escape(name)}</th><td>{values}</td></tr>")
    heads = [Head(label=label, kind=None) for label in ("what", "value")]
    return table("Software and machine, as the records state them", heads, rows, classes="text")


def problems_html(problems: Iterable[Problem]) -> str:
    """Return the files that could not be used, or a sentence that all could."""
    items = "".join(f"<li><code>{html.escape(p.path)}</code>: {html.escape(p.message)}</li>" for p in problems)
    return f"<ul>{items}</ul>" if items else "<p>None: every record found was read and its checksum is right.</p>"


def _plain(value: object) -> str:
    return "not recorded" if value is None else str(value)


def _unit_text(unit: str) -> str:
    return {"score": "0 to 1", "ppl": "perplexity", "fraction": "%", "ratio": "x full"}.get(unit, unit)


def _row(row: Row) -> str:
    cell = row.cell
    names = row_head(row.policy, "noisy times" if cell.status == "noisy" else "")
    names += text_cell(row.budget, sort=budget_size(cell))
    return f"<tr>{names}{''.join(_entry(entry) for entry in row.entries)}</tr>"


def _entry(entry: Entry) -> str:
    title = f"n = {entry.n}" if entry.n is not None else ""
    kind = entry.kind if entry.kind in ("failed", "noisy") else ""
    return number_cell(entry.text, entry.interval, value=entry.value, kind=kind, title=title)
