"""All checks of a results folder in order, and the one JSON that says how they ended.

outcome = audit(Path("results"))
print(outcome.passed, outcome.body["digest"])
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.audit.aggregates import AGGREGATES_CHECK
from kvbench.audit.check import Check, Finding, Outcome, run_check
from kvbench.audit.copies import COPIES_CHECK
from kvbench.audit.counts import COUNTS_CHECK
from kvbench.audit.environment import ENVIRONMENT_CHECK
from kvbench.audit.evidence import Evidence, read_evidence
from kvbench.audit.freed import FREED_CHECK
from kvbench.audit.full_itself import FULL_ITSELF_CHECK
from kvbench.audit.interval_bounds import BOUNDS_CHECK
from kvbench.audit.key import KEY_CHECK
from kvbench.audit.kv_bytes import BYTES_CHECK
from kvbench.audit.launches import LAUNCHES_CHECK
from kvbench.audit.lengths import LENGTHS_CHECK
from kvbench.audit.possible import POSSIBLE_CHECK
from kvbench.audit.rates import RATES_CHECK
from kvbench.audit.realised_budget import BUDGET_CHECK
from kvbench.audit.same_samples import SAMPLES_CHECK
from kvbench.audit.seal import SEAL_CHECK
from kvbench.audit.status import STATUS_CHECK
from kvbench.audit.text_scores import SCORES_CHECK
from kvbench.audit.times import TIMES_CHECK
from kvbench.audit.tokens import TOKENS_CHECK

KIND = "kvbench_audit"
VERSION = 1
CHECKS: tuple[Check, ...] = (
    TOKENS_CHECK,
    LENGTHS_CHECK,
    KEY_CHECK,
    BYTES_CHECK,
    BUDGET_CHECK,
    ENVIRONMENT_CHECK,
    SEAL_CHECK,
    STATUS_CHECK,
    COUNTS_CHECK,
    SAMPLES_CHECK,
    FULL_ITSELF_CHECK,
    AGGREGATES_CHECK,
    BOUNDS_CHECK,
    SCORES_CHECK,
    FREED_CHECK,
    LAUNCHES_CHECK,
    RATES_CHECK,
    TIMES_CHECK,
    COPIES_CHECK,
    POSSIBLE_CHECK,
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
    if outcome.id != SEAL_CHECK.id or not evidence.damaged:
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
