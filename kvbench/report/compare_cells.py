"""Compare two cells sample by sample: the same sample under both, so its difficulty cancels."""

from __future__ import annotations

from dataclasses import replace

from kvbench.report.cell import CellResult
from kvbench.report.compare_latency import compare_latency, timing_noise
from kvbench.report.comparison import DECLARED, Choices, Comparison, judged
from kvbench.report.paired import sample_score
from kvbench.stats.difference import Inference, infer
from kvbench.stats.margins import is_latency_ratio, smallest_margin
from kvbench.stats.paired import paired_sums
from kvbench.stats.power import more_samples
from kvbench.stats.verdicts import verdict_of
from kvbench.units import measure

_NOT_OF_THE_POLICY = ("full_", "copy_bandwidth_")


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


def _filled(base: Comparison, found: Inference) -> Comparison:
    detectable = found.minimum_detectable or 0.0
    return replace(
        base,
        **{
            name: getattr(found, name)
            for name in ("value", "low", "high", "method", "t_low", "t_high", "num_samples", "num_clusters", "p_value")
        },
        minimum_detectable=found.minimum_detectable,
        more_samples=more_samples(found.value, detectable, found.num_samples, base.margin, is_sparse=found.is_sparse),
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
        reason = "observed once, so nothing says how far chance reaches"
        return replace(base, method="single observations: no interval", verdict="not comparable", reason=reason)
    low, high = one.bounds[0] - two.bounds[1], one.bounds[1] - two.bounds[0]
    higher = measure(base.measure).better == "higher"
    margin = None if base.measure.startswith("ppl") else base.margin  # declared in nats, and these are perplexities
    verdict = verdict_of(low, high, higher_is_better=higher, margin=margin, p_value=0.0)
    found = replace(base, verdict=verdict, margin=margin, method="the two cells' own intervals, not paired")
    noise = next(filter(None, (timing_noise(cell, base.measure) for cell in (base.first, base.second))), "")
    if noise:
        return replace(found, verdict="noisy", noise=noise, reason=noise)
    return found
