"""Choosing rows of the verdict table: a select for every label in which rows differ, and a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvbench.report.cell import CellResult
from kvbench.report.cell_rows import CellRow
from kvbench.report.page_markup import escaped

_FILTERS = (
    ("model", "Model"),
    ("dataset", "Data set"),
    ("policy", "Policy"),
    ("budget", "Budget"),
    ("verdict", "Verdict"),
    ("status", "Status"),
)


def filters_html(rows: Sequence[CellRow]) -> str:
    """Return the form, which the script shows and works."""
    selects = "".join(_select(name, label, _values(rows, name)) for name, label in _FILTERS)
    return (
        '<form id="filters" class=controls aria-label="Choose rows of the verdict table" hidden>'
        f'{selects}<label>Text<input type=search id="filter-text" autocomplete=off></label>'
        f'<button type=reset>Show all</button><output id="filter-count" aria-live=polite></output></form>'
    )


def _values(rows: Sequence[CellRow], name: str) -> list[str]:
    if name == "budget":
        ordered = sorted(rows, key=lambda row: (budget_size(row.cell), row.cell.budget))
        return list(dict.fromkeys(row.cell.budget for row in ordered))
    found: Iterable[str] = (
        {"verdict": row.verdict or "no quality", "model": row.model, "dataset": row.dataset}.get(name)
        or str(getattr(row.cell, name))
        for row in rows
    )
    return sorted(set(found))


def _select(name: str, label: str, values: list[str]) -> str:
    if len(values) < 2:
        return ""
    options = "".join(f'<option value="{escaped(value)}">{escaped(_shown(name, value))}</option>' for value in values)
    return f'<label>{label}<select data-field="{name}"><option value="" selected>all</option>{options}</select></label>'


def _shown(name: str, value: str) -> str:
    return "everything" if name == "budget" and value == "-" else value


def budget_size(cell: CellResult) -> float:
    """Return what budgets sort by; the full cache keeps everything, so it stands above every budget."""
    size = cell.budget_fraction if cell.budget_fraction is not None else cell.budget_tokens
    return 1e18 if cell.is_full or size is None else float(size)
