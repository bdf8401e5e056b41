"""R1: the accepted record is one of the attempts beside it, and the one that counts."""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.results.record import MEASURED


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    same = [attempt for attempt in cell.attempts if attempt["attempt"] == cell.body["attempt"]]
    if not same:
        yield "record.json is none of the attempts beside it"
    elif same[0] != cell.body:
        yield f"record.json differs from its attempt {cell.body['attempt'][:8]}"
    elif cell.body["status"] not in MEASURED and any(attempt["status"] in MEASURED for attempt in cell.attempts):
        yield f"a record with status {cell.body['status']} stands where a measured attempt lies beside it"


def _notes(cell: Cell, peers: Peers) -> Iterator[str]:
    good = sum(attempt["status"] in MEASURED for attempt in cell.attempts)
    if good > 1:
        yield f"measured {good} times; the record is one of them"


SEAL_CHECK = Check(
    id="R1",
    title="every file is sealed; the record is the attempt that counts",
    meaning="a file was changed, damaged, put there or taken away after the run",
    applies=lambda cell, peers: True,
    problems=_problems,
    notes=_notes,
)
