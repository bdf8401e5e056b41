"""How large a difference matters, per measure, declared before anything is measured.

A difference whose whole interval lies inside the margin is called equivalent. The defaults are choices, and the
report prints the one it used; `kvbench report --margin rougeL_vs_full=0.01` changes one.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvbench.errors import ConfigError, close_matches
from kvbench.measures import MEASURES, Measure

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
        name, _, text = word.partition("=")
        if smallest_margin(name) is None:
            known = [one for one in MEASURES if smallest_margin(one) is not None]
            raise ConfigError(f"--margin names {name!r}; {close_matches(name, known)}")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value < 10:
            raise ConfigError(f"--margin {word} must be MEASURE=NUMBER with a number above 0 and below 10")
        found[name] = value
    return found
