"""The page's tables: results (sortable), how each number is measured, environment, problems."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable

from kvbench.report.load import Problem, Results
from kvbench.report.table_rows import Entry, Row, Table, samples_text
from kvbench.units import MEASURES, measure


def scroll_box(content: str, label: str) -> str:
    """Return `content` in a box that scrolls sideways by itself, by touch and by key."""
    return f'<div class=scroll tabindex=0 role=region aria-label="{html.escape(label)}">{content}</div>'


def results_html(table: Table) -> str:
    """Return the table; each head is a button that sorts, numbers carry their base value."""
    heads = [_head("policy", "", "text"), _head("budget", "", "number")]
    for name in table.columns:
        better = measure(name).better
        notes = ("" if better == "none" else f"{better} is better", samples_text((r.cell for r in table.rows), name))
        heads.append(_head(measure(name).label, "<br>".join(note for note in notes if note), "number"))
    rows = "".join(_row(index, row) for index, row in enumerate(table.rows))
    body = f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{rows}</tbody></table>"
    return scroll_box(body, f"Results, {table.title}")


def measures_html(names: Iterable[str]) -> str:
    """Return what each shown measurement means."""
    shown = set(names)
    rows = "".join(
        f"<tr><th scope=row>{html.escape(known.label)}</th><td>{html.escape(known.definition)}</td>"
        f"<td>{html.escape(_unit_text(known.unit))}</td><td>{known.better if known.better != 'none' else '-'}</td></tr>"
        for name, known in MEASURES.items()
        if name in shown
    )
    head = "<thead><tr><th>name</th><th>what it is</th><th>unit</th><th>better</th></tr></thead>"
    return scroll_box(f"<table class=text>{head}<tbody>{rows}</tbody></table>", "How each number is measured")


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
    return scroll_box(f"<table class=text><tbody>{''.join(rows)}</tbody></table>", "Environment")


def problems_html(problems: Iterable[Problem]) -> str:
    """Return the files that could not be used, or a sentence that all could."""
    items = "".join(f"<li><code>{html.escape(p.path)}</code>: {html.escape(p.message)}</li>" for p in problems)
    return f"<ul>{items}</ul>" if items else "<p>None: every record found was read and its checksum is right.</p>"


def _plain(value: object) -> str:
    return "not recorded" if value is None else str(value)


def _unit_text(unit: str) -> str:
    return {"score": "0 to 1", "ppl": "perplexity", "fraction": "%", "ratio": "x full"}.get(unit, unit)


def _head(label: str, note: str, kind: str) -> str:
    name = " class=name" if label in ("policy", "budget") else ""
    button = f"<button type=button>{html.escape(label)}</button>"
    return f'<th{name} scope=col aria-sort="none" data-kind="{kind}">{button}<small>{note}</small></th>'


def _row(index: int, row: Row) -> str:
    cell = row.cell
    size = cell.budget_fraction if cell.budget_fraction is not None else cell.budget_tokens
    # The full cache keeps everything, so it sorts above every budget; without a number, order decides.
    value = "1e18" if cell.is_full else str(index if size is None else size)
    noisy = "<small class=failed>noisy</small>" if cell.status == "noisy" else ""
    names = (
        f'<td class=name data-v="{html.escape(row.policy)}">{html.escape(row.policy)}{noisy}</td>'
        f'<td class=name data-v="{value}">{html.escape(row.budget)}</td>'
    )
    return f"<tr>{names}{''.join(_entry(entry) for entry in row.entries)}</tr>"


def _entry(entry: Entry) -> str:
    value = "" if entry.value is None else repr(entry.value)
    kind = " class=failed" if entry.kind == "failed" else ""
    title = f' title="n = {entry.n}"' if entry.n is not None else ""
    interval = f"<small>{html.escape(entry.interval)}</small>" if entry.interval else ""
    return f'<td{kind}{title} data-v="{value}">{html.escape(entry.text)}{interval}</td>'
