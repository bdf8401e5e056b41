"""A4: how long the answers are beside the full cache's; a row outside of 10 % says so."""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers

_NEAR = 0.1


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    if cell.value("length_ratio") is None and any(row.get("length_ratio") is not None for row in cell.samples):
        yield "answers have lengths, and the cell tells none"


def _notes(cell: Cell, peers: Peers) -> Iterator[str]:
    ratio = cell.value("length_ratio")
    if ratio is not None and abs(ratio - 1) > _NEAR:
        yield f"answers of {100 * ratio:.0f} % of the full cache's length: outside of 10 %"


LENGTHS_CHECK = Check(
    id="A4",
    title="the length of answers beside the full cache's is told",
    meaning="short or endless answers are compared with whole ones, and nobody is told",
    applies=lambda cell, peers: cell.usable and cell.task("Generation") is not None,
    problems=_problems,
    notes=_notes,
)
