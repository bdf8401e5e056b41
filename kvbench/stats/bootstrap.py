"""BCa bootstrap by cluster of a paired difference, 10,000 draws, fixed seed.

Source: Efron 1987, "Better bootstrap confidence intervals" (bias correction and acceleration); Hesterberg
2015, arXiv 1411.5279, section 4.2 (the level for few units). The draws are those of scipy.stats.bootstrap with
the same seed, held as counts so that a comparison is one matrix product; a test compares the two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import special

from kvbench.stats.paired import Floats, PairedSums, differences
from kvbench.stats.student import quantile, tail

NUM_DRAWS = 10_000
SEED = 20_260_101
_KEPT_UNITS = 400  # up to so many clusters the counts of all draws (32 MB) are kept for the next comparison
_BLOCK = 60_000  # products so small are made by one thread: the same bits on every machine, no waiting for others


@dataclass(frozen=True, kw_only=True, slots=True)
class Bootstrap:
    """Sorted draws of a difference, with the bias and acceleration of BCa."""

    draws: Floats
    bias: float
    acceleration: float
    num_clusters: int

    def bounds(self, confidence: float, *, widened: bool = True) -> tuple[float, float]:
        """Return the two-sided BCa interval; `widened` for few clusters (Hesterberg 2015)."""
        half = (
            quantile(0.5 + confidence / 2, self.num_clusters) if widened else float(special.ndtri(0.5 + confidence / 2))
        )
        stretch = math.sqrt(self.num_clusters / (self.num_clusters - 1)) if widened else 1.0
        levels = [float(special.ndtr(self._moved(side * half * stretch))) for side in (-1, 1)]
        low, high = np.quantile(self.draws, levels)
        return float(low), float(high)

    def p_value(self) -> float:
        """Return the two-sided p value of a difference of 0: the level at which the widened interval just holds it.

        0 where no draw lies beyond 0, which 10,000 draws can not resolve.
        """
        share = float(np.searchsorted(self.draws, 0.0, "left") + np.searchsorted(self.draws, 0.0, "right"))
        share /= 2 * len(self.draws)
        if not 0 < share < 1:
            return 0.0
        shifted = (float(special.ndtri(share)) - self.bias) / (
            1 + self.acceleration * (float(special.ndtri(share)) - self.bias)
        )
        z = (shifted - self.bias) / math.sqrt(self.num_clusters / (self.num_clusters - 1))
        return 2 * min(tail(z, self.num_clusters), tail(-z, self.num_clusters))

    def _moved(self, z: float) -> float:
        shifted = self.bias + z
        return float(self.bias + shifted / (1 - self.acceleration * shifted))


def bootstrap(pairs: PairedSums) -> Bootstrap | None:
    """Return the draws; None where BCa is not defined (all draws equal, or on one side of the value)."""
    draws = np.sort(np.concatenate([differences(counts @ pairs.columns) for counts in _counts(pairs.num_clusters)]))
    below = (np.searchsorted(draws, pairs.value, "left") + np.searchsorted(draws, pairs.value, "right")) / 2
    jackknife = pairs.leave_one_out()
    deviations = jackknife.mean() - jackknife
    spread = float(np.square(deviations).sum())
    if not 0 < below < len(draws) or spread == 0 or draws[0] == draws[-1]:
        return None
    acceleration = float((deviations**3).sum() / (6 * spread**1.5))
    bias = float(special.ndtri(below / len(draws)))
    return Bootstrap(draws=draws, bias=bias, acceleration=acceleration, num_clusters=pairs.num_clusters)


def _counts(num_clusters: int) -> Iterable[Floats]:
    """Return how often each draw holds each cluster, (draws, C), in blocks."""
    return _kept_counts(num_clusters) if num_clusters <= _KEPT_UNITS else _drawn_counts(num_clusters)


@functools.lru_cache(maxsize=2)
def _kept_counts(num_clusters: int) -> tuple[Floats, ...]:
    return tuple(_drawn_counts(num_clusters))


def _drawn_counts(num_clusters: int) -> Iterator[Floats]:
    rng = np.random.default_rng(SEED)
    rows = max(1, _BLOCK // num_clusters)
    for start in range(0, NUM_DRAWS, rows):
        num = min(rows, NUM_DRAWS - start)
        chosen = rng.integers(0, num_clusters, (num, num_clusters)) + num_clusters * np.arange(num)[:, None]
        counts = np.bincount(chosen.ravel(), minlength=num * num_clusters)
        yield counts.reshape(num, num_clusters).astype(np.float64)
