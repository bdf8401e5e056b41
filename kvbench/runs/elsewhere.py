"""What became of cells whose jobs ran elsewhere, told from the records they left."""

from __future__ import annotations

from collections.abc import Mapping

from kvbench.runs.cell import Attempt
from kvbench.runs.held_claims import HeldClaims
from kvbench.runs.supervisor import Ticket
from kvbench.sinks.store import RecordStore


def statuses_elsewhere(
    tickets: Mapping[str, Ticket], store: RecordStore, claims: HeldClaims, *, sweep: str, since_utc: str
) -> dict[str, str]:
    """Return the status of each cell that was tried since `since_utc`, or that nobody works on any more.

    The latter was lost with its job and gets a record that says so. A cell that a living job holds is left out.
    """
    found = {}
    for key, ticket in tickets.items():
        tries = [body for body in store.attempts(key) if str(body["started_utc"]) >= since_utc]
        if not tries and key in claims.take([key], None):
            lost = Attempt(cell=ticket.cell, sweep=sweep, phase=None, status="killed")
            lost.error = {"type": "JobLost", "message": "its job ended without a record", "traceback": ""}
            tries = [lost.body({})]
            store.commit(tries[0])
            claims.release([key])
        if tries:
            found[key] = str(tries[-1]["status"])
    return found
