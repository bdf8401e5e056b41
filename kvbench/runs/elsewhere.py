"""What became of cells whose jobs ran elsewhere, told from the records they left.

Jobs run on other machines, whose clocks may be wrong by minutes: what is new is told by names, never by times.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence, Set
from typing import Any

from kvbench.errors import RecordError
from kvbench.results.record import MEASURED, read_record
from kvbench.results.store import RecordStore
from kvbench.runs.cell import Attempt
from kvbench.runs.held_claims import HeldClaims
from kvbench.runs.supervisor import Ticket


def attempt_ids(keys: Sequence[str], store: RecordStore) -> frozenset[str]:
    """Return the ids of all attempts at the cells `keys` that there are."""
    return frozenset(str(body["attempt"]) for key in keys for body in store.attempts(key))


def statuses_elsewhere(
    tickets: Mapping[str, Ticket], store: RecordStore, claims: HeldClaims, *, sweep: str, known: Set[str]
) -> dict[str, str]:
    """Return the status of each cell with an attempt that is not `known`, or that nobody works on any more.

    The latter was lost with its job and gets a record that says so. A cell that a living job holds is left out.
    """
    found = {}
    for key, ticket in tickets.items():
        status = _status(key, store, known)
        if status is None and key in claims.take([key], None):
            status = _status(key, store, known)  # it may have ended just before its claim went
            if status is None:
                lost = Attempt(cell=ticket.cell, sweep=sweep, phase=None, status="killed")
                lost.error = {"type": "JobLost", "message": "its job ended without a record", "traceback": ""}
                store.commit(lost.body({}))
                status = lost.status
            claims.release([key])
        if status is not None:
            found[key] = status
    return found


def _status(key: str, store: RecordStore, known: Set[str]) -> str | None:
    """Return how the new attempts at a cell came out; None if there are none.

    One that measured it counts first. Of failed ones it is the one that was stored last, as the store saw it.
    """
    new = [body for body in store.attempts(key) if body["attempt"] not in known]
    if not new:
        return None
    last: list[dict[str, Any]] = []
    with contextlib.suppress(RecordError):
        last = [body for body in (read_record(store.record_file(key)),) if body["attempt"] not in known]
    chosen = next((body for body in new if body["status"] in MEASURED), (last or new)[-1])
    return str(chosen["status"])
