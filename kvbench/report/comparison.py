"""What a comparison of two cells says, and how its numbers become a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kvbench.measures import measure
from kvbench.report.cell import CellResult
from kvbench.stats.paired import CONFIDENCE
from kvbench.stats.power import more_samples
from kvbench.stats.tests import LEVEL, Verdict, verdict_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """First cell minus second: in the measure's unit, ppl in nats per token, times relative to full minus 1.

    `low` and `high` are the 95 % interval, None where there is none; `p_holm` is corrected for the comparisons of
    its family, `minimum_detectable` is what the samples would show in 80 % of repetitions (from the few that differ
    where `is_sparse`), and `more_samples` says about how many more would decide. `reason` says why something is not
    comparable, decided or ranked at all, `noise` why its times are noisy.
    """

    measure: str
    first: CellResult
    second: CellResult
    value: float
    low: float | None = None
    high: float | None = None
    method: str
    t_low: float | None = None
    t_high: float | None = None
    num_samples: int = 0
    num_clusters: int = 0
    p_value: float | None = None
    p_holm: float | None = None
    minimum_detectable: float | None = None
    margin: float | None = None
    verdict: Verdict
    is_sparse: bool = False
    more_samples: int | None = None
    primary: bool = False
    reason: str = ""
    noise: str = ""

    @property
    def is_clear(self) -> bool:
        """True when one of the two is shown to be better."""
        return self.verdict in ("better", "worse")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What the reader chose: margins by measure, whether unequal sample sets are cut to the common ones, confidence."""

    margins: Mapping[str, float] = field(default_factory=dict)
    intersect: bool = False
    confidence: float = CONFIDENCE


DECLARED = Choices()


def withheld(one: Comparison, reason: str) -> Comparison:
    """Return the comparison without a verdict where there is a `reason` for it (kvbench.report.ability)."""
    return replace(one, verdict="not ranked", reason=reason, more_samples=None) if reason else one


def judged(one: Comparison, p_holm: float | None = None, num_compared: int = 1) -> Comparison:
    """Return the comparison with its verdict under the corrected p value, its own where there is no family.

    `num_compared` is how many differences share the level with it at Holm's step.
    """
    p_value = one.p_value if p_holm is None else p_holm
    if one.noise:
        return replace(one, verdict="noisy", p_holm=p_holm, reason=one.noise)
    if one.low is None or one.high is None or p_value is None:
        known = one.verdict == "not comparable"
        return replace(
            one, verdict=one.verdict if known else "undecided", p_holm=p_holm, reason=one.reason or one.method
        )
    higher = measure(one.measure).better == "higher"
    verdict = verdict_of(one.low, one.high, higher_is_better=higher, margin=one.margin, p_value=p_value)
    decided = replace(one, verdict=verdict, p_holm=p_holm, more_samples=None, reason="")
    if verdict != "undecided":
        return decided
    more = more_samples(
        *(one.value, one.minimum_detectable or 0.0, one.num_samples, one.margin),
        is_sparse=one.is_sparse,
        num_compared=num_compared,
    )
    return replace(decided, more_samples=more, reason=_reason(one, p_value, more))


def _reason(one: Comparison, p_value: float, more: int | None) -> str:
    """Return why the samples do not decide; empty where more of them would."""
    if one.low is not None and one.high is not None and (one.low > 0 or one.high < 0):
        if one.p_value is not None and one.p_value <= LEVEL:
            return f"not clear after Holm's correction (p = {p_value:.2g})"
        return f"too few clusters differ (p = {one.p_value:.2g})"
    if one.minimum_detectable is None:
        return "the two cells' own intervals overlap"
    return "no number of samples within reach would decide" if more is None else ""
