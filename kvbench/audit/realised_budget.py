"""A7: at every logged step no more entries than the budget allows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from kvbench.audit.budget_rule import allowed_entries, entries_curve, kind_of
from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.audit.steps import ENTRIES, steps_taken

_SLACK = 1e-9


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    rows = entries_curve(cell)
    if odd := cell.num_odd_rows("entries", 3):
        yield f"{odd} logged steps are not three numbers"
    if not rows:
        yield "steps were taken, and none is logged"
        return
    yield from _over(cell, rows)
    yield from _summary(cell, rows)


def _over(cell: Cell, rows: list[list[float]]) -> Iterator[str]:
    if kind_of(cell) != "none":
        return
    budget = cell.setting("budget")
    if not budget:
        seen, _, peak = next(row for row in rows if not row[0] == row[1] == row[2])
        yield f"keeps everything, but after {seen:g} tokens it holds {peak:g} entries"
        return
    over = [row for row in rows if row[2] > allowed_entries(budget, row[0])]
    seen, _, peak = over[0]
    yield (
        f"after {seen:g} tokens it holds {peak:g} entries, the budget allows {allowed_entries(budget, seen)} "
        f"({len(over)} of {len(rows)} steps are over)"
    )


def _summary(cell: Cell, rows: list[list[float]]) -> Iterator[str]:
    """Compare the numbers told with the steps that they must come from."""
    if any(after[0] <= before[0] for before, after in itertools.pairwise(rows)):
        yield "the logged steps are out of order"
    if any(mean > peak + _SLACK for _, mean, peak in rows):
        yield "at a step the mean of the entries is above the largest"
    largest = cell.value("entries_peak")
    if largest is not None and largest != max(row[2] for row in rows):
        yield f"entries_peak is {largest:g}, the largest logged is {max(row[2] for row in rows):g}"
    ranges = {"entries_mean": [row[1] for row in rows], "realised_budget_fraction": [row[1] / row[0] for row in rows]}
    for name, logged in ranges.items():
        value = cell.value(name)
        if value is not None and not min(logged) - _SLACK <= value <= max(logged) + _SLACK:
            yield f"{name} is {value:.4g}, outside of what was logged ({min(logged):.4g} to {max(logged):.4g})"


def _notes(cell: Cell, peers: Peers) -> Iterator[str]:
    kind = kind_of(cell) if entries_curve(cell) else "none"
    share = 100 * (cell.value("realised_budget_fraction") or 0)
    if kind == "prompt only":
        yield f"cuts the prompt only and keeps what it generates: {share:.0f} % of the tokens seen are held"
    elif kind == "decode only":
        yield f"cuts nothing of the prompt: {share:.0f} % of the tokens seen are held"


def _tells(cell: Cell) -> bool:
    return any(cell.value(name) is not None for name in ENTRIES) or bool(cell.body["curves"].get("entries"))


BUDGET_CHECK = Check(
    id="A7",
    title="the budget is kept at every logged step",
    meaning="the policy held more entries than it says",
    applies=lambda cell, peers: cell.usable and (_tells(cell) or steps_taken(cell) > 0),
    problems=_problems,
    notes=_notes,
)
