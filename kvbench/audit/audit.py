"""All checks of a results folder in order, and the one JSON that says how they ended.

outcome = audit(Path("results"))
print(outcome.passed, outcome.body["digest"])

An audit as it is shown: table in the terminal, badge, line for a README.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kvbench.audit.bookkeeping import COPIES_CHECK, COUNTS_CHECK, ENVIRONMENT_CHECK, KEY_CHECK, SEAL_CHECK, STATUS_CHECK
from kvbench.audit.budgets import BUDGET_CHECK, BYTES_CHECK, FREED_CHECK
from kvbench.audit.evidence import Check, Evidence, Finding, Outcome, read_evidence, run_check
from kvbench.audit.numbers import AGGREGATES_CHECK, BOUNDS_CHECK, POSSIBLE_CHECK
from kvbench.audit.scoring import FULL_ITSELF_CHECK, LENGTHS_CHECK, SAMPLES_CHECK, SCORES_CHECK, TOKENS_CHECK
from kvbench.audit.times import LAUNCHES_CHECK, RATES_CHECK, TIMES_CHECK
from kvbench.results.redaction import redact

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


_WIDTH = 118
_SHOWN_NOTES = 5
_BADGE = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="kvbench audit: {text}">
<title>kvbench audit: {text}</title>
<rect width="{width}" height="20" rx="3" fill="#3b3b3b"/>
<path d="M96 0h{rest}a3 3 0 0 1 3 3v14a3 3 0 0 1-3 3H96z" fill="{colour}"/>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
<text x="7" y="14">kvbench audit</text>
<text x="103" y="14">{text}</text>
</g>
</svg>
"""


def table_lines(result: Audit) -> Iterator[str]:
    """Yield the table: a line per check, and below a failed one the first cell, its fault and what it means."""
    for outcome in result.outcomes:
        yield f"{outcome.id:<4}{outcome.verdict:<15}{outcome.title}{_counted(outcome)}"
        if outcome.findings:
            first = outcome.findings[0]
            yield from _indented(f"{first.cell}: {first.text}")
            if len(outcome.findings) > 1:
                yield from _indented(f"and {len(outcome.findings) - 1} more, see the JSON")
            yield from _indented(f"means: {outcome.meaning}")
    yield from _notes(result)
    yield ""
    yield f"{summary(result)}; {result.num_cells} cells, digest {result.digest[:16]}"


def _counted(outcome: Outcome) -> str:
    if outcome.verdict == "not run":
        return " (not run: needs the model)"
    if outcome.verdict == "not applicable":
        return ""
    return f" ({outcome.num_checked} cell{'s' if outcome.num_checked != 1 else ''})"


def _notes(result: Audit) -> Iterator[str]:
    if any(outcome.notes for outcome in result.outcomes):
        yield ""
        yield "to know, and no fault:"
    for outcome in result.outcomes:
        for note in outcome.notes[:_SHOWN_NOTES]:
            yield from _indented(f"{outcome.id} {note.cell}: {note.text}", indent="  ")
        if len(outcome.notes) > _SHOWN_NOTES:
            yield f"  {outcome.id} and {len(outcome.notes) - _SHOWN_NOTES} more cells, see the JSON"


def _indented(text: str, indent: str = " " * 19) -> Iterator[str]:
    clean = "".join(letter if letter.isprintable() else "?" for letter in redact(text))
    yield (indent + clean)[: 3 * _WIDTH]


def summary(result: Audit) -> str:
    """Return the verdict in one line."""
    made = result.count("passed") + result.count("failed")
    if result.failed:
        return f"{len(result.failed)} of {made} checks failed: {', '.join(outcome.id for outcome in result.failed)}"
    return f"{made} of {made} checks passed"


def badge_svg(result: Audit) -> str:
    """Return the badge as SVG; no server is asked."""
    text = summary(result).split(":")[0]
    width = 110 + round(6.4 * len(text))
    colour = "#b3261e" if result.failed else "#2e7d32"
    return _BADGE.format(width=width, rest=width - 99, text=text, colour=colour)


def badge_line(result: Audit, badge: str, report: str) -> str:
    """Return the Markdown for a README; paths as they are seen from there."""
    return f"[![kvbench audit: {summary(result).split(':')[0]}]({quote(badge)})]({quote(report)})"
