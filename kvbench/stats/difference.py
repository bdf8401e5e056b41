"""What is inferred about a paired difference: interval, p values, and what the samples could have shown."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvbench.stats.bootstrap import NUM_DRAWS, bootstrap
from kvbench.stats.paired import PairedSums
from kvbench.stats.power import minimum_detectable
from kvbench.stats.student import quantile, standard_error, tail

CONFIDENCE = 0.95
MIN_BOOTSTRAP_CLUSTERS = 20
MAX_T_CLUSTERS = 100
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class Inference:
    """A difference with its 95 % interval; `t_low` and `t_high` stand beside a bootstrap of under 100 clusters.

    `low` is None where one cluster shows no spread. `p_value` is against a difference of 0.
    """

    value: float
    low: float | None
    high: float | None
    method: str
    t_low: float | None
    t_high: float | None
    p_value: float | None
    standard_error: float
    num_samples: int
    num_clusters: int

    @property
    def minimum_detectable(self) -> float | None:
        """Return the difference found with 80 % power; None where nothing is known about the spread."""
        return None if self.low is None else minimum_detectable(self.standard_error)


def infer(pairs: PairedSums) -> Inference:
    """Return what `pairs` show: BCa by cluster, Student's t under 20 clusters."""
    return _infer(pairs.columns.tobytes(), pairs.num_samples)


@functools.lru_cache(maxsize=4096)
def _infer(data: bytes, num_samples: int) -> Inference:
    columns = np.frombuffer(data, dtype=np.float64).reshape(-1, 4)
    pairs = PairedSums(columns=columns, num_samples=num_samples)
    build: Callable[..., Inference] = functools.partial(
        Inference, value=pairs.value, num_samples=num_samples, num_clusters=pairs.num_clusters
    )
    none = {"t_low": None, "t_high": None}
    if pairs.num_clusters == 1:
        return build(low=None, high=None, method="one cluster: no interval", p_value=None, standard_error=0.0, **none)
    influences = pairs.influences()
    error = standard_error(influences)
    scale = float(np.abs(columns[:, ::2] / columns[:, 1::2]).max())
    if error <= _ROUNDING * scale:
        same = float(pairs.value) if abs(pairs.value) > _ROUNDING * scale else 0.0
        p_value = 1.0 if same == 0 else 0.0
        method = "every cluster differs by the same"
        return build(low=same, high=same, method=method, p_value=p_value, standard_error=0.0, **none)
    half = quantile(0.5 + CONFIDENCE / 2, pairs.num_clusters) * error
    t_low, t_high = pairs.value - half, pairs.value + half
    p_value = 2 * tail(-abs(pairs.value) / error, pairs.num_clusters)
    found = bootstrap(pairs) if pairs.num_clusters >= MIN_BOOTSTRAP_CLUSTERS else None
    if found is None:
        method = f"t interval over {pairs.num_clusters} clusters"
        return build(low=t_low, high=t_high, method=method, p_value=p_value, standard_error=error, **none)
    low, high = found.bounds(CONFIDENCE)
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = t_low, t_high
    beside = {"t_low": t_low, "t_high": t_high} if pairs.num_clusters < MAX_T_CLUSTERS else none
    method = f"BCa bootstrap, {NUM_DRAWS:,} draws, by cluster"
    return build(low=low, high=high, method=method, p_value=p_value, standard_error=error, **beside)
