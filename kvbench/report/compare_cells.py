"""Compare two cells sample by sample: the same sample under both, so its difficulty cancels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvbench.measures import measure
from kvbench.report.cell import CellResult, Estimate
from kvbench.report.compare_latency import compare_latency
from kvbench.report.compare_unpaired import compare_unpaired, has_interval, observed_once
from kvbench.report.comparison import DECLARED, Choices, Comparison, judged
from kvbench.report.paired import sample_score
from kvbench.stats.paired import Inference, infer, paired_sums
from kvbench.stats.tests import is_latency_ratio, smallest_margin

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
