"""Two arms measured on the same samples, and the estimators of their difference.

Every mean is a ratio of sums over clusters (images, documents), because clusters are what was drawn
independently: a score has its number of samples below, perplexity its scored tokens. Source: Miller 2024,
arXiv 2411.00640, sections 2.2 (clusters) and 4.2 (pairing); the ratio of sums is what pools tokens there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvbench.errors import MeasureError

Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedSums:
    """Per cluster (C, 4): total and weight of the first arm, total and weight of the second.

    The difference is sum(total) / sum(weight) of the first arm minus the same of the second.
    """

    columns: Floats
    num_samples: int

    @property
    def num_clusters(self) -> int:
        """Return how many clusters there are."""
        return len(self.columns)

    @property
    def value(self) -> float:
        """Return the difference over all clusters."""
        return float(differences(self.columns.sum(axis=0)))

    def influences(self) -> Floats:
        """Return what each cluster adds to the difference, (C,): mean 0, and SD / sqrt(C) is the standard error.

        The linear part of the ratios (delta method); for means of equal clusters exactly the deviations.
        """
        mine, weight, other, other_weight = self.columns.T
        first = (mine - mine.sum() / weight.sum() * weight) / weight.mean()
        second = (other - other.sum() / other_weight.sum() * other_weight) / other_weight.mean()
        return np.asarray(first - second, dtype=np.float64)

    def leave_one_out(self) -> Floats:
        """Return the difference without each cluster in turn, (C,)."""
        return differences(self.columns.sum(axis=0) - self.columns)


def differences(sums: Floats) -> Floats:
    """Return the difference of sums (..., 4)."""
    return np.asarray(sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3], dtype=np.float64)


def paired_sums(
    first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]], clusters: Sequence[Hashable]
) -> PairedSums:
    """Return the sums by cluster of two arms' (total, weight) on the same samples.

    Raises: MeasureError if lengths differ, there is no sample, a number is not finite or a weight not above 0.
    """
    if not len(first) == len(second) == len(clusters) or not len(first):
        raise MeasureError(
            f"{len(first)} and {len(second)} samples in {len(clusters)} clusters cannot be paired; give one of each."
        )
    rows = np.hstack([np.asarray(arm, dtype=np.float64).reshape(-1, 2) for arm in (first, second)])
    if not np.isfinite(rows).all() or (rows[:, 1::2] <= 0).any():
        raise MeasureError("a sample has a number that is not finite or a weight that is not above 0; leave it out.")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    index = np.array([numbers[name] for name in clusters], dtype=np.intp)
    columns = np.zeros((len(numbers), 4))
    np.add.at(columns, index, rows)
    return PairedSums(columns=columns, num_samples=len(rows))
