"""An audit as it is shown: table in the terminal, badge, line for a README."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

from kvbench.audit.audit import Audit
from kvbench.audit.check import Outcome
from kvbench.results.redaction import redact

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
