"""From the records of a sweep to what its W&B summary run shows: tables, verdicts, figures, best policies."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.installed import installed_version
from kvbench.measures import MEASURES, measure
from kvbench.results.record import read_cell
from kvbench.results.store import RecordStore
from kvbench.sinks.wandb.content import Figure, SweepSummary, Table, measure_group, summary_run

if TYPE_CHECKING:
    from kvbench.report.compare import Comparison
    from kvbench.report.load import CellResult, Group, Results
    from kvbench.sinks.wandb.run import RunSpec

_CELL_COLUMNS = ("key", "model", "dataset", "policy", "budget", "positions", "status")
_COMPARED = (
    *("value", "low", "high", "verdict", "margin", "p_holm", "minimum_detectable", "num_samples", "num_clusters"),
    *("more_samples", "primary", "method", "reason"),
)
_IN_NUMBERS = ("value", "low", "high", "verdict")
# The measures that become keys of the summary; a key per measure and cell of a large sweep would be too many for W&B.
_SUMMARISED = (
    *("ppl", "rougeL_vs_full", "rougeL_vs_reference", "kl_to_full", "objects_recalled_fraction"),
    *("needles_recalled_fraction", "exact_fraction"),
    *("tpot_ratio_to_full", "ttft_ratio_to_full", "throughput_ratio_to_full"),
)


def summary_of(folder: Path, sweep: str, keys: Collection[str], *, to: Path | None = None) -> RunSpec:
    """Return the summary run of the records with a key in `keys` in the results folder `folder`.

    to: the folder of wandb's files, by default the same.
    """
    from kvbench.report.compare import group_comparisons
    from kvbench.report.figures.draw import draw_pngs
    from kvbench.report.load import load_results

    results = load_results(folder, keys=set(keys))
    compared = [(group, _with_interval(group_comparisons(group))) for group in results.groups]
    summary = SweepSummary(
        sweep=sweep,
        bodies=[_body(folder, cell.key) for cell in results.records],
        folder=folder,
        to=to or folder,
        tables={
            "cells": _cells(results),
            "verdicts": _verdicts(compared),
            "best": _best(compared),
        },
        figures={f"figures/{png.name}": Figure(png=png.data, caption=png.caption) for png in draw_pngs(results)},
        numbers=dict(_numbers(compared)),
    )
    return summary_run(summary, installed_version())


def _with_interval(compared: tuple[Comparison, ...]) -> tuple[Comparison, ...]:
    """Leave out what was observed once, of which nothing can be said; the cells' table has the numbers."""
    return tuple(one for one in compared if one.low is not None or one.verdict == "not comparable")


def _body(folder: Path, key: str) -> dict[str, Any]:
    return read_cell(RecordStore(folder).cell_folder(key)).body


def _cells(results: Results) -> Table:
    """Return a row per cell: labels, status, and every number with its interval, under the keys of the cells' runs."""
    measured = [name for name in MEASURES if any(cell.estimate(name) for cell in results.records)]
    ends = {name: [end for end in ("", "_low", "_high") if _has(results, name, end)] for name in measured}
    rows = []
    for group in results.groups:
        for cell in group.cells:
            labels = [cell.key[:16], cell.model, cell.dataset, group.series_label(cell)]
            numbers = [_part(cell, name, end) for name in measured for end in ends[name]]
            rows.append([*labels, cell.budget, cell.positions, cell.status, *numbers])
    keys = [f"{measure_group(name)}/{name}{end}" for name in measured for end in ends[name]]
    return Table(columns=[*_CELL_COLUMNS, *keys], rows=rows)


def _has(results: Results, name: str, end: str) -> bool:
    return any(_part(cell, name, end) is not None for cell in results.records)


def _part(cell: CellResult, name: str, end: str) -> float | None:
    found = cell.estimate(name)
    return None if found is None else {"": found.value, "_low": found.low, "_high": found.high}[end]


def _verdicts(compared: list[tuple[Group, tuple[Comparison, ...]]]) -> Table:
    """Return a row per comparison, those with the full cache and those between policies at one budget."""
    rows = [
        [
            *(group.title, measure(one.measure).label, group.series_label(one.first), one.first.budget),
            group.series_label(one.second),
            *(getattr(one, name) for name in _COMPARED),
        ]
        for group, some in compared
        for one in some
    ]
    return Table(columns=["group", "measure", "policy", "budget", "against", *_COMPARED], rows=rows)


def _best(compared: list[tuple[Group, tuple[Comparison, ...]]]) -> Table:
    """Return a row per budget and measure: the policy of the best value, and whether the next one is worse."""
    columns = ["group", "budget", "measure", "policy", "value", "low", "high", "next policy", "verdict against it"]
    return Table(columns=columns, rows=[row for group, some in compared for row in _best_rows(group, some)])


def _best_rows(group: Group, compared: tuple[Comparison, ...]) -> Iterator[list[Any]]:
    from kvbench.report.standing import best_policies

    for best in best_policies(group, compared):
        labels = (group.title, best.budget, measure(best.measure).label, group.series_label(best.cell))
        found = best.estimate
        yield [*labels, found.value, found.low, found.high, group.series_label(best.runner_up), best.verdict]


def _numbers(compared: list[tuple[Group, tuple[Comparison, ...]]]) -> Iterator[tuple[str, float | str]]:
    """Yield flat summary keys: to_full/<policy>@<budget>/quality/ppl, ..._low, ..._high, ..._verdict."""
    for group, some in compared:
        several = len(compared) > 1
        for one in some:
            if not one.second.is_full or one.measure not in _SUMMARISED:
                continue
            cell = f"{group.series_label(one.first)}@{one.first.budget}"
            # W&B reads a dot in a key as a step into a group.
            start = (f"to_full/{group.title}/{cell}" if several else f"to_full/{cell}").replace(".", "_")
            for part in _IN_NUMBERS:
                found = getattr(one, part)
                if found is not None:
                    ending = "" if part == "value" else f"_{part}"
                    yield f"{start}/{measure_group(one.measure)}/{one.measure}{ending}", found
