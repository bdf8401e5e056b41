"""The results table before it is drawn: the same rows feed the terminal, markdown and the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from kvbench.measures import MEASURES, MISSING, format_interval, format_value, measure
from kvbench.report.cell import CellResult
from kvbench.report.compare_latency import timing_noise
from kvbench.report.load import Group

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
