"""What one sample scores in a measure, and which of two values is the better one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from kvbench.measures import measure
from kvbench.stats.paired import POOLED

_LARGEST = 1e100  # squares and sums of what is larger leave the floats; no score and no log-loss is


def is_better(name: str, one: float, two: float) -> bool:
    """Tell whether `one` is a better value of `name` than `two`."""
    return one > two if measure(name).better == "higher" else one < two


def sample_score(sample: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """Return (total, weight) of one sample; perplexity and KL weigh their samples by tokens."""
    total: object = sample.get(name)
    weight: object = 1
    if name in POOLED:
        total, weight = (sample.get(part) for part in POOLED[name])
    if not _is_number(total) or not _is_number(weight) or weight <= 0:
        return None
    return total, weight


def _is_number(value: object) -> TypeGuard[int | float]:
    """Tell whether a float can hold it; JSON may also hold integers that no float can."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
