"""The panels of one chapter of a W&B Report: quality, time and memory of its cells, as their runs' summaries say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr

    from kvbench.sinks.wandb_report import Chapter

WIDTH, HEIGHT, PER_ROW = 8, 7, 3  # of a panel, in the report's 24 columns
_BUDGET = "memory/realised_budget_fraction"
_KV = "memory/kv_stored_bytes"
_TPOT = "latency/tpot_ms"


def chapter_panels(wr: Any, chapter: Chapter) -> dict[str, list[Any]]:
    """Return the panels by heading, laid out in rows; `wr` is wandb-workspaces' module of reports."""
    found = {
        "Quality": _quality(wr, chapter),
        "Time": _times(wr, chapter),
        "Memory": _memory(wr, chapter),
        "All settings and numbers": [_parallel(wr, chapter)],
    }
    return {heading: _placed(wr, panels) for heading, panels in found.items() if panels}


def _quality(wr: Any, chapter: Chapter) -> list[Any]:
    budget = [_scatter(wr, _BUDGET, key, f"{title} against realised budget") for key, title in chapter.quality]
    known = {key for key, _ in (*chapter.latency, *chapter.memory)}
    costs = [(key, name) for key, name in ((_KV, "KV bytes"), (_TPOT, "time per token")) if key in known]
    pareto = [
        _scatter(wr, cost, key, f"{title} against {name}") for cost, name in costs for key, title in chapter.quality[:1]
    ]
    return [*budget, *pareto]


def _scatter(wr: Any, x: str, y: str, title: str) -> wr.ScatterPlot:
    return wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(y))


def _times(wr: Any, chapter: Chapter) -> list[Any]:
    title = "Time per token by launch, the full cache's beside it"
    of_both = ["launches/tpot_ms", "launches/full_tpot_ms"]
    lines = [wr.LinePlot(title=title, x="launch", y=of_both)] if "launches" in chapter.curves else []
    return [*_bars(wr, chapter.latency), *lines]


def _memory(wr: Any, chapter: Chapter) -> list[Any]:
    title, of_both = "Entries kept over tokens seen", ["entries/mean", "entries/max"]
    lines = [wr.LinePlot(title=title, x="seen_tokens", y=of_both)] if "entries" in chapter.curves else []
    return [*_bars(wr, chapter.memory), *lines]


def _bars(wr: Any, keys: Sequence[tuple[str, str]]) -> list[Any]:
    return [wr.BarPlot(title=title, metrics=[wr.SummaryMetric(key)]) for key, title in keys]


def _parallel(wr: Any, chapter: Chapter) -> wr.ParallelCoordinatesPlot:
    keys = [_BUDGET, *(key for some in (chapter.memory, chapter.latency, chapter.quality) for key, _ in some[:1])]
    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config("policy.name"), display_name="policy")]
    columns += [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(key)) for key in keys]
    return wr.ParallelCoordinatesPlot(columns=columns, layout=wr.Layout(w=WIDTH * PER_ROW, h=HEIGHT))


def _placed(wr: Any, panels: list[Any]) -> list[Any]:
    for number, panel in enumerate(panels):
        row, column = divmod(number, PER_ROW)
        wide = panel.layout.w > WIDTH
        width = panel.layout.w if wide else WIDTH
        panel.layout = wr.Layout(x=column * WIDTH, y=row * HEIGHT, w=width, h=HEIGHT)
    return panels
