"""From an interval to one word; the margin decides what is too small to matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Verdict = Literal["better", "worse", "equivalent", "undecided", "noisy", "not comparable", "not ranked"]
LEVEL = 0.05
_TURNED: Mapping[Verdict, Verdict] = {"better": "worse", "worse": "better"}


def verdict_of(low: float, high: float, *, higher_is_better: bool, margin: float | None, p_value: float) -> Verdict:
    """Return the verdict on first minus second; `p_value` is corrected for the family where there is one.

    Equivalent (the whole interval inside the margin) comes first: a difference may be certain and still too
    small to matter. Better and worse need an interval without zero and a p value of at most 5 %.
    """
    if margin is not None and -margin < low and high < margin:
        return "equivalent"
    if p_value <= LEVEL and (low > 0 or high < 0):
        return "better" if (low > 0) == higher_is_better else "worse"
    return "undecided"


def turned(verdict: Verdict) -> Verdict:
    """Return the verdict as seen from the second of the two."""
    return _TURNED.get(verdict, verdict)


def is_non_inferior(low: float, high: float, *, higher_is_better: bool, margin: float) -> bool:
    """Whether the first is shown to be at most `margin` worse than the second."""
    return low > -margin if higher_is_better else high < margin
