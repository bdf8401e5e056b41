"""Compare two cells sample by sample: the same sample under both, so its difficulty cancels.

The interval is a percentile bootstrap over clusters (samples that share a picture stay together),
seeded, so that the same records always give the same words on the page.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from kvbench.report.cell import CellResult
from kvbench.units import measure

Verdict = Literal["better", "worse", "undecided"]
NUM_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """First cell minus second: in the measurement's unit, for `ppl` in nats per token.

    `low` and `high` are None when the samples carry no such number; `verdict` then asks whether the
    two cells' own intervals are apart.
    """

    value: float
    low: float | None
    high: float | None
    num_samples: int
    verdict: Verdict


def compare(first: CellResult, second: CellResult, name: str) -> Difference | None:
    """Return how `first` differs from `second` in the measurement `name`; None if either has none."""
    one, two = first.estimate(name), second.estimate(name)
    if one is None or two is None:
        return None
    clusters, num_samples = _paired_clusters(first, second, name)
    if len(clusters) >= 2:
        value, low, high = _bootstrap(clusters)
        return Difference(value=value, low=low, high=high, num_samples=num_samples, verdict=_verdict(name, low, high))
    low, high = one.bounds[0] - two.bounds[1], one.bounds[1] - two.bounds[0]
    has_interval = one.low is not None and two.low is not None
    verdict = _verdict(name, low, high) if has_interval else "undecided"
    return Difference(value=one.value - two.value, low=None, high=None, num_samples=0, verdict=verdict)


def is_worse(name: str, one: float, two: float) -> bool:
    """Tell whether `one` is a worse value of `name` than `two`."""
    return one < two if measure(name).better == "higher" else one > two


def sample_score(sample: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """Return (total, weight) of one sample; a perplexity weighs its samples by scored tokens."""
    total: object = sample.get(name)
    weight: object = 1
    if name == "ppl":
        total, weight = sample.get("nll_sum"), sample.get("num_scored_tokens", 0)
    if not _is_number(total) or not _is_number(weight) or weight <= 0:
        return None
    return total, weight


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _verdict(name: str, low: float, high: float) -> Verdict:
    if low > 0 or high < 0:
        return "worse" if is_worse(name, low, 0.0) else "better"
    return "undecided"


def _paired_clusters(
    first: CellResult, second: CellResult, name: str
) -> tuple[list[tuple[float, float, float, float]], int]:
    """Return per cluster the sums (total, weight, other total, other weight), and the number of pairs."""
    others = {str(sample.get("id")): sample for sample in second.samples}
    sums: dict[str, tuple[float, float, float, float]] = {}
    num_pairs = 0
    for sample in first.samples:
        identity = str(sample.get("id"))
        mine, other = sample_score(sample, name), sample_score(others.get(identity, {}), name)
        if mine is None or other is None:
            continue
        num_pairs += 1
        cluster = str(sample.get("cluster") or identity)
        a, b, c, d = sums.get(cluster, (0.0, 0.0, 0.0, 0.0))
        sums[cluster] = (a + mine[0], b + mine[1], c + other[0], d + other[1])
    return list(sums.values()), num_pairs


def _bootstrap(clusters: list[tuple[float, float, float, float]]) -> tuple[float, float, float]:
    totals, weights, other_totals, other_weights = (list(column) for column in zip(*clusters, strict=True))

    def difference(chosen: tuple[int, ...] | range) -> float:
        mine: float = sum(totals[i] for i in chosen) / sum(weights[i] for i in chosen)
        other: float = sum(other_totals[i] for i in chosen) / sum(other_weights[i] for i in chosen)
        return mine - other

    draws = sorted(difference(chosen) for chosen in _resamples(len(clusters)))
    edge = round(0.025 * NUM_RESAMPLES)
    return difference(range(len(clusters))), draws[edge], draws[-1 - edge]


@functools.lru_cache(maxsize=4)
def _resamples(num_clusters: int) -> tuple[tuple[int, ...], ...]:
    rng = random.Random(num_clusters)
    indices = range(num_clusters)
    return tuple(tuple(rng.choices(indices, k=num_clusters)) for _ in range(NUM_RESAMPLES))
