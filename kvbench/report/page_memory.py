"""The page's memory table: what the peak is made of, what the budget says, what is stored, and the peak by phase."""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.measures import format_value
from kvbench.report.cell import CellResult
from kvbench.report.load import Group
from kvbench.report.page_filters import budget_size
from kvbench.report.page_markup import Head, not_measured, number_cell, row_head, table, text_cell

_PARTS, _KV, _PEAKS = "what is in memory", "KV cache", "peak of everything alive, by phase"
# (column, remark, measurement, group)
_COLUMNS = (
    ("weights", "and buffers", "peak_load_bytes", _PARTS),
    ("activations", "model without cache", "plain_activation_bytes", _PARTS),
    ("statistics", "of attention, held at the end", "statistics_bytes", _PARTS),
    ("bookkeeping", "positions, ranks, lengths", "bookkeeping_bytes", _PARTS),
    ("nominal", "what the budget says", "kv_theoretical_bytes", _KV),
    ("in use", "valid entries", "kv_valid_bytes", _KV),
    ("stored", "from storages", "kv_stored_bytes", _KV),
    ("vision", "", "peak_vision_bytes", _PEAKS),
    ("prefill", "", "peak_prefill_bytes", _PEAKS),
    ("settle", "policy on the prompt", "peak_settle_bytes", _PEAKS),
    ("decode", "", "peak_decode_bytes", _PEAKS),
    ("whole", "largest of all", "peak_memory_bytes", _PEAKS),
    ("reserved", "by the allocator", "peak_reserved_bytes", _PEAKS),
)
_LAST = (
    ("peak / bound", "1 holds no more than it must", "peak_over_bound_ratio"),
    ("RSS", "process", "peak_rss_bytes"),
)
_NOTE = (
    "Peaks hold everything alive in that phase, weights and inputs too, so they can not be added up. Eviction after "
    "the prompt lowers the peak of decode, not that of prefill. Every number was observed once and has no interval."
)


def memory_html(group: Group) -> str:
    """Return the table of a group, or "" where no cell has a number of the memory pass."""
    names = [name for _, _, name, _ in _COLUMNS] + [name for _, _, name in _LAST]
    if not any(cell.estimate(name) for cell in group.cells for name in names if name in cell.measurements):
        return ""
    heads = [Head(label="policy", kind="text"), Head(label="budget", kind="amount")]
    heads += [Head(label=label, note=note, group=over) for label, note, _, over in _COLUMNS]
    heads += [Head(label=label, note=note) for label, note, _ in _LAST]
    rows = (f"<tr>{''.join(_row(group, cell, names))}</tr>" for cell in group.cells if not cell.failed)
    return f"<p class=quiet>{_NOTE}</p>" + table(f"Memory by phase, {group.title}", heads, rows)


def _row(group: Group, cell: CellResult, names: list[str]) -> Iterator[str]:
    yield row_head(group.series_label(cell))
    yield text_cell("everything" if cell.is_full and cell.budget == "-" else cell.budget, sort=budget_size(cell))
    for name in names:
        found = cell.estimate(name)
        yield not_measured() if found is None else number_cell(format_value(name, found.value), value=found.value)
