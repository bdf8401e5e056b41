"""Does a results folder hold together? An independent reading of its records, which needs nothing else.

    found = audit(Path("results"))
    print(summary(found), found.digest)

Here stand all checks in order, the one JSON that says how they ended, and how it is shown. `evidence` reads the records
and says what a check is; the checks stand by what they look at: `bookkeeping`, `budgets`, `scoring`, `numbers`. Records
are judged by rules of their own: what a budget allows, for one, stands in `audit.budgets` and in the cache, so that an
error in one is found by the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kvbench.audit import bookkeeping, budgets, numbers, scoring
from kvbench.audit.evidence import Check, Finding, Outcome, Verdict, read_evidence, run_check
from kvbench.results.redaction import printable

KIND = "kvbench_audit"
VERSION = 1
CHECKS: tuple[Check, ...] = (
    *(scoring.tokens, scoring.lengths, bookkeeping.key, budgets.cache_bytes, budgets.budget, bookkeeping.environment),
    *(bookkeeping.seal, bookkeeping.status, bookkeeping.counts, scoring.samples, scoring.full_itself),
    *(numbers.aggregates, numbers.bounds, scoring.scores, budgets.freed, numbers.launches, numbers.rates),
    *(numbers.dates, bookkeeping.copies, numbers.possible),
)
_NEED_THE_MODEL = (
    Outcome(id="A1", title="5 % of the samples answered again, while timed", meaning="", verdict="not run"),
    Outcome(id="A2", title="one sample repeated is at most 10 % faster than the mix", meaning="", verdict="not run"),
)
VERDICTS: tuple[Verdict, ...] = ("failed", "passed", "not run", "not applicable")
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

    def count(self, verdict: Verdict) -> int:
        """Return how many checks ended so."""
        return sum(outcome.verdict == verdict for outcome in self.outcomes)


def audit(folder: Path, *, sweep: str | None = None) -> Audit:
    """Make every check on the records below `folder`, or on those of one sweep. Raises: ConfigError."""
    evidence = read_evidence(folder, sweep=sweep)
    outcomes = [run_check(check, evidence) for check in CHECKS]
    if evidence.damaged:  # files that cannot be read belong to no cell, and to the check of seals
        damage = tuple(Finding(cell=name, text=why) for name, why in evidence.damaged)
        at = CHECKS.index(bookkeeping.seal)
        num_checked, findings = outcomes[at].num_checked + len(damage), (*damage, *outcomes[at].findings)
        outcomes[at] = replace(outcomes[at], verdict="failed", num_checked=num_checked, findings=findings)
    return Audit(outcomes=(*_NEED_THE_MODEL, *outcomes), digest=evidence.digest, num_cells=len(evidence.cells))


def audit_body(result: Audit, *, version: str, sweep: str | None) -> dict[str, Any]:
    """Return what is sealed: digest of the records, verdict of every check; the same records, the same bytes."""
    checks = [asdict(outcome) for outcome in result.outcomes]
    for one in checks:
        del one["meaning"]
    head = {"digest": result.digest, "kvbench": version, "sweep": sweep, "num_cells": result.num_cells}
    counts = {verdict: result.count(verdict) for verdict in VERDICTS}
    return {**head, "passed": not result.failed, "counts": counts, "checks": checks}


def table_lines(result: Audit) -> Iterator[str]:
    """Yield the table: a line per check, and below a failed one the first cell, its fault and what it means."""
    for outcome in result.outcomes:
        counted = f" ({outcome.num_checked} cell{'s' if outcome.num_checked != 1 else ''})"
        counted = {"not run": " (not run: needs the model)", "not applicable": ""}.get(outcome.verdict, counted)
        yield f"{outcome.id:<4}{outcome.verdict:<15}{outcome.title}{counted}"
        if outcome.findings:
            first = outcome.findings[0]
            yield _indented(f"{first.cell}: {first.text}")
            if len(outcome.findings) > 1:
                yield _indented(f"and {len(outcome.findings) - 1} more, see the JSON")
            yield _indented(f"means: {outcome.meaning}")
    if any(outcome.notes for outcome in result.outcomes):
        yield ""
        yield "to know, and no fault:"
    for outcome in result.outcomes:
        for note in outcome.notes[:_SHOWN_NOTES]:
            yield _indented(f"{outcome.id} {note.cell}: {note.text}", indent="  ")
        if len(outcome.notes) > _SHOWN_NOTES:
            yield f"  {outcome.id} and {len(outcome.notes) - _SHOWN_NOTES} more cells, see the JSON"
    yield ""
    cells = f"{result.num_cells} cell{'' if result.num_cells == 1 else 's'}"
    yield f"{summary(result)}; {cells}, digest {result.digest[:16]}"


def _indented(text: str, indent: str = " " * 19) -> str:
    return (indent + printable(text))[: 3 * _WIDTH]


def summary(result: Audit) -> str:
    """Return in one line how many checks ended how, and which failed: "1 failed (A7), 19 passed, 2 not run"."""
    failed = f" failed ({', '.join(outcome.id for outcome in result.failed)})"
    return counts_text(result).replace(" failed", failed, 1)


def counts_text(result: Audit) -> str:
    """Return "20 passed, 2 not run": what was not run or had nothing to look at is no check passed."""
    return ", ".join(f"{number} {verdict}" for verdict in VERDICTS if (number := result.count(verdict)))


def badge_svg(result: Audit) -> str:
    """Return the badge as SVG; no server is asked."""
    text = counts_text(result)
    width = 110 + round(6.4 * len(text))
    colour = "#b3261e" if result.failed else "#2e7d32"
    return _BADGE.format(width=width, rest=width - 99, text=text, colour=colour)


def badge_line(result: Audit, badge: str, report: str) -> str:
    """Return the Markdown for a README; paths as they are seen from there."""
    return f"[![kvbench audit: {counts_text(result)}]({quote(badge)})]({quote(report)})"
