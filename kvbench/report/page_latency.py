"""The page's latency table: the first token, the step, the policy's part of both, and the roof of the memory."""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.report.cell import CellResult
from kvbench.report.compare_latency import timing_noise
from kvbench.report.load import Group
from kvbench.report.page_filters import budget_size
from kvbench.report.page_markup import Head, not_measured, number_cell, row_head, table, text_cell
from kvbench.units import format_interval, format_value

_FIRST, _STEP, _ROOF = "first token", "one decode step", "roof of the memory"
_COLUMNS = (
    ("TTFT", "vision, prompt, cut", "ttft_ms", _FIRST),
    ("settle", "policy's part of it", "settle_ms", _FIRST),
    ("TPOT", "median step", "tpot_ms", _STEP),
    ("p90", "slow steps", "tpot_p90_ms", _STEP),
    ("policy", "naming victims, alone", "policy_ms", _STEP),
    ("roof", "weights and entries read once", "roof_ms", _ROOF),
    ("reached", "roof over TPOT", "roof_share_fraction", _ROOF),
    ("throughput", "prompt included", "throughput_tokens_per_s", "whole launch"),
)
_OVERHEAD_SHARE = 0.5
_NOTE = (
    "Medians of timed launches, interleaved with the full cache in one process; [low, high] is the 95 % interval over "
    "launches. A step that reaches less than half of the roof is overhead-bound: most of it is neither weights nor "
    "entries, so its time says little about the size of the cache. On a CPU, whose caches may hold the weights, the "
    "roof is no bound."
)


def latency_html(group: Group) -> str:
    """Return the table of a group, or "" where no cell was timed."""
    names = [name for _, _, name, _ in _COLUMNS]
    if not any(cell.estimate(name) for cell in group.cells for name in names):
        return ""
    heads = [Head(label="policy", kind="text"), Head(label="budget", kind="amount")]
    heads += [Head(label=label, note=note, group=over) for label, note, _, over in _COLUMNS]
    rows = (_row(group, cell, names) for cell in group.cells if not cell.failed)
    return f"<p class=quiet>{_NOTE}</p>" + table(f"Latency, {group.title}", heads, rows)


def _row(group: Group, cell: CellResult, names: list[str]) -> str:
    noisy = " class=noisy" if timing_noise(cell) else ""
    return f"<tr{noisy}>{''.join(_cells(group, cell, names))}</tr>"


def _cells(group: Group, cell: CellResult, names: list[str]) -> Iterator[str]:
    noise = timing_noise(cell)
    yield row_head(group.series_label(cell), f"noisy: {noise}" if noise else "")
    yield text_cell("everything" if cell.is_full and cell.budget == "-" else cell.budget, sort=budget_size(cell))
    for name in names:
        found = cell.estimate(name)
        if found is None:
            yield not_measured()
            continue
        below = format_interval(name, found.value, found.low, found.high)
        if name == "roof_share_fraction" and found.value < _OVERHEAD_SHARE:
            below = f"{below}\noverhead-bound".strip()
        title = f"n = {found.n}" if found.n is not None else ""
        yield number_cell(format_value(name, found.value), below, value=found.value, title=title)
