"""From numbers to one word, and what a number of samples can show: Student's t, p values, margins, power, the verdict.

`verdict_of` turns an interval and a p value into "better", "worse", "equivalent" or "undecided". The margin decides
what is too small to matter; it is declared per measure before anything is measured. A difference whose whole interval
lies inside the margin is called equivalent. The defaults are choices, and the report prints the one it used;
`kvbench report --margin rougeL_vs_full=0.01` changes one.

Sources: Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6
(p values of a family, such that any false claim among them is rarer than the level); Welch 1947, "The generalization
of Student's problem" (two means measured apart); Clopper and Pearson 1934 (a share, from how often it was seen).

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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from kvbench.errors import ConfigError
from kvbench.measures import MEASURES, Measure, measure_named

Floats: TypeAlias = npt.NDArray[np.float64]


def special() -> Any:
    """Import scipy.special when the first number is there; a command line and a sweep with nothing to do need none."""
    from scipy import special as functions

    return functions


def quantile(probability: float, num_units: float) -> float:
    """Return the quantile of t with one degree of freedom fewer than units; the normal one for infinitely many."""
    return float(
        special().ndtri(probability) if num_units == math.inf else special().stdtrit(num_units - 1, probability)
    )


def tail(statistic: float, num_units: float) -> float:
    """Return P(T <= statistic)."""
    return float(special().ndtr(statistic) if num_units == math.inf else special().stdtr(num_units - 1, statistic))


def p_value_of(difference: float, error: float, num_units: float) -> float:
    """Return the two-sided p value of a difference of 0, by t; without a spread it is certain."""
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return 2 * tail(-abs(difference) / error, num_units)


def standard_error(influences: Floats) -> float:
    """Return the standard error of an estimate from its units' influences; 0 where they are equal."""
    return float(influences.std(ddof=1)) / math.sqrt(len(influences))


def welch(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Return the standard error of a difference of two means of (standard error, units) each, and its units.

    Units are degrees of freedom and one.
    """
    parts = [(error**2, units - 1) for error, units in (first, second)]
    total = sum(part for part, _ in parts)
    freedom = total**2 / sum(part**2 / free for part, free in parts) if total > 0 else parts[0][1]
    return math.sqrt(total), freedom + 1


def largest_share(num_seen: int, num: int, confidence: float) -> float:
    """Return the upper end of Clopper and Pearson's two-sided interval of a share of which `num_seen` of `num` were."""
    return float(special().betaincinv(num_seen + 1, num - num_seen, 0.5 + confidence / 2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the corrected p values, in the order given: the k-th smallest of m times (m - k + 1), never falling."""
    found = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        found[index] = largest
    return found


def unpaired_p_value(difference: float, widths: tuple[float, float], num_units: tuple[int, int]) -> float:
    """Return the two-sided p value of a difference of 0, by Welch's t; each width gives a standard error back."""
    errors = [width / (2 * quantile(0.975, num)) for width, num in zip(widths, num_units, strict=True)]
    error, units = welch((errors[0], num_units[0]), (errors[1], num_units[1]))
    return p_value_of(difference, error, units) if math.isfinite(error) else 1.0


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


_BY_UNIT = {
    "score": 0.02,  # two words in a hundred
    "fraction": 0.02,  # two objects, needles or tokens in a hundred
    "ppl": 0.02,  # nats per token: two per cent of the perplexity
    "nats/token": 0.02,  # the same log-loss, of the full cache's own answer
}
_LATENCY = 0.03  # what launches of one and the same setting may differ by before a cell is called noisy


def smallest_margin(name: str, chosen: Mapping[str, float] | None = None) -> float | None:
    """Return the margin of the measure: the chosen one, else the declared one, None where none is."""
    if chosen and name in chosen:
        return chosen[name]
    measure = MEASURES.get(name)
    if measure is None or measure.better == "none":
        return None
    return _LATENCY if is_latency_ratio(measure) else _BY_UNIT.get(measure.unit)


def is_latency_ratio(measure: Measure) -> bool:
    """Whether the measure is a time or rate relative to the full cache."""
    return measure.name.endswith("_ratio_to_full") and measure.unit == "ratio"


def is_quality(name: str) -> bool:
    """Whether the measure has a margin and comes from samples; no clock is in it."""
    known = MEASURES.get(name)
    return known is not None and smallest_margin(name) is not None and known.reproduces and not is_latency_ratio(known)


def parse_margins(words: list[str]) -> dict[str, float]:
    """Return margins given as "rougeL_vs_full=0.01". Raises: ConfigError."""
    found: dict[str, float] = {}
    for word in words:
        asked, _, text = word.partition("=")
        name = measure_named("--margin", asked, (one for one in MEASURES if smallest_margin(one) is not None))
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value < 10:
            raise ConfigError(f"--margin {word} must be MEASURE=NUMBER with a number above 0 and below 10")
        found[name] = value
    return found


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
