"""The page's latency table: the first token, the step, the policy's part of both, and the roof of the memory."""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.measures import format_interval, format_value, measure
from kvbench.report.cell import CellResult
from kvbench.report.compare_latency import timing_noise
from kvbench.report.load import Group
from kvbench.report.page_filters import budget_size
from kvbench.report.page_markup import Head, not_measured, number_cell, row_head, table, text_cell

_FIRST, _STEP, _ROOF = "first token", "one decode step", "roof of the memory"
# (column, remark, measurement, group, measurement whose noise is in it)
_COLUMNS = (
    ("TTFT", "vision, prompt, cut", "ttft_ms", _FIRST, "ttft_ms"),
    ("settle", "policy's part of it", "settle_ms", _FIRST, "ttft_ms"),
    ("TPOT", "median step", "tpot_ms", _STEP, "tpot_ms"),
    ("p90", "slow steps", "tpot_p90_ms", _STEP, "tpot_ms"),
    ("policy", "naming victims, alone", "policy_ms", _STEP, "tpot_ms"),
    ("roof", "weights and entries read once", "roof_ms", _ROOF, ""),
    ("reached", "roof over TPOT", "roof_share_fraction", _ROOF, "tpot_ms"),
    ("throughput", "prompt included", "throughput_tokens_per_s", "whole launch", "throughput_tokens_per_s"),
)
_OVERHEAD_SHARE = 0.5
_NOTE = (
    "Medians of timed launches, interleaved with the full cache in one process; [low, high] is the 95 % interval over "
    "launches. A step that reaches less than half of the roof is overhead-bound: most of it is neither weights nor "
    "entries, so its time says little about the size of the cache. On a CPU, whose caches may hold the weights, the "
    "roof is no bound. Grey numbers are noisy, and their box says why."
)


def latency_html(group: Group) -> str:
    """Return the table of a group, or "" where no cell was timed."""
    if not any(cell.estimate(name) for cell in group.cells for _, _, name, _, _ in _COLUMNS):
        return ""
    heads = [Head(label="policy", kind="text"), Head(label="budget", kind="amount")]
    heads += [Head(label=label, note=note, group=over) for label, note, _, over, _ in _COLUMNS]
    rows = (f"<tr>{''.join(_cells(group, cell))}</tr>" for cell in group.cells if not cell.failed)
    return f"<p class=quiet>{_NOTE}</p>" + table(f"Latency, {group.title}", heads, rows)


def _cells(group: Group, cell: CellResult) -> Iterator[str]:
    noisy = [measure(name).label for name in ("ttft_ms", "tpot_ms") if timing_noise(cell, name)]
    yield row_head(group.series_label(cell), f"noisy: {' and '.join(noisy)}" if noisy else "")
    yield text_cell("everything" if cell.is_full and cell.budget == "-" else cell.budget, sort=budget_size(cell))
    for _, _, name, _, timed in _COLUMNS:
        found, noise = cell.estimate(name), timing_noise(cell, timed) if timed else ""
        if found is None:
            yield not_measured()
            continue
        below = format_interval(name, found.value, found.low, found.high)
        if name == "roof_share_fraction" and found.value < _OVERHEAD_SHARE:
            below = f"{below}\noverhead-bound".strip()
        title = "; ".join(part for part in (noise, f"n = {found.n}" if found.n is not None else "") if part)
        kind = "noisy" if noise else ""
        yield number_cell(format_value(name, found.value), below, value=found.value, kind=kind, title=title)
