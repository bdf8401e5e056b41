"""What one sample scores in a measure, and which of two values is the worse one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from kvbench.units import measure

_POOLED = {
    "ppl": ("nll_sum", "num_scored_tokens"),
    "kl_to_full": ("kl_sum", "num_compared_tokens"),
    "top1_agreement_fraction": ("num_agreeing_tokens", "num_compared_tokens"),
}


def is_worse(name: str, one: float, two: float) -> bool:
    """Tell whether `one` is a worse value of `name` than `two`."""
    return one < two if measure(name).better == "higher" else one > two


def sample_score(sample: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """Return (total, weight) of one sample; perplexity and KL weigh their samples by tokens."""
    total: object = sample.get(name)
    weight: object = 1
    if name in _POOLED:
        total, weight = (sample.get(part) for part in _POOLED[name])
    if not _is_number(total) or not _is_number(weight) or weight <= 0:
        return None
    return total, weight


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
