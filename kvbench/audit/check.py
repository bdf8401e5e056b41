"""What a check is, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from kvbench.audit.evidence import Cell, Evidence, Peers

# A sealed record may hold text where a number belongs, here or in a cell it is compared with.
_WRONG_TYPES = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
Verdict = Literal["passed", "failed", "not applicable", "not run"]


def _silent(cell: Cell, peers: Peers) -> Iterator[str]:
    """Note nothing."""
    return iter(())


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check, made cell by cell; `peers` are the cells that may be compared with it, itself included.

    applies: whether there is anything to check. problems: sentences, one for each thing that is wrong.
    notes: sentences that a reader should know and that are no fault. meaning: what a failure means.
    """

    id: str
    title: str
    meaning: str
    applies: Callable[[Cell, Peers], bool]
    problems: Callable[[Cell, Peers], Iterator[str]]
    notes: Callable[[Cell, Peers], Iterator[str]] = _silent


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A sentence about one cell, or about a file that is no cell."""

    cell: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one check found."""

    id: str
    title: str
    meaning: str
    verdict: Verdict
    num_checked: int = 0
    findings: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = field(default=())


def run_check(check: Check, evidence: Evidence) -> Outcome:
    """Make `check` on every cell it applies to."""
    findings: list[Finding] = []
    notes: list[Finding] = []
    num_checked = 0
    for cell in evidence.cells:
        applies, problems, told = _on_cell(check, cell, evidence.peers(cell))
        num_checked += applies
        findings += [Finding(cell=cell.name, text=text) for text in problems]
        notes += [Finding(cell=cell.name, text=text) for text in told]
    return Outcome(
        id=check.id,
        title=check.title,
        meaning=check.meaning,
        verdict="failed" if findings else "passed" if num_checked else "not applicable",
        num_checked=num_checked,
        findings=tuple(findings),
        notes=tuple(notes),
    )


def _on_cell(check: Check, cell: Cell, peers: Peers) -> tuple[bool, list[str], list[str]]:
    """Return whether `check` applies, its problems and its notes; what has the wrong type is a problem."""
    try:
        if not check.applies(cell, peers):
            return False, [], []
        return True, list(check.problems(cell, peers)), list(check.notes(cell, peers))
    except _WRONG_TYPES as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split()):.80}"
        return True, [f"it, or a cell it is compared with, holds what no run writes ({why})"], []
