"""The verdict table as plain text cells, for markdown and LaTeX: one wording, two notations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvbench.measures import format_value, format_with_interval, measure
from kvbench.report.cell import Estimate
from kvbench.report.cell_rows import CellRow, cell_rows
from kvbench.report.difference_text import difference_text, difference_unit, size_text, verdict_remark
from kvbench.report.judged import Judged

NOTE = (
    "Differences are the policy minus the full cache, paired by sample, with 95 % intervals; detectable is the "
    "smallest true difference found in 80 % of repetitions; ratios to full under 1 are faster."
)
_NAMES = 3  # policy, budget and verdict are text, all other columns numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictTable:
    """One model and data set: heads and rows of the same length; the first `num_text` columns are text."""

    title: str
    note: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text: int = _NAMES


def verdict_table(judged: Judged) -> VerdictTable:
    """Return the table of one group by its primary measure."""
    rows = cell_rows(judged)
    label = measure(judged.primary).label if judged.primary else "quality"
    heads = (
        *("policy", "budget", "verdict", label, "minus full", "detectable", "collapses"),
        *("TPOT", "TPOT / full", "TTFT", "TTFT / full", "KV stored", "of full"),
    )
    withheld = judged.ability.sentence
    note = f"{withheld}{' ' if withheld else ''}{NOTE}{_margins(rows)}"
    return VerdictTable(title=judged.group.title, note=note, heads=heads, rows=tuple(map(_cells, rows)))


def _cells(row: CellRow) -> tuple[str, ...]:
    one, cell = row.comparison, row.cell
    return (
        row.policy,
        cell.budget,
        _verdict(row),
        _estimate(row.measure, row.quality),
        difference_text(one) if one else "-",
        (size_text(one.measure, one.minimum_detectable) if one else "") or "-",
        "-" if row.num_collapsed is None else f"{row.num_collapsed} of {row.num_paired}",
        *(
            text
            for name, time in zip(("tpot", "ttft"), row.times, strict=True)
            for text in (_estimate(f"{name}_ms", time.own), _estimate(f"{name}_ratio_to_full", time.ratio))
        ),
        "-" if row.stored_bytes is None else format_value("kv_stored_bytes", row.stored_bytes),
        "-" if row.stored_share is None else f"{row.stored_share:.2f}x",
    )


def _verdict(row: CellRow) -> str:
    remark = verdict_remark(row.comparison) if row.comparison else ""
    noisy = "times noisy" if row.cell.status == "noisy" and row.verdict != "noisy" else ""
    remarks = "; ".join(part for part in (remark, noisy) if part)
    return (row.verdict or "-") + (f" ({remarks})" if remarks else "")


def _estimate(name: str | None, found: Estimate | None) -> str:
    return "-" if name is None or found is None else format_with_interval(name, found.value, found.low, found.high)


def _margins(rows: Sequence[CellRow]) -> str:
    made = [row.comparison for row in rows if row.comparison is not None and row.comparison.margin is not None]
    found = {f"{size_text(one.measure, one.margin)} {difference_unit(one.measure)[0]}".strip() for one in made}
    return f" Margin: {', '.join(sorted(found))}." if found else ""
