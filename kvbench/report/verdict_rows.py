"""The verdict table before it is drawn: each cell against the full cache, in the measures declared for that."""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.measures import MISSING, measure
from kvbench.report.comparison import DECLARED, Choices, Comparison
from kvbench.report.comparisons import PRIMARY_LATENCY, PRIMARY_QUALITIES, group_comparisons
from kvbench.report.difference_text import (
    difference_interval,
    difference_unit,
    difference_value,
    size_text,
    verdict_remark,
)
from kvbench.report.load import Group

_DECLARED = (*PRIMARY_QUALITIES, PRIMARY_LATENCY)
_REMARKED = {"equivalent": " ", "undecided": ", "}  # in a terminal only these words need more


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictRow:
    """One cell against full in one measure, as text; `detectable` is what the samples would show in 80 %."""

    policy: str
    budget: str
    measure: str
    difference: str
    interval: str
    detectable: str
    verdict: str


def verdict_rows(group: Group, choices: Choices = DECLARED) -> tuple[VerdictRow, ...]:
    """Return the rows of the group's quality measure, then those of its latency measure; noisy cells stay last."""
    against = [one for one in group_comparisons(group, choices, _DECLARED, between=False) if one.second.is_full]
    quality = next((name for name in PRIMARY_QUALITIES if any(one.measure == name for one in against)), None)
    chosen = [one for name in (quality, PRIMARY_LATENCY) for one in against if one.measure == name]
    return tuple(_row(group, one) for one in chosen)


def verdict_text(one: Comparison) -> str:
    """Return "undecided, needs about 184 more samples", "equivalent within 2.0 points", "noisy"."""
    remark = verdict_remark(one) if one.verdict in _REMARKED else ""
    return f"{one.verdict}{_REMARKED[one.verdict]}{remark}" if remark else one.verdict


def declared_text(rows: tuple[VerdictRow, ...]) -> str:
    """Return what the table says and how it was made."""
    names = " and ".join(dict.fromkeys(measure(row.measure).label for row in rows))
    return (
        f"Declared before: {names}, each policy against full, Holm's correction within a measure. "
        "[low, high] is the 95 % interval of the paired difference, uncorrected; detects: the difference that "
        "these samples find in 80 % of repetitions. Noisy times are in no ranking."
    )


def _row(group: Group, one: Comparison) -> VerdictRow:
    unit = difference_unit(one.measure)[0]
    detectable = size_text(one.measure, one.minimum_detectable)
    return VerdictRow(
        policy=group.series_label(one.first),
        budget=one.first.budget,
        measure=one.measure,
        difference=f"{difference_value(one)} {unit}".strip(),
        interval=difference_interval(one),
        detectable=f"{detectable} {unit}".strip() if detectable else MISSING,
        verdict=verdict_text(one),
    )
