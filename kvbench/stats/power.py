"""What a number of samples can show: the smallest difference, how many more would decide, and whether anything can.

`minimum_detectable` and `more_samples` take 80 % power at a two-sided level of 5 %: 1.960 + 0.842 = 2.80 standard
errors of a normal mean; we take the quantiles of t, which matter for few units (Miller 2024, arXiv 2411.00640, 5).

`next_rung` searches a ladder of budgets by bisection for the smallest that is shown to be safe, with an honest error
over all looks: every look tests one rung at a one-sided level of 5 % over the number of looks (Bonferroni). While
truth is monotone the claim is false in at most 5 % of searches: rungs that are truly unsafe are met only on the one
path that bisection takes towards the truth, until one of them is passed by mistake; a safe rung that is not shown to
be safe only leads away from them. Simulated in the tests.

`floor_of` is what the full cache's own score must clear: a policy can only be shown to lose what the full cache has.
Where that is not clear of chance, differences between policies are differences between failures, and rank nobody.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from kvbench.stats.tests import quantile

_MOST_TIMES_MORE = 1000
_ERROR = 0.05
# Five margins of 0.02: of less than that, "equivalent" would allow a policy to lose more than a fifth.
HEADROOM_FRACTION = 0.1
MOST_EMPTY_FRACTION = 0.5  # of the full cache's answers; with more, most scores compare with nothing


def minimum_detectable(standard_error: float, num_units: float) -> float:
    """Return the true difference that is found in 80 % of repetitions."""
    return (quantile(0.975, num_units) + quantile(0.8, num_units)) * standard_error


def more_samples(
    value: float, detectable: float, num_samples: int, margin: float | None, *,
    is_sparse: bool = False, num_compared: int = 1,
) -> int | None:  # fmt: skip
    """Return about how many more samples would decide, if the true difference is `value`.

    `detectable` is the difference that these samples detect. They would tell it from 0, or, where a margin is
    given and `value` is inside, show that it is inside; whichever takes fewer. `num_compared` differences share the
    level of the first question (Holm), the second is asked of each alone. A spread shrinks with the root of
    the samples, the bound of rare differences (`is_sparse`) with their number. None where more than a thousand
    times the samples would be needed, or it can not be said.
    """
    part = 0.025 / num_compared  # of the level, at which a difference must be larger by `stretch` to be found
    if is_sparse:
        stretch = math.log(part) / math.log(0.025)
    else:
        at_80_percent = quantile(0.8, math.inf)
        stretch = (quantile(1 - part, math.inf) + at_80_percent) / (quantile(0.975, math.inf) + at_80_percent)
    gap = abs(value) / stretch
    if margin is not None and abs(value) < margin:
        gap = max(gap, margin - abs(value))
    if detectable <= 0 or detectable > _MOST_TIMES_MORE * gap:
        return None
    times = (detectable / gap) ** (1 if is_sparse else 2)
    return None if times > _MOST_TIMES_MORE else max(1, math.ceil((times - 1) * num_samples))


def most_looks(num_rungs: int) -> int:
    """Return how many rungs a bisection of so many looks at, at most."""
    return num_rungs.bit_length()


def look_confidence(num_rungs: int) -> float:
    """Return the two-sided confidence whose one bound errs in 5 % over the number of looks."""
    return 1 - 2 * _ERROR / most_looks(num_rungs)


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


def floor_of(chance: float) -> float:
    """Return what the lower end of the full cache's interval must exceed: a tenth of the way from chance to 1."""
    return chance + HEADROOM_FRACTION * (1.0 - chance)


def constant_answer_score(references: Iterable[str]) -> float:
    """Return what one and the same answer to every question would score: the share of the most common reference.

    0 where no reference is there twice, since then a constant answer is right by knowing one sample.
    """
    counts = Counter(" ".join(text.casefold().split()) for text in references)
    most = max(counts.values(), default=0)
    return most / counts.total() if most > 1 else 0.0
