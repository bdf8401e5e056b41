"""The verdict table before it is drawn: each cell against the full cache, in the measures declared for that."""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.report.comparison import DECLARED, Choices, Comparison
from kvbench.report.comparisons import PRIMARY_LATENCY, PRIMARY_QUALITIES, group_comparisons
from kvbench.report.load import Group
from kvbench.units import MISSING, measure

_DECLARED = (*PRIMARY_QUALITIES, PRIMARY_LATENCY)


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
    against = [one for one in group_comparisons(group, choices, _DECLARED) if one.second.is_full]
    quality = next((name for name in PRIMARY_QUALITIES if any(one.measure == name for one in against)), None)
    chosen = [one for name in (quality, PRIMARY_LATENCY) for one in against if one.measure == name]
    return tuple(_row(group, one) for one in chosen)


def verdict_text(one: Comparison) -> str:
    """Return "undecided, about 184 more samples", "equivalent within 2.0 points", "noisy"."""
    if one.verdict == "equivalent" and one.margin is not None:
        return f"equivalent within {difference_text(one.measure, one.margin, signed=False)}"
    if one.verdict == "undecided":
        more = f"about {one.more_samples:,} more {_units(one)}" if one.more_samples else one.reason
        return f"undecided, {more}" if more else "undecided"
    return one.verdict


def difference_text(name: str, value: float | None, *, signed: bool = True) -> str:
    """Return a difference in its unit: points of a share, per cent of a time, nats per token, scores."""
    if value is None:
        return MISSING
    sign = "+" if signed else ""
    unit = measure(name).unit
    if unit == "ratio":
        return f"{100 * value:{sign}.1f} %"
    if unit == "fraction":
        return f"{100 * value:{sign}.1f} points"
    return f"{value:{sign}.3f}" + (" nats" if unit in ("ppl", "nats/token") else "")


def declared_text(rows: tuple[VerdictRow, ...]) -> str:
    """Return what the table says and how it was made."""
    names = " and ".join(dict.fromkeys(measure(row.measure).label for row in rows))
    return (
        f"Declared before: {names}, each policy against full, Holm's correction within a measure. "
        "[low, high] is the 95 % interval of the paired difference, uncorrected; detects: the difference that "
        "these samples find in 80 % of repetitions. Noisy times are in no ranking."
    )


def _row(group: Group, one: Comparison) -> VerdictRow:
    interval = ""
    if one.low is not None and one.high is not None:
        texts = (difference_text(one.measure, number).split(" ")[0] for number in (one.low, one.high))
        interval = f"[{', '.join(texts)}]"
    return VerdictRow(
        policy=group.series_label(one.first),
        budget=one.first.budget,
        measure=one.measure,
        difference=difference_text(one.measure, one.value),
        interval=interval,
        detectable=difference_text(one.measure, one.minimum_detectable, signed=False),
        verdict=verdict_text(one),
    )


def _units(one: Comparison) -> str:
    return "launches" if measure(one.measure).unit == "ratio" else "samples"
