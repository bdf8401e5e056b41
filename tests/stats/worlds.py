"""Worlds whose truth is known: paired samples of many shapes, and a clock with launches, drift, steps and spikes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvbench.stats.paired import PairedSums

Floats = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Floats]

# Differences of one score with the true mean, each with a spread of the size that policies show.
SHAPES: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, n: rng.normal(0.02, 0.1, n), 0.02),
    "skewed": (lambda rng, n: 0.1 - rng.exponential(0.1, n), 0.0),
    "often equal": (lambda rng, n: -1.0 * (rng.random(n) < 0.3) * rng.beta(2, 5, n), -0.3 * 2 / 7),
    "heavy tails": (lambda rng, n: 0.05 * rng.standard_t(3, n), 0.0),
    "two kinds": (
        lambda rng, n: np.where(rng.random(n) < 0.5, rng.normal(-0.1, 0.02, n), rng.normal(0.1, 0.02, n)),
        0.0,
    ),
}


def scores(differences: Floats) -> PairedSums:
    """One sample per cluster: a score of 0.5 and the same plus the difference."""
    n, ones = len(differences), np.ones(len(differences))
    return PairedSums(columns=np.stack([0.5 + differences, ones, np.full(n, 0.5), ones], axis=1), num_samples=n)


def right_or_wrong(rng: np.random.Generator, num: int, known: float, lost: float) -> Floats:
    """Answers that are right or wrong, (num, 4): full knows `known` of them, and the policy loses `lost`."""
    full, ones = (rng.random(num) < known).astype(np.float64), np.ones(num)
    return np.stack([full * (rng.random(num) >= lost / known), ones, full, ones], axis=1)


def two_sizes_of_loss(rng: np.random.Generator, num: int, lost: float) -> Floats:
    """A perfect score of which `lost` lose 0.01, or, one in ten of these, all, (num, 4); 0.109 on average."""
    loss = (rng.random(num) < lost) * np.where(rng.random(num) < 0.1, 1.0, 0.01)
    ones = np.ones(num)
    return np.stack([1 - loss, ones, ones, ones], axis=1)


def unequal_clusters(rng: np.random.Generator, num: int, num_large: int, lost: float) -> Floats:
    """Pictures with one question, and `num_large` with 20: only of these the policy loses all with chance `lost`."""
    weight = np.where(np.arange(num) < num_large, 20.0, 1.0)
    kept = (weight == 1) | (rng.random(num) >= lost)
    return np.stack([weight * kept, weight, weight, weight], axis=1)


def passages(rng: np.random.Generator, num_clusters: int, delta: float) -> tuple[Floats, npt.NDArray[np.intp]]:
    """Log-losses (samples, 4) of questions on shared passages and the passage of each; the true difference is delta.

    Passages differ in how much the policy loses on them, and questions in length.
    """
    cluster = np.repeat(np.arange(num_clusters), rng.integers(5, 11, num_clusters))
    tokens = rng.integers(20, 150, len(cluster)).astype(np.float64)
    base = rng.gamma(4, 0.3, num_clusters)[cluster] + rng.normal(0, 0.05, len(cluster))
    loss = delta + rng.normal(0, 0.1, num_clusters)[cluster] + rng.normal(0, 0.1, len(cluster))
    return np.stack([tokens * (base + loss), tokens, tokens * base, tokens], axis=1), cluster


def by_cluster(rows: Floats, cluster: npt.NDArray[np.intp]) -> PairedSums:
    columns = np.zeros((cluster.max() + 1, 4))
    np.add.at(columns, cluster, rows)
    return PairedSums(columns=columns, num_samples=len(rows))


@dataclass(frozen=True, kw_only=True)
class VirtualClock:
    """A machine: spread of launches and of steps, drift over all launches, slow steps, and a neighbour's load."""

    launch_sd: float = 0.01
    step_sd: float = 0.03
    drift: float = 0.0
    spike_share: float = 0.03
    neighbour_share: float = 0.0

    def launches(self, rng: np.random.Generator, factors: Floats, num_steps: int = 47) -> Floats:
        """Return the median step (ms) of each launch in order; `factors` is how slow each one truly is."""
        num = len(factors)
        level = 10 * factors * (1 + self.drift * np.arange(num) / max(1, num - 1))
        level = level * np.exp(rng.normal(0, self.launch_sd, num))
        level = level * np.where(rng.random(num) < self.neighbour_share, rng.uniform(1.2, 1.6, num), 1.0)
        steps = level[:, None] * np.exp(rng.normal(0, self.step_sd, (num, num_steps)))
        steps = steps * np.where(rng.random(steps.shape) < self.spike_share, rng.uniform(2, 5, steps.shape), 1.0)
        return np.asarray(np.median(steps, axis=1))

    def abba(self, rng: np.random.Generator, slower: float, num_blocks: int = 3) -> tuple[Floats, Floats]:
        """Return the launch medians of policy and full in the order policy, full, full, policy."""
        is_policy = np.tile([True, False, False, True], num_blocks)
        found = self.launches(rng, np.where(is_policy, slower, 1.0))
        return found[is_policy], found[~is_policy]
