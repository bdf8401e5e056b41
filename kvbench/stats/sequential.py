"""The smallest rung of a ladder that is shown to be safe, by bisection, with an honest error over all looks.

Every look tests one rung at a one-sided level of 5 % over the number of looks there may be (Bonferroni). While
truth is monotone the claim is false in at most 5 % of searches: rungs that are truly unsafe are met only on the
one path that bisection takes towards the truth, until one of them is passed by mistake; a safe rung that is not
shown to be safe only leads away from them. Simulated in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

ERROR = 0.05


def most_looks(num_rungs: int) -> int:
    """Return how many rungs a bisection of so many looks at, at most."""
    return num_rungs.bit_length()


def look_confidence(num_rungs: int) -> float:
    """Return the two-sided confidence whose one bound errs in 5 % over the number of looks."""
    return 1 - 2 * ERROR / most_looks(num_rungs)


def next_rung(num_rungs: int, shown_safe: Mapping[int, bool]) -> int | None:
    """Return the rung to look at next, None when the search is over; rung 0 is the smallest budget."""
    low = max((rung for rung, safe in shown_safe.items() if not safe), default=-1)
    high = min((rung for rung, safe in shown_safe.items() if safe), default=num_rungs)
    return (low + high) // 2 if high - low > 1 else None


def smallest_sample(margin: float, confidence: float) -> int:
    """Return how many clusters show a margin of a score between 0 and 1 if none of them differs at all.

    Clopper and Pearson's bound of a share that was never seen, times the whole scale.
    """
    return 1 if margin >= 1 else math.floor(math.log((1 - confidence) / 2) / math.log1p(-margin)) + 1
