"""What a comparison of two cells says, and how its numbers become a verdict.

Every comparison of a group: its cells with the full cache, and policies with each other at equal budget.

for one in group_comparisons(group):
    print(one.first.policy, one.measure, one.verdict, one.value, one.low, one.high)

Compare two cells sample by sample: the same sample under both, so its difficulty cancels.

Compare times: a policy with the full cache it was interleaved with, or two policies by their ratios to full.

Compare two cells that hold no samples of a measure, such as times and bytes, by their own intervals.

Differences and verdicts in words: one wording for terminal, page, markdown, CSV and LaTeX.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from kvbench.measures import MEASURES, measure
from kvbench.report.ability import Ability
from kvbench.report.load import CellResult, Estimate, Group, sample_score
from kvbench.stats.latency import LogRatio, between, from_interval, noise_reason
from kvbench.stats.paired import CONFIDENCE, Inference, infer, paired_sums
from kvbench.stats.power import more_samples
from kvbench.stats.tests import LEVEL, Verdict, holm, is_latency_ratio, smallest_margin, unpaired_p_value, verdict_of


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


def compare_latency(first: CellResult, second: CellResult, name: str, choices: Choices) -> Comparison:
    """Return the ratio of `first` to `second` minus 1, before any verdict but noisy; `first` has the measure."""
    ratios = [_ratio(first, name), None if second.is_full else _ratio(second, name)]
    value = (first.measurements[name].value / (1.0 if second.is_full else second.measurements[name].value)) - 1
    n = first.measurements[name].n or 0
    base = Comparison(
        measure=name, first=first, second=second, value=value, method="single observations: no interval",
        num_samples=n, num_clusters=n, verdict="not comparable",
        reason="observed once, so nothing says how far chance reaches", margin=smallest_margin(name, choices.margins),
        noise=_noise(name, first, second),
    )  # fmt: skip
    mine, other = ratios
    if mine is None or (other is None and not second.is_full):
        return base
    return _compare_latency_filled(base, mine if other is None else between(mine, other))


def _compare_latency_filled(base: Comparison, found: LogRatio) -> Comparison:
    low, high = found.bounds()
    return replace(
        base,
        value=math.expm1(found.mean),
        verdict="undecided",
        reason="",
        low=low,
        high=high,
        method="t of paired log ratios of launches" + ("" if base.second.is_full else ", each to its own full cache"),
        p_value=found.p_value(),
        minimum_detectable=found.minimum_detectable(),
    )


def _ratio(cell: CellResult, name: str) -> LogRatio | None:
    found = cell.measurements[name]
    if found.low is None or found.high is None:
        return None
    return from_interval(found.value, found.low, found.high, found.n or 0)


def _noise(name: str, *cells: CellResult) -> str:
    """Return why the times of one of the cells are noisy; empty where they are not, or nothing was recorded."""
    for cell in cells:
        if (reason := timing_noise(cell, name)) and not cell.is_full:
            return reason
    return ""


def timing_noise(cell: CellResult, name: str = "tpot_ratio_to_full") -> str:
    """Return why a time or rate of the cell is noisy; empty where it is not, or the measure is neither."""
    if not _is_time(name):
        return ""
    spread = max((found for one in _spreads(name) if (found := _value(cell, one)) is not None), default=None)
    drift, foreign = _value(cell, "reference_drift_fraction"), _value(cell, "foreign_gpu_processes")
    if cell.status == "noisy" and spread is drift is foreign is None:
        return "the cell is noisy"
    return noise_reason(spread, drift, None if foreign is None else int(foreign))


def _value(cell: CellResult, name: str) -> float | None:
    found = cell.estimate(name)
    return None if found is None else found.value


def _spreads(name: str) -> tuple[str, ...]:
    """Return the spreads that say how far the measure can be trusted; a whole launch has both parts."""
    if "throughput" in name:
        return "tpot_spread_fraction", "ttft_spread_fraction"
    return ("ttft_spread_fraction",) if "ttft" in name else ("tpot_spread_fraction",)


def _is_time(name: str) -> bool:
    """Whether the measure is a time or a rate, or made of one, which a noisy machine spoils."""
    if name == "capacity_ratio_to_full":
        return False  # how many prompts fit, on any clock
    of_times = ("_ratio_to_full", "roof_share_fraction")
    return measure(name).unit in ("ms", "tokens/s") or name.endswith(of_times)


Bounds = tuple[float, float]


def compare_unpaired(base: Comparison, ends: tuple[Bounds, Bounds], counts: tuple[int, int]) -> Comparison:
    """Return whether the intervals `ends` of the two cells, over `counts` units each, are apart.

    The bounds are in the unit of the difference. It is stricter than pairing: the interval of the difference reaches
    from one's low to the other's high.
    """
    noise = next(filter(None, (timing_noise(cell, base.measure) for cell in (base.first, base.second))), "")
    (low, high), (other_low, other_high) = ends
    found = replace(
        base,
        low=low - other_high,
        high=high - other_low,
        p_value=unpaired_p_value(base.value, (high - low, other_high - other_low), counts),
        method="the two cells' own intervals, not paired",
        noise=noise,
    )
    return judged(found)


def observed_once(base: Comparison) -> Comparison:
    """Return the comparison of numbers without an interval."""
    reason = "observed once, so nothing says how far chance reaches"
    return replace(base, method="single observations: no interval", verdict="not comparable", reason=reason)


def has_interval(found: Estimate) -> bool:
    """Whether the number has bounds, and a count of what they were made of."""
    return found.low is not None and found.high is not None and (found.n or 0) > 1


_NOT_OF_THE_POLICY = ("full_", "copy_bandwidth_")
_AGAINST_FULL = ("_vs_full", "top1_agreement_fraction")
Scores = Mapping[str, tuple[float, float]]


def compare(first: CellResult, second: CellResult, name: str, choices: Choices = DECLARED) -> Comparison | None:
    """Return how `first` differs from `second` in the measure `name`; None if either has none.

    None too where no side is better, and for what describes the full cache or the machine, not the policy.
    """
    one, two = first.estimate(name), second.estimate(name)
    if measure(name).better == "none" or one is None or name.startswith(_NOT_OF_THE_POLICY):
        return None
    if is_latency_ratio(measure(name)):
        return judged(compare_latency(first, second, name, choices)) if second.is_full or two else None
    if two is None:
        return None
    values = [_subtracted(name, found.value) for found in (one, two)]
    if -math.inf in values:
        return None
    scored = (_scores(first, name), _scores(second, name))
    base = Comparison(
        measure=name,
        first=first,
        second=second,
        value=values[0] - values[1],
        method="none",
        verdict="not comparable",
        margin=smallest_margin(name, choices.margins),
    )
    if not any(scored):
        return _without_samples(base, one, two)
    shared = [identity for identity in scored[0] if identity in scored[1]]
    if not shared or (len(shared) < max(map(len, scored)) and not choices.intersect):
        counts = f"{len(shared)} samples have a number in both, of {len(scored[0])} and {len(scored[1])}"
        return replace(base, reason=f"{counts}; --intersect compares those" if shared else counts)
    return _paired(base, scored, shared, choices)


def _paired(base: Comparison, scored: tuple[Scores, Scores], shared: Sequence[str], choices: Choices) -> Comparison:
    clusters = _clusters(base.first)
    mine, theirs = ([scores[identity] for identity in shared] for scores in scored)
    pairs = paired_sums(mine, theirs, [clusters[identity] for identity in shared])
    found = infer(pairs, scale=_scale(base.measure, theirs), confidence=choices.confidence)
    return judged(_filled(replace(base, verdict="undecided"), found))


def _scale(name: str, theirs: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Return what differences of the measure lie between: no answer is closer to the full cache's than that itself."""
    if measure(name).unit not in ("score", "fraction"):
        return None
    is_full = name.endswith(_AGAINST_FULL) and all(total == weight for total, weight in theirs)
    return -1.0, 0.0 if is_full else 1.0


def _subtracted(name: str, number: float) -> float:
    """Return a number of the measure as it is subtracted: a perplexity in nats per token."""
    if measure(name).unit != "ppl":
        return number
    return math.log(number) if number > 0 else -math.inf


def _filled(base: Comparison, found: Inference) -> Comparison:
    return replace(
        base,
        **{
            name: getattr(found, name)
            for name in (
                *("value", "low", "high", "method", "t_low", "t_high", "num_samples", "num_clusters", "p_value"),
                *("minimum_detectable", "is_sparse"),
            )
        },
    )


def _scores(cell: CellResult, name: str) -> dict[str, tuple[float, float]]:
    found = ((str(sample.get("id")), sample_score(sample, name)) for sample in cell.samples)
    return {identity: score for identity, score in found if score is not None}


def _clusters(cell: CellResult) -> dict[str, str]:
    identities = ((str(sample.get("id")), sample.get("cluster")) for sample in cell.samples)
    return {identity: str(cluster or identity) for identity, cluster in identities}


def _without_samples(base: Comparison, one: Estimate, two: Estimate) -> Comparison:
    """Without samples ask whether the two cells' own intervals are apart."""
    if not has_interval(one) or not has_interval(two):
        return observed_once(base)
    mine, theirs = (
        (_subtracted(base.measure, found.bounds[0]), _subtracted(base.measure, found.bounds[1])) for found in (one, two)
    )
    if not all(map(math.isfinite, (*mine, *theirs))):
        return observed_once(base)
    return compare_unpaired(base, (mine, theirs), (one.n or 0, two.n or 0))


PRIMARY_QUALITIES = ("rougeL_vs_full", "ppl", "rougeL_vs_reference", "turn1_rougeL_vs_full")
PRIMARY_LATENCY = "tpot_ratio_to_full"
PRIMARY_BUDGET = 0.2


def group_comparisons(
    group: Group, choices: Choices = DECLARED, only: Collection[str] | None = None, *, between: bool = True
) -> tuple[Comparison, ...]:
    """Return every budgeted cell against full, and every two policies at equal budget, in every measure or `only` some.

    Verdicts are corrected by Holm within a measure: those against full are one family, those between policies another,
    which is left out without `between`. Where the full cache can not do the task nobody is ranked.
    """
    names = [
        name
        for name in MEASURES
        if any(cell.estimate(name) for cell in group.budgeted) and (only is None or name in only)
    ]
    found: list[Comparison] = []
    for name in names:
        for pairs in (_against_full(group), between_policies(group) if between else ()):
            family = [one for pair in pairs if (one := compare(*pair, name, choices))]
            found.extend(_corrected(family))
    ability = Ability(group)
    return tuple(withheld(one, ability.reason(one.measure)) for one in _marked(group, found))


def _against_full(group: Group) -> Iterator[tuple[CellResult, CellResult]]:
    if group.full is not None:
        yield from ((cell, group.full) for cell in group.budgeted if not cell.failed)


def between_policies(group: Group) -> Iterator[tuple[CellResult, CellResult]]:
    """Yield every two policies at equal budget."""
    for cells in group.by_budget.values():
        yield from combinations((cell for cell in cells if not cell.failed), 2)


def _corrected(family: list[Comparison]) -> list[Comparison]:
    tested = sorted((one for one in family if one.p_value is not None), key=lambda one: one.p_value or 0.0)
    p_values = holm([one.p_value or 0.0 for one in tested])
    found = {id(one): judged(one, p_values[k], len(tested) - k) for k, one in enumerate(tested)}
    return [found.get(id(one), one) for one in family]


def declared_budget(group: Group) -> str | None:
    """Return the budget of the primary comparisons: 20 % of the tokens, else the middle one; failed cells count too.

    It is settled by what was asked for, so that a cell that fails does not move it.
    """
    budgets = list(group.by_budget)
    known = next((cell.budget for cell in group.budgeted if cell.budget_fraction == PRIMARY_BUDGET), None)
    return known or (budgets[len(budgets) // 2] if budgets else None)


def _marked(group: Group, found: Iterable[Comparison]) -> Iterator[Comparison]:
    """Mark the comparisons that were declared before: one quality and one latency measure, at one budget."""
    quality = next((name for name in PRIMARY_QUALITIES if any(cell.estimate(name) for cell in group.budgeted)), None)
    budget = declared_budget(group)
    for one in found:
        is_primary = one.second.is_full and one.measure in (quality, PRIMARY_LATENCY) and one.first.budget == budget
        yield replace(one, primary=True) if is_primary else one


def difference_unit(name: str) -> tuple[str, float, int]:
    """Return (unit, divisor, decimals) in which differences of the measure are printed."""
    known = measure(name)
    if known.unit in ("ppl", "nats/token"):
        return "nats/token", 1.0, 3
    if known.unit == "fraction":
        return "points", 0.01, 1
    if is_latency_ratio(known):
        return "%", 0.01, 1
    return "", 1.0, 3


def difference_value(one: Comparison) -> str:
    """Return "-0.324", with the sign also where it is positive."""
    _, factor, places = difference_unit(one.measure)
    return f"{one.value / factor:+.{places}f}"


def difference_interval(one: Comparison) -> str:
    """Return "[-0.356, -0.296]"; empty without an interval."""
    if one.low is None or one.high is None:
        return ""
    _, factor, places = difference_unit(one.measure)
    return f"[{one.low / factor:+.{places}f}, {one.high / factor:+.{places}f}]"


def difference_text(one: Comparison) -> str:
    """Return "-0.324 [-0.356, -0.296] points"."""
    unit, _, _ = difference_unit(one.measure)
    return " ".join(part for part in (difference_value(one), difference_interval(one), unit) if part)


def size_text(name: str, size: float | None) -> str:
    """Return a size in the measure's difference unit, such as a margin or the smallest detectable difference."""
    if size is None:
        return ""
    _, factor, places = difference_unit(name)
    return f"{size / factor:.{places}f}"


def verdict_remark(one: Comparison) -> str:
    """Return what belongs below the word: the margin, how many samples are missing, or why nothing can be said."""
    if one.verdict == "equivalent" and one.margin is not None:
        unit = difference_unit(one.measure)[0]
        return f"within {size_text(one.measure, one.margin)}{f' {unit}' if unit else ''}"
    if one.verdict == "undecided" and one.more_samples is not None:
        many, single = ("launches", "launch") if is_latency_ratio(measure(one.measure)) else ("samples", "sample")
        return f"needs about {one.more_samples:,} more {single if one.more_samples == 1 else many}"
    return one.reason
