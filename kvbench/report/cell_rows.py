"""The page's verdict table before it is drawn: a row per cell with quality, times and bytes; also for other formats."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvbench.report.cell import CellResult, Estimate
from kvbench.report.collapses import losses_of
from kvbench.report.comparison import Comparison
from kvbench.report.judged import Judged

TIMES = ("tpot", "ttft")
REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True, slots=True)
class Time:
    """A time, its ratio to the full cache's in the same launches, and what follows from it."""

    own: Estimate | None
    ratio: Estimate | None
    comparison: Comparison | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CellRow:
    """One cell: its quality against full, its times, its bytes, and the samples it loses.

    `verdict` is the quality's, "reference" for the full cache, the status of a failed cell, "" where none exists.
    """

    model: str
    dataset: str
    policy: str
    cell: CellResult
    measure: str | None
    quality: Estimate | None
    comparison: Comparison | None
    verdict: str
    times: tuple[Time, ...]
    stored_bytes: float | None
    stored_share: float | None
    num_collapsed: int | None
    num_paired: int


def cell_rows(judged: Judged, name: str | None = None) -> tuple[CellRow, ...]:
    """Return the rows of a group in table order, quality by the measure `name`, else the primary one."""
    return tuple(_row(judged, cell, name or judged.primary) for cell in judged.group.cells)


def all_rows(groups: Iterable[Judged]) -> tuple[CellRow, ...]:
    """Return the rows of several groups, each by its primary measure."""
    return tuple(row for judged in groups for row in cell_rows(judged))


def _row(judged: Judged, cell: CellResult, name: str | None) -> CellRow:
    group = judged.group
    comparison = judged.against_full(cell, name) if name else None
    losses = losses_of(group, cell, name) if name and not cell.is_full else ()
    stored, full = cell.estimate("kv_stored_bytes"), group.full and group.full.estimate("kv_stored_bytes")
    return CellRow(
        model=group.model,
        dataset=group.dataset,
        policy=group.series_label(cell),
        cell=cell,
        measure=name,
        quality=cell.estimate(name) if name else None,
        comparison=comparison,
        verdict=_verdict(cell, comparison),
        times=tuple(_time(judged, cell, kind) for kind in TIMES),
        stored_bytes=stored.value if stored else None,
        stored_share=stored.value / full.value if stored and full and full.value > 0 else None,
        num_collapsed=sum(loss.collapsed for loss in losses) if losses else None,
        num_paired=len(losses),
    )


def _verdict(cell: CellResult, comparison: Comparison | None) -> str:
    if cell.failed:
        return cell.status
    if cell.is_full:
        return REFERENCE
    return comparison.verdict if comparison else ""


def _time(judged: Judged, cell: CellResult, kind: str) -> Time:
    ratio = f"{kind}_ratio_to_full"
    return Time(
        own=cell.estimate(f"{kind}_ms"), ratio=cell.estimate(ratio), comparison=judged.against_full(cell, ratio)
    )
