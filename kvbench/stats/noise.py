"""Whether a machine was quiet enough for its times to enter a comparison.

Launches of one and the same setting may spread by 3 % and a reference kernel may change by 2 % from start to end;
no other process may use the GPU. What is noisier is measured once more, and then called noisy: its numbers are
shown, but no verdict is made of them. Nothing is ever dropped for being large.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_SPREAD_FRACTION = 0.03
MAX_DRIFT_FRACTION = 0.02
FEWEST_LAUNCHES = 3


def spread_fraction(*arms: Sequence[float]) -> float | None:
    """Return the largest standard deviation over mean of any arm's launches; None for under three launches."""
    if min(len(arm) for arm in arms) < FEWEST_LAUNCHES:
        return None
    return max(float(np.std(arm, ddof=1) / np.mean(arm)) for arm in arms)


def noise_reason(spread: float | None, drift: float | None, num_foreign: int | None = None) -> str:
    """Return why times are noisy, empty where they are not; None is what was not measured."""
    reasons = []
    if spread is not None and spread > MAX_SPREAD_FRACTION:
        reasons.append(f"launches of one setting spread by {spread:.1%}, over {MAX_SPREAD_FRACTION:.0%}")
    if drift is not None and drift > MAX_DRIFT_FRACTION:
        reasons.append(f"a reference kernel drifted by {drift:.1%}, over {MAX_DRIFT_FRACTION:.0%}")
    if num_foreign:
        reasons.append(f"{num_foreign} other processes used the GPU")
    return "; ".join(reasons)
