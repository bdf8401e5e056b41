"""Compare two cells sample by sample: the same sample under both, so its difficulty cancels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kvbench.report.cell import CellResult
from kvbench.report.paired import sample_score
from kvbench.stats.difference import CONFIDENCE, Inference, infer
from kvbench.stats.margins import smallest_margin
from kvbench.stats.paired import paired_sums
from kvbench.stats.power import more_samples
from kvbench.stats.verdicts import LEVEL, Verdict, verdict_of
from kvbench.units import measure

_RATIO = "_ratio_to_full"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """First cell minus second: in the measure's unit, ppl in nats per token, times relative to full minus 1.

    `low` and `high` are the 95 % interval, None where there is none; `p_holm` is corrected for the comparisons of
    its family, `minimum_detectable` is what the samples would show in 80 % of repetitions, and `more_samples`
    says about how many more would decide. `reason` says why something is not comparable or not decided.
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
    more_samples: int | None = None
    primary: bool = False
    reason: str = ""

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


def compare(first: CellResult, second: CellResult, name: str, choices: Choices = DECLARED) -> Comparison | None:
    """Return how `first` differs from `second` in the measure `name`; None if either has none or no side is better."""
    one, two = first.estimate(name), second.estimate(name)
    if measure(name).better == "none" or one is None:
        return None
    if name.endswith(_RATIO) and second.is_full:
        return _relative_to_full(first, second, name, choices)
    if two is None:
        return None
    margin = smallest_margin(name, choices.margins)
    scored = [_scores(cell, name) for cell in (first, second)]
    shared = [identity for identity in scored[0] if identity in scored[1]]
    base = Comparison(
        measure=name,
        first=first,
        second=second,
        value=one.value - two.value,
        method="",
        verdict="undecided",
        margin=margin,
    )
    if not shared:
        return _unpaired(base)
    if len(shared) < max(len(scored[0]), len(scored[1])) and not choices.intersect:
        counts = f"{len(shared)} samples have a number in both, of {len(scored[0])} and {len(scored[1])}"
        return replace(base, verdict="not comparable", method="none", reason=f"{counts}; --intersect compares those")
    clusters = _clusters(first)
    inference = infer(
        paired_sums(
            [scored[0][identity] for identity in shared],
            [scored[1][identity] for identity in shared],
            [clusters[identity] for identity in shared],
        ),
        bounded=measure(name).unit in ("score", "fraction"),
        confidence=choices.confidence,
    )
    return judged(_filled(base, inference))


def judged(one: Comparison, p_holm: float | None = None) -> Comparison:
    """Return the comparison with its verdict under the corrected p value, its own where there is no family."""
    p_value = one.p_value if p_holm is None else p_holm
    if one.low is None or one.high is None or p_value is None:
        return replace(one, verdict="undecided", p_holm=p_holm)
    higher = measure(one.measure).better == "higher"
    verdict = verdict_of(one.low, one.high, higher_is_better=higher, margin=one.margin, p_value=p_value)
    more = one.more_samples if verdict == "undecided" else None
    reason = ""
    if verdict == "undecided" and p_value > LEVEL and (one.low > 0 or one.high < 0):
        reason = f"not clear after Holm's correction (p = {p_value:.2g})"
    elif verdict == "undecided" and more is None:
        reason = "no number of samples within reach would decide"
    return replace(one, verdict=verdict, p_holm=p_holm, more_samples=more, reason=reason)


def _filled(base: Comparison, found: Inference) -> Comparison:
    error = found.standard_error
    return replace(
        base,
        **{
            name: getattr(found, name)
            for name in ("value", "low", "high", "method", "t_low", "t_high", "num_samples", "num_clusters", "p_value")
        },
        minimum_detectable=found.minimum_detectable,
        more_samples=more_samples(found.value, error, found.num_samples, base.margin, is_sparse=found.is_sparse),
    )


def _scores(cell: CellResult, name: str) -> dict[str, tuple[float, float]]:
    found = ((str(sample.get("id")), sample_score(sample, name)) for sample in cell.samples)
    return {identity: score for identity, score in found if score is not None}


def _clusters(cell: CellResult) -> dict[str, str]:
    identities = ((str(sample.get("id")), sample.get("cluster")) for sample in cell.samples)
    return {identity: str(cluster or identity) for identity, cluster in identities}


def _unpaired(base: Comparison) -> Comparison:
    """Without samples ask whether the two cells' own intervals are apart, which is stricter than pairing."""
    one, two = base.first.estimate(base.measure), base.second.estimate(base.measure)
    assert one is not None
    assert two is not None
    if one.low is None or two.low is None:
        return replace(base, method="single observations: no interval")
    low, high = one.bounds[0] - two.bounds[1], one.bounds[1] - two.bounds[0]
    higher = measure(base.measure).better == "higher"
    verdict = verdict_of(low, high, higher_is_better=higher, margin=base.margin, p_value=0.0)
    return replace(base, verdict=verdict, method="the two cells' own intervals, not paired")


def _relative_to_full(first: CellResult, second: CellResult, name: str, choices: Choices) -> Comparison | None:
    """Return a ratio minus 1 with the interval of the record, which is made of launches beside the full cache's."""
    found = first.estimate(name)
    assert found is not None
    low, high = (None, None) if found.low is None or found.high is None else (found.low - 1, found.high - 1)
    one = Comparison(
        measure=name, first=first, second=second, value=found.value - 1, low=low, high=high, method=found.method,
        num_samples=found.n or 0, num_clusters=found.n or 0, verdict="undecided",
        margin=smallest_margin(name, choices.margins),
    )  # fmt: skip
    if low is None or high is None:
        return one
    higher = measure(name).better == "higher"
    verdict = verdict_of(low, high, higher_is_better=higher, margin=one.margin, p_value=0.0)
    return replace(one, verdict="noisy" if first.status == "noisy" else verdict)
