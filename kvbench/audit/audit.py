"""All checks of a results folder in order, and the one JSON that says how they ended.

outcome = audit(Path("results"))
print(outcome.passed, outcome.body["digest"])
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.audit import (
    aggregates,
    copies,
    counts,
    environment,
    freed,
    full_itself,
    interval_bounds,
    key,
    kv_bytes,
    launches,
    lengths,
    possible,
    rates,
    realised_budget,
    same_samples,
    seal,
    status,
    text_scores,
    times,
    tokens,
)
from kvbench.audit.check import Check, Finding, Outcome, run_check
from kvbench.audit.evidence import Evidence, read_evidence

KIND = "kvbench_audit"
VERSION = 1
CHECKS: tuple[Check, ...] = tuple(
    module.CHECK
    for module in (
        *(tokens, lengths, key, kv_bytes, realised_budget, environment),
        *(seal, status, counts, same_samples, full_itself, aggregates, interval_bounds, text_scores),
        *(freed, launches, rates, times, copies, possible),
    )
)
_NEED_THE_MODEL = (
    Outcome(id="A1", title="5 % of the samples answered again, while timed", meaning="", verdict="not run"),
    Outcome(id="A2", title="one sample repeated is at most 10 % faster than the mix", meaning="", verdict="not run"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """The outcomes in order, and the digest of the records they are about."""

    outcomes: tuple[Outcome, ...]
    digest: str
    num_cells: int

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Those that failed."""
        return tuple(outcome for outcome in self.outcomes if outcome.verdict == "failed")

    def count(self, verdict: str) -> int:
        """Return how many checks ended so."""
        return sum(outcome.verdict == verdict for outcome in self.outcomes)


def audit(folder: Path, *, sweep: str | None = None) -> Audit:
    """Make every check on the records below `folder`, or on those of one sweep. Raises: ConfigError."""
    evidence = read_evidence(folder, sweep=sweep)
    outcomes = [_with_damage(run_check(check, evidence), evidence) for check in CHECKS]
    return Audit(outcomes=(*_NEED_THE_MODEL, *outcomes), digest=evidence.digest, num_cells=len(evidence.cells))


def _with_damage(outcome: Outcome, evidence: Evidence) -> Outcome:
    """Files that cannot be read belong to no cell, and to the check of seals."""
    if outcome.id != seal.CHECK.id or not evidence.damaged:
        return outcome
    damage = tuple(Finding(cell=name, text=why) for name, why in evidence.damaged)
    return Outcome(
        id=outcome.id,
        title=outcome.title,
        meaning=outcome.meaning,
        verdict="failed",
        num_checked=outcome.num_checked + len(damage),
        findings=(*damage, *outcome.findings),
        notes=outcome.notes,
    )


def audit_body(result: Audit, *, version: str, sweep: str | None) -> dict[str, Any]:
    """Return what is sealed: digest of the records, verdict of every check; the same records, the same bytes."""
    return {
        "digest": result.digest,
        "kvbench": version,
        "sweep": sweep,
        "num_cells": result.num_cells,
        "passed": not result.failed,
        "checks": [
            {
                "id": outcome.id,
                "title": outcome.title,
                "verdict": outcome.verdict,
                "num_checked": outcome.num_checked,
                "findings": [{"cell": one.cell, "text": one.text} for one in outcome.findings],
                "notes": [{"cell": one.cell, "text": one.text} for one in outcome.notes],
            }
            for outcome in result.outcomes
        ],
    }
